"""Guards of the values of a row: numbers that stay finite in float32, texts that Arrow and JSON can hold.

Decides: which number is one, which text may stand in a column, and what becomes of the values of numpy and pandas.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

LARGEST = 1e9
SMALLEST_WEIGHT = 1e-9
"""Bounds of margins and weights: beyond them, sums and products leave float32, in which the loss is computed."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_TEXT = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")
_TEXTS = re.compile(rf"\s*\[\s*(?:(?:{_TEXT.pattern})(?:\s*,)?\s*)+\]\s*")
_NUMBERS = re.compile(r"\[(?:[\s,]*(?:[-+.\deE]+|nan|None|True|False)(?=[\s,\]]))+[\s,]*\]")
_ARRAY = re.compile(r"\s*array\((.*?)(?:,\s*dtype=object)?\)\s*", re.DOTALL)
_BETWEEN_OBJECTS = re.compile(rf"{_TEXT.pattern}|(\}}\s+\{{)")
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """The row gives no pair.

    Args:
        kind: the short class it is counted under, such as "missing key".
        reason: what is wrong, with the value, and what was expected.
        bad: True if the row breaks the format; False for a tie and the like.
    """

    def __init__(self, kind: str, reason: str, *, bad: bool = True):
        super().__init__(clean_text(reason))  # it may quote keys of the row
        self.kind = clean_text(kind)
        self.bad = bad


def shown(value: Any) -> str:
    """Return a value of the data as a message shows it: cut to 40 characters, with its type unless it is text.

    Args:
        value: any value.
    """
    try:
        text = repr(value[:50] if isinstance(value, str) else value)
    except ValueError:  # a whole number of more digits than Python turns into text
        text = "a number of thousands of digits"
    if len(text) > 40:
        text = text[:37] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"


def as_number(value: Any) -> float | None:
    """Return a finite number, also one written as text, as float; None for anything else.

    Args:
        value: any value; True and False are no numbers.

    >>> as_number("2.5"), as_number(True), as_number("N/A"), as_number(10**400)
    (2.5, None, None, None)
    """
    number = math.nan
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    return number if math.isfinite(number) else None


def finite(value: Any, where: str) -> float:
    """Return a number, also one written as text, as float.

    Args:
        value: any value.
        where: its place in the row, for the reason of a refusal.

    Raises:
        RowError: it is no number, or not a finite one.
    """
    number = as_number(value)
    if number is None:
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a finite number")
    return number


def bounded_margin(value: Any, where: str) -> float:
    """Return a margin that is safe in float32.

    Args:
        value: a number, also as text.
        where: its place in the row, for the reason of a refusal.

    Raises:
        RowError: it is no number, or its size is larger than `LARGEST`.
    """
    number = finite(value, where)
    if abs(number) > LARGEST:
        raise RowError("wrong type", f"'{where}' is {number:g}, expected a number from {-LARGEST:g} to {LARGEST:g}")
    return number


def bounded_weight(value: Any, where: str) -> float:
    """Return a weight above 0 that is safe in float32, also after sums and divisions.

    Args:
        value: a number, also as text.
        where: its place in the row, for the reason of a refusal.

    Raises:
        RowError: it is no number, not above 0, or not from `SMALLEST_WEIGHT` to `LARGEST`.
    """
    number = finite(value, where)
    if number <= 0:
        raise RowError("wrong type", f"'{where}' is {number:g}, expected a number above 0")
    if not SMALLEST_WEIGHT <= number <= LARGEST:
        wanted = f"{SMALLEST_WEIGHT:g} to {LARGEST:g}"
        raise RowError("wrong type", f"'{where}' is {number:g}, expected a number from {wanted}")
    return number


def clean_text(text: str) -> str:
    """Return a text that UTF-8 can hold: halves of surrogate pairs become U+FFFD. For names, never for contents.

    Args:
        text: any text.

    >>> clean_text("a" + chr(0xD800)) == "a" + chr(0xFFFD)
    True
    """
    return _SURROGATE.sub("\ufffd", text)


