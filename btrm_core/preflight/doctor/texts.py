"""What `btrm doctor` says of texts and tokens: one function per check, each ending in a verdict.

Decides: what is looked at, and from which figure on a finding is a warning or a failure. No weights are needed here;
the checks of a model are `model`'s.

Shapes: P pairs, S sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from btrm_core.chat import ChatFormat
from btrm_core.data import (
    Finding,
    PairData,
    contradictory_pairs,
    duplicate_pairs,
    duplicate_prompts,
    longer_wins_characters,
)
from btrm_core.evaluation import standard_error
from btrm_core.packing import Tree, pack_row
from btrm_core.preflight import Check

TRUNCATED_WARN = 0.05
"""Share of pairs that lose a part of their prompt."""


DROPPED_WARN, DROPPED_FAIL = 0.01, 0.5
"""Share of pairs that cannot be trained on."""


REPEATED_PROMPTS_WARN = 0.1
"""Share of pairs whose prompt an earlier pair has."""


LABELS_WARN, LABELS_FAIL = 0.001, 0.05
"""Share of pairs that repeat or contradict another one, or have two equal sides."""


LENGTH_BIAS_WARN = 0.1
"""Distance of the "longer wins" accuracy from 0.5 that a model can live on."""


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
            number = int((sequence == bos).sum())
            if number != 1 or sequence[0] != bos:
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


def truncation(reports: Sequence[Mapping[str, Any]]) -> Check:
    """How many prompts are cut to keep to the maximum length.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    given, cut = _total(reports, "given"), _total(reports, "truncated")
    limit, longest = reports[0]["max_length"], max(report["longest"] for report in reports)
    figures = {"pairs": given, "truncated": cut, "max_length": limit, "longest": longest}
    if not cut:
        what = f"no conversation is over {limit:,} tokens, the longest has {longest:,}"
        return Check("truncation", "ok", what, figures=figures)
    share = cut / given
    what = f"{cut:,} of {given:,} pairs ({share:.1%}) lose the beginning of their prompt to keep to {limit:,} tokens"
    if share < TRUNCATED_WARN:
        return Check("truncation", "ok", what, figures=figures)
    why = "the model judges answers to a question it does not see whole"
    return Check("truncation", "warn", what, why, "raise --max-length", figures)


def dropped_pairs(reports: Sequence[Mapping[str, Any]], overlap: int) -> Check:
    """How many pairs cannot be trained on, by reason.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
        overlap: training pairs left out because their prompt is in the evaluation data.
    """
    given, reasons = _total(reports, "given"), dropped_reasons(reports)
    number = sum(reasons.values())
    figures = {"pairs": given, "dropped": reasons, "prompts_in_evaluation": overlap}
    aside = f"; {overlap:,} more because their prompt is in the evaluation data" if overlap else ""
    if not number:
        return Check("dropped pairs", "ok", f"none of {given:,} pairs is dropped{aside}", figures=figures)
    reason, most = max(reasons.items(), key=lambda item: item[1])
    examples = next(report["examples"][reason] for report in reports if reason in report["examples"])
    what = (
        f"{number:,} of {given:,} pairs ({number / given:.1%}) are dropped{aside}; most ({most:,}) for "
        f"'{reason}' (first: {examples[0]})"
    )
    share = number / given
    if share < DROPPED_WARN:
        return Check("dropped pairs", "ok", what, figures=figures)
    advice = "raise --max-length" if "max_length" in reason else "mend or remove these pairs"
    verdict = "fail" if share > DROPPED_FAIL else "warn"
    return Check("dropped pairs", verdict, what, "they are lost to the training", advice, figures)


def dropped_reasons(reports: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Dropped pairs by reason, over all parts of the data.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report["dropped"])
    return dict(total.most_common())


def repeated_prompts(data: PairData) -> Check:
    """How many pairs compare answers to a prompt that came before.

    Args:
        data: the pairs as they were read.
    """
    found = duplicate_prompts(data)
    figures = {"pairs": found.pairs, "repeated": found.count}
    number = f"{found.count:,} of {found.pairs:,} pairs ({found.share:.1%})" if found.count else "none of the pairs"
    what = f"{number} {'have' if found.count else 'has'} the prompt of an earlier one"
    if found.share < REPEATED_PROMPTS_WARN:
        return Check("repeated prompts", "ok", what, figures=figures)
    return Check(
        "repeated prompts",
        "warn",
        f"{what} (first: {found.examples[0]})",
        "prompts with many pairs weigh more, and a second pass over their answers overfits",
        "train for one epoch, keep fewer pairs of a prompt, or give each pair a `weight` of 1 over their number",
        figures,
    )


def labels(data: PairData, reasons: Mapping[str, int]) -> Check:
    """Pairs with two equal sides, pairs that come twice, and pairs that contradict each other.

    Args:
        data: the pairs as they were read.
        reasons: dropped pairs by reason.
    """
    repeated, opposed = duplicate_pairs(data), contradictory_pairs(data)
    kinds = data.issues.counts | data.issues.skipped
    identical = kinds.get("chosen equals rejected", 0) + sum(
        number for reason, number in reasons.items() if reason.startswith("chosen and rejected are the same")
    )
    figures = {"identical": identical, "repeated": repeated.count, "contradictory": opposed.count}
    total = len(data) + identical
    worst = max(identical, repeated.count, opposed.count) / max(1, total)
    found = [
        _labelled(identical, "with two equal sides"),
        _labelled(repeated.count, "given twice", repeated),
        _labelled(opposed.count, "that contradict another one", opposed),
    ]
    what = ", ".join(found) if worst else f"of {total:,} pairs none has equal sides, comes twice or contradicts another"
    if worst < LABELS_WARN:
        return Check("labels", "ok", what, figures=figures)
    return Check(
        "labels",
        "fail" if opposed.count / max(1, total) > LABELS_FAIL else "warn",
        what,
        "equal sides teach nothing, repeats count double, and no model can satisfy a contradiction",
        "remove the repeats, and decide each contradiction or remove both of its pairs",
        figures,
    )


def length_bias(data: PairData, of: str = "") -> Check:
    """What preferring the longer answer gets: the baseline of length alone.

    Args:
        data: the pairs as they were read.
        of: which part of the data, to add to the check's name.
    """
    accuracy = longer_wins_characters(data)
    error = standard_error(accuracy, len(data))
    name = f"length bias{of}"
    figures = {"pairs": len(data), "longer_wins_characters": accuracy, "standard_error": error}
    what = f'"longer wins" gets {accuracy:.3f} ± {error:.3f} of {len(data):,} pairs right'
    distance = abs(accuracy - 0.5)
    if distance < LENGTH_BIAS_WARN or distance < 2 * error:
        return Check(name, "ok", what, figures=figures)
    longer = "longer" if accuracy > 0.5 else "shorter"
    return Check(
        name,
        "warn",
        what,
        f"a model can reach {max(accuracy, 1 - accuracy):.2f} by preferring the {longer} answer alone",
        "balance the lengths, or judge the model by how far it is above that",
        figures,
    )


def _labelled(number: int, text: str, finding: Finding | None = None) -> str:
    first = f" (first: {finding.examples[0]})" if finding and finding.examples else ""
    return f"{number:,} {text}{first}"


def _total(reports: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(report[key] for report in reports)
