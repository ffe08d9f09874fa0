from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from btrm_core import cache, files
from btrm_core.cache import sealed
from btrm_core.errors import DataError


def test_root_is_the_argument_then_the_environment_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BTRM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root() == tmp_path / ".cache" / "btrm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_root() == Path("/xdg/btrm")
    monkeypatch.setenv("BTRM_CACHE", "~/own")
    assert cache.cache_root() == tmp_path / "own"
    assert cache.cache_root("~/given") == tmp_path / "given"


def write_x(folder: Path) -> None:
    (folder / "x").write_text("made")


def test_entry_is_built_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        write_x(folder)

    for _ in range(2):
        assert (cache.build_once(tmp_path / "e", build).path / "x").read_text() == "made"
    assert len(calls) == 1
    (tmp_path / "e" / "x").write_text("cut")  # another size: damaged
    cache.build_once(tmp_path / "e", build)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_the_first_of_two_builders_wins_and_both_go_on(tmp_path):
    def slow(folder):
        (folder / "x").write_text("second")
        cache.build_once(tmp_path / "e", write_x)  # another process finishes meanwhile

    assert (cache.build_once(tmp_path / "e", slow).path / "x").read_text() == "made"
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        write_x(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(tmp_path / "e", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(28, "whatever Arrow says"), Exception("Error while serializing: I/O error: (os error 28)")],
    ids=["Arrow", "safetensors"],
)
def test_full_disk_is_one_line(error, tmp_path):
    def full(folder):
        write_x(folder)
        raise error

    with pytest.raises(DataError) as caught:
        cache.build_once(tmp_path / "e", full)
    assert list(tmp_path.iterdir()) == []
    assert str(caught.value) == (
        f"cannot write the data cache '{tmp_path}': No space left on device. "
        "Free some space, or set BTRM_CACHE to a folder on another disk."
    )


def test_remains_of_killed_processes_go_and_what_others_build_stays(tmp_path):
    with files.whole_directory(tmp_path / "other") as building:
        (tmp_path / ".building-left").mkdir()
        for path in (building, tmp_path / ".building-left"):
            os.utime(path, (time.time() - 3600,) * 2)
        cache.build_once(tmp_path / "e", write_x)
        assert {path.name for path in tmp_path.iterdir()} == {building.name, "e"}
    assert {path.name for path in tmp_path.iterdir()} == {"other", "e"}


def test_digest_depends_on_values_alone():
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1}) != files.digest({"a": 1}, {"b": 2})
    assert files.digest("\ud800") != files.digest("?")


def test_file_hash_is_remembered_once_the_file_has_settled(tmp_path, monkeypatch, capsys):
    path, root = tmp_path / "a", tmp_path / "cache"
    path.write_text("x")
    young = cache.file_sha256(path, root)
    assert not root.exists()
    monkeypatch.setattr(sealed, "_SETTLED_SECONDS", -1.0)
    assert cache.file_sha256(path, root) == young
    known = next((root / "hashes").iterdir())
    cache.keep_value(known, {**cache.kept_value(known), "sha256": "remembered"})
    assert cache.file_sha256(path, root) == "remembered"
    known.write_text(known.read_text().replace("remembered", "edited"))
    assert cache.file_sha256(path, root) == young
    assert capsys.readouterr().err.count(f"the cache entry {known} is damaged") == 1
    assert cache.file_sha256(path, root) == young
    assert capsys.readouterr().err == ""


def test_unreadable_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"cannot read '.*': Is a directory"):
        cache.file_sha256(tmp_path, tmp_path / "c")


def test_code_that_is_not_there_has_no_digest():
    with pytest.raises(FileNotFoundError, match="btrm_core has no package 'moved_away'"):
        cache.code_digest("data", "moved_away")
