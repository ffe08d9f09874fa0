"""Evaluate a finished model on preference pairs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from btrm_core import files
from btrm_core.console import LongWork
from btrm_core.data import Naming, TokenStore, curate, encode_pairs, load_pairs
from btrm_core.errors import CheckpointError
from btrm_core.evaluation import PairRewards
from btrm_core.packing import Bundle, divided
from btrm_core.scoring.kept import Kept, Part
from btrm_core.scoring.scorer import Scorer

_EVALUATED_TOGETHER = 512


@dataclass(frozen=True)
class SourceRewards:
    """The rewards of a source's pairs, and what became of its rows.

    Attributes:
        rewards: of every pair that could be encoded.
        rows: what was read, and the bad rows, as JSON values.
        encoding: what was cut and dropped, as JSON values.
        notes: lines for the reader about rows left out and conversations cut.
        bad_rows: rows that could not be understood.
        fingerprint: a SHA-256 of what the pairs were made from; empty if they were read from a file of rewards.
        seconds: that computing takes; estimated where rewards of an interrupted evaluation were there.
    """

    rewards: PairRewards
    rows: dict[str, Any]
    encoding: dict[str, Any]
    notes: tuple[str, ...]
    bad_rows: int
    seconds: float
    fingerprint: str = ""


def source_rewards(
    scorer: Scorer, source: str, naming: Naming | None = None, kept: Kept | None = None
) -> SourceRewards:
    """Give every pair of a source its rewards.

    Args:
        scorer: the model.
        source: a file, folder or hub id, as for `btrm train --data`.
        naming: the user's own names of columns and roles.
        kept: goes on where an interrupted evaluation was, and keeps how far this one comes.

    Raises:
        DataError: the source cannot be read, or holds no pair.
        CheckpointError: the model gives a reward that is not a finite number.
    """
    data = load_pairs([source], naming=naming, own_prompts=True)
    pairs = encode_pairs(data, scorer.chat, scorer.max_length)
    of = files.digest(data.fingerprint, scorer.max_length, len(pairs))
    with contextlib.nullcontext(Part()) if kept is None else kept.part(scorer, source, of) as part:
        new = len(pairs) - sum(len(chunk) for chunk in part.chunks)
        started = time.monotonic()
        reward_P2 = encoded_rewards(scorer, pairs, source, part)
        seconds = (time.monotonic() - started) * len(pairs) / new if new else 0.0
    issues = data.issues
    told = str(issues.format()) if issues.noteworthy else ""
    return SourceRewards(
        rewards=curate.with_rewards(data, pairs, reward_P2, str(scorer.directory), source),
        rows=issues.to_dict(),
        encoding=pairs.report,
        notes=tuple(text for text in (told, pairs.describe()) if text),
        bad_rows=issues.bad,
        seconds=seconds,
        fingerprint=data.fingerprint,
    )


def encoded_rewards(scorer: Scorer, pairs: TokenStore, name: str, part: Part) -> np.ndarray:
    """Rewards [P, 2] (chosen, rejected) of encoded pairs, float64, on the rows that scoring uses.

    Args:
        scorer: the model; its `tokens_per_batch` bounds a row.
        pairs: encoded with the scorer's tokenizer and template.
        name: what the progress bar is called.
        part: rewards that are there from before, and where further ones are kept.

    Raises:
        CheckpointError: a reward is not a finite number.
    """
    rewards_P2 = np.zeros((len(pairs), 2))
    with LongWork(f"scoring {name}".rstrip(), len(pairs), "pair") as work:
        for place, (start, stop) in enumerate(_windows(pairs.first_pair_G)):
            own = slice(pairs.first_pair_G[start], pairs.first_pair_G[stop])
            if place < len(part.chunks):
                rewards_P2[own] = part.chunks[place]
                work.reach(own.stop)
                continue
            found: list[Bundle] = []
            first_G, members = [], 0
            for group in range(start, stop):
                tree = pairs.group(group)
                first_G.append(members)
                places = tuple(range(members, members + len(tree.leaf)))
                found += divided(Bundle(tree, places), scorer.tokens_per_batch)
                members += len(places)
            rewards_S = scorer.bundle_rewards(found)
            first_P = np.array(first_G)[pairs.group_P[own] - start]
            for side, places_P in enumerate((pairs.chosen_P, pairs.rejected_P)):
                rewards_P2[own, side] = rewards_S[first_P + places_P[own]]
            part.add(rewards_P2[own].tolist())
            work.reach(own.stop)
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
