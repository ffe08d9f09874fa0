"""Score a file of conversations, pairs or responses, in order, and go on where an interrupted call stopped."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from btrm_core import files, outputs
from btrm_core.data import PACKED, Naming, cache_root, data_path, opened
from btrm_core.errors import DataError
from btrm_core.model import reward_scale
from btrm_core.scoring.partial import Tally, header_file, partial_file
from btrm_core.scoring.records import (
    CONVERSATION,
    OWN_NAME,
    PAIR,
    RESPONSES,
    Record,
    read_record,
    written,
)
from btrm_core.scoring.responses import Responses, Rewards
from btrm_core.scoring.scorer import Scorer

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
        return [group for record in self.records if record.error is None for group in record.groups]


def score_file(
    scorer: Scorer,
    source: str,
    output: str,
    *,
    overwrite: bool = False,
    naming: Naming | None = None,
    normalize: bool = False,
) -> str:
    """Give every line of a JSON Lines file its rewards; see `records` for what a line may be.

    Lines are written to `OUTPUT.partial`, which is renamed when it is complete. A call that finds the partial file of
    an interrupted one with the same input and the same model goes on after its last whole line. Empty lines are left
    out. What is no regular file (`-`, `/dev/stdout`, a pipe, `/dev/null`) is written to as it stands.

    Args:
        scorer: the model.
        source: a JSON Lines file, also packed, a pipe, or `-` for standard input.
        output: the file to write; a link is followed. `-` is standard output.
        overwrite: replace a finished output.
        naming: the user's own names of columns and roles.
        normalize: rewards in standard deviations from the mean of the set that the model was calibrated on.

    Returns:
        One line with counts and speed.

    Raises:
        DataError: the input cannot be read, the output exists or cannot be written, or not one line could be scored.
        CheckpointError: `normalize`, and the model was never calibrated.
    """
    scale = reward_scale(scorer.manifest, scorer.directory) if normalize else None
    path = _input(source)
    target = outputs.output_file(output)
    work = _Work(scorer, path, naming or Naming(), scale)
    try:
        if target is None:
            with outputs.output_stream(output) as stream:
                done, seconds, before = _streamed(work, stream), work.seconds, 0
        else:
            _check_target(path, target, overwrite)
            done, before = _to_file(work, target)
            seconds = work.seconds
    except OSError as error:
        again = "; the same command goes on from the last whole line" if target else ""
        raise DataError(f"cannot write {target or output}: {error.strerror or error}{again}") from error
    if not done.lines:
        raise DataError(f"{source} holds no lines")
    if done.failed == done.lines:
        raise DataError(f"none of the {done.lines:,} lines of {source} could be scored; {done.first_error}")
    return summary(done, done.lines - before, work.units, seconds, target or Path(output))


@dataclass
class _Work:
    """What a call scores with and from, and what it has done."""

    scorer: Scorer
    path: Path
    naming: Naming
    scale: tuple[float, float] | None = None
    units: int = 0
    seconds: float = 0.0


def _to_file(work: _Work, target: Path) -> tuple[Tally, int]:
    """Score into `TARGET.partial`, which becomes the target; returns the tally and the lines from before."""
    header = {
        "format": FORMAT_VERSION,
        "input": files.file_sha256(work.path, cache_root()),
        "model": work.scorer.identity,
        **({"map": repr(work.naming)} if work.naming else {}),
        **({"scale": list(work.scale)} if work.scale else {}),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(target, header) as (stream, done):
        before = done.lines
        _score_lines(work, stream, done)
        os.fsync(stream.fileno())
        if done.failed < done.lines:
            Path(stream.name).replace(target)
        else:
            Path(stream.name).unlink()
        header_file(target).unlink(missing_ok=True)
    return done, before


def _streamed(work: _Work, stream: IO[bytes]) -> Tally:
    done = Tally()
    _score_lines(work, stream, done)
    return done


def _input(source: str) -> Path:
    """The file to read: `source`, or the copy of a pipe."""
    path, kind = data_path(source, cache_root())
    if kind != "file":
        what = "a folder" if kind == "folder" else "no file"
        raise DataError(f"there is {what} {source}; expected a JSON Lines file of conversations, pairs or responses")
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    if name.endswith(_OTHER_FORMATS) and path == Path(source).expanduser():
        raise DataError(f"{path} is not JSON Lines; expected one JSON object a line (.jsonl, also .jsonl.gz)")
    return path


def _check_target(path: Path, target: Path, overwrite: bool) -> None:
    if target.suffix.lower() in PACKED:
        raise DataError(f"{target} would be written as plain text; name it without {target.suffix}")
    if target.exists() and (target.is_dir() or target.samefile(path)):
        raise DataError(f"cannot write to {target}: it is {'a directory' if target.is_dir() else 'the input'}")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; name another output, or replace it with --overwrite")


def _score_lines(work: _Work, stream: IO[bytes], done: Tally) -> None:
    """Score what follows the lines that are done."""
    from tqdm import tqdm

    budget = ROWS_AHEAD * work.scorer.tokens_per_batch * _CHARACTERS_PER_TOKEN
    waiting: list[_Chunk] = []

    def groups(chunks: Iterator[_Chunk]) -> Iterator[Sequence[Responses]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield chunk.groups

    bar = tqdm(total=work.path.stat().st_size, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
    with bar:
        started = time.monotonic()
        for scored in work.scorer.stream(groups(_chunks(work, done.lines, budget))):
            chunk = waiting.pop(0)
            lines = _output_lines(chunk, iter(scored), work.scale)
            stream.write(b"".join(_encoded(line) for line in lines))
            stream.flush()
            for line in lines:
                done.add(line)
            for record in chunk.records:
                done.noted.update(record.noted)
            work.units += sum(reward is not None for one in scored for reward in one.rewards)
            bar.update(chunk.position - bar.n)
            work.seconds = time.monotonic() - started
            speed = work.units / max(1e-9, work.seconds)
            bar.set_postfix_str(f"{done.lines:,} lines, {speed:.1f} rewards/s")


def _output_lines(chunk: _Chunk, scored: Iterator[Rewards], scale: tuple[float, float] | None) -> list[dict[str, Any]]:
    mean, std = scale or (0.0, 1.0)
    lines = []
    for record in chunk.records:
        parts = [next(scored) for _ in record.groups] if record.error is None else []
        rewards = tuple(reward for part in parts for reward in part.rewards)
        if scale is not None:
            rewards = tuple(None if reward is None else (reward - mean) / std for reward in rewards)
        errors = tuple(error for part in parts for error in part.errors)
        lines.append(written(record, rewards, errors, any(part.truncated for part in parts)))
    return lines


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return (json.dumps(line) + "\n").encode("ascii")


def _chunks(work: _Work, skip: int, budget: int) -> Iterator[_Chunk]:
    """Read the lines after the first `skip`, in chunks of about `budget` characters."""
    records: list[Record] = []
    size = number = seen = 0
    path = work.path
    with opened(path) as (lines, packed):
        if lines.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16, expected UTF-8. Convert it with: iconv -t UTF-8")
        problem: str | None = None
        try:
            for raw in lines:
                if packed.broken and not raw.endswith(b"\n"):  # half a line
                    break
                number += 1
                if not raw.strip():
                    continue
                seen += 1
                if seen <= skip:
                    continue
                records.append(read_record(raw, number, work.naming))
                size += len(raw)
                if size >= budget or len(records) >= _MOST_RECORDS:
                    yield _Chunk(records, packed.position)
                    records, size = [], 0
        except OSError as error:
            problem = str(error)
        if records:
            yield _Chunk(records, packed.position)
        if problem := problem or packed.broken:
            raise DataError(
                f"{path} cannot be read after line {number} ({problem}); the file may be cut short. The rewards up to "
                "there are kept in the partial output"
            )


def summary(done: Tally, new_lines: int, units: int, seconds: float, target: Path) -> str:
    """One line about a finished file.

    Args:
        done: the whole file, lines from before included.
        new_lines: lines written this time.
        units: rewards computed this time, two for a pair.
        seconds: what they took.
        target: the finished file.

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
    if done.renamed:
        text += f"; {done.renamed:,} have keys of these names, so that the rewards are called {OWN_NAME}..."
    if done.noted:
        text += "; " + ", ".join(f"{what} ({number:,})" for what, number in done.noted.most_common(5))
    return text
