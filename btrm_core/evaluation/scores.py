"""The reward of every pair: what an evaluation is computed from, kept as JSON Lines or Parquet.

Decides: the names in such a file; those RewardBench's per-example files have are theirs, and such files can be read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_ROWS_TOGETHER = 2000


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
            if len(held) == _ROWS_TOGETHER:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held = []
        writer.write_table(pa.Table.from_pylist(held, schema=schema))


def _sound(value: Any) -> Any:
    """A value as Parquet can hold it: without half surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [{k: _sound(v) for k, v in message.items()} for message in value] if isinstance(value, list) else value


def read_scores(path: str | Path) -> list[PairRewards]:
    """Read a file of `write_scores`, or RewardBench's per-example file (JSON Lines, also gzipped, or Parquet).

    Args:
        path: its ending says which format it is in.

    Returns:
        One per model and source of pairs that the file names, in the order of their first rows.

    Raises:
        DataError: there is no such file, a line is not understood, or it holds no pair.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(
            f"there is no file {source}; expected rewards of pairs, as `btrm eval --output FILE` writes them"
        )
    rows = _parquet_rows(source) if source.suffix == ".parquet" else _json_rows(source)
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, row in rows:
        kept = _kept(row, source, number)
        parts.setdefault((kept["model"], kept["data"]), []).append(kept)
    if not parts:
        raise DataError(f"{source} holds no pair")
    return [_of_rows(model, data, kept) for (model, data), kept in parts.items()]


def _of_rows(model: str, data: str, kept: Sequence[Mapping[str, Any]]) -> PairRewards:
    texts = [one["text"] for one in kept]
    return PairRewards(
        model=model,
        data=data,
        id_P=[one["id"] for one in kept],
        subset_P=[one["subset"] for one in kept],
        prompt_P=np.array([one["prompt"] for one in kept], dtype=np.uint64),
        reward_P2=np.array([one["rewards"] for one in kept], dtype=np.float64),
        tokens_P2=np.array([one["tokens"] for one in kept], dtype=np.int64),
        characters_P2=np.array([one["characters"] for one in kept], dtype=np.int64),
        probability_P=np.array([one["probability"] for one in kept], dtype=np.float64),
        data_margin_P=np.array([one["margin"] for one in kept], dtype=np.float64),
        text=texts.__getitem__ if all(text is not None for text in texts) else None,
    )


def _json_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    opener = gzip.open if source.suffix == ".gz" else open
    number = 0
    try:
        with opener(source, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{source}, at line {number or 1}: {error}; expected one JSON object a line") from error


def _parquet_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source} is no Parquet file that can be read: {error}") from error


def _kept(row: Any, source: Path, number: int) -> dict[str, Any]:
    where = f"{source}, line {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, expected an object with scores_chosen and scores_rejected")
    chosen, rejected = (_reward(row, f"scores_{side}", where) for side in ("chosen", "rejected"))
    text = _text(row)
    name = str(row["id"]) if row.get("id") is not None else str(number)
    lengths = {kind: [_length(row.get(f"{kind}_{side}")) for side in ("chosen", "rejected")] for kind in _LENGTHS}
    if text is not None and UNKNOWN in lengths["characters"]:
        lengths["characters"] = [len(text.chosen), len(text.rejected)]
    probability, margin = row.get("probability"), row.get("margin")
    return {
        "id": name,
        "subset": str(row.get("subset") or ""),
        "model": str(row.get("model") or source.name),
        "data": str(row.get("data") or source.name),
        "prompt": _prompt_number(row, text, f"{source.name}:{name}"),
        "rewards": (chosen, rejected),
        **lengths,
        "probability": 1.0 if probability is None else float(probability),
        "margin": math.nan if margin is None else float(margin),
        "text": text,
    }


_LENGTHS = ("tokens", "characters")


def _reward(row: Mapping[str, Any], name: str, where: str) -> float:
    if name not in row:
        has = ", ".join(list(row)[:8]) or "nothing"
        raise DataError(f"{where}: missing key '{name}'; expected 'scores_chosen' and 'scores_rejected', it has {has}")
    value = row[name]
    if isinstance(value, list) and len(value) == 1:  # some writers keep the model's output of shape (1,)
        value = value[0]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: '{name}' is {str(value)[:40]!r}, expected a number or null")
    return float(value)


def _length(value: Any) -> int:
    return UNKNOWN if value is None else int(value)


def _text(row: Mapping[str, Any]) -> PairText | None:
    chosen, rejected = row.get("text_chosen"), row.get("text_rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return PairText((("user", prompt),), chosen, rejected)
    messages: Iterable[Any] = prompt if isinstance(prompt, list) else ()
    return PairText(tuple((str(m.get("role")), str(m.get("content"))) for m in messages), chosen, rejected)


def _prompt_number(row: Mapping[str, Any], text: PairText | None, otherwise: str) -> int:
    """The number of the prompt: as kept, or of its text, or of this pair alone."""
    kept = row.get("prompt_id")
    if isinstance(kept, str) and len(kept) == 16:
        try:
            return int(kept, 16)
        except ValueError:
            pass
    known = json.dumps(text.prompt) if text is not None and text.prompt else str(kept or otherwise)
    return int.from_bytes(hashlib.sha256(known.encode("utf-8", "surrogatepass")).digest()[:8], "big")
