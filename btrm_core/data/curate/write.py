"""Pairs to files in the standard format, whatever format they came in.

Decides what a written row is: `id`, `subset`, `chosen` and `rejected` as whole lists of messages, and `margin`,
`weight`, `probability` where they say something. Reading such a file gives the same pairs again.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from btrm_core import outputs
from btrm_core.data.pairs import PairData
from btrm_core.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_TOGETHER = 1000


def standard_rows(data: PairData) -> Iterator[dict[str, Any]]:
    """Every pair as a row of the standard format.

    Args:
        data: P pairs.

    Yields:
        P dictionaries that JSON can hold, in the order of the data.
    """
    for batch in data.batches(_TOGETHER):
        for pair in batch:
            prompt = [{"role": m["role"], "content": m["content"]} for m in pair["prompt"]]
            row: dict[str, Any] = {"id": pair["id"], "subset": pair["subset"]}
            for side in ("chosen", "rejected"):
                row[side] = [*prompt, {"role": "assistant", "content": pair[side]}]
            if pair["margin"] is not None:
                row["margin"] = pair["margin"]
            row |= {name: pair[name] for name in ("weight", "probability") if pair[name] != 1.0}
            yield row


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """The file to write; a link is followed.

    Args:
        path: what the user named; its ending says the format.
        overwrite: whether a file that is there may be replaced.

    Raises:
        DataError: its ending says no format, it is no file (a pipe, a device), or it is there already.
    """
    target = outputs.output_file(str(path))
    if target is None:
        raise DataError(f"{path} is no file, expected one ending in {', '.join(ENDINGS)}")
    if not target.name.endswith(ENDINGS):
        raise DataError(f"cannot tell the format of {target} from its ending; expected {', '.join(ENDINGS)}")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; name another output, or replace it with --overwrite")
    return target


def write_pairs(data: PairData, path: str | Path, progress: Callable[[int], None] | None = None) -> None:
    """Write pairs as JSON Lines, gzipped JSON Lines or Parquet, by the ending of the name; whole or not at all.

    Args:
        data: P pairs.
        path: the file; one that is there is replaced, folders that are not are made.
        progress: called with 1 for every pair written.

    Raises:
        DataError: it is no file of a known ending, or cannot be written.
    """
    target = check_target(path, overwrite=True)
    try:
        with outputs.whole_file(str(target)) as partial:
            if target.suffix == ".parquet":
                _parquet(data, partial, progress)
                return
            # Level 6 and no time: equal pairs give equal bytes, which caches know again.
            with partial.open("wb") as file:
                packed = target.suffix == ".gz"
                stream: IO[bytes] = gzip.GzipFile("", "wb", 6, file, mtime=0) if packed else file  # type: ignore[assignment]
                _json_lines(data, stream, progress)
                if packed:
                    stream.close()
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; name another output") from error


def _json_lines(data: PairData, file: IO[bytes], progress: Callable[[int], None] | None) -> None:
    for row in standard_rows(data):
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        if progress:
            progress(1)


def _parquet(data: PairData, path: Path, progress: Callable[[int], None] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"id": pa.string(), "subset": pa.string(), "chosen": messages, "rejected": messages}
    schema = pa.schema([*types.items(), *((name, pa.float64()) for name in ("margin", "weight", "probability"))])
    with pq.ParquetWriter(path, schema) as writer:
        held: list[dict[str, Any]] = []
        for row in standard_rows(data):
            held.append(row)
            if len(held) == _TOGETHER:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held = []
            if progress:
                progress(1)
        writer.write_table(pa.Table.from_pylist(held, schema=schema))
