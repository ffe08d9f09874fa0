"""Where the cache is, what kinds of things are in it, and what their keys hold of btrm's own code."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """One folder of the cache.

    Attributes:
        what: what its entries are, for the user.
        pattern: names of its entries; whatever is called otherwise is not btrm's and left alone.
        folders: whether an entry is a folder with a record of its files, or a single file.
        large: whether entries may be large, so that the oldest go when the cache is over its limit.
    """

    what: str
    pattern: re.Pattern[str]
    folders: bool
    large: bool


_KEY = re.compile(r"[0-9a-f]{64}")
_VALUE = re.compile(r"[0-9a-f]{64}\.json")
KINDS = {
    "pairs": Kind("checked pairs", _KEY, folders=True, large=True),
    "encoded": Kind("pairs as tokens", _KEY, folders=True, large=True),
    "toy": Kind("tiny models for runs without --model", re.compile(r".+-[0-9a-f]{12}"), folders=True, large=True),
    "piped": Kind("copies of standard input and pipes", re.compile(r"[0-9a-f]{16}\.\w+"), folders=False, large=True),
    "hashes": Kind("digests of data files", _VALUE, folders=False, large=False),
    "leakage": Kind("verdicts on packed rows", _VALUE, folders=False, large=False),
}
"""The folders of the cache, by name."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache directory: the argument, else $BTRM_CACHE, $XDG_CACHE_HOME/btrm, ~/.cache/btrm.

    Args:
        cache_dir: a directory; None or empty if not given.
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    if given := os.environ.get("BTRM_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "btrm"


@functools.cache
def code_digest(*packages: str) -> str:
    """Return the SHA-256 of the source of whole packages of btrm_core, by their names.

    Part of every cache key: an entry written by other code is not read, even between two releases. Read once
    per process, so that an edit beside a running program does not change its mind.

    Args:
        packages: folders of btrm_core.

    Raises:
        FileNotFoundError: a package has no module; the digest of nothing would let old entries pass for new ones.
    """
    whole = hashlib.sha256()
    for package in packages:
        paths = sorted((Path(__file__).parent.parent / package).rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"btrm_core has no package {package!r}: the cache key needs its source")
        for path in paths:
            whole.update(path.read_bytes())
    return whole.hexdigest()