def label(value: Any) -> str | None:
    """Return an id or subset as text, or None if the value is none: neither text nor a number.

    Args:
        value: any value; a whole number loses its ".0", and one that is not finite is none.

    >>> label(1.0), label("x"), label([1]), label(True)
    ('1', 'x', None, None)
    """
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    try:
        return str(value)
    except ValueError:  # more digits than Python turns into text
        return None


def plain(value: Any) -> Any:
    """Return the value with numpy arrays and scalars, pandas' missing values, tuples and mappings made plain.

    Args:
        value: any value; what is of none of these types is left as it is, at any depth.

    Returns:
        The value of text, numbers, lists, dictionaries with keys of text, and None (also for what is no number).

    >>> import numpy as np
    >>> plain({"a": np.array([np.float32(1.5), None], dtype=object), "b": float("nan")})
    {'a': [1.5, None], 'b': None}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes | bytearray):  # text of a binary column; what is not UTF-8 is refused with the row
        return bytes(value).decode("utf-8", "surrogateescape")
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, pandas' and pyarrow's columns
        return plain(value.tolist())
    return value


def listed(value: Any) -> Any:
    """Return the list that a text spells in JSON or as Python prints it (a cell of a CSV file); else the value itself.

    Args:
        value: any value.

    >>> listed('["a", "b"]'), listed("['a' 'b']"), listed("[True, None]"), listed("[not one"), listed("a")
    (['a', 'b'], ['a', 'b'], [True, None], '[not one', 'a')
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[") or not value.rstrip().endswith("]"):
        return value
    found = literal(value)
    return found if isinstance(found, list) else value


def literal(text: str) -> Any:
    """Return the value that a text spells in JSON, in Python, or as numpy prints it; None for none.

    Args:
        text: a text of a row, such as the cell of a CSV file.

    >>> literal("[{'a': 1} {'a': 2}]"), literal("[ 1. nan]"), literal("array(['a', 'b'], dtype=object)"), literal("x y")
    ([{'a': 1}, {'a': 2}], [1.0, None], ['a', 'b'], None)
    >>> literal("{'a': array([{'b': nan}], dtype=object)}"), literal("({'a': 1}, {'a': '} {'})")
    ({'a': [{'b': None}]}, [{'a': 1}, {'a': '} {'}])
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    text = (match.group(1) if (match := _ARRAY.fullmatch(text)) else text).strip()
    if _TEXTS.fullmatch(text):  # numpy prints texts without commas, which Python would join
        return [ast.literal_eval(found) for found in _TEXT.findall(text)]
    if _NUMBERS.fullmatch(text):
        words = text[1:-1].replace(",", " ").split()
        return [{"True": True, "False": False}.get(word, as_number(word)) for word in words]
    for joined in (text, _BETWEEN_OBJECTS.sub(lambda found: "}, {" if found.group(1) else found.group(), text)):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return plain(ast.literal_eval(_AsPrinted().visit(ast.parse(joined, mode="eval"))))
    return None


class _AsPrinted(ast.NodeTransformer):
    """What Python prints and cannot read back: numpy's arrays as lists, numbers that are none as None."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        known = isinstance(node.func, ast.Name) and node.func.id == "array" and len(node.args) == 1
        return node.args[0] if known else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(None) if node.id in ("nan", "NaT") else node


def json_value(value: Any) -> Any:
    """Return a value that JSON can hold: numbers that are not finite become null, wherever they are.

    Args:
        value: text, numbers, None, and lists and dictionaries of them.

    >>> json_value({"a": [float("inf"), 1.5]})
    {'a': [None, 1.5]}
    """
    made: list[Any] = [value]
    waiting: list[tuple[Any, Any]] = [(made, 0)]
    while waiting:  # a row may be deeper than Python's own calls
        holder, place = waiting.pop()
        item = holder[place]
        if isinstance(item, float):
            holder[place] = item if math.isfinite(item) else None
        elif isinstance(item, dict | list):
            holder[place] = copy = item.copy()
            places = list(copy) if isinstance(copy, dict) else range(len(copy))
            waiting += [(copy, inner) for inner in places if isinstance(copy[inner], float | dict | list)]
    return made[0]
