"""Which split a file is of, and which of several splits is meant."""

from __future__ import annotations

import re
from pathlib import Path

from btrm_core.errors import DataError, did_you_mean

_SPLIT_NAMES = ("train", "validation", "valid", "dev", "test", "eval")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?=\.)")
_NAMED_SPLIT = re.compile(rf"((?:{'|'.join(_SPLIT_NAMES)})[-_][A-Za-z]\w*?)[-_]?\d*", re.IGNORECASE)
_SPLIT_WORD = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLIT_NAMES)})(?=[-_./]|$)", re.IGNORECASE)


def choose_split(where: str, splits: list[str], wanted: str | None) -> str:
    """Pick the wanted split, else "train", else the only one, or the only one of that beginning (`train_data`).

    Args:
        where: the source, for messages.
        splits: those it has; an empty name for files of none.
        wanted: the one asked for; None if none was.

    Raises:
        DataError: there is none to pick; it says which there are.
    """
    named = ", ".join(sorted(name for name in splits if name)) or "none"
    if wanted is not None:
        if wanted in splits:
            return wanted
        if len(near := _beginning(wanted, splits)) == 1:
            return near[0]
        raise DataError(f"'{where}' has no split '{wanted}': it has {named}.{did_you_mean(wanted, splits)}")
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    if len(near := _beginning("train", splits)) == 1:
        return near[0]
    example = sorted(name for name in splits if name)[0]
    raise DataError(f"'{where}' has no split 'train': it has {named}. Name one, for example '{where}:{example}'.")


def _beginning(word: str, splits: list[str]) -> list[str]:
    return [split for split in splits if split.startswith((f"{word}_", f"{word}-"))]


def split_of(path: Path) -> str:
    """The split a file belongs to by its name or its folder's, or an empty string.

    Args:
        path: of the file, inside its source.
    """
    if shard := _SHARD.match(path.name):
        return shard.group(1)
    for part in reversed([*path.parent.parts, path.name.partition(".")[0]]):
        if named := _NAMED_SPLIT.fullmatch(part):  # train_prefs and train_sft are two splits, train_0 and train_1 one
            return named.group(1).lower()
    words = _SPLIT_WORD.findall(path.as_posix())
    return words[-1].lower() if words else ""
