"""What CONTRIBUTING and CHANGELOG say of hooks and families is what the code says.

`pytest tests/docs/test_contributing.py --update-golden` writes the generated parts of CONTRIBUTING anew.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from test_layering import LAYERS
from transformers import AutoConfig, AutoTokenizer

from btrm_core.families import PROJECT, hookspecs, list_families, load
from btrm_core.families.hookspecs import HOOKS
from btrm_core.families.new_family import package_files
from btrm_core.model import build_toy
from btrm_core.preflight.conformance import runner
from btrm_core.preflight.conformance.probe import answers
from btrm_core.preflight.conformance.runner import FamilyConformance

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "btrm_core"
NAME = "parrot"
OPTIONAL = {"init_head"}
"""Answered by btrm's default for every family that comes with it; tests/preflight and tests/families give their own."""
LANGUAGES = {".toml": "toml", ".py": "python", ".jinja": "jinja", ".md": "markdown"}

TUTORIAL = """\
`btrm new-family {name}` writes the package below into `btrm-{name}/`. It is complete: install it, and its test passes.

```
btrm new-family {name}
pip install -e './btrm-{name}[test]'
pytest btrm-{name}
```

Then make it yours: say in `claims` which checkpoints you mean, name the tokens of their vocabulary, and write down
their chat format, which ends every conversation in the token where the reward is read. Look at the result with
`btrm families {name} --model OWNER/NAME`, check it against the real tokenizer with
`btrm families {name} --check --model OWNER/NAME`, and publish it as any other package. A hook that you leave out is
answered by btrm. Nothing in btrm has to change for a new family, and nothing in btrm knows the name of one.

The checks also run without a test file, as `pytest --btrm-family={name}`. They make a tokenizer and a two-layer model
from the recipe's tiny shape; a family without one gives the test class `special_tokens` and `model` (config values), or
`tokenizer` (a directory).
"""


def signature(name: str) -> str:
    """A hook as it is written: its name, arguments and what it returns."""
    return f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", "")


def tutorial() -> str:
    """How to write a family: every file of the generated package, literally."""
    parts = [TUTORIAL.format(name=NAME)]
    for path, text in package_files(NAME).items():
        if text:
            fence = "````" if "```" in text else "```"
            parts.append(f"`{path}`\n\n{fence}{LANGUAGES[Path(path).suffix]}\n{text}{fence}\n")
    checks = [
        f"| {name.removeprefix('test_').replace('_', ' ')} | {inspect.getdoc(getattr(FamilyConformance, name))} |"
        for name in runner._checks()
    ]
    parts.append("What the test class checks:\n\n| check | proves |\n|---|---|\n" + "\n".join(checks) + "\n")
    return "\n".join(parts)


def hooks() -> str:
    """The specification of every hook, from its docstring."""
    parts = []
    for name in HOOKS:
        question, _, rest = (inspect.getdoc(getattr(hookspecs, name)) or "").partition("\n")
        lines = [f"### `{signature(name)}`", "", f"**{question}**", ""]
        for section, body in re.findall(r"^(\w+):(.*?)(?=^\w+:|\Z)", rest, re.MULTILINE | re.DOTALL):
            if section == "Args":
                lines += [f"*{section}*", ""]
                for argument, text in re.findall(r"^    (\w+):(.*?)(?=^    \w+:|\Z)", body, re.MULTILINE | re.DOTALL):
                    lines.append(f"- `{argument}`: {' '.join(text.split())}")
            else:
                lines.append(f"*{section}*: {' '.join(body.split())}")
            lines.append("")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def charter(name: str) -> str:
    """What a package or module says it is, in the first paragraph of its docstring."""
    path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.sub(rf"^{name.capitalize()}: (.)", lambda found: found.group(1).upper(), text)


def tour() -> str:
    """Packages and modules in import order with their charters."""
    names = [n for line in LAYERS.split("\n") for n in line.split()]
    there = [n for n in names if (PACKAGE / n).is_dir() or (PACKAGE / f"{n}.py").exists()]
    rows = [f"| `{name}` | {charter(name)} |" for name in there]
    return "\n".join(["| | what it decides |", "|---|---|", *rows])


