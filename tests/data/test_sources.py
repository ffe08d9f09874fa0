from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import hub_server

from btrm_core.data.sources import Source, resolve
from btrm_core.errors import DataError

ROW = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def write(path: Path, text: str = json.dumps(ROW) + "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def found(spec: str | Path, root: Path) -> list[Source]:
    return list(resolve([str(spec)], root).sources)


@pytest.mark.parametrize(
    ("name", "kind", "subset"),
    [
        ("a.jsonl", "jsonl", "a"),
        ("a.ndjson", "jsonl", "a"),
        ("a.v2.jsonl.gz", "jsonl", "a.v2"),
        ("a.json", "json", "a"),
        ("a.json.gz", "json", "a"),
        ("a.csv", "csv", "a"),
        ("a.tsv.gz", "csv", "a"),
        ("A.JSONL", "jsonl", "A.JSONL"),
        ("a.parquet", "parquet", "a"),
    ],
)
def test_files_are_read_by_their_ending(tmp_path, name, kind, subset):
    source = found(write(tmp_path / name), tmp_path / "cache")[0]
    assert (source.kind, source.name, source.subset) == (kind, name, subset)


def test_the_place_is_shown_as_the_user_wrote_it(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert found("data/a.jsonl", tmp_path / "cache")[0].where == "data/a.jsonl"
    assert found("data/", tmp_path / "cache")[0].where == "data/a.jsonl"


def test_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError) as error:
        resolve([f"{tmp_path}/trian.jsonl"], tmp_path / "cache")
    assert str(error.value) == (
        f"no such file or folder: '{tmp_path}/trian.jsonl'. Did you mean 'train.jsonl'? "
        "A Hub data set is written org/name or org/name:split."
    )


def test_missing_file_without_a_near_name_lists_the_folder(tmp_path):
    for number in range(8):
        write(tmp_path / f"part{number}.jsonl")
    with pytest.raises(DataError) as error:
        resolve([f"{tmp_path}/zzzz"], tmp_path / "cache")
    assert "The folder has: part0.jsonl, part1.jsonl, part2.jsonl" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'.*nowhere' does not exist either"):
        resolve([f"{tmp_path}/nowhere/a.jsonl"], tmp_path / "cache")


@pytest.mark.parametrize("spec", ["pairs", "pairs.jsonl", "org/pairs.jsonl", "a/b/c", "a/b:c:d:e"])
def test_what_cannot_be_a_hub_id_is_a_missing_file(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        resolve([spec], tmp_path / "cache")


def test_mistyped_folder_beside_the_right_one_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "data" / "helpful" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="Did you mean 'helpful'"):
        resolve(["data/helpfull"], tmp_path / "cache")


def test_unknown_ending_says_what_is_accepted(tmp_path):
    path = write(tmp_path / "a.txt")
    with pytest.raises(DataError) as error:
        resolve([str(path)], tmp_path / "cache")
    assert str(error.value) == (
        f"cannot tell the format of '{path}': expected a file ending in "
        ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz, .zst, .bz2 or .xz), .parquet, .arrow or .feather."
    )


def test_no_source_at_all(tmp_path):
    for specs in ([], [""]):
        with pytest.raises(DataError, match="no data given"):
            resolve(specs, tmp_path)


def test_folder_prefers_train_and_says_what_it_leaves(tmp_path):
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000.jsonl"):
        write(tmp_path / "d" / name)
    write(tmp_path / "d" / "README.md")
    write(tmp_path / "d" / ".hidden" / "train.jsonl")
    write(tmp_path / "d" / "dataset_infos.json")
    resolved = resolve([str(tmp_path / "d")], tmp_path / "cache")
    assert [source.name for source in resolved.sources] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    assert resolved.notes == (f"{tmp_path}/d: the split 'train' is used; left out: data/test-00000.jsonl",)
    chosen = resolve([f"{tmp_path}/d:test"], tmp_path / "cache")
    assert [source.name for source in chosen.sources] == ["test-00000.jsonl"]


def test_folder_whose_splits_are_folders(tmp_path):
    write(tmp_path / "d" / "train" / "0.jsonl")
    write(tmp_path / "d" / "validation" / "0.jsonl")
    assert [s.where for s in found(tmp_path / "d", tmp_path / "c")] == [f"{tmp_path}/d/train/0.jsonl"]


def test_folder_without_split_names_is_read_whole(tmp_path):
    write(tmp_path / "d" / "a.jsonl")
    write(tmp_path / "d" / "b.csv")
    resolved = resolve([str(tmp_path / "d")], tmp_path / "cache")
    assert len(resolved.sources) == 2
    assert resolved.notes == ()


