"""How large the cache may grow, and how people write sizes and ages."""

from __future__ import annotations

import os
import re

from btrm_core.errors import ConfigError

LIMIT_VARIABLE = "BTRM_CACHE_LIMIT"
"""Environment variable: how large the cache may grow."""
DEFAULT_LIMIT = "100GB"
"""Room for some thirty encodings of 700,000 pairs; what is read from the hub is not counted, it lies elsewhere."""
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_AGES = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def size_limit() -> int | None:
    """Bytes that the cache may take: $BTRM_CACHE_LIMIT, else 100 GB; None for no limit.

    Raises:
        ConfigError: the variable says something else.
    """
    text = os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT
    if text.strip().lower() == "none":
        return None
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{LIMIT_VARIABLE}: {error}, or none for no limit") from error


def parse_size(text: str) -> int:
    """Bytes of a size as people write it.

    Args:
        text: a number with a unit: 20GB, 1.5 TB, 500M, 8GiB (1024^3), or bytes alone.

    Raises:
        ConfigError: it is none.

    >>> parse_size("20GB"), parse_size("1.5k"), parse_size("1 GiB")
    (20000000000, 1500, 1073741824)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is no size; expected a number with a unit, such as 20GB")
    unit = _SIZES[found[2].lower()]
    if found[3]:
        unit = 1024 ** (list(_SIZES).index(found[2].lower()))
    return int(float(found[1]) * unit)


def parse_age(text: str) -> float:
    """Seconds of an age as people write it.

    Args:
        text: a number with a unit: 45m, 12h, 30d or 2w.

    Raises:
        ConfigError: it is none.

    >>> parse_age("30d"), parse_age("1.5h")
    (2592000.0, 5400.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mhdw])\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{text!r} is no age; expected minutes, hours, days or weeks: 45m, 12h, 30d, 2w")
    return float(found[1]) * _AGES[found[2].lower()]


def size_text(size: float) -> str:
    """A size for people, in decimal units.

    Args:
        size: bytes.

    >>> size_text(0), size_text(1_500), size_text(20_000_000_000)
    ('0 B', '1.5 kB', '20.0 GB')
    """
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.95 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
