"""Public functions say what their arguments are and what they raise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import btrm_core

ROOT = Path(btrm_core.__file__).parent
EXCUSED: frozenset[str] = frozenset(
    """
    data/convert.py data/curate/overview.py data/curate/select.py data/curate/similar.py data/curate/write.py
    data/encode.py data/formats.py data/inputs/spec.py data/inputs/streams.py data/inputs/tables.py data/issues.py
    data/pairs.py data/quality.py data/readers.py data/shapes/conversation.py data/shapes/messages.py
    data/shapes/preference.py data/shapes/text.py data/shapes/values.py data/store.py
    data/tables.py evaluation/plots.py packing/rows.py packing/trees.py
    """.split()
)
"""Modules that are not there yet; one that is must leave this list."""
GIVEN_ELSEWHERE = ("click.", "flags(", "router.", "app.", "hookspec", "hookimpl", "overload", "property", "setter")
"""Decorators of what is described by something else: a command's flags, the fields that a route's OpenAPI description
lists, a hook's specification, an attribute."""
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}


def functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public functions of a module, and public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
            ("_", "test_", "pytest_")
        ):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(word in decorator for word in GIVEN_ELSEWHERE for decorator in decorators):
                yield node


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What is inside a function, without the functions inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from own(child)


def errors_of_btrm() -> set[str]:
    tree = ast.parse((ROOT / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def faults(path: Path) -> list[str]:
    """What the docstrings of a module leave out."""
    found, errors = [], errors_of_btrm()
    for node in functions(ast.parse(path.read_text(encoding="utf-8")).body):
        text = ast.get_docstring(node) or ""
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
        missing = [name for name in names if not re.search(rf"^\s+{name}:", text, re.MULTILINE)]
        if missing:
            found.append(f"{node.name} (line {node.lineno}) does not say what {', '.join(missing)} is")
        raised = {
            ast.unparse(inner.exc.func)
            for inner in own(node)
            if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call)
        }
        if raised & errors and "Raises:" not in text:
            found.append(f"{node.name} (line {node.lineno}) raises {', '.join(sorted(raised & errors))} unsaid")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_take_and_raise(name):
    found = faults(MODULES[name])
    if name in EXCUSED:
        assert found, f"{name} says everything now: take it off the list of those excused"
    else:
        assert not found, "\n".join(found)


def test_a_silent_function_is_found(tmp_path):
    file = tmp_path / "silent.py"
    file.write_text('def f(a, b):\n    """One.\n\n    Args:\n        a: it.\n    """\n    raise DataError("no")\n')
    assert faults(file) == ["f (line 1) does not say what b is", "f (line 1) raises DataError unsaid"]
