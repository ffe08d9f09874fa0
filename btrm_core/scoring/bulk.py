"""Score a file of conversations, pairs or responses, in order, and go on where an interrupted call stopped."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from btrm_core import files
from btrm_core.data import cache_root
from btrm_core.errors import DataError
from btrm_core.scoring.records import CONVERSATION, PAIR, RESPONSES, Record, read_record, written
from btrm_core.scoring.scorer import Responses, Rewards, Scorer


@dataclass
class Tally:
    """What the lines of an output are.

    Attributes:
        kinds: lines with all their rewards, by kind.
        failed: lines with an `error`.
        truncated: lines whose prompt was cut.
        first_error: the first `error`.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    truncated: int = 0
    first_error: str = ""

    @property
    def lines(self) -> int:
        """All lines."""
        return sum(self.kinds.values()) + self.failed

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of the output."""
        self.truncated += bool(line.get("truncated"))
        if "error" in line:
            self.failed += 1
            self.first_error = self.first_error or str(line["error"])
            return
        self.kinds[PAIR if "reward_margin" in line else RESPONSES if "rewards" in line else CONVERSATION] += 1


def header_file(target: Path) -> Path:
    """Where it is written what a partial output belongs to."""
    return target.with_name(target.name + ".partial.json")


@contextlib.contextmanager
def partial_file(target: Path, header: dict[str, Any]) -> Iterator[tuple[IO[bytes], Tally]]:
    """Open `OUTPUT.partial` for this process alone, cut to its whole lines, with the tally of these.

    Args:
        target: the output.
        header: JSON values that say what the rewards are of; lines written under another header are dropped.

    Raises:
        DataError: another process is writing it.
    """
    with target.with_name(target.name + ".partial").open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is writing {stream.name}; wait for it, or name another output") from None
        stream.seek(0)
        known, done, size = header_file(target), Tally(), 0
        if Path(stream.name).stat().st_size:
            what = "is not of this input and model: starting anew"
            with contextlib.suppress(OSError, ValueError):
                if json.loads(known.read_text(encoding="utf-8")) == header:
                    done, size = _whole_lines(stream)
                    what = f"goes on after {done.lines:,} lines" if size else "holds no whole line: starting anew"
            print(f"{stream.name} {what}", file=sys.stderr)
        stream.truncate(size)
        known.write_text(json.dumps(header) + "\n", encoding="utf-8")
        try:
            yield stream, done
        except KeyboardInterrupt:
            print(f"{stream.name} keeps {done.lines:,} lines; the same command goes on from there", file=sys.stderr)
            raise


def _whole_lines(stream: IO[bytes]) -> tuple[Tally, int]:
    """Count the whole lines at the beginning of a partial output; returns them and the bytes they take."""
    tally, size = Tally(), 0
    for raw in stream:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        tally.add(line)
        size += len(raw)
    return tally, size


FORMAT_VERSION = 1


ROWS_AHEAD = 16
"""Rows of conversations that are read, arranged and written together."""


_CHARACTERS_PER_TOKEN = 4


_MOST_RECORDS = 512


_OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".json")


@dataclass(frozen=True)
class _Chunk:
    records: list[Record]
    position: int
    """Bytes of the input file that were read when the chunk was complete."""

    @property
    def groups(self) -> list[Responses]:
        return [(record.prompt, record.responses) for record in self.records if record.error is None]


def score_file(scorer: Scorer, source: str, output: str, *, overwrite: bool = False) -> str:
    """Give every line of a JSON Lines file its rewards; see `records` for what a line may be.

    Lines are written to `OUTPUT.partial`, which is renamed when it is complete. A call that finds the partial file of
    an interrupted one with the same input and the same model goes on after its last whole line. Empty lines are left
    out.

    Args:
        scorer: the model.
        source: a JSON Lines file, also gzipped.
        output: the file to write.
        overwrite: replace a finished output.

    Returns:
        One line with counts and speed.

    Raises:
        DataError: the input cannot be read, the output exists or cannot be written, or not one line could be scored.
    """
    path, target = Path(source), Path(output)
    _check_places(path, target, overwrite)
    header = {
        "format": FORMAT_VERSION,
        "input": files.file_sha256(path, cache_root()),
        "model": scorer.identity,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(target, header) as (stream, done):
            started, before = time.monotonic(), done.lines
            units = _score_lines(scorer, path, stream, done)
            seconds = time.monotonic() - started
            os.fsync(stream.fileno())
            if done.failed < done.lines:
                Path(stream.name).replace(target)
            else:
                Path(stream.name).unlink()
            header_file(target).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; the same command goes on from the last whole line"
        ) from error
    if not done.lines:
        raise DataError(f"{source} holds no lines")
    if done.failed == done.lines:
        raise DataError(f"none of the {done.lines:,} lines of {source} could be scored; {done.first_error}")
    return summary(done, done.lines - before, units, seconds, target)


def _check_places(path: Path, target: Path, overwrite: bool) -> None:
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected a JSON Lines file of conversations, pairs or responses")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(_OTHER_FORMATS):
        raise DataError(f"{path} is not JSON Lines; expected one JSON object a line (.jsonl, also .jsonl.gz)")
    if target.suffix.lower() == ".gz":
        raise DataError(f"{target} would be written as plain text; name it without .gz")
    if target.exists() and (target.is_dir() or target.samefile(path)):
        raise DataError(f"cannot write to {target}: it is {'a directory' if target.is_dir() else 'the input'}")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; name another output, or replace it with --overwrite")


def _score_lines(scorer: Scorer, path: Path, stream: IO[bytes], done: Tally) -> int:
    """Score what follows the lines that are done; returns the number of rewards given."""
    from tqdm import tqdm

    budget = ROWS_AHEAD * scorer.tokens_per_batch * _CHARACTERS_PER_TOKEN
    units, waiting = 0, []

    def groups(chunks: Iterator[_Chunk]) -> Iterator[Sequence[Responses]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield chunk.groups

    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
    with bar:
        started = time.monotonic()
        for scored in scorer.stream(groups(_chunks(path, done.lines, budget))):
            chunk = waiting.pop(0)
            lines = _output_lines(chunk, iter(scored))
            stream.write(b"".join(_encoded(line) for line in lines))
            stream.flush()
            for line in lines:
                done.add(line)
            units += sum(reward is not None for one in scored for reward in one.rewards)
            bar.update(chunk.position - bar.n)
            speed = units / max(1e-9, time.monotonic() - started)
            bar.set_postfix_str(f"{done.lines:,} lines, {speed:.1f} rewards/s")
    return units


def _output_lines(chunk: _Chunk, scored: Iterator[Rewards]) -> list[dict[str, Any]]:
    lines = []
    for record in chunk.records:
        result = Rewards((), (), False) if record.error is not None else next(scored)
        lines.append(written(record, result.rewards, result.errors, result.truncated))
    return lines


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return (json.dumps(line) + "\n").encode("ascii")


def _chunks(path: Path, skip: int, budget: int) -> Iterator[_Chunk]:
    """Read the lines after the first `skip`, in chunks of about `budget` characters."""
    records: list[Record] = []
    size = number = seen = 0
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        lines = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if packed else file
        if not packed and file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16, expected UTF-8. Convert it with: iconv -t UTF-8")
        try:
            for raw in lines:
                number += 1
                if not raw.strip():
                    continue
                seen += 1
                if seen <= skip:
                    continue
                records.append(read_record(raw, number))
                size += len(raw)
                if size >= budget or len(records) >= _MOST_RECORDS:
                    yield _Chunk(records, file.tell())
                    records, size = [], 0
        except (EOFError, OSError, zlib.error) as error:
            if records:
                yield _Chunk(records, file.tell())
            raise DataError(
                f"{path} cannot be read after line {number} ({error}); the file may be cut short. The rewards up to "
                "there are kept in the partial output"
            ) from error
        if records:
            yield _Chunk(records, file.tell())


def summary(done: Tally, new_lines: int, units: int, seconds: float, target: Path) -> str:
    """One line about a finished file.

    >>> from collections import Counter
    >>> tally = Tally(Counter(pair=1200), failed=2, truncated=3, first_error="line 7: not JSON")
    >>> summary(tally, 1202, 2400, 12.0, Path("out.jsonl"))
    'out.jsonl: 1,200 pairs scored in 12.0 s (100.0 pairs/s); 3 truncated; 2 not scored (line 7: not JSON)'
    """
    names = {CONVERSATION: "conversation", PAIR: "pair", RESPONSES: "prompt"}
    counts = [f"{n:,} {names[kind]}{'' if n == 1 else 's'}" for kind, n in done.kinds.items() if n]
    only_pairs = set(done.kinds) == {PAIR}
    speed = units / max(seconds, 1e-9) / (2 if only_pairs else 1)
    unit = "pairs" if only_pairs else "rewards"
    text = f"{target}: {', '.join(counts)} scored in {seconds:.1f} s ({speed:.1f} {unit}/s)"
    if new_lines < done.lines:
        text += f"; {done.lines - new_lines:,} lines were there from before"
    if done.truncated:
        text += f"; {done.truncated:,} truncated"
    if done.failed:
        text += f"; {done.failed:,} not scored ({done.first_error})"
    return text
