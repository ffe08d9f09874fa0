"""`btrm new-family` writes a package that can be published; `test_third_party` builds, installs and checks one."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import pytest

from btrm_core.errors import ConfigError
from btrm_core.families.new_family import package_files, write_family

ROOT = Path(__file__).parents[2]


def test_it_writes_a_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = write_family("sea-dog")
    assert directory == Path("btrm-sea-dog")
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()) == [
        "README.md",
        "btrm_sea_dog/__init__.py",
        "btrm_sea_dog/chat_template.jinja",
        "btrm_sea_dog/py.typed",
        "pyproject.toml",
        "tests/test_sea_dog.py",
    ]
    project = tomllib.loads((directory / "pyproject.toml").read_text())
    assert project["project"]["name"] == "btrm-sea-dog"
    assert project["project"]["entry-points"]["btrm.families"] == {"sea-dog": "btrm_sea_dog"}


@pytest.mark.parametrize("name", ["foo", "sea-dog", "a2_b"])
def test_the_name_is_put_in_everywhere(name):
    files = package_files(name)
    module = name.replace("-", "_")
    for path, text in files.items():
        assert "myfamily" not in f"{path}{text}".lower()
    assert f'family = "{name}"' in files[f"tests/test_{module}.py"]
    for path in (f"btrm_{module}/__init__.py", f"tests/test_{module}.py"):
        ast.parse(files[path])
    jinja2.Environment().parse(files[f"btrm_{module}/chat_template.jinja"])


def test_the_module_is_short_and_clean(tmp_path):
    directory = write_family("foo", tmp_path / "package")
    assert len((directory / "btrm_foo/__init__.py").read_text().splitlines()) <= 65
    assert len((directory / "tests/test_foo.py").read_text().split("\n\n\n")[1].splitlines()) == 2
    rules = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "D"]
    for command in (["check", *rules], ["format", "--check", *rules[:2]]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_an_installed_family_is_not_written_again(tmp_path):
    message = r"family 'llama3' is installed already \(btrm [\d.]+\); choose another name"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        write_family("llama3", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_name_that_would_hide_another_package(tmp_path):
    with pytest.raises(ConfigError, match=r"^a module btrm_core is installed already; choose another name$"):
        write_family("core", tmp_path / "package")


@pytest.mark.parametrize("name", ["", "Foo", "2foo", "foo bar", "foo/..", "-foo", "foo-", "foo--bar", "föö", "foo.bar"])
def test_a_name_that_cannot_be_one(name, tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_family(name, tmp_path / "package")
    assert str(caught.value) == (
        f"'{name}' cannot be a family's name; expected small letters and digits, and single - or _ between them, such "
        "as 'my-family2'"
    )


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_family("foo", tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(ConfigError) as caught:
        write_family("foo", tmp_path / "empty")
    assert str(caught.value) == f"{tmp_path}/empty exists already; choose another --directory, or remove it"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file exists already"):
        write_family("foo", tmp_path / "file")
    with pytest.raises(ConfigError) as caught:
        write_family("foo", tmp_path / "file" / "below")
    assert str(caught.value) == f"cannot write {tmp_path}/file/below: Not a directory; choose another --directory"
