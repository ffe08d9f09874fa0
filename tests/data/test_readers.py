from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btrm_core.data import readers
from btrm_core.data.issues import RowIssue
from btrm_core.data.readers import read_rows
from btrm_core.data.sources import Source, resolve

ROWS = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def source(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return resolve([str(path)], path.parent / "cache").sources[0]


def read(path: Path, content: bytes):
    """Rows by line, and issues as text."""
    rows, issues = {}, []
    for line, row in read_rows(source(path, content)):
        if isinstance(row, RowIssue):
            assert row.line == line
            issues.append(str(row).removeprefix(str(path)))
        else:
            rows[line] = row
    return rows, issues


NUMBERED = dict(enumerate(ROWS, start=1))


def test_json_lines(tmp_path):
    assert read(tmp_path / "a.jsonl", LINES) == (NUMBERED, [])
    assert read(tmp_path / "b.jsonl.gz", gzip.compress(LINES)) == (NUMBERED, [])
    assert read(tmp_path / "c.json", LINES) == (NUMBERED, [])


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    content = b"\xef\xbb\xbf" + b"\r\n\r\n".join(LINES.splitlines())
    rows, issues = read(tmp_path / "a.jsonl", content)
    assert list(rows) == [1, 3, 5, 7, 9]
    assert not issues


def test_bad_lines_are_reported_and_the_rest_is_read(tmp_path):
    good = LINES.splitlines()
    content = b"\n".join([good[0], b"{broken", b'["a"]', b'{"prompt": "\xff"}', good[1], b"[" * 100_000])
    rows, issues = read(tmp_path / "a.jsonl", content)
    assert list(rows) == [1, 5]
    assert issues[:3] == [
        ":2: not JSON: Expecting property name enclosed in double quotes at column 2",
        ":3: the row is a list, expected an object with keys such as 'chosen' and 'rejected'",
        ":4: not UTF-8: byte 0xff at position 13",
    ]
    assert issues[3].startswith(":6: not JSON: maximum recursion depth")


@pytest.mark.parametrize("name", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"])
def test_wide_letters_are_named(tmp_path, name):
    expected = [f":1: the file is {name}, expected UTF-8. Convert it with: iconv -f {name} -t UTF-8"]
    for file in ("a.jsonl", "a.json", "a.csv"):
        assert read(tmp_path / file, LINES.decode().encode(name)) == ({}, expected)


ARRAY = b"[" + b",".join(LINES.splitlines()) + b"]"
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.jsonl", ARRAY),
        ("pretty.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("commas.jsonl", LINES.replace(b"}\n", b"},\n")),
        ("columns.json", json.dumps(COLUMNS).encode()),
        ("pandas.json", json.dumps({k: {str(n): v for n, v in enumerate(c)} for k, c in COLUMNS.items()}).encode()),
        ("semicolons.csv", b"prompt;chosen;rejected\n" + b"".join(b"%d?;yes;no %d\n" % (n, n) for n in range(5))),
        ("tabs.csv", b"prompt\tchosen\trejected\n" + b"".join(b"%d?\tyes\tno %d\n" % (n, n) for n in range(5))),
        ("excel.csv", b"sep=|\nprompt| chosen|rejected\n" + b"".join(b"%d?|yes|no %d\n" % (n, n) for n in range(5))),
        ("commas.tsv", b"prompt, chosen, rejected\n" + b"".join(b"%d?,yes,no %d\n" % (n, n) for n in range(5))),
    ],
)
def test_files_of_another_form_than_their_name_says(tmp_path, name, content):
    got = [row for _, row in read_rows(source(tmp_path / name, content))]
    assert got == ROWS


