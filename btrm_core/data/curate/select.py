"""Which pairs of a data set are kept: each filter counts what it leaves out, under a reason of its own.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.data.curate.prompts import Prompts, prompt_texts
from btrm_core.data.curate.similar import has_passage
from btrm_core.data.issues import IssueReport, RowIssue
from btrm_core.data.pairs import PairData
from btrm_core.data.quality import repeated_pairs
from btrm_core.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat

    Mask = NDArray[np.bool_]

Progress = Callable[[int], None]
_TOGETHER = 1000
_EXAMPLES = 5


@dataclass(frozen=True)
class Filters:
    """What to leave out; None and False leave all in.

    Attributes:
        min_margin: pairs whose margin is smaller, or not given.
        max_tokens: pairs of which a conversation is longer; needs a chat format.
        dedupe: pairs that repeat an earlier one.
        decontaminate: prompts that must not occur: the same prompt, or 13 consecutive words of one.
        sample: keep so many pairs, spread evenly by a hash of their place.
    """

    min_margin: float | None = None
    max_tokens: int | None = None
    dedupe: bool = False
    decontaminate: Prompts | PairData | None = None
    sample: int | None = None


def filtered(
    data: PairData, filters: Filters, chat: ChatFormat | None = None, progress: Progress | None = None
) -> PairData:
    """Keep the pairs that pass all filters; its report counts the others by reason.

    Args:
        data: P pairs.
        filters: what to leave out.
        chat: the chat format, for `max_tokens`.
        progress: called with the number of pairs done each time that some are encoded.

    Returns:
        The pairs left, in their order.

    Raises:
        DataError: nothing is left, the sample is below 1, or `max_tokens` is given without a chat format.
    """
    for mask_P, reason in _masks(data, filters, chat, progress):
        data = kept(data, mask_P, reason)
    if filters.sample is not None:
        if filters.sample < 1:
            raise DataError(f"--sample is {filters.sample}; expected at least 1 pair")
        drawn = np.random.default_rng(0).permutation(len(data))[: filters.sample]
        is_drawn_P = np.zeros(len(data), dtype=bool)
        is_drawn_P[drawn] = True
        data = kept(data, is_drawn_P, "not in the sample")
    return data


def _masks(
    data: PairData, filters: Filters, chat: ChatFormat | None, progress: Progress | None
) -> Iterator[tuple[Callable[[PairData], Mask], str]]:
    if filters.dedupe:
        yield lambda left: ~repeated_pairs(left), "repeats an earlier pair"
    if filters.min_margin is not None:
        least = filters.min_margin
        if not math.isfinite(least):
            raise DataError(f"--min-margin is {least:g}; expected a finite number")
        yield lambda left: _margin(left) >= least, f"margin below {least:g}, or none given"
    if filters.decontaminate is not None:
        other = Prompts.of(filters.decontaminate)
        yield lambda left: ~np.isin(left.prompt_hash_P, other.hash_P), "prompt also in the other data"
        yield (
            lambda left: ~np.fromiter(has_passage(prompt_texts(left), other.passages), dtype=bool, count=len(left)),
            "prompt has 13 words in a row of the other data",
        )
    if filters.max_tokens is not None:
        most = filters.max_tokens
        if chat is None:
            raise DataError("--max-tokens needs a tokenizer and a chat template; name them with --model ID|DIR")
        yield lambda left: token_lengths(left, chat, progress).max(axis=1) <= most, f"longer than {most} tokens"


def kept(data: PairData, mask: Mask | Callable[[PairData], Mask], reason: str) -> PairData:
    """The pairs for which the mask is true; the others are counted in the report under the reason.

    Args:
        data: P pairs.
        mask: bool [P], or what makes it of the pairs.
        reason: why the others are left out.

    Raises:
        DataError: none is left.
    """
    is_kept_P = mask(data) if callable(mask) else mask
    number = int((~is_kept_P).sum())
    if not number:
        return data
    if number == len(data):
        raise DataError(f"no pair is left: all {number:,} are left out for '{reason}'; loosen the filters")
    ids = [str(data.dataset[int(i)]["id"]) for i in np.flatnonzero(~is_kept_P)[:_EXAMPLES]]
    examples = [RowIssue(name, 0, reason, reason, bad=False) for name in ids]
    issues: IssueReport = data.issues.skip(reason, number, examples)
    return data.select(np.flatnonzero(is_kept_P), reason, issues)


def _margin(data: PairData) -> NDArray[np.float64]:
    column = data.dataset.with_format("arrow").select_columns(["margin"])[:]["margin"]
    margin_P: NDArray[np.float64] = np.asarray(column.to_numpy(), dtype=np.float64)
    return np.where(np.isnan(margin_P), -np.inf, margin_P)


def token_lengths(data: PairData, chat: ChatFormat, progress: Progress | None = None) -> NDArray[np.int64]:
    """Tokens of both whole conversations of every pair, uncut.

    Args:
        data: P pairs.
        chat: the chat format that gives their ids.
        progress: called with the number of pairs done each time that some are encoded.

    Returns:
        int64 [P, 2], chosen and rejected; 0 for a pair that the template refuses.
    """
    lengths: list[Sequence[int]] = []
    for rows in data.batches(_TOGETHER):
        lengths += [[len(ids) for ids in one] for one in encoded(rows, chat)]
        if progress:
            progress(len(rows))
    return np.array(lengths, dtype=np.int64).reshape(-1, 2)


def encoded(rows: Sequence[dict[str, Any]], chat: ChatFormat) -> Iterator[list[list[int]]]:
    """Ids of both conversations of some pairs; two empty lists for one that the template refuses.

    Args:
        rows: rows of `PairData.dataset`.
        chat: the chat format.

    Yields:
        The ids of chosen and of rejected, uncut, for each row.
    """
    asked = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
    for result in chat.encode_groups(asked, NO_LIMIT):
        yield result.sequences if not result.error else [[], []]


NO_LIMIT = 1 << 40
"""Maximum length where nothing is to be cut."""