def test_the_files_to_change_and_the_ways_through_the_house_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A tour")[2].partition("## Habits")[0]
    hand_written = text.partition("### What you change")[2]
    named = {code for code in re.findall(r"`([\w/.]+(?:\.py|\.md|/))`", hand_written) if "NAME" not in code}
    assert len(named) > 40
    missing = {code for code in named if not (PACKAGE / code).exists() and not (ROOT / code).exists()}
    assert not missing
    ways = re.findall(r"^  (\w[\w/, ]+?)   ", text, re.MULTILINE)
    assert len(ways) > 15
    for way in ways:
        folder = ""
        for place in way.split(", "):
            folder = place.rpartition("/")[0] or folder
            name = place.rpartition("/")[2]
            found = [PACKAGE / folder / name, PACKAGE / folder / f"{name}.py"]
            assert any(path.exists() for path in found), f"{way} is no place in btrm_core"


@pytest.mark.parametrize(("section", "generate"), [("tour", tour), ("family tutorial", tutorial), ("hooks", hooks)])
def test_generated_part_of_contributing_is_current(section, generate, update_golden):
    file = ROOT / "CONTRIBUTING.md"
    begin, end = f"<!-- {section}: begin -->\n", f"<!-- {section}: end -->"
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    text, closed, after = rest.partition(end)
    assert found, f"CONTRIBUTING.md has no line {begin!r}"
    assert closed, f"CONTRIBUTING.md has no line {end!r}"
    if update_golden:
        text = f"\n{generate()}\n"
        file.write_text("".join([before, begin, text, end, after]), encoding="utf-8")
    assert text.strip() == generate().strip(), "run pytest tests/docs/test_contributing.py --update-golden"


def test_the_tutorial_holds_the_generated_package_literally():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path, content in package_files(NAME).items():
        assert content in text, path


def test_every_hook_is_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in HOOKS:
        assert f"### `{signature(name)}`" in text


def hook_entries() -> list[str]:
    """The lines under *Hooks* in CHANGELOG, the newest release first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### Hooks\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return [line for section in sections for line in section.splitlines() if line.startswith("- `")]


def test_every_signature_is_recorded_in_the_changelog():
    latest: dict[str, str] = {}
    for line in hook_entries():
        recorded = line.split("`")[1]
        latest.setdefault(recorded.partition("(")[0], line)
    for name in HOOKS:
        assert name in latest, f"hook {name} is new: say so under *Hooks* in CHANGELOG.md"
        assert f"`{signature(name)}`" in latest[name], (
            f"the signature of {name} has changed: record {signature(name)} under *Hooks* in CHANGELOG.md"
        )
    gone = [line for name, line in latest.items() if name not in HOOKS and "removed" not in line]
    assert not gone, "these hooks are gone: say so under *Hooks* in CHANGELOG.md"


def test_every_hook_is_implemented_by_a_family_and_by_the_package_that_conformance_breaks():
    """A hook ships only with a real family that needs it, and the kit is tried on a package that answers it."""
    written = re.findall(r"^@hookimpl\ndef (\w+)", package_files(NAME)[f"btrm_{NAME}/__init__.py"], re.MULTILINE)
    real = {hook for entry in list_families() if entry.distribution == PROJECT for hook in load(entry.name).hooks}
    third = {
        hook
        for path in (ROOT / "tests" / "third_party").glob("*/btrm_*/__init__.py")
        for hook in re.findall(r"^@hookimpl\ndef (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(HOOKS) - OPTIONAL <= real
    assert set(HOOKS) <= real | third | OPTIONAL
    assert set(written) <= set(HOOKS)


def test_conformance_asks_every_hook(tmp_path):
    """The probe that compares two processes asks each hook, so none can answer unsteadily unseen."""
    family = load("llama3")
    directory = tmp_path / "toy"
    build_toy(family.recipe().tiny, directory)
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert set(answers(family, config, tokenizer)) == set(HOOKS)
