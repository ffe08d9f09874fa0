"""What a person is shown: how far long work is, remarks beside it, JSON, tables.

Decides: that remarks go to standard error, once over all processes, that long work shows a bar on a terminal and a line
every few seconds elsewhere, that JSON knows no NaN, and which libraries are kept silent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

LOUD = ("transformers", "huggingface_hub")
"""Loggers whose reports say less than the one line that btrm prints."""
LINE_EVERY = 5.0
"""Seconds between the lines of long work where there is no terminal."""
BAR_EVERY = 1.0
"""Seconds after which a bar appears on a terminal, and its clock moves on where nothing else does."""


GPU_FILES = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*")
"""What the NVIDIA driver shows of each GPU, whether torch can use it or not."""


class Member(Protocol):
    """One of the processes of a run, or the only one."""

    @property
    def is_main(self) -> bool:
        """True on the one process that prints."""


def unused_gpu() -> tuple[str, str] | None:
    """What is wrong, and what to do, if this machine has an NVIDIA GPU that torch cannot use; None otherwise."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # so the user wants it
        return None
    there = [path for pattern in GPU_FILES for path in Path("/").glob(pattern)]
    if not there:
        return None
    too_old = f"is built for CUDA {torch.version.cuda}, for which the driver may be too old (see nvidia-smi)"
    why = too_old if torch.version.cuda else "is built without CUDA"
    return (
        f"this machine has a GPU ({there[0]}), but torch {torch.__version__} cannot use it, and everything runs on the "
        f"CPU, in fp32 and very much slower: it {why}",
        "install a torch that fits the driver (pytorch.org/get-started), or set CUDA_VISIBLE_DEVICES= (to nothing) if "
        "the CPU is meant",
    )


def say(runtime: Member, text: str) -> None:
    """Print one remark to standard error, once over all processes, without breaking the bar.

    Args:
        runtime: the process that speaks; only the main one is heard.
        text: one or more lines.
    """
    if runtime.is_main:
        tell(text)


def tell(text: str) -> None:
    """Print one remark of this process to standard error, without breaking the bar.

    Args:
        text: one or more lines.
    """
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed, a reader that has gone
        tqdm.write(text, file=sys.stderr)


def show(text: str) -> None:
    """Print a result of finished work to standard output; the work stays done where nobody reads it any more.

    Args:
        text: one or more lines.
    """
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


class _Heard:
    """A stream to which a bar is written, also where nobody listens any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class LongWork:
    """How far a piece of work is: a bar on a terminal, elsewhere a line every few seconds, however slow each step is.

    Work within work speaks for both. Work that is quicker than the first line or bar shows nothing.
    """

    _open: ClassVar[list[LongWork]] = []

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, done: int = 0, stays: bool = False
    ) -> None:
        """Begin.

        Args:
            what: What is done, and with what.
            total: How much there is; None where that is not known, and only the time is shown.
            unit: One of what is counted; "B" for bytes.
            done: How much was done before.
            stays: The last state remains on the screen or in the log.
        """
        self.what, self.total, self.unit, self.done, self.stays = what, total, unit, done, stays
        self.text, self._first, self._started = "", done, time.monotonic()
        self._stream, self._said, self._closed = sys.stderr, False, threading.Event()
        self._bar: Any = None
        if os.environ.get("RANK", "0") != "0":  # one process speaks for all
            return
        terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal:
            self._bar = self._make_bar()
        self._open.append(self)
        every = BAR_EVERY if terminal else LINE_EVERY
        self._thread = threading.Thread(target=self._keep_telling, args=(every,), daemon=True)
        self._thread.start()

    def __enter__(self) -> LongWork:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, number: int) -> None:
        """Count what was done since.

        Args:
            number: Of what is counted.
        """
        self.reach(self.done + number)

    def reach(self, done: int) -> None:
        """Set how much is done by now.

        Args:
            done: All of it, from the beginning.
        """
        if self._bar is not None and not self._closed.is_set():
            self._bar.update(done - self.done)
        self.done = done

    def note(self, text: str) -> None:
        """Set what is shown beside.

        Args:
            text: Replaces what was shown before.
        """
        self.text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End; more often does no harm."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self not in self._open:
            return
        self._thread.join()
        if self._bar is not None:
            self._bar.close()
        elif self._said or self.stays:
            self._say()
        self._open.remove(self)

    def line(self) -> str:
        """The state as one line.

        >>> work = LongWork("encoding", 4000, "pair")
        >>> work.reach(1000)
        >>> work.line()[:39]
        'encoding: 1,000 of 4,000 pairs (25%), 0'
        """
        from tqdm import tqdm

        seconds = time.monotonic() - self._started
        parts = []
        if self.total is not None:
            parts.append(f"{self._count(self.done)} of {self._count(self.total)} {self.unit}s".removesuffix(" Bs"))
            parts[0] += f" ({self.done / max(1, self.total):.0%})"
        parts.append(tqdm.format_interval(seconds))
        gained = self.done - self._first
        if self.total is not None and gained > 0 and self.done < self.total:
            parts.append(f"about {tqdm.format_interval(seconds * (self.total - self.done) / gained)} left")
        return f"{self.what}: " + ", ".join([*parts, *([self.text] if self.text else [])])

    def _count(self, number: int) -> str:
        from tqdm import tqdm

        return f"{tqdm.format_sizeof(number)}B" if self.unit == "B" else f"{number:,}"

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        count = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return tqdm(
            desc=self.what,
            total=self.total,
            initial=self.done,
            unit=self.unit or "it",
            unit_scale=self.unit == "B",
            leave=self.stays,
            delay=0 if self.stays else BAR_EVERY,
            dynamic_ncols=True,
            file=_Heard(self._stream),
            bar_format=count if self.total is not None else "{desc} [{elapsed}{postfix}]",
        )

    def _keep_telling(self, every: float) -> None:
        while not self._closed.wait(every):
            if self._bar is not None:
                self._bar.refresh()
            elif self._open[-1] is self:
                self._said = True
                self._say()

    def _say(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the work goes on where nobody listens any more
            self._stream.write(self.line() + "\n")
            self._stream.flush()


@contextlib.contextmanager
def quiet_libraries(stdout: TextIO | None = None, stderr: TextIO | None = None) -> Iterator[None]:
    """Keep the reports and progress bars of libraries off the screen: what is wrong is said in one line.

    Args:
        stdout: Where goes what they print meanwhile; None leaves it.
        stderr: The same for standard error.
    """
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(name) for name in LOUD]
    levels, shown = [logger.level for logger in loggers], bars.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(stdout or sys.stdout), contextlib.redirect_stderr(stderr or sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity, which it does not know, become None, at any depth.

    Args:
        value: numbers, texts, lists and dictionaries.
    """
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any) -> str:
    """JSON as btrm prints it on standard output.

    Args:
        value: what JSON can hold; anything else as its text.
    """
    return json.dumps(finite(value), indent=2, ensure_ascii=False, default=str)


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines with the cells of each column below each other.

    Args:
        rows: Cells of equally long rows, the names of the columns first if there are any.
        right: Columns that end below each other instead of beginning so.

    >>> table([("name", "pairs"), ("maths", "7")], right={1})
    ['name   pairs', 'maths      7']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines
