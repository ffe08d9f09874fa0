"""What the texts of a data set already tell before any training: duplicates, contradictions, length bias.

Each function reads the pairs once, in batches, and keeps a few numbers per pair, so the size of the data does
not matter.

Shapes: P pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from btrm_core.data.pairs import PairData
from btrm_core.evaluation import standard_error

_EXAMPLES_KEPT = 5
_TOGETHER = 10_000
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """How many pairs something is true of, and the ids of the first few.

    Attributes:
        count: pairs it is true of.
        pairs: all pairs that were looked at.
        examples: ids of the first of them, in the order of the data; at most five.
    """

    count: int
    pairs: int
    examples: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Their share of all pairs, 0 for no data."""
        return self.count / self.pairs if self.pairs else 0.0


def duplicate_prompts(data: PairData) -> Finding:
    """Pairs whose prompt an earlier pair has too (with other answers, or the same).

    Not wrong in itself: several pairs may compare answers to one prompt. But they weigh more together, and
    their losses are not independent.

    Args:
        data: P pairs; prompts are compared by their hashes.
    """
    return _finding(data, _repeats(data.prompt_hash_P))


def duplicate_pairs(data: PairData) -> Finding:
    """Pairs that repeat an earlier one: equal prompt, chosen and rejected.

    Args:
        data: P pairs.
    """
    return _finding(data, repeated_pairs(data))


def repeated_pairs(data: PairData) -> np.ndarray:
    """True for every pair that an earlier one equals: prompt, chosen and rejected.

    Args:
        data: P pairs.

    Returns:
        bool [P], in the order of the data.
    """
    return _repeats(_pair_hashes(data)[0])


def contradictory_pairs(data: PairData) -> Finding:
    """Pairs for which another pair says the opposite: equal prompt, chosen and rejected swapped.

    Both pairs of a contradiction are counted.

    Args:
        data: P pairs.
    """
    forward_P, backward_P = _pair_hashes(data)
    return _finding(data, np.isin(forward_P, backward_P))


def longer_wins_characters(data: PairData) -> float:
    """Accuracy of preferring the longer answer by characters; equal lengths count half.

    A reward model that does not beat it may have learnt nothing but length.

    Args:
        data: P pairs; of an answer its own characters count, without the prompt.

    Returns:
        A share, 0 to 1; NaN for no data.
    """
    import pyarrow.compute as pc

    wins = 0.0
    for table in data.dataset.with_format("arrow").iter(batch_size=10_000):
        chosen, rejected = (pc.utf8_length(table[name]).to_numpy() for name in ("chosen", "rejected"))
        wins += float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
    return wins / len(data) if len(data) else float("nan")


@dataclass(frozen=True)
class Sharing:
    """What the pairs of a prompt have in common, in characters of messages; a template adds some to every one.

    Attributes:
        pairs: number of pairs.
        prompts: number of distinct prompts.
        conversations: number of distinct conversations.
        separate: characters of both sides of every pair: what separate passes read.
        once: characters with every prompt, and every answer to it, counted once: what a tree holds.
        keys: characters of the distinct conversations: what attention looks at.
    """

    pairs: int
    prompts: int
    conversations: int
    separate: int
    once: int
    keys: int

    @property
    def saved(self) -> float:
        """Share of the characters that need not be computed again, 0 to 1."""
        return 1 - self.once / self.separate if self.separate else 0.0

    def __str__(self) -> str:
        return (
            f"{self.saved:.1%} of the characters are shared by the two sides of a pair or the pairs of a prompt and "
            f"computed once: {self.prompts:,} prompts, {self.conversations:,} conversations"
        )


def sharing(data: PairData) -> Sharing:
    """Measure what the pairs of a prompt share, without a tokenizer: what two answers begin with does not count.

    Args:
        data: P pairs.

    Returns:
        Counts, and sums of characters; all 0 for no data.
    """
    import xxhash

    keys: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    start = 0
    for table in data.dataset.with_format("arrow").iter(batch_size=10_000):
        column = table["prompt"].combine_chunks()
        characters = pc.utf8_length(pc.struct_field(pc.list_flatten(column), "content")).to_numpy()
        prompt_P = np.bincount(pc.list_parent_indices(column).to_numpy(), characters, len(column)).astype(np.int64)
        hash_P = data.prompt_hash_P[start : start + len(column)]
        for side in ("chosen", "rejected"):
            own = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in table[side].to_pylist()], np.uint64)
            keys.append(hash_P * np.uint64(0x9E3779B97F4A7C15) ^ own)
            answers.append(pc.utf8_length(table[side]).to_numpy().astype(np.int64))
            prompts.append(prompt_P)
        start += len(column)
    if not keys:
        return Sharing(0, 0, 0, 0, 0, 0)
    _, first = np.unique(np.concatenate(keys), return_index=True)
    answer_2P, prompt_2P = np.concatenate(answers), np.concatenate(prompts)
    # the columns come side by side, batch by batch; prompts in their own order
    _, of_prompt = np.unique(data.prompt_hash_P, return_index=True)
    prompt_P = np.concatenate(prompts[::2])
    once = int(prompt_P[of_prompt].sum() + answer_2P[first].sum())
    keys_of = int((prompt_2P + answer_2P)[first].sum())
    return Sharing(len(data), len(of_prompt), len(first), int((prompt_2P + answer_2P).sum()), once, keys_of)


