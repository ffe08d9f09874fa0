"""Files of conversations to files of rewards, and preference data to an evaluation.

Decides: that a scored file has one line per input line in their order, and that memory does not grow with the file.
What a line means is `records`', how an interrupted call is continued `partial`'s; the numbers are the scorer's.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from btrm_core import cache
from btrm_core.data import load_pairs
from btrm_core.encoded import EncodedPairs, encode_pairs
from btrm_core.errors import CheckpointError, DataError
from btrm_core.evaluate import figures_of
from btrm_core.partial import Tally, header_file, partial_file
from btrm_core.records import CONVERSATION, PAIR, RESPONSES, Record, read_record, written
from btrm_core.report import evaluation_text, subset_table
from btrm_core.rows import Bundle
from btrm_core.scorer import Group, Scored, Scorer

FORMAT_VERSION = 1
ROWS_AHEAD = 16
"""Rows of conversations that are read, arranged and written together."""
_CHARACTERS_PER_TOKEN = 4
_MOST_RECORDS = 512
_EVALUATED_TOGETHER = 512
_OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".json")


@dataclass(frozen=True)
class _Chunk:
    records: list[Record]
    position: int
    """Bytes of the input file that were read when the chunk was complete."""

    @property
    def groups(self) -> list[Group]:
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
        "input": cache.file_sha256(path, cache.cache_root()),
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

    def groups(chunks: Iterator[_Chunk]) -> Iterator[Sequence[Group]]:
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


def _output_lines(chunk: _Chunk, scored: Iterator[Scored]) -> list[dict[str, Any]]:
    lines = []
    for record in chunk.records:
        result = Scored((), (), False) if record.error is not None else next(scored)
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


class _Joined:
    """Pairs of several sources one after another, as far as `figures_of` looks at them."""

    def __init__(self, parts: Sequence[EncodedPairs]) -> None:
        self.chosen_P = np.concatenate([part.chosen_P for part in parts])
        self.rejected_P = np.concatenate([part.rejected_P for part in parts])
        self.probability_P = np.concatenate([part.probability_P for part in parts])
        self._subsets = [name for part in parts for name in part.subsets()]

    def __len__(self) -> int:
        return len(self._subsets)

    def subset(self, index: int) -> str:
        """The subset of a pair."""
        return self._subsets[index]


def evaluate_sources(scorer: Scorer, sources: Sequence[str]) -> dict[str, Any]:
    """Evaluate a model on preference pairs, each source by itself and all together.

    Args:
        scorer: the model.
        sources: files, folders and hub ids, as for `btrm train --data`.

    Returns:
        JSON values: `model`, `family`, `dtype`, `overall` and `sources` with the figures of `evaluate.figures_of`; for
        each source also `rows` (what was read, and the bad rows) and `encoding` (what was cut and dropped); `bad_rows`,
        `seconds` and `pairs_per_second`.

    Raises:
        DataError: a source cannot be read, or holds no pair.
        CheckpointError: the model gives a reward that is not a finite number.
    """
    parts: list[EncodedPairs] = []
    rewards: list[np.ndarray] = []
    by_source: dict[str, Any] = {}
    bad = seconds = 0.0
    for source in dict.fromkeys(sources):
        data = load_pairs([source])
        pairs = encode_pairs(data, scorer.chat, scorer.max_length)
        started = time.monotonic()
        rewards_P2 = encoded_rewards(scorer, pairs, source)
        seconds += time.monotonic() - started
        parts.append(pairs)
        rewards.append(rewards_P2)
        by_source[source] = figures_of(pairs, rewards_P2) | {"rows": data.issues.to_dict(), "encoding": pairs.report}
        by_source[source]["notes"] = [text for text in (_issues_text(data.issues), pairs.describe()) if text]
        bad += data.issues.bad
    joined = cast("EncodedPairs", _Joined(parts))
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
    return str(issues.format()) if issues.bad or issues.skipped else ""


def encoded_rewards(scorer: Scorer, pairs: EncodedPairs, name: str = "") -> np.ndarray:
    """Rewards [P, 2] (chosen, rejected) of encoded pairs, float64, on the rows that scoring uses.

    Raises:
        CheckpointError: a reward is not a finite number.
    """
    from tqdm import tqdm

    rewards_P2 = np.zeros((len(pairs), 2))
    with tqdm(total=len(pairs), unit="pair", desc=name, dynamic_ncols=True, file=sys.stderr, leave=False) as bar:
        for start in range(0, len(pairs), _EVALUATED_TOGETHER):
            places = range(start, min(start + _EVALUATED_TOGETHER, len(pairs)))
            found = [Bundle(pairs.group(i), (2 * n, 2 * n + 1)) for n, i in enumerate(places)]
            rewards_P2[places.start : places.stop] = scorer.bundle_rewards(found).reshape(-1, 2)
            bar.update(len(places))
    if not np.isfinite(rewards_P2).all():
        worst = int(np.flatnonzero(~np.isfinite(rewards_P2).all(axis=1))[0])
        raise CheckpointError(
            f"{scorer.directory} gives pair {pairs.id(worst)} a reward that is not a finite number; "
            "the weights are damaged, or need --dtype fp32"
        )
    return rewards_P2


def format_evaluation(result: dict[str, Any]) -> str:
    """An evaluation for the screen: a line per source, its subsets, and what was left out."""
    family = f", family {result['family']}" if result["family"] else ""
    lines = [f"{result['model']}{family}, {result['dtype']}, {result['pairs_per_second']:.1f} pairs/s"]
    everything = {"all": result["overall"]} if len(result["sources"]) > 1 else {}
    for name, figures in {**result["sources"], **everything}.items():
        lines.append(f"{name}: {evaluation_text(figures).removeprefix('held-out ')}")
        if name in result["sources"]:
            lines += [subset_table(figures["subsets"])] if "subsets" in figures else []
            lines += ["  " + note.replace("\n", "\n  ") for note in figures["notes"]]
    return "\n".join(lines)
