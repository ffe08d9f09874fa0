"""Parquet and packed files in and out, and what the rows of a window share."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.scorer_samples import reward_model, say

from btrm_core.errors import DataError
from btrm_core.packing import grow
from btrm_core.scoring.bulk import finish, run, score_file
from btrm_core.scoring.bulk.windows import Windows
from btrm_core.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(str(reward_model(tmp_path_factory.mktemp("formats") / "model")), device="cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "BATCH_ROWS", 40)
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def near(found: list[Any], expected: list[Any]) -> bool:
    """Equal within rounding; nothing where nothing is."""
    return [one is None for one in found] == [one is None for one in expected] and (
        [one for one in found if one is not None] == pytest.approx([one for one in expected if one is not None], 1e-5)
    )


def lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("ending", "unpack"), [("gz", gzip.decompress), ("bz2", bz2.decompress), ("xz", lzma.decompress), ("zst", None)]
)
def test_the_ending_packs_the_output(
    scorer: Scorer, tmp_path: Path, ending: str, unpack: Callable[[bytes], bytes] | None
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hi", "response": f"{n}"} for n in range(5)])
    plain, packed = tmp_path / "out.jsonl", tmp_path / f"out.jsonl.{ending}"
    score_file(scorer, source, str(plain))
    score_file(scorer, source, str(packed))
    if unpack is None:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(packed)), "zstd") as stream:
            found = stream.read()
    else:
        found = unpack(packed.read_bytes())
    assert found == plain.read_bytes()
    again = tmp_path / "again.jsonl"
    score_file(scorer, str(packed), str(again))  # what was written can be read
    assert [line["btrm_reward"] for line in lines(again.read_bytes())] == [line["reward"] for line in lines(found)]
    assert {path.name for path in tmp_path.iterdir()} >= {"out.jsonl", packed.name}
    assert not list(tmp_path.glob("*.partial*")) + list(tmp_path.glob("*.making"))


def table(number: int) -> pyarrow.Table:
    """Pairs with columns of types that JSON has not, in row groups of odd sizes."""
    return pyarrow.table(
        {
            "prompt": [f"Say {n % 7}." for n in range(number)],
            "chosen": [f"{n}" for n in range(number)],
            "rejected": [None if n == 3 else f"Not {n}." for n in range(number)],
            "when": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)] * number,
            "price": [Decimal("1.50")] * number,
            "small": pyarrow.array([n % 100 for n in range(number)], pyarrow.int8()),
            "reward_margin": ["mine"] * number,
        }
    ).replace_schema_metadata({"owner": "me"})


def test_parquet_in_and_out_keeps_the_columns_and_their_types(scorer: Scorer, tmp_path: Path) -> None:
    rows = 70
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    asked = table(rows)
    pyarrow.parquet.write_table(asked, source, row_group_size=33)
    said = score_file(scorer, str(source), str(target))
    assert f"{rows - 1:,} pairs scored" in said
    found = pyarrow.parquet.read_table(target)
    assert found.select(asked.column_names).equals(asked)
    assert found.schema.metadata[b"owner"] == b"me"
    assert found.schema.names[len(asked.column_names) :] == [
        "chosen_reward",
        "rejected_reward",
        "btrm_reward_margin",
        "error",
    ]
    assert found.schema.field("chosen_reward").type == pyarrow.float32()
    as_lines = tmp_path / "out.jsonl"
    score_file(scorer, str(source), str(as_lines))
    plain = lines(as_lines.read_bytes())
    for name in ("chosen_reward", "rejected_reward", "btrm_reward_margin"):
        assert near(found.column(name).to_pylist(), [line[name] for line in plain])
    assert found.column("error").to_pylist() == [line.get("error") for line in plain]
    assert {(line["price"], line["reward_margin"]) for line in plain} == {("1.50", "mine")}
    assert found.column("error").to_pylist()[3].startswith("line 4: ")


def test_lines_become_a_table_and_what_has_no_common_type_becomes_json(scorer: Scorer, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": say("Hi", "Hello"), "id": 1, "any": 1, "tags": {"a": 1}},
        {"prompt": "Hi", "responses": ["Hello", "No"], "id": 2.5, "any": "x", "tags": {"b": "y"}, "nothing": {}},
        {"messages": [], "reward": "mine"},
    ]
    rows += [{"messages": say("Hi", f"{n}"), "any": [n]} for n in range(50)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    score_file(scorer, source, str(target))
    found = pyarrow.parquet.read_table(target).to_pylist()
    score_file(scorer, source, str(tmp_path / "out.jsonl"))
    plain = lines((tmp_path / "out.jsonl").read_bytes())
    assert len(found) == len(plain) == len(rows)
    assert found[0]["messages"] == rows[0]["messages"]
    assert [row["id"] for row in found[:3]] == [1, 2.5, None]
    assert [row["any"] for row in found[:4]] == ["1", '"x"', None, "[0]"]
    assert [row["tags"] for row in found[:2]] == [{"a": 1, "b": None}, {"a": None, "b": "y"}]
    assert [row["nothing"] for row in found[:2]] == [None, "{}"]
    assert found[1]["rewards"] == pytest.approx(plain[1]["rewards"], rel=1e-6)
    # one line has a reward of its own, and so no two kinds of value are in one column
    assert json.loads(found[2]["reward"]) == "mine"
    assert json.loads(found[0]["reward"]) == plain[0]["reward"]
    assert found[2]["error"] == plain[2]["error"]


def test_an_interrupted_table_is_gone_on_with(
    scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(table(40), source)
    score_file(scorer, str(source), str(tmp_path / "whole.parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score_file(scorer, str(source), str(target))
    assert not target.exists()
    partial = tmp_path / "out.parquet.partial"
    kept = partial.read_bytes().splitlines(keepends=True)[:25]
    partial.write_bytes(b"".join(kept))
    score_file(scorer, str(source), str(target))
    assert "out.parquet.partial goes on after 25 lines" in capsys.readouterr().err
    whole = pyarrow.parquet.read_table(tmp_path / "whole.parquet")
    found = pyarrow.parquet.read_table(target)
    assert found.schema == whole.schema
    assert near(found.column("chosen_reward").to_pylist(), whole.column("chosen_reward").to_pylist())


def test_a_table_that_is_cut_short_is_refused(scorer: Scorer, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(table(40), source)
    source.write_bytes(source.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"in\.parquet is no whole Parquet file"):
        score_file(scorer, str(source), str(tmp_path / "out.jsonl"))


def test_windows_hold_a_bounded_number_of_rows_and_characters(tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", [{"prompt": "Hi", "response": "x"}] * 1300)
    large = write(tmp_path / "large.jsonl", [{"prompt": "Hi", "response": "x" * 1000}] * 300)
    assert [len(window.rows) for window in Windows(Path(small), 0, 8192)] == [512, 512, 276]
    assert max(len(window.rows) for window in Windows(Path(large), 0, 64)) == 4
    assert [window.rows[0][0] for window in Windows(Path(small), 700, 8192)] == [701, 1213]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Hi"] * 300, "response": ["x" * 1000] * 300}),
                                tmp_path / "large.parquet")  # fmt: skip
    assert max(len(window.rows) for window in Windows(tmp_path / "large.parquet", 0, 64)) == 5


def test_what_distant_rows_of_a_window_share_is_computed_once(scorer: Scorer, tmp_path: Path) -> None:
    prompts = [f"{p} " + "Tell me about tea. " * 5 for p in range(4)]
    asked = [say(prompt, f"{r}.") for r in range(5) for prompt in prompts]
    asked += asked[:7]  # the same conversations once more
    source, before = write(tmp_path / "in.jsonl", [{"messages": c} for c in asked]), scorer.tokens.computed
    score_file(scorer, source, str(tmp_path / "out.jsonl"))
    computed = scorer.tokens.computed - before
    ids = scorer.chat.encode(asked)
    assert computed == sum(len(grow(ids[p : 20 : len(prompts)]).tokens) for p in range(len(prompts)))
    assert computed < sum(map(len, ids)) / 3
    found = [line["reward"] for line in lines((tmp_path / "out.jsonl").read_bytes())]
    assert found[20:] == found[:7]
    assert found == pytest.approx([scorer.rewards([c])[0] for c in asked], abs=1e-5)
