"""Pairs as the model will see them, also under a template or pad token that `btrm train` refuses.

A refused answer is seen best in what it writes, so its conversations are encoded without demanding anything of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from btrm_core.chat import ChatFormat, Conversation, install_pad, self_contained, settle
from btrm_core.data import Pair, PairData
from btrm_core.errors import DataError, FamilyError
from btrm_core.families import Family, PadToken
from btrm_core.packing import Tree, grow

UNSOUND_PAIRS = 256
"""Pairs that are encoded as a refused template writes them."""


@dataclass(frozen=True)
class Example:
    """One pair to show.

    Attributes:
        id: the pair's id.
        subset: its subset.
        group: its tokens; None if there are none.
        truncated: whether its prompt was cut.
        error: why there are no tokens.
    """

    id: str
    subset: str
    group: Tree | None
    truncated: bool = False
    error: str | None = None


def encode_example(row: Pair, chat: ChatFormat | None, max_length: int, *, as_written: bool) -> Example:
    """Encode one pair as training would or, `as_written`, as a refused template has it.

    Args:
        row: the pair.
        chat: how conversations become ids; None if nothing can be rendered.
        max_length: longest conversation in tokens.
        as_written: demand nothing of the template.
    """
    if chat is None:
        return Example(row.id, row.subset, None, error="the template renders nothing")
    if row.rejected_prompt:
        return Example(
            row.id, row.subset, None, error="its answers have prompts of their own, and are shown by no pair"
        )
    answers = [row.chosen, row.rejected]
    if as_written:
        group = _group_as_written(chat, row.prompt, answers)
        return Example(row.id, row.subset, group, error=None if group else "the template does not render it")
    encoded = chat.encode_group(row.prompt, answers, max_length)
    if encoded.error:
        return Example(row.id, row.subset, None, error=encoded.error)
    cut = bool(encoded.dropped_turns or encoded.cut_characters)
    return Example(row.id, row.subset, grow(encoded.sequences), cut)


def format_as_written(tokenizer: Any, config: Any, family: Family) -> ChatFormat | None:
    """A format that encodes what a refused template writes, demanding nothing of it.

    Args:
        tokenizer: the base model's tokenizer.
        config: the base model's transformers config.
        family: who answers.

    Returns:
        None if tokenizer or template cannot be used at all. The format's `pad_id` is -1 if it is the pad token that is
        refused.
    """
    try:
        tokenizer = family.setup_tokenizer(tokenizer, config)
        template = family.template_answer(tokenizer)
        tokenizer = self_contained(tokenizer)
        pad = PadToken("")
        with contextlib.suppress(FamilyError):
            answer = family.pad_answer(tokenizer)
            install_pad(tokenizer, answer.value, answer.given_by)
            pad = PadToken(str(tokenizer.pad_token))
        return settle(tokenizer, template.value, pad, 0, {"chat_template": template.given_by}, check=False)
    except FamilyError:
        return None


def pairs_as_written(rows: PairData, chat: ChatFormat) -> Iterator[tuple[str, Tree]]:
    """Id and tokens of the first pairs, of those that a refused template renders.

    Args:
        rows: the pairs as they were read.
        chat: how conversations become ids.
    """
    for row in rows.rows(0, UNSOUND_PAIRS):
        if group := _group_as_written(chat, row["prompt"], [row["chosen"], row["rejected"]]):
            yield row["id"], group


def _group_as_written(chat: ChatFormat, prompt: Conversation, answers: list[str]) -> Tree | None:
    try:
        texts = [chat.render([*prompt, {"role": "assistant", "content": answer}]) for answer in answers]
    except DataError:
        return None
    sequences = chat.encoder.encode(texts)
    return grow(sequences) if all(sequences) else None
