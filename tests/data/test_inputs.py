"""Files, pipes and tables as people have them, and what is written around their names."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btrm_core.data import load_pairs, pairs_from_rows
from btrm_core.data.inputs.spec import Slice, parse_spec
from btrm_core.data.inputs.streams import _ending
from btrm_core.data.issues import RowIssue
from btrm_core.data.readers import read_rows
from btrm_core.data.sources import resolve
from btrm_core.errors import DataError

ROWS = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}"} for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def read(spec: object, root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, issues = [], []
    for source in resolve([str(spec)], root / "cache").sources:
        for _, row in read_rows(source):
            if isinstance(row, RowIssue):
                issues.append(f"{row.kind}: {row.reason}")
            else:
                rows.append(row)
    return rows, issues


def packed(name: str, content: bytes) -> bytes:
    if name.endswith(".zst"):
        return pa.compress(content, "zstd", asbytes=True)
    by_ending = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return by_ending[Path(name).suffix](content)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_packed_files(tmp_path: Path, ending: str, form: str) -> None:
    content = {".jsonl": LINES, ".json": json.dumps(ROWS).encode(), ".csv": b"prompt,chosen,rejected\n0?,yes,no 0\n"}[
        form
    ]
    name = f"a{form}{ending}"
    (tmp_path / name).write_bytes(packed(name, content))
    assert read(tmp_path / name, tmp_path) == (ROWS[:1] if form == ".csv" else ROWS, [])


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_what_comes_before_a_break_is_read_and_nothing_half(tmp_path: Path, ending: str, form: str) -> None:
    rows = [{"prompt": os.urandom(900).hex(), "chosen": "a", "rejected": "b" * (n % 7)} for n in range(900)]
    if form == ".csv":
        content = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        content = json.dumps(rows) if form == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    name = f"a{form}{ending}"
    whole = packed(name, content.encode())
    (tmp_path / name).write_bytes(whole[: -len(whole) // 3])
    got, issues = read(tmp_path / name, tmp_path)
    assert got == rows[: len(got)]
    assert len(issues) == 1
    assert issues[0].startswith("unreadable ")
    assert len(got) > 0


def test_a_packed_file_without_its_ending_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(LINES))
    assert read(tmp_path / "a.jsonl", tmp_path) == (ROWS, [])


@pytest.mark.parametrize(
    ("content", "expected", "issue"),
    [
        (b'[{"a": 1}]\n[{"a": 2}]', [1, 2], None),
        (b'[{"a": 1}] [] [{"a": 2}]\n', [1, 2], None),
        (b'[{"a": 1}]\n{"a": 2}', [1], "something follows the array's closing ']'; the rest is not read"),
        (b'[{"a": 1}] and so on', [1], "something follows the array's closing ']'; the rest is not read"),
        (b'{"version": 1, "data": [{"a": 1}, {"a": 2}]}', [1, 2], None),
        (b'{\n "version": "x",\n "data": [\n  {"a": 1},\n  {"a": 2}\n ]\n}\n', [1, 2], None),
        (b'{\n "a": 1\n}\n{\n "a": 2\n}\n', [1, 2], None),
        (b'{\n "a": 1\n}\n{\n "a": oops\n}\n', [1], "not JSON: Expecting value; the rest is not read"),
        (b'{"a": 1}\n{"a": 2}\n', [1, 2], None),
        (b'{"a": 1, "a": 2}\n{"a": 3}\n', [3], "an object has the key 'a' twice"),
        (b'[{"a": 1}, {"b": {"c": 1, "c": 2}}]', [1], "an object has the key 'c' twice; the rest is not read"),
    ],
)
def test_json_is_read_to_its_end(tmp_path: Path, content: bytes, expected: list[int], issue: str | None) -> None:
    (tmp_path / "a.json").write_bytes(content)
    rows, issues = read(tmp_path / "a.json", tmp_path)
    assert [row["a"] for row in rows] == expected
    assert [text.partition(": ")[2] for text in issues] == ([issue] if issue else [])


def test_one_row_of_messages_is_a_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": messages, "rejected_response": "b"}))
    assert len(load_pairs([str(tmp_path / "a.json")])) == 1
    (tmp_path / "b.json").write_text(json.dumps({"prompt": "q", "answers": [{"answer": "a", "rank": 1}] * 2}, indent=1))
    assert len(read(tmp_path / "b.json", tmp_path)[0]) == 1


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    assert read(tmp_path / "a.csv", tmp_path) == (
        [],
        ["column named twice: the header names the column 'chosen' twice; nothing is read"],
    )


def test_numbers_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,probability,margin,weight\nq,a,b,0.75,2,0.5\n")
    pair = load_pairs([str(tmp_path / "a.csv")])[0]
    assert (pair.probability, pair.margin, pair.weight) == (0.75, 2.0, 0.5)


SLICES = [
    *(("[:3]", range(3)), ("[7:]", range(7, 10)), ("[2:4]", range(2, 4)), ("[-2:]", range(8, 10)), ("[:-8]", range(2))),
    *(("[:20%]", range(2)), ("[50%:]", range(5, 10)), ("[10%:30%]", range(1, 3)), ("[-10%:]", range(9, 10))),
    *(("[5:2]", range(0)), ("[:99]", range(10)), ("[20:]", range(0))),
]


@pytest.mark.parametrize(("text", "rows"), SLICES)
def test_slices(tmp_path: Path, text: str, rows: range) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    got, issues = read(f"{tmp_path}/a.jsonl{text}", tmp_path)
    assert got == [ROWS[n] for n in rows]
    assert issues == ([] if rows else [f"empty slice: the slice {text} holds no row"])


@pytest.mark.parametrize(("text", "rows"), SLICES)
def test_a_slice_of_a_split_is_one_of_all_its_files(tmp_path: Path, text: str, rows: range) -> None:
    lines = LINES.splitlines(keepends=True)
    for number, (start, stop) in enumerate(((0, 4), (4, 5), (5, 10))):
        (tmp_path / f"train-{number:05}-of-00003.jsonl").write_bytes(b"".join(lines[start:stop]))
    sources = resolve([f"{tmp_path}:train{text}"], tmp_path / "cache").sources
    found = [row for source in sources for _, row in read_rows(source)]
    assert [row for row in found if not isinstance(row, RowIssue)] == [ROWS[n] for n in rows]
    assert sum(isinstance(row, RowIssue) for row in found) == (not rows)
    with pytest.raises(DataError, match=r"'https://x\.org/a\.jsonl' is an address, expected a file"):
        resolve(["https://x.org/a.jsonl"], tmp_path)


def test_a_slice_is_other_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    whole, part = load_pairs([f"{tmp_path}/a.jsonl"]), load_pairs([f"{tmp_path}/a.jsonl[:5]"])
    assert (len(whole), len(part)) == (10, 5)
    assert whole.fingerprint != part.fingerprint
    assert [pair.id for pair in part] == [f"a.jsonl:{n}" for n in range(1, 6)]


def test_a_weight_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    data = load_pairs([f"chat={tmp_path}/a.jsonl[:2]*0.5", f"{tmp_path}/a.jsonl[2:3]"])
    assert [(pair.id, pair.subset, pair.weight) for pair in data] == [
        *(("chat:1", "chat", 0.5), ("chat:2", "chat", 0.5), ("a.jsonl:3", "a", 1.0)),
    ]
    assert [p.weight for p in load_pairs([f"{tmp_path}/a.jsonl[:1]:0.3", f"{tmp_path}/a.jsonl:.5[:1]"])] == [0.3, 0.5]
    with pytest.raises(DataError, match=r"Drop ':0\.5'"):  # which of two weights was meant?
        load_pairs([f"{tmp_path}/a.jsonl:0.5*0.3"])
    with pytest.raises(DataError, match=r"the mixing weight of .* is 0, expected above 0"):
        load_pairs([f"{tmp_path}/a.jsonl*0"])


@pytest.mark.parametrize(
    ("text", "place", "config", "split", "options", "rows"),
    [
        ("org/name", "org/name", None, None, {}, None),
        ("org/name:test[:10%]", "org/name", None, "test", {}, Slice("", "10%")),
        ("org/name:cfg:test", "org/name", "cfg", "test", {}, None),
        ("org/name@v1.0:test", "org/name", None, "test", {"revision": "v1.0"}, None),
        ("org/name@refs/pr/1", "org/name", None, None, {"revision": "refs/pr/1"}, None),
        ("org/name:data_dir=a/b:train", "org/name", None, "train", {"data_dir": "a/b"}, None),
        ("org/name:split=x:config=y", "org/name", "y", "x", {}, None),
        ("parts/[0-9].jsonl[:5]", "parts/[0-9].jsonl", None, None, {}, Slice("", "5")),
    ],
)
def test_what_may_stand_around_a_name(
    text: str, place: str, config: str | None, split: str | None, options: dict[str, str], rows: Slice | None
) -> None:
    spec = parse_spec(text, lambda path: False)
    assert (spec.place, spec.config, spec.split, spec.rows) == (place, config, split, rows)
    assert {key: spec.option(key) for key in options} == options


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(DataError, match=r"has the unknown option 'datadir'.* Did you mean 'data_dir'"):
        parse_spec("org/name:datadir=x", lambda path: False)


def test_what_exists_is_taken_as_it_stands(tmp_path: Path) -> None:
    for name in ("a=b.jsonl", "c[:1].jsonl", "d*2", "e:f.jsonl"):
        (tmp_path / name).write_bytes(LINES)
        assert parse_spec(str(tmp_path / name), lambda path: Path(path).exists()).place == str(tmp_path / name)
    assert len(read(tmp_path / "c[:1].jsonl", tmp_path)[0]) == 10


def test_patterns(tmp_path: Path) -> None:
    for name in ("x/1.jsonl", "x/2.jsonl", "x/y/3.jsonl", "x/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    assert len(read(f"{tmp_path}/x/*.jsonl", tmp_path)[0]) == 20
    assert len(read(f"{tmp_path}/x/**/*.jsonl", tmp_path)[0]) == 30
    assert len(read(f"{tmp_path}/x/[12].jsonl[:2]", tmp_path)[0]) == 4
    with pytest.raises(DataError, match="no file fits the pattern"):
        read(f"{tmp_path}/x/*.csv", tmp_path)


def test_splits_of_a_downloaded_repository(tmp_path: Path) -> None:
    for name in ("train_prefs", "train_sft", "train_gen", "test_prefs"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{name}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no split 'train': it has test_prefs, train_gen, train_prefs, train_sft"):
        read(tmp_path, tmp_path)
    assert len(read(f"{tmp_path}:train_prefs", tmp_path)[0]) == 10
    assert len(read(f"{tmp_path}:train_prefs[:20%]", tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("names", "split", "count"),
    [
        (("train_prefs.jsonl", "train_sft.jsonl"), "", None),
        (("train_prefs.jsonl", "train_sft.jsonl"), ":train_sft", 1),
        (("default/train_prefs/0000.jsonl", "default/train_sft/0000.jsonl"), "", None),
        (("default/train_prefs/0000.jsonl", "default/train_prefs/0001.jsonl"), ":train_prefs", 2),
        (("train_data.jsonl", "test_data.jsonl"), "", 1),
        (("train_data.jsonl", "test_data.jsonl"), ":test", 1),
        (("train_1.jsonl", "train_2.jsonl", "test-0.jsonl"), "", 2),
        (("train_part1.jsonl", "train_part2.jsonl"), "", 2),
        (("pairs-train.jsonl", "pairs-test.jsonl"), "", 1),
    ],
)
def test_splits_by_the_names_of_files_and_folders(
    tmp_path: Path, names: tuple[str, ...], split: str, count: int | None
) -> None:
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(LINES)
    if count is None:
        with pytest.raises(DataError, match="no split 'train': it has train_prefs, train_sft"):
            resolve([f"{tmp_path}/d"], tmp_path / "cache")
        return
    assert len(resolve([f"{tmp_path}/d{split}"], tmp_path / "cache").sources) == count


def test_links_to_nothing_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "d" / "b.jsonl").symlink_to("/nowhere/b.jsonl")
    for spec in (f"{tmp_path}/d", f"{tmp_path}/d/b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl' is a link to '/nowhere/b\.jsonl', which does not exist"):
            read(spec, tmp_path)
    for spec, reason in {
        "~nouser-of-this-name/a.jsonl": "names the home of an unknown user",
        "a\0b": "holds a NUL character",
        f"{'x' * 300}.jsonl": "File name too long",
        "/dev/null": "is a device or a socket",
    }.items():
        with pytest.raises(DataError, match=reason) as error:
            read(spec, tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_pipe_is_read_like_a_file(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    content = {"jsonl": LINES, "json": json.dumps(ROWS).encode(), "parquet": b""}[kind]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
        content = (tmp_path / "a.parquet").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    assert read(pipe, tmp_path) == (ROWS, [])
    writer.join()
    assert f"reading the pipe {pipe} to its end" in capfd.readouterr().err
    assert read(pipe, tmp_path) == (ROWS, [])  # the copy, not the empty pipe


def test_standard_input(tmp_path: Path) -> None:
    code = "from btrm_core.data import load_pairs; print(len(load_pairs(['-'])), load_pairs(['-[:3]'])[0].id)"
    done = subprocess.run([sys.executable, "-c", code], input=LINES, capture_output=True, timeout=120, check=True)
    assert done.stdout.split() == [b"10", b"stdin:1"]


def test_arrow_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "broken.arrow").write_bytes((tmp_path / "file.arrow").read_bytes()[:100])
    assert read(tmp_path / "stream.arrow", tmp_path) == (ROWS, [])
    assert read(tmp_path / "file.arrow", tmp_path) == (ROWS, [])
    rows, issues = read(tmp_path / "broken.arrow", tmp_path)
    assert (rows, len(issues)) == ([], 1)
    assert issues[0].startswith("unreadable Arrow: unreadable Arrow data from here on (")


def test_columns_that_python_cannot_hold_cost_nothing(tmp_path: Path) -> None:
    columns = {name: pa.array([row[name] for row in ROWS]) for name in ("prompt", "chosen", "rejected")}
    columns |= {
        "date": pa.array([2**31 - 1] * 10, pa.int32()).cast(pa.date32()),
        "long": pa.array([2**62] * 10, pa.int64()).cast(pa.duration("s")),
        "when": pa.array([2**62] * 10, pa.timestamp("us", tz="Mars/Olympus")),
        "inside": pa.array([[{"at": datetime.datetime(2024, 1, 1)}]] * 10),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load_pairs([str(tmp_path / "a.parquet")])
    assert [pair.rejected for pair in data] == [row["rejected"] for row in ROWS]
    assert data.issues.unused == dict.fromkeys(("date", "long", "when", "inside"), 10)


def test_one_text_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    chosen = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["p", "q", "r"], "chosen": chosen, "rejected": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, issues = read(tmp_path / "a.parquet", tmp_path)
    assert [row["prompt"] for row in rows] == ["p", "r"]
    assert len(issues) == 1
    assert issues[0].startswith("unreadable Parquet row: unreadable row: 'utf-8' codec can't decode")


def test_columns_of_the_type_json_are_decoded(tmp_path: Path) -> None:
    import datasets

    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("a", "b")]
    features = datasets.Features({"chosen": datasets.List(datasets.Json()), "rejected": datasets.Json()})
    made = datasets.Dataset.from_dict({"chosen": [messages[0]], "rejected": [messages[1]]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    for place in ("saved", "a.parquet"):
        pair = load_pairs([str(tmp_path / place)])[0]
        assert (pair.prompt, pair.chosen, pair.rejected) == ([{"role": "user", "content": "q"}], "a", "b")


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (b'\xef\xbb\xbf{"prompt": 1}\n', ".json"),
        (b'  [{"chosen": 1}]', ".json"),
        (b"\xef\xbb\xbfid,prompt,chosen\n", ".csv"),
        (b"nonsense\n", ".json"),
        (b"PAR1x", ".parquet"),
        (b"ARROW1\0\0", ".arrow"),
        (gzip.compress(b"prompt,chosen"), ".json"),
    ],
)
def test_what_is_in_a_pipe_is_told_by_its_beginning(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / "piped").write_bytes(content)
    assert _ending(tmp_path / "piped") == ending


def test_values_of_numpy_and_pandas() -> None:
    import numpy as np
    import pandas as pd

    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": np.float32(1.5), "id": np.int64(7)},
        {
            "prompt": np.array([{"role": "user", "content": "r"}]),
            "chosen": "a",
            "rejected": "b",
            "weight": float("nan"),
        },
    ]
    for given in (rows, pd.DataFrame(rows)):
        data = pairs_from_rows(given)
        assert [(pair.prompt[0]["content"], pair.margin, pair.weight) for pair in data] == [
            ("q", 1.5, 1.0),
            ("r", None, 1.0),
        ]
        assert data[0].id == "7"
    assert len(pairs_from_rows(pa.Table.from_pylist(ROWS))) == 10


def test_rows_in_memory_of_every_kind(tmp_path: Path) -> None:
    import numpy as np

    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    itself: list[Any] = []
    itself.append(itself)
    structured = np.array([("q", "a", "b")], dtype=[(name, "U5") for name in row])
    when = pa.array([2**62], pa.timestamp("us", tz="Mars/Olympus"))
    table = pa.table({**{name: [text] for name, text in row.items()}, "when": when})
    for given in (row, {name: [text] for name, text in row.items()}, structured, table, table.to_batches()[0]):
        (pair,) = pairs_from_rows(given)
        assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == ("q", "a", "b")
    report = pairs_from_rows(["x", None, row, [1], {"x": itself}]).issues
    assert (report.rows, report.used, report.counts) == (5, 1, {"not an object": 4})
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert len(load_pairs(tmp_path / "a.jsonl")) == len(load_pairs([tmp_path / "a.jsonl"])) == 1


CARD = """---
license: mit
configs:
- config_name: helpful
  data_files:
  - split: train
    path: ["a/one.jsonl", "a/two*.jsonl"]
  - split: extra
    path: b/**
- config_name: harmless
  data_dir: c
  data_files: "*.jsonl"
- config_name: plain
  data_dir: d
{default}---
# Pairs
"""


def described(tmp_path: Path, card: str) -> Path:
    """A downloaded repository whose README names its files; those of each split have ids of their own."""
    folder = tmp_path / "repo"
    for name in ("a/one", "a/two-1", "a/three", "b/x/deep", "c/pairs", "d/train", "d/test", "e/train"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = {"id": name, "prompt": f"{name}?", "chosen": "yes", "rejected": "no"}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("asked", "config", "split", "found"),
    [
        (":helpful", "helpful", "train", ["a/one", "a/two-1"]),
        (":helpful:train", "helpful", "train", ["a/one", "a/two-1"]),
        (":helpful:extra", "helpful", "extra", ["b/x/deep"]),
        (":config=helpful:split=extra", "helpful", "extra", ["b/x/deep"]),
        (":harmless", "harmless", "train", ["c/pairs"]),
        (":plain", "plain", "train", ["d/train"]),
        (":plain:test", "plain", "test", ["d/test"]),
    ],
)
def test_a_readme_that_names_files_is_read_as_datasets_reads_it(
    tmp_path: Path, asked: str, config: str, split: str, found: list[str]
) -> None:
    import datasets

    folder = described(tmp_path, CARD.format(default=""))
    rows, _ = read(f"{folder}{asked}", tmp_path)
    assert [row["id"] for row in rows] == found
    theirs = datasets.load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path / "theirs"))
    assert theirs["id"] == found


def test_the_default_configuration_of_a_readme(tmp_path: Path) -> None:
    folder = described(tmp_path, CARD.format(default="  default: true\n"))
    assert [row["id"] for row in read(folder, tmp_path)[0]] == ["d/train"]
    assert [row["id"] for row in read(f"{folder}:test", tmp_path)[0]] == ["d/test"]
    assert [row["id"] for row in read(f"{folder}:harmless", tmp_path)[0]] == ["c/pairs"]
    (note,) = resolve([str(folder)], tmp_path / "cache").notes
    assert note.startswith(f"{folder}: the split 'train' of the configuration 'plain' is used; left out: a/one.jsonl, ")


@pytest.mark.parametrize(
    ("card", "asked", "said"),
    [
        (CARD.format(default=""), "", "has several configurations and none is the default: helpful, harmless, plain"),
        (CARD.format(default=""), ":helpfull:train", "has no configuration 'helpfull': .* Did you mean 'helpful'"),
        (CARD.format(default=""), ":helpful:test", "has no split 'test': it has extra, train"),
        ("---\nconfigs:\n- config_name: x\n  data_files: 3\n---\n", "", "the README.md of .* cannot be read: "),
        ("---\nconfigs: [\n---\n", "", "the README.md of .* cannot be read: "),
        (
            "---\nconfigs:\n- config_name: x\n  data_files: gone-*.jsonl\n---\n",
            "",
            "is in 'gone-\\*.jsonl', which is not",
        ),
        ("---\nconfigs:\n- config_name: x\n  data_files: ../out.jsonl\n---\n", "", "is outside of the folder"),
    ],
)
def test_a_readme_that_names_what_is_not_there(tmp_path: Path, card: str, asked: str, said: str) -> None:
    folder = described(tmp_path, card)
    (tmp_path / "out.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=said) as caught:
        read(f"{folder}{asked}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("card", ["# Pairs\n", "---\nlicense: mit\n---\n", "---\nconfigs\n", ""])
def test_a_readme_that_says_nothing_of_files_leaves_their_names(tmp_path: Path, card: str) -> None:
    folder = described(tmp_path, card)
    assert {row["id"] for row in read(f"{folder}:test", tmp_path)[0]} == {"d/test"}
