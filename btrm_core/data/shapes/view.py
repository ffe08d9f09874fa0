"""A row while it is read: what was looked at, what was not, and what is worth saying about it.

Decides: that nothing which carries content is dropped in silence. A key that holds a value and was never asked for is
counted under `unused`; what was understood in a way the user should know is counted under `remarks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from btrm_core.data.shapes.named import hidden
from btrm_core.data.shapes.naming import Naming
from btrm_core.data.shapes.values import RowError, clean_text, plain

_PLAIN_NAMES = {
    *("prompt", "instruction", "question", "messages", "conversations", "system", "history", "input"),
    *("chosen", "rejected", "response", "responses", "scores", "winner", "margin", "weight", "subset", "id"),
}
"""Names that are known in capitals too, and with space around them."""
_PLAIN = (str, int, float, list, dict, type(None))


class RowView(Mapping[str, Any]):
    """A row that remembers which of its keys were used.

    Args:
        row: the row as read.
        naming: the user's own names.

    Attributes:
        naming: likewise.
        remarks: what is worth counting about this row, in short phrases.
        parts_unused: keys inside messages and objects that hold something nobody asked for.
    """

    def __init__(self, row: Mapping[str, Any], naming: Naming | None = None) -> None:
        self.naming = naming or Naming()
        self._row, self.mapped = self.naming(row)
        if not all(map(str.islower, map(str, self._row))) or any(" " in str(key) for key in self._row):
            self._row = _renamed(self._row)
        self._hidden = hidden(self.naming.format)
        self._used: set[str] = set()
        self.remarks: set[str] = set()
        self.parts_unused: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._row[key]
        self._used.add(key)
        return value if isinstance(value, _PLAIN) else plain(value)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as used if there is one.

        Args:
            key: btrm's name of the key.
            default: what is returned if there is no such key or it holds None.
        """
        return self[key] if self.has(key) else default

    def has(self, key: str) -> bool:
        """True if the key holds a value; does not count as using it.

        Args:
            key: btrm's name of the key; one that holds None, or answers in another format than the named one, has no
                value.
        """
        return key not in self._hidden and self._row.get(key) is not None

    def peek(self, key: str) -> Any:
        """The value of a key or None; does not count as using it.

        Args:
            key: btrm's name of the key.
        """
        return None if key in self._hidden else self._row.get(key)

    def __iter__(self) -> Any:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def use(self, *keys: str) -> None:
        """Say that keys were used, although not through `get`."""
        self._used |= set(keys)

    def remark(self, text: str) -> None:
        """Say something about the row; counted once a row.

        Args:
            text: a short phrase.
        """
        self.remarks.add(text)

    def leave_parts(self, where: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
        """Note the keys of an object in the row that hold something and are not among `known`.

        Args:
            where: what the noted keys are prefixed with, before a dot.
            item: the object.
            known: its keys that are understood.
        """
        for key, value in item.items():
            if key not in known and not _is_empty(value):
                self.parts_unused.add(f"{where}.{key}")

    @property
    def unused(self) -> list[str]:
        """The keys that hold something and were not used, with those inside messages."""
        keys = [key for key, value in self._row.items() if key not in self._used and not _is_empty(value)]
        return [clean_text(str(key)) for key in (*keys, *sorted(self.parts_unused))]

    def missing(self, key: str) -> RowError:
        """Return the error for a key that the row should have; it names those that the row has.

        Args:
            key: the key that is not there.
        """
        has = ", ".join(list(self)[:8]) or "nothing"
        return RowError("missing key", f"missing key '{key}' (the row has {has})")


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its plain names in small letters, but for those it has so already."""
    plain_names = {key: str(key).strip().lower() for key in row}
    return {name if name in _PLAIN_NAMES and name not in row else key: row[key] for key, name in plain_names.items()}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
