"""Pairs as the model will see them, also under a template or pad token that `btrm train` refuses.

A refused answer is seen best in what it writes, so its conversations are encoded without demanding anything of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from btrm_core.chat import ChatFormat, Conversation, Encoder, fast_backend, install_pad, opens_turns, self_contained
from btrm_core.data import Pair, PairData
from btrm_core.errors import DataError, FamilyError
from btrm_core.families import Family, PadToken
from btrm_core.files import text_sha256
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
    """Encode one pair as training would or, `as_written`, as a refused template has it."""
    if chat is None:
        return Example(row.id, row.subset, None, error="the template renders nothing")
    answers = [row.chosen, row.rejected]
    if as_written:
        group = _group_as_written(chat, row.prompt, answers)
        return Example(row.id, row.subset, group, error=None if group else "the template does not render it")
    encoded = chat.encode_group(row.prompt, answers, max_length)
    if encoded.error:
        return Example(row.id, row.subset, None, error=encoded.error)
    cut = bool(encoded.dropped_turns or encoded.cut_characters)
    return Example(row.id, row.subset, grow(encoded.sequences), cut)


def format_as_written(tokenizer: Any, config: Any, family: Family, rows: PairData) -> ChatFormat | None:
    """A format that encodes what a refused template writes; its terminal token is the most frequent last one.

    Returns:
        None if tokenizer or template cannot be used at all. The format's `pad_id` is -1 if it is the pad token that is
        refused.
    """
    try:
        tokenizer = family.setup_tokenizer(tokenizer, config)
        template = family.template_answer(tokenizer).value
        tokenizer = self_contained(tokenizer)
        encoder = Encoder(fast_backend(tokenizer), {})
    except FamilyError:
        return None
    try:
        pad = family.pad_answer(tokenizer)
        install_pad(tokenizer, pad.value, pad.given_by)
        pad_id = int(tokenizer.pad_token_id)
    except FamilyError:
        pad_id = -1
    chat = ChatFormat(
        tokenizer=tokenizer,
        template=template,
        template_sha256=text_sha256(template),
        pad=PadToken(tokenizer.pad_token or ""),
        pad_id=pad_id,
        bos_id=tokenizer.bos_token_id,
        terminal_id=-1,
        control_ids=frozenset(tokenizer.added_tokens_decoder),
        num_new_tokens=0,
        answers={},
        encoder=encoder,
    )
    ends = Counter(int(sequence[-1]) for _, group in pairs_as_written(rows, chat) for sequence in group.sequences)
    if not ends:
        return None
    chat.terminal_id = ends.most_common(1)[0][0]
    chat.bos_id = None if opens_turns(chat) else chat.bos_id
    return chat


def pairs_as_written(rows: PairData, chat: ChatFormat) -> Iterator[tuple[str, Tree]]:
    """Id and tokens of the first pairs, of those that a refused template renders."""
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
