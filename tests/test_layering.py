"""The house: imports point one way, packages are entered by their faces, nothing that a run reaches names a family."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import btrm_core

ROOT = Path(btrm_core.__file__).parent
LAYERS = """
errors marks
settings console files hub weights outputs lifetime
config
families
chat packing evaluation
data
model
training scoring
preflight run serving
testing cli
__main__ pytest_plugin
"""
FLOOR = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
OWN_FACE = {"training.processes", "preflight.doctor", "preflight.plan", "preflight.conformance", "preflight.verify"}
"""Packages inside a package that are entered by a face of their own."""
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MODULES = 350, 60, 7, 12
LARGER = {"packing.rows": (370, 7)}
"""Modules that are not yet down to the limits: lines of the module, parameters of a function."""
MAX_TRAINING = 18


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def exported(name: str) -> frozenset[str]:
    """The names of a face: a function may be called as the module that holds it."""
    path = MODULES.get(name)
    found = (
        re.search(r"^__all__ = \[(.*?)\]", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE) if path else None
    )
    return frozenset(re.findall(r'"(\w+)"', found.group(1))) if found else frozenset()


@cache
def imported(name: str) -> tuple[str, ...]:
    """Modules of btrm_core that a module imports, also inside functions and for types alone; "" is the package."""
    found = []
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            head, _, inner = full.partition(".")
            if head == "btrm_core":
                outer, _, last = inner.rpartition(".")
                found.append(outer if inner not in MODULES or last in exported(outer) else inner)
    return tuple(dict.fromkeys(found))


def package(name: str) -> str:
    """What is entered by one face: the top-level package, or one with a face of its own."""
    inner = ".".join(name.split(".")[:2])
    return inner if inner in OWN_FACE else name.partition(".")[0]


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_its_floor():
    assert {top(name) for name in MODULES} - {""} <= set(FLOOR)


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        if name
        for target in imported(name)
        if target and top(target) != top(name) and FLOOR[top(target)] >= FLOOR[top(name)]
    ]
    assert not wrong


def test_no_two_modules_import_each_other():
    inside = {name: [t for t in imported(name) if t != name] for name in MODULES if MODULES[name].name != "__init__.py"}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name in done or name not in inside:
            return
        for target in inside[name]:
            walk(target, (*way, name))
        done.add(name)

    for name in inside:
        walk(name, ())


def test_packages_are_entered_by_their_faces():
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        for target in imported(name)
        if package(target) != package(name) and "." in target and target not in OWN_FACE
        # the pytest plugin hands pytest a file; the root and `testing` are public names, loaded without their packages
        if name not in ("", "testing", "pytest_plugin")
    ]
    assert not wrong


def reached(start: str) -> set[str]:
    """Every module that importing `start` and calling what is in it can load."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += [t for t in imported(name) if t in MODULES]
        if MODULES[name].name != "__init__.py" and "." in name:
            waiting.append(name.rpartition(".")[0])
    return found


def test_nothing_that_a_run_reaches_names_a_family():
    installed = {point.name for point in entry_points(group="btrm.families")}
    names = (installed | {"gemma", "llama", "mistral", "qwen"}) - {"checkpoint"}  # an ordinary word too
    named = re.compile("|".join(sorted(names)), re.IGNORECASE)
    modules = reached("run")
    assert {"training.loop", "model.reward", "packing.rows", "families.family"} <= modules
    for name in modules - {"", *(m for m in MODULES if top(m) in ("preflight", "cli"))}:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else getattr(node, "id", getattr(node, "attr", None))
            if isinstance(text, str) and id(node) not in docs:
                assert not named.search(text), f"{name}:{node.lineno} names a family: {text!r}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_functions_are_small(name):
    text = MODULES[name].read_text(encoding="utf-8")
    max_lines, max_parameters = LARGER.get(name, (MAX_LINES, MAX_PARAMETERS))
    assert text.count("\n") <= max_lines
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        length = node.end_lineno - node.lineno + 1 - docstring
        assert length <= MAX_FUNCTION_LINES, f"{name}:{node.name} has {length} lines"
        if any("click." in ast.unparse(decorator) for decorator in node.decorator_list):
            continue  # the flags of a command are its parameters
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [a for a in arguments if a.arg not in ("self", "cls")]
        assert len(own) <= max_parameters, f"{name}:{node.name} has {len(own)} parameters"


def test_packages_are_small():
    sizes: dict[str, int] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py" and "." in name:
            folder = name.rpartition(".")[0]
            sizes[folder] = sizes.get(folder, 0) + 1
    too_large = {name: size for name, size in sizes.items() if size > MAX_MODULES and name != "training"}
    assert not too_large
    assert sizes["training"] <= MAX_TRAINING
