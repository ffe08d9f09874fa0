"""The reward of every pair: what an evaluation is computed from, written as JSON Lines or Parquet.

Decides: the names in such a file; those RewardBench's per-example files have are theirs.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.statistics import wins
from btrm_core.outputs import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

UNKNOWN = -1
"""A length that a file does not give."""
ROWS_TOGETHER = 2000
"""Rows of a Parquet file that are held at once."""


@dataclass(frozen=True)
class PairText:
    """A pair to be read: the messages of its prompt (role, content), and both answers."""

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, eq=False)
class PairRewards:
    """The rewards of P pairs and what the data says of them.

    Attributes:
        model: what gave the rewards.
        data: where the pairs are from.
        id_P: the pair's id.
        subset_P: its subset, empty for none.
        prompt_P: a number that only pairs of equal prompts share, uint64.
        reward_P2: rewards of chosen and rejected; not finite where there is none.
        tokens_P2: tokens of both conversations' own parts, -1 where not known.
        characters_P2: characters of both answers, -1 where not known.
        probability_P: how likely it is that chosen is better, as the data says; 0.5 is a tie.
        data_margin_P: by how much chosen should win, as the data says; NaN where it does not.
        text: the pair at a place to be read; None where only rewards were kept.
    """

    model: str
    data: str
    id_P: list[str]
    subset_P: list[str]
    prompt_P: NDArray[np.uint64]
    reward_P2: FloatArray
    tokens_P2: IntArray
    characters_P2: IntArray
    probability_P: FloatArray
    data_margin_P: FloatArray
    text: Callable[[int], PairText] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.id_P)

    @property
    def margin_P(self) -> FloatArray:
        """Reward margins, chosen minus rejected; not finite where a reward is not."""
        with np.errstate(invalid="ignore"):
            margin_P: FloatArray = self.reward_P2[:, 0] - self.reward_P2[:, 1]
        return margin_P

    def select(self, places: IntArray) -> PairRewards:
        """The pairs at these places, in this order.

        Args:
            places: indices into the P pairs; one may come again.
        """
        text = self.text
        return replace(
            self,
            id_P=[self.id_P[i] for i in places],
            subset_P=[self.subset_P[i] for i in places],
            text=None if text is None else lambda place: text(int(places[place])),
            **{name: getattr(self, name)[places] for name in _ARRAYS},
        )

    @staticmethod
    def joined(parts: Sequence[PairRewards]) -> PairRewards:
        """Pairs of several sources one after another, all by one model.

        Args:
            parts: at least one; texts are kept if all have them.
        """
        starts = np.cumsum([0, *(len(part) for part in parts)])

        def text(place: int) -> PairText:
            which = int(np.searchsorted(starts, place, side="right")) - 1
            read = parts[which].text
            assert read is not None
            return read(place - int(starts[which]))

        return PairRewards(
            model=parts[0].model,
            data="all",
            id_P=[name for part in parts for name in part.id_P],
            subset_P=[name for part in parts for name in part.subset_P],
            text=text if all(part.text is not None for part in parts) else None,
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS},
        )


def same_pairs(first: PairRewards, second: PairRewards) -> tuple[IntArray, IntArray, bool]:
    """Places of the pairs that are in both: of equal id, prompt and lengths.

    Files of other writers know no ids or no prompts, or spell them in another way: then the rest must do, at last the
    ids alone. Less is asked only where that more than doubles the pairs. Of several that are equal in all, the first of
    one goes with the first of the other, and so on.

    Args:
        first: rewards of one model.
        second: rewards of another one, in any order.

    Returns:
        Places in `first` (ascending) and in `second`, int64 [common pairs] each; and whether the ids alone say that
        pairs are the same.
    """
    text = ("prompt_P", "characters_P2")
    best: list[tuple[int, int]] = []
    by_id = False
    for columns in (("id_P", *text), ("id_P", "prompt_P"), text, ("id_P",)):
        known = {key: place for place, key in enumerate(_keys(second, columns))}
        found = [(place, known[key]) for place, key in enumerate(_keys(first, columns)) if key in known]
        if len(found) > 2 * len(best):
            best, by_id = found, columns == ("id_P",)
    places_N2 = np.array(best, dtype=np.int64).reshape(-1, 2)
    return places_N2[:, 0], places_N2[:, 1], by_id


def _keys(rewards: PairRewards, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """What a pair is known by: these columns, and how many equal ones came before."""
    seen: dict[tuple[Any, ...], int] = {}
    for key in zip(*(map(str, np.asarray(getattr(rewards, name)).tolist()) for name in columns), strict=True):
        seen[key] = seen.get(key, -1) + 1
        yield (*key, seen[key])


_ARRAYS = ("prompt_P", "reward_P2", "tokens_P2", "characters_P2", "probability_P", "data_margin_P")


def write_scores(rewards: Sequence[PairRewards], path: str | Path) -> None:
    """Write one line or row per pair: JSON Lines, gzipped if the name ends in .gz, or Parquet by its ending.

    Args:
        rewards: one per model and source, all written into this one file.
        path: appears when it is complete; its directory is made if it is missing.

    Raises:
        DataError: it cannot be written.
    """
    try:
        with whole_file(str(path)) as partial:
            if Path(path).suffix == ".parquet":
                _write_parquet(rewards, partial)
                return
            opener = gzip.open if Path(path).suffix == ".gz" else open
            # Half a surrogate pair, which only an escape can write, stays an escape.
            with opener(partial, "wt", encoding="utf-8", errors="backslashreplace") as file:
                for row in _all_rows(rewards):
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def _all_rows(rewards: Sequence[PairRewards]) -> Iterator[dict[str, Any]]:
    for part in rewards:
        yield from _rows(part)


def _rows(rewards: PairRewards) -> Iterator[dict[str, Any]]:
    won_P = wins(rewards.margin_P)
    for place, name in enumerate(rewards.id_P):
        chosen, rejected = rewards.reward_P2[place].tolist()
        row: dict[str, Any] = {"id": name, "subset": rewards.subset_P[place], "model": rewards.model}
        row["data"] = rewards.data
        row["prompt_id"] = f"{int(rewards.prompt_P[place]):016x}"
        if rewards.text is not None:
            text = rewards.text(place)
            row["prompt"] = [{"role": role, "content": content} for role, content in text.prompt]
            row |= {"text_chosen": text.chosen, "text_rejected": text.rejected}
        scored = math.isfinite(chosen) and math.isfinite(rejected)
        row["scores_chosen"] = chosen if math.isfinite(chosen) else None
        row["scores_rejected"] = rejected if math.isfinite(rejected) else None
        row["results"] = float(won_P[place]) if scored else None
        for kind in ("tokens", "characters"):
            for side, length in zip(
                ("chosen", "rejected"), getattr(rewards, f"{kind}_P2")[place].tolist(), strict=True
            ):
                row[f"{kind}_{side}"] = None if length == UNKNOWN else length
        row["probability"] = float(rewards.probability_P[place])
        margin = float(rewards.data_margin_P[place])
        row["margin"] = margin if math.isfinite(margin) else None
        yield row


def _write_parquet(rewards: Sequence[PairRewards], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    strings = ("id", "subset", "model", "data", "prompt_id", "text_chosen", "text_rejected")
    numbers = ("scores_chosen", "scores_rejected", "results", "probability", "margin")
    lengths = ("tokens_chosen", "tokens_rejected", "characters_chosen", "characters_rejected")
    types = dict.fromkeys(strings, pa.string()) | {"prompt": message}
    types |= dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(lengths, pa.int64())
    if all(part.text is None for part in rewards):
        types = {name: kind for name, kind in types.items() if name not in ("prompt", "text_chosen", "text_rejected")}
    schema = pa.schema(list(types.items()))
    with pq.ParquetWriter(path, schema) as writer:
        held: list[dict[str, Any]] = []
        for row in _all_rows(rewards):
            held.append({name: _sound(value) for name, value in row.items()})
            if len(held) == ROWS_TOGETHER:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held = []
        writer.write_table(pa.Table.from_pylist(held, schema=schema))


def _sound(value: Any) -> Any:
    """A value as Parquet can hold it: without half surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [{k: _sound(v) for k, v in message.items()} for message in value] if isinstance(value, list) else value
