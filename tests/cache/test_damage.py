"""Whatever was done to the cache: it is noticed, said in one line and made anew, and never trained on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chat_samples import make_chat

from btrm_core import cache
from btrm_core.cache import entries
from btrm_core.data import TokenStore, encode_pairs, load_pairs
from btrm_core.errors import DataError
from btrm_core.families import load
from btrm_core.model import toy

BLOCK = 4096


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def damages_told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("the cache entry ")]


def zero_a_block(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = len(content) // 2
    content[start : start + BLOCK] = bytes(len(content[start : start + BLOCK]))
    file.write_bytes(content)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def write_entry(folder: Path) -> None:
    (folder / "data.arrow").write_bytes(bytes(range(256)) * 64)
    (folder / "report.json").write_text("{}")
    (folder / "inner").mkdir()
    (folder / "inner" / "more").write_text("more")


def a_folder_in_its_place(entry: Path) -> None:
    (entry / "data.arrow").unlink()
    (entry / "data.arrow").mkdir()


def anothers(entry: Path) -> None:
    """Everything of another entry, which is whole by itself."""
    other = cache.build_once(entry.with_name("other"), lambda folder: (folder / "data.arrow").write_text("x"))  # type: ignore[arg-type,return-value]
    shutil.rmtree(entry)
    shutil.copytree(other.path, entry)


def edited_record(entry: Path) -> None:
    record = json.loads((entry / cache.COMPLETE).read_text())
    del record["files"]["data.arrow"]
    (entry / cache.COMPLETE).write_text(json.dumps(record))
    (entry / "data.arrow").unlink()


def a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("no folder")


def a_link_to_nothing(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to(entry.with_name("gone"))


def emptied(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("content of data.arrow has changed", lambda entry: zero_a_block(entry / "data.arrow")),
    ("content of data.arrow has changed", lambda entry: flip_a_bit(entry / "data.arrow")),
    ("content of inner/more has changed", lambda entry: flip_a_bit(entry / "inner" / "more")),
    ("data.arrow has 16,284 bytes, expected 16,384", lambda entry: os.truncate(entry / "data.arrow", 16_284)),
    ("data.arrow has 0 bytes", lambda entry: os.truncate(entry / "data.arrow", 0)),
    ("data.arrow is missing", lambda entry: (entry / "data.arrow").unlink()),
    ("data.arrow is missing", a_folder_in_its_place),
    ("foreign.arrow does not belong to it", lambda entry: (entry / "foreign.arrow").write_text("x")),
    ("report.json has 13 bytes", lambda entry: (entry / "report.json").write_text('{"given": 12}')),
    ("complete.json has changed", edited_record),
    ("complete.json has changed", anothers),
    ("complete.json is missing", lambda entry: (entry / cache.COMPLETE).unlink()),
    ("complete.json is no record", lambda entry: (entry / cache.COMPLETE).write_text("[1]")),
    ("complete.json is no record", lambda entry: (entry / cache.COMPLETE).write_bytes(b"\x00" * 200)),
    ("complete.json is no record", lambda entry: (entry / cache.COMPLETE).write_text("[" * 100_000)),
    ("complete.json is missing", emptied),
    ("cannot be read: Not a directory", a_file),
    ("complete.json is missing", a_link_to_nothing),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGES, ids=[str(number) for number in range(len(DAMAGES))])
def test_every_damage_is_noticed_and_built_anew(
    reason: str, damage: Callable[[Path], object], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = cache.build_once(root / "pairs" / "key", write_entry).path
    damage(entry)
    capsys.readouterr()
    cache.build_once(entry, write_entry)
    told = damages_told(capsys)
    assert len(told) == 1
    assert reason in told[0]
    assert cache.damage(entry) is None
    assert (entry / "data.arrow").read_bytes() == bytes(range(256)) * 64
    cache.build_once(entry, lambda _: pytest.fail("it is whole"))
    assert damages_told(capsys) == []


def test_a_disk_that_keeps_nothing_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_record", lambda name, _: {"files": {"x": [1, "0"]}, "seal": entries.seal(name, {})})
    with pytest.raises(DataError, match=r"does not last: complete\.json has changed .* right after it was written"):
        cache.build_once(root / "pairs" / "key", write_entry)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Question {n}?", "chosen": "word " * (n % 70) + "yes", "rejected": "no"} for n in range(200)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("damage", [zero_a_block, flip_a_bit])
@pytest.mark.parametrize("name", ["groups.arrow", "pairs.arrow", "report.json"])
def test_damaged_tokens_are_never_trained_on(
    name: str, damage: Callable[[Path], None], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, chat = load_pairs([str(source)]), make_chat()
    first = encode_pairs(data, chat, 64)
    digest, folder = first.digest, first.folder
    assert folder is not None
    del first  # what is mapped would show the damage
    damage(folder / name)
    with pytest.raises(DataError, match=f"cannot be read .*{name} has changed.*start again to build it anew"):
        TokenStore.open(folder)
    again = encode_pairs(data, chat, 64)
    assert len(damages_told(capsys)) == 1
    assert (again.folder, again.digest) == (folder, digest)


@pytest.mark.parametrize("name", ["pairs.arrow", "prompt_hash.npy", "report.json"])
def test_damaged_pairs_are_read_anew(name: str, source: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [pair for pair in load_pairs([str(source)])]
    (entry,) = (root / "pairs").iterdir()
    zero_a_block(entry / name)
    data = load_pairs([str(source)])
    assert len(damages_told(capsys)) == 1
    assert list(data) == first


def test_a_damaged_toy_is_made_anew(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = load("llama3")
    made = toy.toy_model(family, root)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    zero_a_block(made / "model.safetensors")
    assert toy.toy_model(family, root) == made
    assert len(damages_told(capsys)) == 1
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


@pytest.mark.parametrize("edit", [flip_a_bit, zero_a_block, lambda file: file.write_bytes(b"")])
def test_an_edited_value_is_not_believed(
    edit: Callable[[Path], object], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "leakage" / "a.json"
    assert cache.kept_value(path) is None
    cache.keep_value(path, {"ok": False, "reason": "it leaks"})
    assert cache.kept_value(path) == {"ok": False, "reason": "it leaks"}
    assert damages_told(capsys) == []
    shutil.copy(path, path.with_name("b.json"))
    assert cache.kept_value(path.with_name("b.json")) is None, "another's verdict"
    edit(path)
    assert cache.kept_value(path) is None
    assert len(damages_told(capsys)) == 2
