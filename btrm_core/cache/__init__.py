"""The cache: what was prepared once, kept until something it was made of changes, trusted only when whole.

Loads no torch.
"""

from btrm_core.cache.entries import COMPLETE, build_once, damage
from btrm_core.cache.limit import LIMIT_VARIABLE, parse_age, parse_size, size_limit, size_text
from btrm_core.cache.places import KINDS, cache_root, code_digest
from btrm_core.cache.sealed import NEW, file_sha256, keep_value, kept_value
from btrm_core.cache.stock import Item, Stock, keep_within, prune, stock

__all__ = [
    "COMPLETE",
    "KINDS",
    "LIMIT_VARIABLE",
    "NEW",
    "Item",
    "Stock",
    "build_once",
    "cache_root",
    "code_digest",
    "damage",
    "file_sha256",
    "keep_value",
    "keep_within",
    "kept_value",
    "parse_age",
    "parse_size",
    "prune",
    "size_limit",
    "size_text",
    "stock",
]
