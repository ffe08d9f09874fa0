"""`btrm cache`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from btrm_core.console import dumps, table
from btrm_core.errors import ConfigError

if TYPE_CHECKING:
    from btrm_core.cache import Item, Stock

_WHERE = click.option("--dir", "directory", metavar="DIR", help="The cache. Default: $BTRM_CACHE, else the user's.")
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@click.group()
def cache() -> None:
    """Look through what btrm has prepared and kept, and remove it."""


@cache.command()
@_WHERE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(directory: str | None, as_json: bool) -> None:
    """Say where the cache is, what it holds, how large and how old that is, and when it was last used."""
    from btrm_core.cache import cache_root, size_limit, stock

    found, limit = stock(cache_root(directory)), size_limit()
    click.echo(dumps(_described(found, limit)) if as_json else "\n".join(_told(found, limit)))


@cache.command()
@click.option("--older-than", metavar="AGE", help="Remove what was not used for so long: 12h, 30d, 2w.")
@click.option("--max-size", metavar="SIZE", help="Remove the least recently used until no more is left: 20GB.")
@click.option("--all", "everything", is_flag=True, help="Remove everything that no process is using.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_WHERE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prune(directory: str | None, as_json: bool, dry_run: bool, **flags: Any) -> None:
    """Remove what killed processes have left half-written, and what is old or too much.

    Without --older-than, --max-size and --all the cache is brought within its limit (BTRM_CACHE_LIMIT). What a running
    process uses stays, and so does what btrm has not put there.
    """
    from btrm_core.cache import cache_root, parse_age, parse_size, size_limit, size_text, stock
    from btrm_core.cache import prune as remove

    age, size, everything = flags["older_than"], flags["max_size"], flags["everything"]
    if everything and (age or size):
        raise ConfigError("--all removes everything; leave out --older-than and --max-size")
    found = stock(cache_root(directory))
    removed, used = remove(
        found,
        older_than=0.0 if everything else parse_age(age) if age else None,
        max_size=parse_size(size) if size else None if everything or age else size_limit(),
        dry_run=dry_run,
    )
    if as_json:
        click.echo(dumps({"removed": [_entry(i) for i in removed], "in_use": [_entry(i) for i in used]}))
        return
    for item in removed if dry_run else ():
        click.echo(f"{item.path} ({size_text(item.size)})")
    gone = sum(item.size for item in removed)
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(removed):,} entries, {size_text(gone)}")
    if used:
        click.echo(f"{len(used):,} entries are in use and stay, {size_text(sum(item.size for item in used))}")
    click.echo(f"left in {found.root}: {size_text(found.size - gone)}")


def _told(found: Stock, limit: int | None) -> list[str]:
    from btrm_core.cache import KINDS, LIMIT_VARIABLE, size_text

    allowed = "no limit" if limit is None else f"limit {size_text(limit)}"
    lines = [f"{found.root}: {size_text(found.size)} ({allowed}, {LIMIT_VARIABLE})"]
    rows = [("kind", "entries", "size", "oldest", "last used", "in use", "what")]
    for kind, items in _by_kind(found).items():
        what = KINDS[kind].what if kind in KINDS else "left half-written by processes that were killed"
        rows.append((kind, f"{len(items):,}", size_text(sum(item.size for item in items)), *_times(items), what))
    lines += table(rows, right={1, 2, 3, 4, 5})
    if found.foreign:
        lines.append(f"not btrm's, and left alone: {len(found.foreign)}, such as {found.foreign[0]}")
    return lines


def _by_kind(found: Stock) -> dict[str, list[Item]]:
    from btrm_core.cache import KINDS

    kinds = {kind: [item for item in found.items if item.kind == kind and item.finished] for kind in KINDS}
    return {**kinds, "leftovers": [item for item in found.items if not item.finished]}


def _times(items: list[Item]) -> tuple[str, str, str]:
    if not items:
        return "-", "-", "-"
    now = time.time()
    used = sum(item.in_use for item in items)
    return _age(now - min(i.built for i in items)), f"{_age(now - max(i.used for i in items))} ago", f"{used:,}"


def _age(seconds: float) -> str:
    """An age for people, in the largest unit that it fills.

    >>> _age(200_000), _age(59.9)
    ('2 d', '59 s')
    """
    unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= unit), (1.0, "s"))
    return f"{max(0, int(seconds / unit))} {name}"


def _described(found: Stock, limit: int | None) -> dict[str, Any]:
    kinds = {
        kind: {
            "entries": len(items),
            "bytes": sum(item.size for item in items),
            "oldest": min((_moment(item.built) for item in items), default=None),
            "last_used": max((_moment(item.used) for item in items), default=None),
        }
        for kind, items in _by_kind(found).items()
    }
    return {
        "root": found.root,
        "bytes": found.size,
        "limit_bytes": limit,
        "kinds": kinds,
        "entries": [_entry(item) for item in found.items],
        "foreign": [Path(path) for path in found.foreign],
    }


def _entry(item: Item) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "path": item.path,
        "bytes": item.size,
        "built": _moment(item.built),
        "last_used": _moment(item.used),
        "finished": item.finished,
        "in_use": item.in_use,
    }


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
