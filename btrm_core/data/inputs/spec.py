"""What a user writes after `--data`, taken apart.

=============================  ======================================================================================
`pairs.jsonl[:1000]`           a slice of the rows, also `[10%:]`, `[-500:]`, as `datasets` writes it
`folder:test[:10%]`            a split of a folder or of a Hub data set, and a slice of it
`org/name:config:train`        a configuration of a Hub data set and its split
`org/name@v1.0:train`          a branch, tag or commit
`org/name:data_dir=harmless`   a folder inside, also `data_files=PATTERN`, `config=NAME`, `split=NAME`, `revision=NAME`
`parts/*.jsonl.zst`            every file that fits, in the order of their names
`pairs.jsonl*0.5`              a mixing weight: each of its pairs counts half in the loss; also `pairs.jsonl:0.5`
`chat=pairs.jsonl`             a name of one's own, for ids and figures
`-`                            standard input
=============================  ======================================================================================

What exists under the whole text is taken as it stands, so that a file may have any name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from btrm_core.data.shapes.values import LARGEST, SMALLEST_WEIGHT
from btrm_core.errors import DataError, did_you_mean

_SLICE = re.compile(r"\[(-?\d+(?:\.\d+)?%|-?\d+)?:(-?\d+(?:\.\d+)?%|-?\d+)?\]\Z")
_WEIGHT = re.compile(r"\*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\Z|:(\d*\.\d+)\Z")
_NAME = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)
_REVISION = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)@([\w./-]+)")
OPTIONS = ("config", "data_dir", "data_files", "name", "revision", "split")


@dataclass(frozen=True)
class Slice:
    """Rows from `start` up to `stop`, in numbers or per cent, negative ones from the end.

    Attributes:
        start: as written, for example "10", "-5" or "10%"; empty for the beginning.
        stop: likewise; empty for the end.
    """

    start: str = ""
    stop: str = ""

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """Return the first row and the one after the last, from 0.

        Args:
            count: gives the number of all rows; asked only if that is needed.

        >>> Slice("", "10%").bounds(lambda: 250), Slice("5", "9").bounds(lambda: 1 // 0)
        ((0, 25), (5, 9))
        """
        if not any("%" in end or end.startswith("-") for end in (self.start, self.stop)):
            return int(self.start or 0), int(self.stop) if self.stop else None
        number = count()
        start, stop = (_place(end, number) for end in (self.start or "0", self.stop or str(number)))
        return start, max(start, stop)


def _place(end: str, number: int) -> int:
    value = round(float(end[:-1]) * number / 100) if end.endswith("%") else int(end)
    return min(max(value + number if end.startswith("-") else value, 0), number)


@dataclass(frozen=True)
class Spec:
    """One source as the user wrote it.

    Attributes:
        text: the whole text.
        place: path, pattern or Hub id, without what stands around it.
        name: the user's own name, or None.
        parts: what is written after colons and is no option: split, or configuration and split.
        options: what is written as `:key=value` or `@revision`, by its name.
        rows: the slice, or None.
        weight: what every pair of it counts in the loss.
    """

    text: str
    place: str
    name: str | None = None
    parts: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    rows: Slice | None = None
    weight: float = 1.0

    def option(self, *names: str) -> str | None:
        """The value of the first of some options that is given, or None.

        Args:
            *names: names of options; `config` and `name` mean the same, say.
        """
        return next((value for key, value in self.options if key in names), None)

    @property
    def split(self) -> str | None:
        """The split asked for."""
        return self.option("split") or (self.parts[-1] if self.parts else None)

    @property
    def config(self) -> str | None:
        """The configuration asked for."""
        return self.option("config", "name") or (self.parts[0] if len(self.parts) > 1 else None)


def parse_spec(text: str, exists: Callable[[str], bool]) -> Spec:
    """Take a source apart.

    Args:
        text: what the user wrote.
        exists: tells whether there is a file or folder of that path; what exists is not taken apart further.

    Returns:
        Its parts; what the text does not say is empty or None.

    Raises:
        DataError: an option is unknown, or a weight is out of range.

    >>> parse_spec("org/name@v1:test[:10%]*0.5", lambda path: False).split
    'test'
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", text):
        raise DataError(
            f"'{text}' is an address, expected a file or a folder here, or org/name of the Hub. Download it."
        )
    place, name, rows, weight = text, None, None, None
    while not exists(place):  # weight and slice, in either order
        if weight is None and (match := _WEIGHT.search(place)):
            weight = float(match.group(1) or match.group(2))
            if not SMALLEST_WEIGHT <= weight <= LARGEST:
                raise DataError(f"the mixing weight of '{text}' is {weight:g}, expected above 0, at most {LARGEST:g}.")
        elif rows is None and (match := _SLICE.search(place)):
            rows = Slice(match.group(1) or "", match.group(2) or "")
        else:
            break
        place = place[: match.start()]
    if not exists(place) and (match := _NAME.fullmatch(place)) and match.group(1) not in OPTIONS:
        name, place = match.group(1), match.group(2)
    parts: list[str] = []
    options: dict[str, str] = {}
    while not exists(place) and (colon := place.rpartition(":"))[1] and colon[0]:
        place, _, part = colon
        key, equals, value = part.partition("=")
        if equals and key in OPTIONS:
            options[key] = value
        elif equals:
            raise DataError(
                f"'{text}' has the unknown option '{key}', expected {', '.join(OPTIONS)}.{did_you_mean(key, OPTIONS)}"
            )
        else:
            parts.insert(0, part)
    if not exists(place) and (match := _REVISION.fullmatch(place)):
        place, options["revision"] = match.group(1), match.group(2)
    return Spec(text, place, name, tuple(parts), tuple(options.items()), rows, 1.0 if weight is None else weight)


def is_pattern(place: str) -> bool:
    """True if a path holds a wildcard.

    Args:
        place: the path as written.
    """
    return any(character in place for character in "*?[")


def expand(place: str) -> list[Path]:
    """Return the files and folders that fit a pattern, in the order of their names; `**` goes into folders.

    Args:
        place: the pattern, relative to the working directory or from the root on.

    Returns:
        What exists; nothing if none fits.
    """
    path = Path(place)
    anchor = Path(path.anchor) if path.anchor else Path()
    inner = path.relative_to(path.anchor) if path.anchor else path
    return sorted(anchor.glob(str(inner)))


def apart(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Names of sources, those that are called alike with their folder before them, or else a number behind.

    Args:
        names: what each is called.
        folders: the folder each is in; empty for one that keeps its name whatever the others are called.

    >>> apart(["test", "test", "chat"], ["a", "b", "b"]), apart(["x", "x"], ["a", "a"]), apart(["x", "x"], ["", ""])
    (['a/test', 'b/test', 'chat'], ['a/x', 'a/x-2'], ['x', 'x'])
    """
    found: list[str] = []
    for name, folder in zip(names, folders, strict=True):
        alike = names.count(name) > 1 and folder
        whole = f"{folder}/{name}" if alike else name
        times = found.count(whole) + sum(other.startswith(f"{whole}-") for other in found) if alike else 0
        found.append(f"{whole}-{times + 1}" if times else whole)
    return found