def test_one_row_of_messages_is_no_table_of_columns(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": turns, "chosen": turns, "rejected": turns}
    assert read(tmp_path / "a.json", json.dumps(row).encode()) == ({1: row}, [])
    row = {side: {"role": "assistant", "content": "a"} for side in ("chosen", "rejected")}
    assert read(tmp_path / "b.json", json.dumps(row).encode()) == ({1: row}, [])


def test_a_column_without_a_name_has_a_number(tmp_path):
    assert read(tmp_path / "a.csv", b",prompt\n0,q\n") == ({2: {"column 1": "0", "prompt": "q"}}, [])


def test_maps_and_bytes_of_a_table_are_objects_and_texts(tmp_path):
    turn = [("role", "user"), ("content", "q")]
    table = pa.table({"a": pa.array([[turn]], pa.list_(pa.map_(pa.string(), pa.string()))), "b": pa.array([b"x"])})
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    (found,) = read_rows(resolve([str(tmp_path / "a.feather")], tmp_path / "cache").sources[0])
    assert found == (1, {"a": [dict(turn)], "b": b"x"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_empty_file(tmp_path, name):
    assert read(tmp_path / name, b"") == ({}, [": the file is empty"])
    assert read(tmp_path / f"{name}.gz", gzip.compress(b"")) == ({}, [": the file is empty"])


def test_csv_with_a_header_only(tmp_path):
    assert read(tmp_path / "a.csv", b"prompt,chosen,rejected\n") == ({}, [": the file is empty"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_truncated_gzip_gives_what_comes_before_and_one_issue(tmp_path, name):
    rows = [{"prompt": os.urandom(200).hex(), "chosen": "a", "rejected": "b"} for _ in range(300)]
    if ".csv" in name:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
        whole = text.getvalue()
    else:
        whole = json.dumps(rows) if ".json." in name else "".join(json.dumps(row) + "\n" for row in rows)
    made = list(read_rows(source(tmp_path / name, gzip.compress(whole.encode())[:-20_000])))
    got = [row for _, row in made if not isinstance(row, RowIssue)]
    issues = [f":{row.line}: {row.reason}" for _, row in made if isinstance(row, RowIssue)]
    assert got == rows[: len(got)]
    assert len(issues) == 1
    assert "unreadable gzip data from here on" in issues[0]
    assert 0 < len(got) < 300
    if ".jsonl" in name:
        assert issues[0].startswith(f":{len(got) + 1}:")


def test_gz_that_is_not_gzip(tmp_path):
    rows, issues = read(tmp_path / "a.jsonl.gz", LINES)
    assert rows == {}
    assert issues[0].startswith(":1: unreadable gzip data from here on (Not a gzipped file")


@pytest.mark.parametrize("written", [ROWS, {"version": 1, "data": ROWS}])
def test_rows_of_one_line_are_counted(written, tmp_path):
    """Else all have the same id, and no error tells which row it means."""
    rows, issues = read(tmp_path / "a.json", json.dumps(written).encode())
    assert (rows, issues) == (dict(enumerate(ROWS, start=1)), [])
    rows, issues = read(tmp_path / "b.json", json.dumps([*ROWS, 1]).encode())
    assert [issue.partition(" is ")[0] for issue in issues] == [f":{len(ROWS) + 1}: the row"]


def test_json_array_counts_lines(tmp_path):
    rows, issues = read(tmp_path / "b.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode())
    assert list(rows) == [3, 8, 13, 18, 23]
    assert list(rows.values()) == ROWS
    assert not issues


def test_json_array_that_breaks_off(tmp_path):
    text = json.dumps(ROWS, indent=0)
    rows, issues = read(tmp_path / "a.json", text[: text.index("no 3")].encode())
    assert len(rows) == 3
    assert issues == [":17: not JSON: Unterminated string starting at; the rest is not read"]
    rows, issues = read(tmp_path / "b.json", b'[{"a": 1},\n')
    assert issues == [":2: the array breaks off before its closing ']'; the rest is not read"]


def test_json_array_with_an_error_in_the_middle_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_CHARACTERS", 100)
    rows, issues = read(tmp_path / "a.json", b'[{"a": 1},\n{"b": oops},' + b'{"c": 1},' * 50 + b"{}]")
    assert rows == {1: {"a": 1}}
    assert issues == [":2: not JSON: Expecting value; the rest is not read"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=4), max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
)
def test_json_array_is_read_as_json_reads_it(tmp_path_factory, rows, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("array") / "a.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    made = Source(str(path), "a.json", "json", "", path)
    path.write_bytes(content)
    before, readers._CHUNK_CHARACTERS = readers._CHUNK_CHARACTERS, chunk
    try:
        got = [row for _, row in read_rows(made) if not isinstance(row, RowIssue)]
    finally:
        readers._CHUNK_CHARACTERS = before
    assert got == rows


def test_csv_types_and_lines(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "chosen", "rejected", "margin", "weight", "id", "responses"])
    writer.writeheader()
    writer.writerow({"prompt": "one\ntwo", "chosen": '[{"a": 1}]', "rejected": "", "margin": "0.5", "id": "7"})
    writer.writerow({"chosen": json.dumps(messages), "rejected": "[not json", "weight": "2", "margin": "much"})
    writer.writerow({"prompt": "p", "responses": '["a", "b"]'})
    rows, issues = read(tmp_path / "a.csv", text.getvalue().encode())
    assert rows == {
        2: {"prompt": "one\ntwo", "chosen": '[{"a": 1}]', "rejected": "", "margin": "0.5", "id": "7"},
        4: {"prompt": "", "chosen": json.dumps(messages), "rejected": "[not json", "margin": "much", "weight": "2"},
        5: {"prompt": "p", "chosen": "", "rejected": "", "responses": '["a", "b"]'},
    }
    assert not issues
    assert read(tmp_path / "a.tsv", b"prompt\tchosen\na,b\tc\n")[0] == {2: {"prompt": "a,b", "chosen": "c"}}


def test_csv_faults(tmp_path):
    rows, issues = read(tmp_path / "a.csv", b'prompt,chosen\na,b\nc,d,e\nf,"g\nh,i\n')
    assert list(rows) == [2]
    assert issues == [
        ":3: the row has more cells than the header",
        ":4: not CSV: unexpected end of data; the rest is not read",
    ]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    assert read(tmp_path / "a.parquet", content) == (NUMBERED, [])
    rows, issues = read(tmp_path / "b.parquet", content[:-10])
    assert rows == {}
    assert issues[0].startswith(":1: unreadable Parquet data from here on (")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", (tmp_path / "c.parquet").read_bytes()) == ({}, [": the file is empty"])


def test_table(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    made = resolve([str(tmp_path / "saved")], tmp_path / "cache").sources[0]
    assert dict(read_rows(made)) == NUMBERED
