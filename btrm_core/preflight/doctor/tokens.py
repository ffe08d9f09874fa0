"""What `btrm doctor` says of tokens: BOS, terminal token and pad, in every row as training lays it out.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from btrm_core.chat import ChatFormat, begins_once
from btrm_core.packing import Tree, pack_row
from btrm_core.preflight import Check

_ROW_PAIRS = 64


_OTHER_END = "the chat template does not end it in"


_OTHER_TEMPLATE = "mend the template, or give another one with --set tokenizer.chat_template=FILE"


@dataclass
class TokenCounts:
    """What was seen in the tokens of many pairs.

    Attributes:
        pairs: pairs looked at.
        sequences: their finished conversations.
        tokens: tokens stored, what two sides share counted once.
        bos_wrong: sequences that do not have exactly one BOS, at their beginning.
        end_wrong: sequences with another token than the terminal one at the reward position.
        pads: occurrences of the pad token.
        first: for each of the three, the first pair it was seen in, with what was seen.
    """

    pairs: int = 0
    sequences: int = 0
    tokens: int = 0
    bos_wrong: int = 0
    end_wrong: int = 0
    pads: int = 0
    first: dict[str, str] = field(default_factory=dict)


def count_tokens(pairs: Iterable[tuple[str, Tree]], chat: ChatFormat) -> TokenCounts:
    """Look at every token of the given pairs (id, tokens), laid out in rows as in training.

    Args:
        pairs: id and tokens of each pair.
        chat: how conversations become ids.
    """
    counts = TokenCounts()
    batch: list[tuple[str, Tree]] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == _ROW_PAIRS:
            _count_row(batch, chat, counts)
            batch = []
    if batch:
        _count_row(batch, chat, counts)
    return counts


def _count_row(batch: Sequence[tuple[str, Tree]], chat: ChatFormat, counts: TokenCounts) -> None:
    """Add the pairs of one row."""
    row = pack_row([group for _, group in batch])
    name_S = [name for name, group in batch for _ in group.leaf]
    last_S = row.input_ids_T[row.reward_index_S]
    tokens = np.concatenate([group.tokens for _, group in batch])
    counts.pairs += len(batch)
    counts.sequences += len(name_S)
    counts.tokens += len(tokens)
    other_S = np.flatnonzero(last_S != chat.terminal_id)
    if len(other_S):
        counts.end_wrong += len(other_S)
        shown = chat.tokenizer.decode([int(last_S[other_S[0]])])
        counts.first.setdefault("end", f"{name_S[other_S[0]]} has {shown!r}")
    if pads := int((tokens == chat.pad_id).sum()):
        counts.pads += pads
        name = next(name for name, group in batch if (group.tokens == chat.pad_id).any())
        counts.first.setdefault("pad", name)
    bos = chat.bos_id
    heads = sum(group.shared > 0 and group.tokens[0] == bos for _, group in batch)
    if bos is None or (heads == len(batch) == int((tokens == bos).sum())):
        return
    for name, group in batch:
        for sequence in group.sequences:
            if not begins_once(bos, sequence.tolist()):
                number = int((sequence == bos).sum())
                counts.bos_wrong += 1
                counts.first.setdefault("bos", f"{name} has {number}" + (" elsewhere" if number == 1 else ""))


def one_bos(counts: TokenCounts, chat: ChatFormat) -> Check:
    """Every sequence begins with BOS and has no other.

    Args:
        counts: what was seen in the tokens of many pairs.
        chat: how conversations become ids.
    """
    figures = {"sequences": counts.sequences, "wrong": counts.bos_wrong}
    if chat.bos_id is None:
        return _no_bos(chat, figures)
    bos = chat.tokenizer.convert_ids_to_tokens(chat.bos_id)
    if not counts.bos_wrong:
        what = f"each of {counts.sequences:,} sequences begins with {bos} and has no other"
        return Check("one BOS", "ok", what, figures=figures)
    return Check(
        "one BOS",
        "fail",
        f"{counts.bos_wrong:,} of {counts.sequences:,} sequences do not have exactly one {bos}, at their beginning "
        f"(first: {counts.first['bos']})",
        "no text looked like that when the base model was trained",
        _OTHER_TEMPLATE,
        figures,
    )


def _no_bos(chat: ChatFormat, figures: Mapping[str, Any]) -> Check:
    """Whether a template without BOS is one that should have it."""
    tokenizer = chat.tokenizer
    what, bos = "the template writes no BOS token, and none is added", tokenizer.bos_token_id
    if bos is None or tokenizer("Hello")["input_ids"][0] != bos:
        return Check("one BOS", "ok", what, figures=figures)
    why = f"the tokenizer puts {tokenizer.bos_token} before any other text, so the base model has seen few without"
    advice = "begin the template with {{ bos_token }}, or give another one with --set tokenizer.chat_template=FILE"
    return Check("one BOS", "warn", what, why, advice, figures)


def terminal_token(counts: TokenCounts, chat: ChatFormat, dropped: Mapping[str, int]) -> Check:
    """The reward is read at the same control token in every sequence.

    Args:
        counts: what was seen in the tokens of many pairs.
        chat: how conversations become ids.
        dropped: dropped pairs by reason.
    """
    unfinished = sum(number for reason, number in dropped.items() if reason.startswith(_OTHER_END))
    token = chat.terminal_token
    figures = {"sequences": counts.sequences, "wrong": counts.end_wrong, "pairs_dropped": unfinished}
    name = "terminal token"
    if chat.terminal_id not in chat.tokenizer.added_tokens_decoder:
        what = f"conversations end in {chat.tokenizer.decode([chat.terminal_id])!r}, a piece of text, no control token"
    elif counts.end_wrong:
        what = (
            f"{counts.end_wrong:,} of {counts.sequences:,} sequences have another token than {token} at the reward "
            f"position (first: {counts.first['end']})"
        )
    elif unfinished:
        what = f"{unfinished:,} pairs are dropped because the template does not end them in {token}"
    else:
        what = f"{token} is at the reward position of each of {counts.sequences:,} sequences"
        return Check(name, "ok", what, figures=figures)
    why = "the head learns to read one token; at others the reward means nothing"
    return Check(name, "fail", what, why, _OTHER_TEMPLATE, figures)


def pad_token(counts: TokenCounts, chat: ChatFormat) -> Check:
    """The pad token occurs nowhere in the data.

    Args:
        counts: what was seen in the tokens of many pairs.
        chat: how conversations become ids.
    """
    pad = chat.pad.token
    figures = {"tokens": counts.tokens, "found": counts.pads}
    if not counts.pads:
        what = f"{pad} occurs in none of {counts.tokens:,} tokens"
        return Check("pad token", "ok", what, figures=figures)
    return Check(
        "pad token",
        "fail",
        f"{pad} occurs {counts.pads:,} times in {counts.tokens:,} tokens (first: {counts.first['pad']})",
        "other programs find the end of a text by its padding, and would read the reward elsewhere",
        "name a token that never occurs with --set tokenizer.pad_token=TOKEN",
        figures,
    )
