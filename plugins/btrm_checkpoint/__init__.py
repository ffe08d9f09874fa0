"""Any causal model with a chat template of its own: tokenizer, template and pad token as they are, once checked.

For a model that no family is made for, when it is named: it claims nothing. Before it is used, the conformance checks
are made on the checkpoint at hand; one that fails refuses it, and a family written for the model is the way on. Of the
checkpoint's template, only the white space after the last token goes, so that the reward is read at the token that ends
the turn, and a role that hardly any model knows is refused instead of written.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

from btrm_core import Recipe, hookimpl
from btrm_core.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NAME = "checkpoint"
ROLES = ("system", "user", "assistant", "developer", "tool")
HEAD = (
    "{%- for message in messages if message['role'] not in "
    + str(list(ROLES))
    + " %}{{- raise_exception(\"unknown role '\" ~ message['role'] ~ \"'\") }}{%- endfor %}{%- set whole %}\n"
)
TAIL = "{% endset %}{{- whole if add_generation_prompt else whole.rstrip() }}"

_checking: ContextVar[bool] = ContextVar("_checking", default=False)


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Keep the tokenizer, after the checks on this checkpoint; of several processes the first one makes them."""
    if _checking.get() or config is None or os.environ.get("RANK", "0") != "0":
        return tokenizer
    from btrm_core.testing import check_checkpoint

    token = _checking.set(True)
    try:
        results = check_checkpoint(NAME, tokenizer, config)
    finally:
        _checking.reset(token)
    for result in results:
        if result.verdict == "fail":
            raise FamilyError(
                f"this checkpoint does not pass the check '{result.name}': {result.what}; expected a tokenizer and a "
                "chat template that need no correction. Write a family that corrects them: btrm new-family NAME"
            )
    return tokenizer


@hookimpl
def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's own, between two pieces of btrm's; None if it has none."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None or not template.strip() or template.startswith(HEAD):
        return template  # a trained checkpoint brings the pieces along
    return HEAD + template.removesuffix("\n") + TAIL


@hookimpl
def recipe() -> Recipe:
    """Recommend nothing: btrm's defaults hold."""
    return Recipe()
