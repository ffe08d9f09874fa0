"""Rewards of pairs from a file: one that `write_scores` wrote, or one of RewardBench's per example.

Decides: what is missing (null, NaN, no such key) and what is wrong, which is said with its line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.console import LongWork
from btrm_core.errors import DataError
from btrm_core.evaluation.scores import ROWS_TOGETHER, UNKNOWN, PairRewards, PairText

if TYPE_CHECKING:
    from btrm_core.evaluation.scores import IntArray

_KINDS = ("tokens", "characters")
_LONGEST = 2.0**53


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
    with LongWork(f"reading {source}") as work:
        for number, row in rows:
            kept = _kept(row, source, number)
            parts.setdefault((kept["model"], kept["data"]), []).append(kept)
            if number % ROWS_TOGETHER == 0:
                work.note(f"{number:,} pairs")
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
        **{f"{kind}_P2": _lengths([one[kind] for one in kept]) for kind in _KINDS},
        probability_P=np.array([one["probability"] for one in kept], dtype=np.float64),
        data_margin_P=np.array([one["margin"] for one in kept], dtype=np.float64),
        text=texts.__getitem__ if all(text is not None for text in texts) else None,
    )


def _lengths(pairs: Sequence[Sequence[float]]) -> IntArray:
    """Whole numbers of tokens or characters; what is none is not known."""
    length_P2 = np.array(pairs, dtype=np.float64)
    known_P2 = (length_P2 >= 0) & (length_P2 < _LONGEST)
    return np.where(known_P2, length_P2, UNKNOWN).astype(np.int64)


def _json_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    opener = gzip.open if source.suffix == ".gz" else open
    number = 0
    try:
        with opener(source, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{source}, at line {number or 1}: {error}; expected one JSON object a line") from error


def _parquet_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_TOGETHER):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source} is no Parquet file that can be read: {error}") from error


def _kept(row: Any, source: Path, number: int) -> dict[str, Any]:
    where = f"{source}, line {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, expected an object with scores_chosen and scores_rejected")
    for side in ("scores_chosen", "scores_rejected"):
        if side not in row:
            has = ", ".join(list(row)[:8]) or "nothing"
            raise DataError(
                f"{where}: missing key '{side}'; expected 'scores_chosen' and 'scores_rejected', it has {has}"
            )
    text = _text(row)
    name = str(row["id"]) if row.get("id") is not None else str(number)
    lengths = {
        kind: [_number(row, f"{kind}_{side}", where, UNKNOWN) for side in ("chosen", "rejected")] for kind in _KINDS
    }
    if text is not None and UNKNOWN in lengths["characters"]:
        lengths["characters"] = [len(text.chosen), len(text.rejected)]
    probability = _number(row, "probability", where, 1.0)
    if not 0.5 <= probability <= 1:
        raise DataError(f"{where}: 'probability' is {probability:g}, expected 0.5 (a tie) to 1: that chosen is better")
    return {
        "id": name,
        "subset": str(row.get("subset") or ""),
        "model": str(row.get("model") or source),
        "data": str(row.get("data") or source.name),
        "prompt": _prompt_number(row, text, f"{row.get('data') or ''}:{name}"),
        "rewards": [_number(row, f"scores_{side}", where, math.nan) for side in ("chosen", "rejected")],
        **lengths,
        "probability": probability,
        "margin": _number(row, "margin", where, math.nan),
        "text": text,
    }


def _number(row: Mapping[str, Any], name: str, where: str, otherwise: float) -> float:
    """A number of a row; `otherwise` where there is none, which some writers call null and others NaN."""
    value = row.get(name)
    while isinstance(value, list) and len(value) == 1:  # some writers keep the model's output of shape (1,)
        value = value[0]
    if value is None or value != value:
        return otherwise
    try:
        if not isinstance(value, bool) and isinstance(value, int | float):
            return float(value)
    except OverflowError:
        pass
    raise DataError(f"{where}: '{name}' is {str(value)[:40]!r}, expected a number or null")


def _text(row: Mapping[str, Any]) -> PairText | None:
    """Prompt and answers; an answer that is a conversation brings its own prompt. None if there are no such texts."""
    prompt, chosen, rejected = row.get("prompt"), row.get("text_chosen"), row.get("text_rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not chosen or not rejected:
            return None
        (*prompt, chosen), rejected = chosen, rejected[-1]
        chosen, rejected = (one.get("content") if isinstance(one, dict) else None for one in (chosen, rejected))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    if isinstance(prompt, str):
        return PairText((("user", prompt),), chosen, rejected)
    messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    return PairText(tuple((str(m.get("role")), str(m.get("content"))) for m in messages), chosen, rejected)


def _prompt_number(row: Mapping[str, Any], text: PairText | None, otherwise: str) -> int:
    """The number of the prompt: as kept, or of its text, or of this pair alone."""
    kept = row.get("prompt_id")
    if isinstance(kept, str) and len(kept) == 16:
        try:
            return int(kept, 16)
        except ValueError:
            pass
    if text is None or not text.prompt:
        known = str(kept or otherwise)
    else:  # as the data counts prompts, so that rewards of both are the same pairs
        messages = [(role, content.strip()) for role, content in text.prompt]
        known = json.dumps(messages, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(known.encode("utf-8", "surrogatepass")).digest()[:8], "big")
