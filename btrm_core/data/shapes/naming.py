"""The user's own names: which column holds what, and what the roles are called.

`--map prompt=question,chosen=answer_a` and the table `[data.map]` say the same. On the left stands btrm's name, on the
right the name in the data:

=====================  =============================================================================================
`prompt=question`      the column `question` is the prompt; a dot goes into an object (`prompt=info.post`)
`margin=a-b`           the margin is column `a` minus column `b`
`margin=scores`        the margin is the difference of the scores that the row gives its answers
`role.expert=user`     messages of the role `expert` are the user's; the right side is one of btrm's roles
`message.role=who`     the key that holds a message's role; `message.content=text` the one that holds its text
`format=hh`            all rows are in this format (`named.py`), whatever they look like
=====================  =============================================================================================

A row that lacks a mapped column is read as if nothing was mapped, so that evaluation data may have other columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from btrm_core.data.shapes.keys import ANSWERS
from btrm_core.data.shapes.named import check_format
from btrm_core.data.shapes.values import as_number
from btrm_core.errors import ConfigError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "history", "messages", "response", "responses", "scores", "score"),
    *("response_a", "response_b", "winner", "margin", "weight", "probability", "subset", "id", "input"),
)
_ANSWERS = (
    {"chosen", "rejected"},
    {"responses", "scores"},
    {"response_a", "response_b", "winner"},
    {"response", "score"},
)
_ENTRY = re.compile(r",(?=\s*[\w.]+\s*=)")


@dataclass(frozen=True)
class Naming:
    """Which names of the data mean what; empty by default.

    Attributes:
        columns: btrm's name and the column that holds it.
        roles: a role of the data, in lower case, and btrm's role.
        role_key: the key of a message that holds its role; None: `role` or `from`.
        content_key: the key that holds its text; None: `content` or `value`.
        format: the format of every row, a name of `named.FORMATS`; None: each row's is found out.
    """

    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    role_key: str | None = None
    content_key: str | None = None
    format: str | None = None

    def __bool__(self) -> bool:
        return self != Naming()

    def __call__(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], set[str]]:
        """Return the row under btrm's names, and the columns that were found."""
        if not self.columns:
            return row, set()
        mapped: dict[str, Any] = {}
        found = set()
        for name, column in self.columns:
            value, taken = _look_up(row, column) if (name, column) != ("margin", "scores") else (None, ())
            if taken:
                mapped[name] = value
                found |= set(taken)
        if not mapped:
            return row, set()
        hidden = set().union(*(keys for keys in _ANSWERS if keys & set(mapped))) | set(mapped)
        drop = {column.partition(".")[0] for column in found}
        if any(keys & set(mapped) for keys in _ANSWERS):
            drop |= {key for key in ANSWERS if key not in hidden}
        return {**mapped, **{k: v for k, v in row.items() if k not in drop and k not in mapped}}, found

    @property
    def of_renamed_rows(self) -> Naming:
        """What is left to know once the columns of a row carry btrm's names."""
        return replace(self, columns=(("margin", "scores"),) if self.margin_of_scores else ())

    @property
    def margin_of_scores(self) -> bool:
        """True if the margin is to be the difference of the scores of the row."""
        return ("margin", "scores") in self.columns


def parse_naming(entries: Iterable[str] | Mapping[str, Any], form: str | None = None) -> Naming:
    """Read `name=column` texts, or the table of a settings file.

    Args:
        entries: texts of one or several entries with commas between, or a table; `role` and `message` are tables in it.
        form: the format of every row by name; None is what an entry `format` says, else it is found out row by row.

    Returns:
        The names; of an entry given twice, the last.

    Raises:
        ConfigError: an entry is malformed, its left side is unknown, or there is no such format.

    >>> parse_naming(["prompt=question", "role.expert=assistant"]).columns
    (('prompt', 'question'),)
    """
    columns: dict[str, str] = {}
    roles: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name, column in _pairs(entries):
        kind, dot, rest = name.partition(".")
        if dot and kind == "role":
            if column.lower() not in ROLES:
                raise ConfigError(
                    f"map {name}={column}: '{column}' is no role, expected {', '.join(ROLES)}."
                    f"{did_you_mean(column, ROLES)}"
                )
            roles[rest.lower()] = column.lower()
        elif dot and kind == "message" and rest in ("role", "content"):
            keys[rest] = column
        elif name == "format":
            form = form or column
        elif name in COLUMNS:
            columns[name] = column
        else:
            known = (*COLUMNS, "role.NAME", "message.role", "message.content", "format")
            raise ConfigError(
                f"map {name}={column}: '{name}' is unknown, expected one of {', '.join(known)}."
                f"{did_you_mean(name, COLUMNS)}"
            )
    return Naming(
        tuple(columns.items()), tuple(roles.items()), keys.get("role"), keys.get("content"), form and check_format(form)
    )


def _pairs(entries: Iterable[str] | Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(entries, Mapping):
        for name, value in entries.items():
            if isinstance(value, Mapping):
                yield from _pairs(value, f"{before}{name}.")
            else:
                yield f"{before}{name}", str(value)
        return
    for text in entries:
        for entry in _ENTRY.split(str(text)):
            name, equals, column = entry.partition("=")
            if not equals or not name.strip() or not column.strip():
                raise ConfigError(f"map {entry!r} is not of the form name=column, e.g. --map prompt=question")
            yield name.strip(), column.strip()


def _look_up(row: Mapping[str, Any], column: str) -> tuple[Any, tuple[str, ...]]:
    """The value of a column, of an object's inner key, or of one number minus another; and the columns it is from."""
    if column in row:
        return row[column], (column,)
    outer, dot, inner = column.partition(".")
    if dot and isinstance(row.get(outer), Mapping):
        value, taken = _look_up(row[outer], inner)
        return value, (column,) if taken else ()
    for place, character in enumerate(column):
        left, right = column[:place].strip(), column[place + 1 :].strip()
        if character == "-" and left in row and right in row:
            numbers = as_number(row[left]), as_number(row[right])
            return (None if None in numbers else numbers[0] - numbers[1]), (left, right)  # type: ignore[operator]
    return None, ()
