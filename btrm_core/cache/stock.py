"""What is in the cache, and what goes: by age, by size, or because a killed process has left it unfinished.

Decides: that only what btrm has put there is ever removed, never what a running process uses, and that the least
recently used goes first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from btrm_core import files
from btrm_core.cache.limit import LIMIT_VARIABLE, size_text
from btrm_core.cache.places import KINDS
from btrm_core.cache.sealed import NEW
from btrm_core.console import tell
from btrm_core.locks import only_user

_ASIDE = "-old-"
"""In the names of directories that were to be replaced."""


@dataclass(frozen=True)
class Item:
    """One thing in the cache.

    Attributes:
        kind: the folder it is in.
        path: where it is.
        size: bytes.
        built: when it was written, in seconds since 1970.
        used: when it was last used, likewise.
        finished: False for what a process has left half-written.
    """

    kind: str
    path: Path
    size: int
    built: float
    used: float
    finished: bool = True

    @property
    def anchor(self) -> Path:
        """What those that use it have locked."""
        return self.path / "complete.json" if self.finished and KINDS[self.kind].folders else self.path

    @property
    def in_use(self) -> bool:
        """Whether a running process uses or builds it."""
        with only_user(self.anchor) as free:
            return not free or (not self.finished and time.time() - self.built < files.YOUNG_SECONDS)


@dataclass(frozen=True)
class Stock:
    """All that is in the cache.

    Attributes:
        root: where the cache is.
        items: what btrm has put there, the least recently used first.
        foreign: what else lies in its folders; it is never touched.
    """

    root: Path
    items: list[Item]
    foreign: list[Path]

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)


def stock(root: Path) -> Stock:
    """Look through the cache; nothing is read or changed.

    Args:
        root: the cache directory; it may be missing.
    """
    items: list[Item] = []
    foreign: list[Path] = []
    for kind, expected in KINDS.items():
        for path in _listed(root / kind):
            finished = expected.pattern.fullmatch(path.name) is not None
            left = path.name.startswith((files.BUILDING, NEW)) or (path.name[:1] == "." and _ASIDE in path.name)
            if finished or left:
                with contextlib.suppress(OSError):  # another process is removing it
                    items.append(_item(kind, path, finished))
            else:
                foreign.append(path)
    return Stock(root, sorted(items, key=lambda item: (item.used, item.path)), foreign)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _item(kind: str, path: Path, finished: bool) -> Item:
    anchor = path / "complete.json" if finished and KINDS[kind].folders else path
    stat = (anchor if anchor.exists() else path).lstat()
    size = path.lstat().st_size if not path.is_dir() or path.is_symlink() else sum(_sizes(path))
    return Item(kind, path, size, stat.st_mtime, max(stat.st_atime, stat.st_mtime), finished)


def _sizes(folder: Path) -> Iterator[int]:
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield (Path(inner) / name).lstat().st_size


def prune(
    found: Stock, *, older_than: float | None = None, max_size: int | None = None, dry_run: bool = False
) -> tuple[list[Item], list[Item]]:
    """Remove leftovers, what was not used for long, and the least recently used until the rest is small enough.

    Args:
        found: the cache.
        older_than: seconds; what was last used before goes. None keeps it, 0 removes all.
        max_size: bytes that may stay; None lets all stay.
        dry_run: remove nothing, only say what would go.

    Returns:
        What was removed (or would be), and what would have been, but is in use.
    """
    removed: list[Item] = []
    kept: list[Item] = []
    size, now = found.size, time.time()
    for item in sorted(found.items, key=lambda item: item.finished):  # leftovers first; the order stays otherwise
        old = older_than is not None and now - item.used >= older_than
        over = max_size is not None and size > max_size
        if item.finished and not old and not over:
            continue
        if (not item.in_use) if dry_run else _removed(item):
            removed.append(item)
            size -= item.size
        else:
            kept.append(item)
    return removed, kept


def keep_within(root: Path, limit: int | None, spare: Path) -> None:
    """Remove the least recently used large entries until the cache is within its limit, and say so.

    Args:
        root: the cache directory.
        limit: bytes; None for no limit.
        spare: the entry that was just written, which stays in any case.
    """
    if limit is None:
        return
    found = stock(root)
    large = [item for item in found.items if KINDS[item.kind].large and item.path != spare]
    gone: list[Item] = []
    for item in sorted(large, key=lambda item: item.finished):
        if found.size - _bytes(gone) <= limit:
            break
        if _removed(item):
            gone.append(item)
    if gone:
        tell(
            f"the cache {root} was over its limit of {size_text(limit)} ({LIMIT_VARIABLE}): the least recently used "
            f"entries were removed ({len(gone)}, {size_text(_bytes(gone))})"
        )


def _bytes(items: Iterable[Item]) -> int:
    return sum(item.size for item in items)


def _removed(item: Item) -> bool:
    """Remove an item unless it is in use; a reader never sees half of it."""
    if item.in_use:
        return False
    with contextlib.suppress(OSError), only_user(item.anchor) as free:
        if not free:
            return False
        if item.path.is_dir() and not item.path.is_symlink():
            aside = item.path.with_name(f"{files.BUILDING}{secrets.token_hex(8)}")
            item.path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            return not aside.exists()
        item.path.unlink(missing_ok=True)
        return True
    return False
