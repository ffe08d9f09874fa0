"""The errors a user can act on: one line each, exit code 2, no traceback.

Every message says what is wrong (the value and the place), what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BtrmError(Exception):
    """Something the user can put right; the command line prints it on one line and exits with 2."""

    exit_code = 2
    speaks: bool | None = None
    """Of several processes that fail: whether this one says why; None where there is one, or it is not settled."""


class ConfigError(BtrmError):
    """A setting is unknown, malformed, or contradicts another one."""


class FamilyError(BtrmError):
    """A family is unknown, broken, or gives an answer that breaks the contract of its hook."""


class DataError(BtrmError):
    """A data source cannot be read, or holds nothing that can be trained on."""


class CheckpointError(BtrmError):
    """A model directory is missing something, unfinished, or must not be overwritten."""


class TrainingError(BtrmError):
    """Training cannot go on: the numbers say that something is wrong."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string.

    Args:
        name: what was written.
        known: what could have been meant.

    >>> did_you_mean("lama3", ["llama3", "gemma"])
    " Did you mean 'llama3'?"
    >>> did_you_mean("zzz", ["llama3", "gemma"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def printable(text: str) -> str:
    r"""Return a stranger's text with everything that a terminal would obey or not show written as its escape.

    Args:
        text: what others wrote.

    >>> print(printable("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


LONGEST_LINE = 1000
"""Letters of another's message that are shown."""


def one_line(error: BaseException) -> str:
    """The type and the first line of an exception; of btrm's own the line alone, since it is written to be read.

    Args:
        error: what was raised.
    """
    try:
        line = printable(_said(error))
    except Exception:  # an exception of a stranger's may fail even at this
        line = "an error that cannot be shown"
    if isinstance(error, BtrmError):
        return line
    return f"{type(error).__name__}: {line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + '...'}"


def first_line(error: BaseException) -> str:
    r"""The first line of an exception's message, with the next if it announces that; the type's name if there is none.

    Args:
        error: what was raised.

    >>> first_line(ValueError("no such file\nTraceback ..."))
    'no such file'
    >>> first_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    >>> first_line(ValueError("Validation error for field 'hidden_size':\n    TypeError: expected int"))
    "Validation error for field 'hidden_size': TypeError: expected int"
    """
    return f"KeyError: {_said(error)}" if isinstance(error, KeyError) else _said(error)  # alone it is only a name


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
