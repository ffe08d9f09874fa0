"""The run's own settings as a plugin, asked before the family.

Decides how `tokenizer.pad_token`, `tokenizer.chat_template` and `head.init_std` become answers to hooks. A setting that
was left alone is no opinion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrm_core.errors import ConfigError
from btrm_core.families.defaults import normal_head
from btrm_core.families.hookspecs import PadToken, hookimpl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Overrides:
    """Answers the hooks that a user may override.

    Args:
        settings: a `RunConfig`, or any object with `tokenizer.pad_token`, `tokenizer.chat_template` (the path of a
            Jinja file) and `head.init_std`; None stands for "no opinion" everywhere.
    """

    def __init__(self, settings: Any) -> None:
        self._pad_token: str | None = settings.tokenizer.pad_token
        self._chat_template: str | None = settings.tokenizer.chat_template
        self._init_std: float | None = settings.head.init_std

    @hookimpl
    def pad_token(self, tokenizer: PreTrainedTokenizerBase) -> PadToken | None:
        """The named token; one that the vocabulary does not have is added to it.

        Raises:
            ConfigError: the token is empty, or an ordinary token that text can produce.
        """
        token = self._pad_token
        if token is None:
            return None
        if not token.strip():
            raise ConfigError("tokenizer.pad_token is empty: name a token, or leave the setting out")
        if token not in tokenizer.get_vocab():
            return PadToken(token, new=True, reason="named by tokenizer.pad_token; one embedding row is added")
        if token not in tokenizer.get_added_vocab() and token not in tokenizer.all_special_tokens:
            raise ConfigError(
                f"tokenizer.pad_token {token!r} is an ordinary token of the vocabulary, which occurs in data: name a "
                "special token or one that is not in the vocabulary yet, or leave the setting out"
            )
        return PadToken(token, reason="named by tokenizer.pad_token")

    @hookimpl
    def setup_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the named template in the place of the checkpoint's own, for families that take that over; no answer."""
        if (template := self.chat_template()) is not None:
            tokenizer.chat_template = template

    @hookimpl
    def chat_template(self) -> str | None:
        """The text of the named file.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        if self._chat_template is None:
            return None
        path = Path(self._chat_template)
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"tokenizer.chat_template: cannot read {path} ({cause}); give the path of a Jinja file"
            ) from error
        if not template.strip():
            raise ConfigError(f"tokenizer.chat_template: {path} is empty; give the path of a Jinja file")
        return template

    @hookimpl
    def init_head(self) -> Callable[[torch.Tensor], None] | None:
        """A normal distribution with the given standard deviation.

        Raises:
            ConfigError: the standard deviation is negative or not finite.
        """
        std = self._init_std
        if std is None:
            return None
        if not math.isfinite(std) or std < 0:
            raise ConfigError(f"head.init_std is {std}; it must be a finite number, 0 or more")
        return normal_head(float(std))
