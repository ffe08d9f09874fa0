"""Score a file of conversations, pairs or responses, in order, and go on where an interrupted call stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from btrm_core import outputs
from btrm_core.cache import cache_root, file_sha256
from btrm_core.console import LongWork
from btrm_core.data import PACKED, Naming, data_path
from btrm_core.errors import DataError
from btrm_core.files import flush_handle
from btrm_core.scoring.bulk.finish import finish
from btrm_core.scoring.bulk.partial import Tally, header_file, partial_file
from btrm_core.scoring.bulk.windows import Alone, Windows, WindowScorer, is_parquet
from btrm_core.scoring.records import CONVERSATION, OWN_NAME, PAIR, RESPONSES
from btrm_core.scoring.scorer import Scorer

FORMAT_VERSION = 1


_OTHER_FORMATS = (".csv", ".tsv", ".json", ".arrow", ".feather", ".xlsx", ".zip")
_NOT_WRITTEN = (".csv", ".tsv", ".xlsx", ".arrow", ".feather")


def score_file(
    scorer: Scorer | WindowScorer, source: str, output: str, *, overwrite: bool = False, naming: Naming | None = None
) -> str:
    """Give every line of a JSON Lines or row of a Parquet file its rewards; see `records` for what a line may be.

    Lines are written to `OUTPUT.partial`, of which the output is made when it is complete. A call that finds the
    partial file of an interrupted one with the same input and the same model goes on after its last whole line. Empty
    lines are left out. What is no regular file (`-`, `/dev/stdout`, a pipe, `/dev/null`) gets lines as they come.

    Args:
        scorer: the model, or what stands for several copies of it.
        source: a JSON Lines file, also packed, a Parquet file, a pipe, or `-` for standard input.
        output: the file to write; a link is followed. `-` is standard output. `.parquet` makes it Parquet, and `.gz`,
            `.zst`, `.bz2` or `.xz` packs it.
        overwrite: replace a finished output.
        naming: the user's own names of columns and roles.

    Returns:
        One line with counts and speed.

    Raises:
        DataError: the input cannot be read, the output exists or cannot be written, or not one line could be scored.
    """
    path = _input(source)
    target = outputs.output_file(output)
    work = _Work(Alone(scorer) if isinstance(scorer, Scorer) else scorer, path, naming or Naming())
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

    scorer: WindowScorer
    path: Path
    naming: Naming
    units: int = 0
    seconds: float = 0.0


def _to_file(work: _Work, target: Path) -> tuple[Tally, int]:
    """Score into `TARGET.partial`, which becomes the target; returns the tally and the lines from before."""
    header = {
        "format": FORMAT_VERSION,
        "input": file_sha256(work.path, cache_root()),
        "model": work.scorer.identity,
        **({"map": repr(work.naming)} if work.naming else {}),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(target, header) as (stream, done):
        before = done.lines
        _score_lines(work, stream, done)
        flush_handle(stream.fileno())
        if done.failed < done.lines:
            finish(Path(stream.name), work.path, target)
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
        raise DataError(
            f"there is {what} {source}; expected a JSON Lines or Parquet file of conversations, pairs or responses"
        )
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    if name.endswith(_OTHER_FORMATS) and path == Path(source).expanduser():
        raise DataError(
            f"{path} is not JSON Lines or Parquet; expected one JSON object a line (.jsonl, also .jsonl.gz), as "
            f"`btrm data convert {path} -o OUT.jsonl` writes of pairs"
        )
    if name.endswith(".parquet") and not is_parquet(path):
        raise DataError(f"{path} is no Parquet file; expected one, or another ending")
    return path


def _check_target(path: Path, target: Path, overwrite: bool) -> None:
    if target.suffix.lower() in _NOT_WRITTEN:
        raise DataError(f"{target} would be a table of another kind; expected .jsonl, also packed, or .parquet")
    if target.exists() and (target.is_dir() or target.samefile(path)):
        raise DataError(f"cannot write to {target}: it is {'a directory' if target.is_dir() else 'the input'}")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; name another output, or replace it with --overwrite")


def _score_lines(work: _Work, stream: IO[bytes], done: Tally) -> None:
    """Score what follows the lines that are done."""
    windows = Windows(work.path, done.lines, work.scorer.tokens_per_batch, work.naming)
    with LongWork(f"scoring {work.path.name}", work.path.stat().st_size, "B", stays=True) as shown:
        started = time.monotonic()
        for window in work.scorer.finished(windows):
            stream.write(window.lines)
            stream.flush()
            done.merge(window.tally)
            work.units += window.units
            shown.reach(window.position)
            work.seconds = time.monotonic() - started
            speed = work.units / max(1e-9, work.seconds)
            shown.note(f"{done.lines:,} lines, {speed:.1f} rewards/s")


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
