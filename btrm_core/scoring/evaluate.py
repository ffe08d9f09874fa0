"""Evaluate a finished model on preference pairs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from btrm_core.data import Naming, TokenStore, encode_pairs, load_pairs
from btrm_core.errors import CheckpointError
from btrm_core.evaluation import Judged, figures_of
from btrm_core.packing import Bundle, divided
from btrm_core.scoring.scorer import Scorer

_EVALUATED_TOGETHER = 512


def evaluate_sources(scorer: Scorer, sources: Sequence[str], naming: Naming | None = None) -> dict[str, Any]:
    """Evaluate a model on preference pairs, each source by itself and all together.

    Args:
        scorer: the model.
        sources: files, folders and hub ids, as for `btrm train --data`.
        naming: the user's own names of columns and roles.

    Returns:
        JSON values: `model`, `family`, `dtype`, `overall` and `sources` with the figures of `evaluation.figures_of`;
        for each source also `rows` (what was read, and the bad rows) and `encoding` (what was cut and dropped);
        `bad_rows`, `seconds` and `pairs_per_second`.

    Raises:
        DataError: a source cannot be read, or holds no pair.
        CheckpointError: the model gives a reward that is not a finite number.
    """
    parts: list[Judged] = []
    rewards: list[np.ndarray] = []
    by_source: dict[str, Any] = {}
    bad = seconds = 0.0
    for source in dict.fromkeys(sources):
        data = load_pairs([source], naming=naming)
        pairs = encode_pairs(data, scorer.chat, scorer.max_length)
        started = time.monotonic()
        rewards_P2 = encoded_rewards(scorer, pairs, source)
        seconds += time.monotonic() - started
        parts.append(pairs.judged)
        rewards.append(rewards_P2)
        by_source[source] = figures_of(pairs.judged, rewards_P2) | {
            "rows": data.issues.to_dict(),
            "encoding": pairs.report,
        }
        by_source[source]["notes"] = [text for text in (_issues_text(data.issues), pairs.describe()) if text]
        bad += data.issues.bad
    joined = Judged.joined(parts)
    return {
        "model": str(scorer.directory),
        "family": scorer.manifest.get("family"),
        "dtype": str(scorer.model.hf.dtype).removeprefix("torch."),
        "overall": figures_of(joined, np.concatenate(rewards)),
        "sources": by_source,
        "bad_rows": int(bad),
        "seconds": round(seconds, 3),
        "pairs_per_second": round(len(joined) / max(seconds, 1e-9), 3),
    }


def _issues_text(issues: Any) -> str:
    return str(issues.format()) if issues.noteworthy else ""


def encoded_rewards(scorer: Scorer, pairs: TokenStore, name: str = "") -> np.ndarray:
    """Rewards [P, 2] (chosen, rejected) of encoded pairs, float64, on the rows that scoring uses.

    Raises:
        CheckpointError: a reward is not a finite number.
    """
    from tqdm import tqdm

    rewards_P2 = np.zeros((len(pairs), 2))
    with tqdm(total=len(pairs), unit="pair", desc=name, dynamic_ncols=True, file=sys.stderr, leave=False) as bar:
        for start, stop in _windows(pairs.first_pair_G):
            found: list[Bundle] = []
            first_G, members = [], 0
            for group in range(start, stop):
                tree = pairs.group(group)
                first_G.append(members)
                places = tuple(range(members, members + len(tree.leaf)))
                found += divided(Bundle(tree, places), scorer.tokens_per_batch)
                members += len(places)
            rewards_S = scorer.bundle_rewards(found)
            own = slice(pairs.first_pair_G[start], pairs.first_pair_G[stop])
            first_P = np.array(first_G)[pairs.group_P[own] - start]
            for side, places_P in enumerate((pairs.chosen_P, pairs.rejected_P)):
                rewards_P2[own, side] = rewards_S[first_P + places_P[own]]
            bar.update(own.stop - own.start)
    if not np.isfinite(rewards_P2).all():
        worst = int(np.flatnonzero(~np.isfinite(rewards_P2).all(axis=1))[0])
        raise CheckpointError(
            f"{scorer.directory} gives pair {pairs.id(worst)} a reward that is not a finite number; "
            "the weights are damaged, or need --dtype fp32"
        )
    return rewards_P2


def _windows(first_pair_G: np.ndarray) -> Iterator[tuple[int, int]]:
    """Groups that are scored together, as ranges: about as many as hold `_EVALUATED_TOGETHER` pairs."""
    start, number = 0, len(first_pair_G) - 1
    while start < number:
        enough = int(np.searchsorted(first_pair_G, first_pair_G[start] + _EVALUATED_TOGETHER))
        stop = min(max(enough, start + 1), number)
        yield start, stop
        start = stop
