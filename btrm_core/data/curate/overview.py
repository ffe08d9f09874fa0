"""`btrm data inspect`: what preference data holds, before anything is trained on it.

The pairs are read in batches and a few numbers are kept for each, so memory hardly grows with the data. Tokens are
counted on at most 20,000 pairs, spread evenly over the prompts; all else is counted on every pair.

Shapes: P pairs, G prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.data.curate.prompts import Prompts, prompt_texts
from btrm_core.data.curate.select import encoded
from btrm_core.data.curate.similar import has_passage, near_duplicates
from btrm_core.data.pairs import PairData
from btrm_core.data.quality import inspect_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
TOKEN_PAIRS = 20_000
_TOGETHER = 1000
_PADDED_TOGETHER = 8
_CONTROL = re.compile(
    r"<\|[a-z0-9_.-]{2,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>", re.IGNORECASE
)


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        basic: rows, bad rows, lengths in characters, repeats, contradictions, the length baseline, subsets.
        roles: how many messages of prompts each role has.
        turns: how many prompts have so many messages.
        pairs_per_prompt: how many prompts have so many pairs.
        labels: pairs that are certain, soft, tied, weighted, and with a margin.
        control_tokens: pairs whose texts spell a control token, by the token; the twenty most frequent.
        cycles: prompts among whose answers the preferences run in a circle (contradictions are circles of two).
        near_duplicates: prompts that nearly repeat an earlier one, with ids of the first; None if not looked for.
        against: pairs whose prompt is in other data, exactly and by 13 consecutive words; None without other data.
        tokens: lengths and what sharing saves; None without a tokenizer.
    """

    basic: dict[str, Any]
    roles: dict[str, int]
    turns: dict[int, int]
    pairs_per_prompt: dict[int, int]
    labels: dict[str, int]
    control_tokens: dict[str, int]
    cycles: dict[str, Any]
    near_duplicates: dict[str, Any] | None
    against: dict[str, Any] | None
    tokens: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        more = {name: value for name, value in vars(self).items() if name != "basic"}
        for name in ("turns", "pairs_per_prompt"):
            more[name] = {str(key): value for key, value in more[name].items()}
        return {**self.basic, **more}


def survey(
    data: PairData,
    *,
    chat: ChatFormat | None = None,
    against: Prompts | PairData | None = None,
    near: bool = True,
    progress: Progress = lambda what, done, of: None,
) -> Survey:
    """Look through a data set.

    Args:
        data: the pairs.
        chat: how conversations become ids, for lengths in tokens.
        against: prompts of other data that should not be in this one, such as a benchmark.
        near: look for near-duplicate prompts, the slowest part.
        progress: told now and then what is done, how much of it, and of how much.

    Returns:
        What was found; the parts that were not asked for are None.
    """
    roles: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    labels: Counter[str] = Counter()
    control: Counter[str] = Counter()
    done = 0
    for rows in data.batches(_TOGETHER):
        for row in rows:
            roles.update(message["role"] for message in row["prompt"])
            turns[len(row["prompt"])] += 1
            labels.update(_labels(row))
            texts = [*(message["content"] for message in row["prompt"]), row["chosen"], row["rejected"]]
            control.update({found for text in texts for found in _CONTROL.findall(text)})
        done += len(rows)
        progress("rows", done, len(data))
    per_prompt = np.unique(data.prompt_hash_P, return_counts=True)[1]
    basic = inspect_pairs(data, lambda done: progress("repeats", done, len(data)))
    return Survey(
        basic=basic,
        roles=dict(roles.most_common()),
        turns=dict(sorted(turns.items())),
        pairs_per_prompt={int(k): int(v) for k, v in zip(*np.unique(per_prompt, return_counts=True), strict=True)},
        labels=dict(labels),
        control_tokens=dict(control.most_common(20)),
        cycles=_cycles(data, basic["findings"]["contradictory pairs"]["count"]),
        near_duplicates=_near(data, progress) if near else None,
        against=None if against is None else _overlap(data, Prompts.of(against)),
        tokens=None if chat is None else _tokens(data, chat, progress),
    )


def _labels(row: dict[str, Any]) -> list[str]:
    sure = row["probability"]
    found = ["tied" if sure == 0.5 else "certain" if sure == 1 else "soft"]
    found += ["with a margin"] if row["margin"] is not None else []
    return found + (["weighted"] if row["weight"] != 1 else [])


def _first_places(data: PairData) -> NDArray[np.int64]:
    """The first pair of every prompt, in order."""
    return np.sort(np.unique(data.prompt_hash_P, return_index=True)[1]).astype(np.int64)


def _near(data: PairData, progress: Progress) -> dict[str, Any]:
    places = _first_places(data)
    prompts = data.select(places, "one pair of each prompt", data.issues)

    def told() -> Any:
        for number, text in enumerate(prompt_texts(prompts), start=1):
            if number % _TOGETHER == 0:
                progress("near-duplicates", number, len(places))
            yield text

    earlier = near_duplicates(told())
    found = np.flatnonzero(earlier >= 0)
    examples = [[str(prompts.dataset[int(i)]["id"]) for i in (place, earlier[place])] for place in found[:5]]
    return {"count": len(found), "prompts": len(places), "examples": examples}


