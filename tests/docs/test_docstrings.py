"""Public functions say what their arguments are, what they raise, and the shape of an array that they return."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import btrm_core

ROOT = Path(btrm_core.__file__).parent
GIVEN_ELSEWHERE = ("click.", "flags(", "router.", "app.", "hookspec", "hookimpl", "overload", "property", "setter")
"""Decorators of what is described by something else: a command's flags, the fields that a route's OpenAPI description
lists, a hook's specification, an attribute."""
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
SHAPE = re.compile(r"\[[\w., +-]+\]|\([A-Z\d]+(, [A-Z\d]+)+\)")
"""`[P, 2]`, `[queries, keys]`, `[..., out]`, or `(P, 2)` in capitals: other words in parentheses are no shape."""


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


@functools.cache
def array() -> re.Pattern[str]:
    """Finds an array in an annotation, by its own name or by one that a module gives it."""
    alias = re.compile(r"^\s*(\w+) = (?:NDArray\[.*\]|torch\.Tensor)$", re.MULTILINE)
    names = {name for path in MODULES.values() for name in alias.findall(path.read_text(encoding="utf-8"))}
    return re.compile(rf"\b({'|'.join(sorted(names | {'Tensor', 'ndarray', 'NDArray'}))})\b")


def shape_is_unsaid(node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> bool:
    """Whether a function returns an array, not only a function that takes one, and does not describe it."""
    returned = re.sub(r"Callable\[\[[^\]]*\]", "", ast.unparse(node.returns)) if node.returns else ""
    said = SHAPE.search(text.partition("\n")[0]) or re.search(r"^(Returns|Yields):", text, re.MULTILINE)
    return bool(array().search(returned)) and not said


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
        if shape_is_unsaid(node, text):
            found.append(f"{node.name} (line {node.lineno}) does not say the shape of what it returns")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_take_raise_and_return(name):
    found = faults(MODULES[name])
    assert not found, "\n".join(found)


def test_a_silent_function_is_found(tmp_path):
    file = tmp_path / "silent.py"
    file.write_text('def f(a, b):\n    """One.\n\n    Args:\n        a: it.\n    """\n    raise DataError("no")\n')
    assert faults(file) == ["f (line 1) does not say what b is", "f (line 1) raises DataError unsaid"]


@pytest.mark.parametrize(
    ("returned", "text", "is_fault"),
    [
        ("torch.Tensor", "One.", True),
        ("list[np.ndarray] | None", "Rewards (chosen, rejected).\n\n    Of pairs [P, 2].\n", True),
        ("'Hashes'", "One.", True),
        ("Callable[[int], FloatArray]", "One.", True),
        ("Callable[[torch.Tensor], None]", "One.", False),
        ("BlockMask", "One.", False),
        ("torch.Tensor", "One [S].", False),
        ("tuple[IntArray, bool]", "Rewards (P, 2).", False),
        ("Iterator[Tensor]", "One.\n\n    Yields:\n        float32 [S].\n", False),
    ],
)
def test_an_array_of_unsaid_shape_is_found(tmp_path, returned, text, is_fault):
    file = tmp_path / "silent.py"
    file.write_text(f'def f() -> {returned}:\n    """{text}"""\n')
    assert faults(file) == ["f (line 1) does not say the shape of what it returns"] * is_fault
