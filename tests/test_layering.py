"""Imports point left: every module imports only what stands before it in this list."""

import ast
from pathlib import Path

import btrm_core

ORDER = """
errors settings config
hookspecs defaults run_settings family families family_view new_family
tokenizers templates truncation chat
issues cache sources readers formats convert data data_checks
layout batch packing lengths encoding grouping encoded
balance planner rows kernels attention model
loss metrics evaluate inspection failure offload profiling quantized joining distributed agreement
basemodel adapters loader inference startup
memory architecture hardware utilisation schedule report trainer
toy prepare checkpoint card interrupt universal resume saving summary run
loading scorer records partial scoring
testing pytest_plugin doctor_checks doctor_examples doctor_model doctor doctor_view cli_doctor
estimate launch cli __main__
""".split()
MAX_LINES = 350
MAX_FUNCTION_LINES = 60
ROOT = Path(btrm_core.__file__).parent


def sources():
    return sorted(ROOT.rglob("*.py"))


def layer(path: Path) -> str:
    return public(path.relative_to(ROOT).parts[0].removesuffix(".py"))


def public(module: str) -> str:
    """`conformance` is the inside of `testing`."""
    return {"conformance": "testing"}.get(module, module)


def imported(path: Path) -> set[str]:
    """The layers a module imports at run time, also inside functions."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            found |= {public(alias.name.split(".")[1]) for alias in node.names if alias.name.startswith("btrm_core.")}
        elif node.module == "btrm_core":
            found |= {public(alias.name) for alias in node.names}
        elif node.module and node.module.startswith("btrm_core."):
            found.add(public(node.module.split(".")[1]))
    return found & {layer(p) for p in sources()}


def test_every_module_is_listed_once():
    assert len(ORDER) == len(set(ORDER))
    assert {layer(path) for path in sources()} - {"__init__"} <= set(ORDER)


def test_imports_point_left():
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{layer(path)} imports {name}"
        for path in sources()
        for name in imported(path) - {layer(path)}
        if layer(path) != "__init__" and place[name] > place[layer(path)]
    ]
    assert not wrong


def test_the_trainer_knows_no_family():
    names = ("gemma", "llama", "mistral", "qwen")
    for path in sources():
        text = path.read_text().lower()
        if layer(path) in (
            "trainer",
            "model",
            "attention",
            "loader",
            "inference",
            "prepare",
            "run",
            "saving",
            "resume",
        ):
            assert not [name for name in names if f'"{name}' in text], path


def test_modules_and_functions_are_small():
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= MAX_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                length = node.end_lineno - node.lineno + 1 - docstring
                assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.name} has {length} lines"
