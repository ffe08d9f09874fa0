"""The wheel of this project, installed where nothing is but what it requires, used from outside the clone."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.environments import Environment, build_wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PARTS = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "btrm_core", "plugins")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"), PARTS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """btrm and what it requires without any extra: no tool of its developers, no clone."""
    made = Environment(tmp_path_factory.mktemp("stranger") / "environment", PROJECT["project"]["dependencies"])
    made.install(wheel)
    return made


def done_well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_its_packages(wheel):
    packages = [ROOT / name for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    assert sorted(p for p in (ROOT / "plugins").iterdir() if any(p.glob("*.py"))) == sorted(packages[1:])
    source = {
        str(path.relative_to(package.parent))
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {name for name in inside if ".dist-info/" not in name} == source


def test_installed_alone_it_lists_families_trains_and_scores(environment, tmp_path):
    where = "import json, sys, btrm_core, importlib.util as u; print(json.dumps([btrm_core.__file__, sys.path, "
    where += "[n for n in ('pytest', 'matplotlib', 'fastapi', 'peft') if u.find_spec(n)]]))"
    module, path, extras = json.loads(done_well(environment.run("-c", where, cwd=tmp_path)))
    assert Path(module).is_relative_to(environment.directory)
    assert not [entry for entry in path if Path(entry).is_relative_to(ROOT) and "site-packages" not in entry]
    assert extras == []

    command = environment.directory / "bin" / "btrm"  # the script that pip makes
    families = done_well(environment.run(str(command), "families", cwd=tmp_path))
    built_in = PROJECT["project"]["entry-points"]["btrm.families"]
    assert {line.split()[0] for line in families.splitlines() if line} >= set(built_in)
    assert (
        done_well(environment.run(str(command), "--version", cwd=tmp_path)).split()[-1] == PROJECT["project"]["version"]
    )

    done_well(environment.run(str(command), "train", "--family", "llama3", "--max-steps", "2", cwd=tmp_path))
    (model,) = tmp_path.rglob("btrm.json")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hello", "response": "Good day."}) + "\n", encoding="utf-8")
    score = ("score", str(model.parent), str(rows), "-o", str(tmp_path / "scored.jsonl"))
    done_well(environment.run(str(command), *score, cwd=tmp_path))
    (line,) = (tmp_path / "scored.jsonl").read_text(encoding="utf-8").splitlines()
    assert isinstance(json.loads(line)["reward"], float)

    done_well(environment.run(str(command), "new-family", "parrot", cwd=tmp_path))
    assert (tmp_path / "btrm-parrot" / "btrm_parrot" / "py.typed").is_file()


def test_what_an_extra_is_needed_for_says_which(environment, tmp_path):
    """An environment without extras never ends in a traceback: the way on is named."""
    for arguments, extra in {
        ("serve", "nowhere"): "serve",
        ("train", "--family", "llama3", "--lora-rank", "4", "--max-steps", "1"): "lora",
    }.items():
        done = environment.btrm(*arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert re.search(rf"btrm\[{extra}\]", done.stderr), done.stderr
