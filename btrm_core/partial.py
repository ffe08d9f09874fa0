"""The file that an interrupted `btrm score` leaves behind, and how the next call goes on with it.

Decides: rewards are only ever continued for the same input and the same model, after the last whole line, by one
process at a time. What a line says is `records`'.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from btrm_core.errors import DataError
from btrm_core.records import CONVERSATION, PAIR, RESPONSES


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