def _pair_hashes(data: PairData, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of (prompt, chosen, rejected) and of (prompt, rejected, chosen), each uint64 (P)."""
    forward_P, backward_P = (np.empty(len(data), np.uint64) for _ in range(2))
    index = 0
    for table in data.dataset.with_format("arrow").select_columns(["chosen", "rejected"]).iter(batch_size=_TOGETHER):
        for texts in zip(table["chosen"].to_pylist(), table["rejected"].to_pylist(), strict=True):
            prompt = int(data.prompt_hash_P[index]).to_bytes(8, "big")
            chosen, rejected = (hashlib.sha256(text.encode()).digest() for text in texts)
            forward_P[index] = _eight_bytes((prompt, chosen, rejected))
            backward_P[index] = _eight_bytes((prompt, rejected, chosen))
            index += 1
        if progress:
            progress(index)
    return forward_P, backward_P


def _eight_bytes(parts: Sequence[bytes]) -> int:
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:8], "big")


def _repeats(hash_P: np.ndarray) -> np.ndarray:
    """True for every pair whose hash an earlier pair has."""
    repeats_P = np.ones(len(hash_P), dtype=bool)
    repeats_P[np.unique(hash_P, return_index=True)[1]] = False
    return repeats_P


def _finding(data: PairData, is_found_P: np.ndarray) -> Finding:
    indices = np.flatnonzero(is_found_P)
    examples = tuple(str(data.dataset[int(index)]["id"]) for index in indices[:_EXAMPLES_KEPT])
    return Finding(len(indices), len(data), examples)


def inspect_pairs(data: PairData, progress: Progress | None = None) -> dict[str, Any]:
    """Counts, lengths, repeats, contradictions and the length baseline, as a value that can be written as JSON.

    Args:
        data: P pairs.
        progress: told how many pairs were looked at.

    Returns:
        The figures by name; lengths are in characters, shares from 0 to 1, `subsets` the pairs of each, most first.
    """
    multi_turn, subsets = 0, Counter[str]()
    lengths: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    for table in data.dataset.with_format("arrow").iter(batch_size=_TOGETHER):
        multi_turn += int((pc.list_value_length(table["prompt"]).to_numpy() > 1).sum())
        subsets.update({one["values"]: one["counts"] for one in pc.value_counts(table["subset"]).to_pylist()})
        for side, parts in lengths.items():
            parts.append(pc.utf8_length(table[side]).to_numpy())
    characters = {side: np.concatenate(parts) for side, parts in lengths.items()}
    forward_P, backward_P = _pair_hashes(data, progress)
    baseline = longer_wins_characters(data)
    shared = sharing(data)
    findings = {
        "prompts seen before": duplicate_prompts(data),
        "pairs seen before": _finding(data, _repeats(forward_P)),
        "contradictory pairs": _finding(data, np.isin(forward_P, backward_P)),
    }
    return {
        "rows": data.issues.to_dict(),
        "report": data.issues.format(),
        "fingerprint": data.fingerprint,
        "pairs": len(data),
        "multi_turn": multi_turn,
        "characters": {side: _quantiles(values) for side, values in characters.items()},
        "longer_wins_characters": baseline,
        "longer_wins_characters_standard_error": standard_error(baseline, len(data)),
        "sharing": {**vars(shared), "saved": shared.saved},
        "findings": {name: {"count": f.count, "examples": list(f.examples)} for name, f in findings.items()},
        "subsets": dict(subsets.most_common()),
    }


def format_inspection(found: dict[str, Any]) -> str:
    """Return the inspection for the screen.

    Args:
        found: what `inspect_pairs` gave.

    Returns:
        Lines of text, joined; the report of the rows comes first.
    """
    lines = [found["report"], ""]
    lines.append(f"pairs {found['pairs']:,}, of which {found['multi_turn']:,} have more than one message in the prompt")
    for side, quantiles in found["characters"].items():
        shown = ", ".join(f"{name} {value:,}" for name, value in quantiles.items())
        lines.append(f"{side + ' answer':<16} characters: {shown}")
    baseline = found["longer_wins_characters"]
    lines.append(
        f"longer wins      {baseline:.3f} ± {found['longer_wins_characters_standard_error']:.3f} "
        "(what preferring the answer with more characters gets)"
    )
    shared = Sharing(**{name: found["sharing"][name] for name in Sharing.__dataclass_fields__})
    lines.append(f"sharing          {shared}")
    for name, finding in found["findings"].items():
        examples = f", such as {', '.join(finding['examples'][:3])}" if finding["examples"] else ""
        lines.append(f"{name:<20} {finding['count']:,}{examples}")
    if len(found["subsets"]) > 1:
        lines += ["subsets", *(f"  {name or '(none)'}: {count:,}" for name, count in found["subsets"].items())]
    return "\n".join(lines)


def _quantiles(values: np.ndarray) -> dict[str, int]:
    median, p90, largest = (int(np.quantile(values, q)) for q in (0.5, 0.9, 1.0))
    return {"median": median, "90 %": p90, "longest": largest}
