"""The output of a call that is not finished: whose it is, how far it has come, and that one process writes it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from btrm_core.errors import DataError
from btrm_core.locks import hold
from btrm_core.scoring.records import CONVERSATION, OWN_NAME, PAIR, RESPONSES, what_was_added


@dataclass
class Tally:
    """What the lines of an output are.

    Attributes:
        kinds: lines with all their rewards, by kind.
        failed: lines with an `error`.
        truncated: lines whose prompt was cut.
        first_error: the first `error`.
        renamed: lines with a key of their own that what is added is called like.
        noted: what was understood in a way the user should know, or left unused, of the lines read by this call.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    truncated: int = 0
    first_error: str = ""
    renamed: int = 0
    noted: Counter[str] = field(default_factory=Counter)

    @property
    def lines(self) -> int:
        """All lines."""
        return sum(self.kinds.values()) + self.failed

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of the output.

        Args:
            line: as `written` makes it.
        """
        added = what_was_added(line)
        self.truncated += bool(added.get("truncated"))
        self.renamed += any(key.startswith(OWN_NAME) and key.removeprefix(OWN_NAME) in added for key in line)
        if "error" in added:
            self.failed += 1
            self.first_error = self.first_error or str(added["error"])
            return
        self.kinds[PAIR if "reward_margin" in added else RESPONSES if "rewards" in added else CONVERSATION] += 1

    def merge(self, later: Tally) -> None:
        """Count the lines of another tally too.

        Args:
            later: of lines that follow.
        """
        self.kinds += later.kinds
        self.failed += later.failed
        self.truncated += later.truncated
        self.first_error = self.first_error or later.first_error
        self.renamed += later.renamed
        self.noted += later.noted


def header_file(target: Path) -> Path:
    """Where it is written what a partial output belongs to.

    Args:
        target: the finished output; nothing need exist yet.
    """
    return target.with_name(target.name + ".partial.json")


def part_of(target: Path) -> Path:
    """Where an output is while it is not finished.

    Args:
        target: the finished output; nothing need exist yet.
    """
    return target.with_name(target.name + ".partial")


@contextlib.contextmanager
def partial_file(target: Path, header: dict[str, Any]) -> Iterator[tuple[IO[bytes], Tally]]:
    """Open `OUTPUT.partial` for this process alone, cut to its whole lines, with the tally of these.

    Args:
        target: the output.
        header: JSON values that say what the rewards are of; lines written under another header are dropped.

    Raises:
        DataError: another process is writing it.
    """
    done = Tally()
    with partial_lines(target, header, done.add) as stream:
        try:
            yield stream, done
        except KeyboardInterrupt:
            print(f"{stream.name} keeps {done.lines:,} lines; the same command goes on from there", file=sys.stderr)
            raise


@contextlib.contextmanager
def partial_lines(
    target: Path, header: dict[str, Any], take: Callable[[dict[str, Any]], int | None], called: str = ""
) -> Iterator[IO[bytes]]:
    """Open `OUTPUT.partial` for this process alone, cut to its whole lines.

    Args:
        target: the output.
        header: JSON values that say what the lines are of; lines written under another header are dropped.
        take: is given every line that is kept, in order, and may say how many rewards it holds.
        called: what to call it instead of the file's name, if that says nothing to the user.

    Raises:
        DataError: another process is writing it.
    """
    with part_of(target).open("a+b") as stream:
        if not hold(stream):
            raise DataError(f"another process is writing {stream.name}; wait for it, or name another output")
        stream.seek(0)
        known, number, size = header_file(target), 0, 0
        called, unit = called or stream.name, "rewards" if called else "lines"
        if Path(stream.name).stat().st_size:
            what = "is not of this input and model: starting anew"
            with contextlib.suppress(OSError, ValueError):
                if json.loads(known.read_text(encoding="utf-8")) == header:
                    for line, raw in _whole_lines(stream):
                        number, size = number + (take(line) or 1), size + len(raw)
                    what = f"goes on after {number:,} {unit}" if size else "holds no whole line: starting anew"
            print(f"{called} {what}", file=sys.stderr)
        stream.truncate(size)
        known.write_text(json.dumps(header) + "\n", encoding="utf-8")
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(OSError):
                if not Path(stream.name).stat().st_size:  # there is nothing to go on from
                    Path(stream.name).unlink()
                    known.unlink()
            raise


def _whole_lines(stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the whole lines at the beginning of a partial output, with their bytes."""
    for raw in stream:
        try:
            line = json.loads(raw)
        except ValueError:
            return
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            return
        yield line, raw