def _overlap(data: PairData, other: Prompts) -> dict[str, Any]:
    exact_P = np.isin(data.prompt_hash_P, other.hash_P)
    passage_P = np.fromiter(has_passage(prompt_texts(data), other.passages), dtype=bool, count=len(data))
    examples = [str(data.dataset[int(i)]["id"]) for i in np.flatnonzero(exact_P | passage_P)[:5]]
    return {
        "prompts": len(other.hash_P),
        "rows without a prompt": other.without,
        "same prompt": int(exact_P.sum()),
        "13 words in a row": int((passage_P & ~exact_P).sum()),
        "examples": examples,
    }


def _cycles(data: PairData, contradictory: int) -> dict[str, Any]:
    """Prompts whose preferences run in a circle of three answers or more, besides contradictions."""
    several = np.flatnonzero(np.isin(data.prompt_hash_P, _repeated(data.prompt_hash_P)))
    several = several[np.argsort(data.prompt_hash_P[several], kind="stable")]
    prompts = data.prompt_hash_P[several]
    answers = np.empty((len(several), 2), dtype=np.uint64)
    ordered = data.select(several, "prompts with several pairs", data.issues)
    for place, pair in enumerate(ordered):
        for side, text in enumerate((pair.chosen, pair.rejected)):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            answers[place, side] = int.from_bytes(digest[:8], "big")
    ends = [*np.flatnonzero(prompts[1:] != prompts[:-1]) + 1, len(several)]
    found = []
    for start, end in itertools.pairwise([0, *map(int, ends)]):
        graph: dict[int, set[int]] = {}
        for better, worse in answers[start:end].tolist():
            graph.setdefault(better, set()).add(worse)
        if _has_cycle(graph):
            found.append(int(several[start]))
    examples = [str(data.dataset[place]["id"]) for place in sorted(found)[:5]]
    return {"prompts": len(found), "contradictory pairs": contradictory, "examples": examples}


def _repeated(hash_P: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values, counts = np.unique(hash_P, return_counts=True)
    return values[counts > 1]


def _has_cycle(graph: dict[int, set[int]]) -> bool:
    """Whether the edges run in a circle (Kahn: what is left after taking away nodes without incoming edges)."""
    incoming: Counter[int] = Counter(worse for below in graph.values() for worse in below)
    waiting = [node for node in graph if not incoming[node]]
    while waiting:
        for worse in graph.get(waiting.pop(), ()):
            incoming[worse] -= 1
            if not incoming[worse] and worse in graph:
                waiting.append(worse)
    return any(incoming[node] > 0 for node in graph)


def _tokens(data: PairData, chat: ChatFormat, progress: Progress) -> dict[str, Any]:
    """Lengths, and tokens computed by each way of batching, on whole prompts."""
    order = np.argsort(data.prompt_hash_P, kind="stable")[:TOKEN_PAIRS]  # hashes spread prompts evenly
    some = data.select(order, "pairs whose tokens are counted", data.issues)
    hashes = data.prompt_hash_P[order]
    lengths: list[tuple[int, int, int]] = []
    waiting: list[tuple[int, ...]] = []
    trees = place = 0
    for rows in some.batches(_TOGETHER):
        for sequences in encoded(rows, chat):
            if waiting and hashes[place] != hashes[place - 1]:
                trees += _tree_tokens(waiting)
                waiting = []
            waiting += [tuple(ids) for ids in sequences]
            lengths.append((len(sequences[0]), len(sequences[1]), _common(*sequences)))
            place += 1
        progress("tokens", place, len(order))
    trees += _tree_tokens(waiting)
    chosen_P, rejected_P, shared_P = np.array(lengths, dtype=np.int64).T
    separate = int(chosen_P.sum() + rejected_P.sum())
    shuffled = np.random.default_rng(0).permutation(len(chosen_P))
    longest_P = np.maximum(chosen_P, rejected_P)[shuffled]
    padded = sum(
        2 * int(longest_P[s : s + _PADDED_TOGETHER].max()) * len(longest_P[s : s + _PADDED_TOGETHER])
        for s in range(0, len(longest_P), _PADDED_TOGETHER)
    )
    tails_P = chosen_P - rejected_P
    return {
        "pairs": len(chosen_P),
        "chosen": _quantiles(chosen_P),
        "rejected": _quantiles(rejected_P),
        "longer_wins_tokens": float(((tails_P > 0) + 0.5 * (tails_P == 0)).mean()),
        "separate": separate,
        "padded": padded,
        "shared": separate - int(shared_P.sum()),
        "trees": trees,
        "padded_over_shared": padded / max(1, separate - int(shared_P.sum())),
        "padded_over_trees": padded / max(1, trees),
    }


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    number = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        number += 1
    return number


def _tree_tokens(sequences: list[tuple[int, ...]]) -> int:
    """Tokens if every common beginning is computed once: neighbours in sorted order share the most."""
    ordered = sorted(set(sequences))
    shared = sum(_common(a, b) for a, b in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - shared


def _quantiles(values: NDArray[np.int64]) -> dict[str, int]:
    return {name: int(np.quantile(values, q)) for name, q in (("median", 0.5), ("90 %", 0.9), ("longest", 1.0))}
