"""A broken family harms nobody but those who use it: each way of being broken, installed beside working families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import processes
from support.environments import Environment, write_wheel

from btrm_core.families.new_family import package_files

GOOD = "from btrm_core import Recipe, hookimpl\n\n\n@hookimpl\ndef recipe():\n    return Recipe(learning_rate=1e-5)\n"
CLASSY = (
    "from btrm_core import hookimpl\n\n\nclass Family:\n    @hookimpl\n    def recipe(self):\n        return None\n"
)

# Family -> (source, what the entry point names, cause). Each is the only family of a distribution btrm-<family> 1.0.
BROKEN_WHEN_LOADED = {
    "importerror": ("raise ImportError('its data file is gone')\n", "btrm_importerror", "ImportError: its data file"),
    "syntaxerror": ("def broken(:\n", "btrm_syntaxerror", "SyntaxError: invalid syntax"),
    "missing": ("import nobody_has_this\n", "btrm_missing", "ModuleNotFoundError: No module named 'nobody_has_this'"),
    "classy": (CLASSY, "btrm_classy:Family", "btrm_classy:Family is a class; the entry point must name a module"),
    "misspelt": (
        GOOD.replace("def recipe", "def recipes"),
        "btrm_misspelt",
        "it implements 'recipes', which is no hook. Did you mean 'recipe'?",
    ),
}
BROKEN_WHEN_ASKED = {
    "raising": (
        GOOD.replace("return Recipe(learning_rate=1e-5)", "return 1 / 0"),
        "btrm_raising",
        "family 'raising' (btrm-raising 1.0): hook recipe failed: ZeroDivisionError: division by zero",
    ),
    "wrongtype": (
        GOOD.replace("Recipe(learning_rate=1e-5)", "{'learning_rate': 1e-5}"),
        "btrm_wrongtype",
        "family 'wrongtype' (btrm-wrongtype 1.0): hook recipe answered with {'learning_rate': 1e-05} (dict); "
        "expected a Recipe",
    ),
}
FUTURE = "it needs btrm>=99, but btrm "
TWINS = "its name is offered by btrm-twin 1.0 and by btrm-twin-too 1.0"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One environment with every broken family in it and one that works."""
    directory = tmp_path_factory.mktemp("isolation")
    wheels = [
        write_wheel(directory, f"btrm-{name}", entry_points={name: value}, files={f"btrm_{name}/__init__.py": source})
        for name, (source, value, _) in {**BROKEN_WHEN_LOADED, **BROKEN_WHEN_ASKED}.items()
    ]
    for distribution in ("btrm-twin", "btrm-twin-too"):
        module = distribution.replace("-", "_")
        files = {f"{module}/__init__.py": GOOD}
        wheels.append(write_wheel(directory, distribution, entry_points={"twin": module}, files=files))
    wheels.append(
        write_wheel(
            directory,
            "btrm-future",
            entry_points={"future": "btrm_future"},
            files={"btrm_future/__init__.py": "raise RuntimeError('imported although it does not fit')\n"},
            requires=["btrm>=99"],
        )
    )
    fine = {path: text for path, text in package_files("fine").items() if path.startswith("btrm_fine/")}
    wheels.append(write_wheel(directory, "btrm-fine", entry_points={"fine": "btrm_fine"}, files=fine))
    made = Environment(directory / "environment")
    made.install(*wheels)
    return made


@pytest.fixture(scope="module")
def listing(environment: Environment) -> dict[str, list[dict[str, str]]]:
    """What `btrm families --json` says: name -> its entries."""
    done = environment.btrm("families", "--json")
    assert done.returncode == 0, done.stderr
    entries: dict[str, list[dict[str, str]]] = {}
    for entry in json.loads(done.stdout):
        entries.setdefault(entry["name"], []).append(entry)
    return entries


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that the user can put right."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", [*BROKEN_WHEN_LOADED, *BROKEN_WHEN_ASKED])
def test_a_broken_family_is_listed_with_its_cause(listing, name):
    (entry,) = listing[name]
    assert (entry["status"], entry["distribution"], entry["version"]) == ("broken", f"btrm-{name}", "1.0")
    assert entry["cause"].startswith({**BROKEN_WHEN_LOADED, **BROKEN_WHEN_ASKED}[name][2])
    assert "\n" not in entry["cause"]


