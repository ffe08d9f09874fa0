"""What btrm answers when neither the run's settings nor the family have an opinion.

Registered before the family, so that it is asked last. `claims` has no default: nobody claims a checkpoint by default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from btrm_core.families.hookspecs import PadToken, Recipe, hookimpl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

RECIPE = Recipe(
    learning_rate=5e-6, pairs_per_step=64, max_length=2048, epochs=1.0, warmup_ratio=0.03, weight_decay=0.001
)


# Names that vocabularies give to tokens without a meaning, most telling first. "pad" alone comes last because image
# and fill-in-the-middle padding is named so too.
_RESERVED = (r"^\W*pad\W*$", "right_pad", "reserved", "unused", "control", "pad")


# A private-use character: no vocabulary has it as a token, so a tokenizer that can write "unknown" writes it here.
_UNHEARD_OF = "\U0010fffd"


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Keep the tokenizer; what is cut falls off the left, what is padded stands on the right."""
    tokenizer.truncation_side = "left"
    tokenizer.padding_side = "right"
    return tokenizer


@hookimpl
def pad_token(tokenizer: PreTrainedTokenizerBase) -> PadToken:
    """Prefer what the vocabulary has: its own pad token, an unknown token that never occurs, a reserved token."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    own, unknown = tokenizer.pad_token, tokenizer.unk_token
    if own is not None and own not in taken:
        return PadToken(own, reason="the tokenizer's own pad token")
    if unknown is not None and unknown not in taken and _never_written(tokenizer, unknown):
        return PadToken(unknown, reason="the unknown token, which no text produces with this vocabulary")
    added = tokenizer.added_tokens_decoder
    special = [str(added[i]) for i in sorted(added) if added[i].special and str(added[i]) not in taken]
    for pattern in _RESERVED:
        for token in special:
            if re.search(pattern, token, re.IGNORECASE) and token != unknown:
                return PadToken(token, reason="a token that the vocabulary reserves; no resize")
    vocabulary = tokenizer.get_vocab()
    fresh = next(name for name in ("[PAD]", "[BTRM_PAD]") if name not in vocabulary)
    return PadToken(fresh, new=True, reason="the vocabulary has no free token; one embedding row is added")


def _never_written(tokenizer: PreTrainedTokenizerBase, unknown: str) -> bool:
    """Whether the unknown token is special and stays away even from a character that the vocabulary does not have."""
    if unknown not in tokenizer.all_special_tokens:
        return False
    ids = tokenizer.encode(_UNHEARD_OF, add_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(unknown) not in ids


@hookimpl
def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's own template; where it has several, the one named "default"."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


@hookimpl
def init_head(hidden_size: int) -> Callable[[torch.Tensor], None]:
    """Normal with variance 1 / (hidden_size + 1).

    Reference: Stiennon et al. 2020, arXiv:2009.01325. `1 / (d_model + 1)` is the variance there, not the standard
        deviation: at 4096 the two differ 64-fold.
    """
    return normal_head((hidden_size + 1) ** -0.5)


def normal_head(std: float) -> Callable[[torch.Tensor], None]:
    """An initialiser that draws the head from a normal distribution with mean 0 and this standard deviation.

    Args:
        std: the standard deviation.
    """

    def fill(weight_1H: torch.Tensor) -> None:
        import torch

        torch.nn.init.normal_(weight_1H, mean=0.0, std=std)

    return fill


@hookimpl
def recipe() -> Recipe:
    """Moderate values that train most models; every field that a family leaves open is filled from here."""
    return RECIPE
