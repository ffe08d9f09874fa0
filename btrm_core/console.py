"""What a person is shown: remarks beside the progress bar, JSON, tables.

Decides: that remarks go to standard error, once over all processes, that JSON knows no NaN, and which libraries are
kept silent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

LOUD = ("transformers", "huggingface_hub")
"""Loggers whose reports say less than the one line that btrm prints."""


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
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


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