def test_a_name_from_two_distributions_is_refused_and_both_are_named(listing):
    assert [(entry["distribution"], entry["status"]) for entry in listing["twin"]] == [
        ("btrm-twin", "broken"),
        ("btrm-twin-too", "broken"),
    ]
    assert {entry["cause"] for entry in listing["twin"]} == {TWINS}


def test_a_family_for_another_btrm_is_not_even_imported(listing):
    (entry,) = listing["future"]
    assert entry["status"] == "broken"
    assert entry["cause"].startswith(FUTURE)


def test_the_other_families_work(environment, listing):
    assert {name for name, (entry, *_) in listing.items() if entry["status"] == "ok"} >= {
        *("checkpoint", "gemma", "gemma2", "gemma3", "llama3", "mistral", "qwen3"),
        "fine",
    }
    done = environment.btrm("families", "fine")
    assert done.returncode == 0, done.stderr
    assert "btrm-fine 1.0" in done.stdout


def test_the_table_shows_origin_and_cause(environment):
    done = environment.btrm("families")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("missing ")]
    assert line.split() == ["missing", "btrm-missing", "1.0", "broken", *BROKEN_WHEN_LOADED["missing"][2].split()]


def test_debug_shows_the_tracebacks(environment):
    done = environment.btrm("families", "--debug")
    assert done.returncode == 0
    assert "Traceback (most recent call last)" in done.stderr
    assert str(Path("btrm_importerror", "__init__.py")) in done.stderr
    assert "ImportError: its data file is gone" in done.stderr
    assert done.stdout == environment.btrm("families").stdout


@pytest.mark.parametrize("name", [*BROKEN_WHEN_LOADED, "twin", "future"])
def test_naming_a_broken_family_is_an_error_of_the_user(environment, name):
    line = error_line(environment.btrm("families", name))
    version = "1.0"
    assert line.startswith(f"btrm: family '{name}' (btrm-{name} {version}) is broken: ")
    cause = {"twin": TWINS, "future": FUTURE}.get(name) or BROKEN_WHEN_LOADED[name][2]
    assert cause in line
    assert line.endswith(f". Update, repair or uninstall btrm-{name}")


@pytest.mark.parametrize("name", BROKEN_WHEN_ASKED)
def test_a_hook_that_fails_is_an_error_of_the_user(environment, name):
    assert error_line(environment.btrm("families", name)) == f"btrm: {BROKEN_WHEN_ASKED[name][2]}"


def beside(packages: str, *arguments: str) -> None:
    """`btrm ARGUMENTS` in a child that sees these packages too."""
    sys.path.insert(0, packages)
    processes.command(*arguments)


def test_training_with_a_broken_family_stops_before_anything_is_written(environment, tmp_path):
    output = tmp_path / "output"
    given = ("train", "--family", "syntaxerror", "--output", str(output))
    done = processes.ended(beside, str(environment.packages), *given)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("btrm: family 'syntaxerror' (btrm-syntaxerror 1.0) is broken: ")
    assert not output.exists()


def test_an_uninstalled_family_vanishes(environment, tmp_path):
    files = {"btrm_gone/__init__.py": GOOD}
    environment.install(write_wheel(tmp_path, "btrm-gone", entry_points={"gone": "btrm_gone"}, files=files))
    assert environment.btrm("families", "gone").returncode == 0
    environment.uninstall("btrm-gone")
    assert error_line(environment.btrm("families", "gone")).startswith("btrm: unknown family 'gone'.")