def test_folder_with_several_splits_but_no_train(tmp_path):
    write(tmp_path / "d" / "test.jsonl")
    write(tmp_path / "d" / "validation.jsonl")
    with pytest.raises(DataError) as error:
        resolve([f"{tmp_path}/d"], tmp_path / "cache")
    assert str(error.value) == (
        f"'{tmp_path}/d' has no split 'train': it has test, validation. Name one, for example '{tmp_path}/d:test'."
    )
    with pytest.raises(DataError, match=r"no split 'tset': it has test, validation\. Did you mean 'test'"):
        resolve([f"{tmp_path}/d:tset"], tmp_path / "cache")


def test_empty_folder(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        resolve([f"{tmp_path}/d"], tmp_path / "cache")


def test_saved_data_sets(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([ROW])
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "two")
    one, two = found(tmp_path / "one", tmp_path / "c")[0], found(tmp_path / "two", tmp_path / "c")[0]
    assert (one.kind, one.name, one.table[0]) == ("table", "one", ROW)
    assert two.table[0] == ROW
    assert "left out: test" in resolve([f"{tmp_path}/two"], tmp_path / "c").notes[0]
    assert resolve([f"{tmp_path}/two:test"], tmp_path / "c").notes == (
        f"{tmp_path}/two: the split 'test' is used; left out: train",
    )
    with pytest.raises(DataError, match="has no splits"):
        resolve([f"{tmp_path}/one:test"], tmp_path / "c")


def test_broken_saved_data_set(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot load the data set folder") as error:
        resolve([f"{tmp_path}/d"], tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_content_hash_follows_the_content_and_not_the_name_or_time(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    first = found(a, tmp_path / "c")[0].content
    os.utime(a, (1, 1))
    assert found(a, tmp_path / "c")[0].content == first == found(b, tmp_path / "c")[0].content
    write(a, json.dumps({**ROW, "chosen": "four"}))
    assert found(a, tmp_path / "c")[0].content != first


def test_change_of_equal_size_with_the_old_time_is_noticed(tmp_path, monkeypatch):
    from btrm_core.cache import sealed

    monkeypatch.setattr(sealed, "_SETTLED_SECONDS", -1.0)  # remember the hash of a file this young
    path = write(tmp_path / "a.jsonl", "old content")
    before = path.stat()
    first = found(path, tmp_path / "c")[0].content
    time.sleep(0.02)
    path.write_text("new content")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found(path, tmp_path / "c")[0].content != first


def load_in_a_process(address: str, home: Path, *specs: str) -> list[str]:
    """Load each source in one new process (the Hub client reads its address when it is imported)."""
    code = (
        "import sys\nfrom btrm_core.data import load_pairs\nfrom btrm_core.errors import DataError\n"
        "for spec in sys.argv[1:]:\n"
        "    try:\n        data = load_pairs([spec])\n        print(len(data), data[0].id, data.fingerprint)\n"
        "    except DataError as error:\n        print(error)\n"
    )
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "BTRM_CACHE": str(home / "b"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, *specs]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


NOT_CACHED = "The Hub cannot be reached and the data set is not in its cache; pass a local file."


def test_hub_data_sets(tmp_path):
    rows = [json.dumps({**ROW, "prompt": f"{n}?"}) + "\n" for n in range(4)]
    files = {"train.jsonl": "".join(rows[:3]).encode(), "test.jsonl": rows[3].encode()}
    with hub_server.serve("some-org/pairs", files) as address:
        lines = load_in_a_process(
            address,
            tmp_path,
            *(
                "some-org/pairs",
                "some-org/pairs:test",
                "some-org/pairs:default:test",
                "some-org/pairs:nope",
                "org/other",
            ),
        )
    offline = load_in_a_process(address, tmp_path, "some-org/pairs:test", "org/other")
    assert [line.rpartition(" ")[0] for line in lines[:3]] == ["3 some-org/pairs:1", *["1 some-org/pairs:1"] * 2]
    assert lines[3:] == [
        "cannot load 'some-org/pairs:nope' from the Hugging Face Hub: Unknown split \"nope\". Should be one of "
        "['train', 'test']. Check the id, the split and the connection, or pass a local file.",
        "'org/other' is neither a file here nor a data set of the Hugging Face Hub. Check the spelling; for a private "
        "data set, log in with 'hf auth login'.",
    ]
    assert offline[0] == lines[1]  # from the Hub client's cache, with the same fingerprint
    assert offline[1].startswith("cannot load 'org/other' from the Hugging Face Hub: ")
    assert offline[1].endswith(NOT_CACHED)
