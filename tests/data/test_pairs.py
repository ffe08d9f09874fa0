from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import processes

from btrm_core.data.convert import Pair
from btrm_core.data.curate.held_out import drop_overlap, split_held_out
from btrm_core.data.issues import IssueReport, RowIssue
from btrm_core.data.pairs import PairData, load_pairs, pairs_from_rows, prompt_hash
from btrm_core.errors import DataError


def row(number, prompt=None, **more):
    return {
        "prompt": f"Question {number}?" if prompt is None else prompt,
        "chosen": f"yes {number}",
        "rejected": "no",
        **more,
    }


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def ids(data: PairData) -> list[str]:
    return [pair.id for pair in data]


def test_pairs_and_columns(tmp_path):
    data = load_pairs([write(tmp_path / "a.jsonl", [row(1, id="x", margin=2), row(2, weight=0.5, subset="s")])])
    columns = [
        "id",
        "subset",
        "prompt",
        "chosen",
        "rejected",
        "margin",
        "weight",
        "probability",
        "group",
        "rejected_prompt",
    ]
    assert list(data.dataset.features) == columns
    assert data[0] == Pair("x", "a", [{"role": "user", "content": "Question 1?"}], "yes 1", "no", 2.0, 1.0)
    assert list(data) == [data[0], data[1]]
    assert (data[1].id, data[1].subset, data[1].margin, data[1].weight) == ("a.jsonl:2", "s", None, 0.5)
    assert [len(batch) for batch in data.batches(1)] == [1, 1]
    assert data.rows(1, 9) == [data.dataset[1]]
    assert data.issues.format() == "2 rows read: 2 pairs"
    assert not data.issues.noteworthy


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/p\xe4irs.jsonl")  # as Latin-1 systems name files
    data = load_pairs([write(Path(path), [row(1)])])
    assert (ids(data), data[0].subset) == (["p\ufffdirs.jsonl:1"], "p\ufffdirs")


def test_several_sources_are_mixed_in_order(tmp_path):
    import datasets

    datasets.Dataset.from_list([row(5)]).save_to_disk(tmp_path / "saved")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(row(3)).encode()))
    data = load_pairs(
        [write(tmp_path / "a.jsonl", [row(1), row(2)]), str(tmp_path / "b.jsonl.gz"), str(tmp_path / "saved")]
    )
    assert ids(data) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl.gz:1", "saved:1"]
    assert data.dataset["subset"][:] == ["a", "a", "b", "saved"]


BAD_LINES = [
    json.dumps(row(1)),
    "{not json",
    json.dumps({"prompt": "p", "chosen": "a"}),
    json.dumps({"chosen": [{"role": "judge", "content": "x"}], "rejected": []}),
    json.dumps({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}),
    *[json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"})] * 7,
    json.dumps(row(2)),
]


def test_bad_rows_are_counted_and_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    (tmp_path / "empty.jsonl").touch()
    roles = "system, user, assistant, tool"
    expected = f"""13 rows read: 2 pairs, 10 bad rows, 1 left out, 1 file without a row
  bad: chosen equals rejected (7)
    {path}:6: 'chosen' and 'rejected' are the same answer: 'a'
    {path}:7: 'chosen' and 'rejected' are the same answer: 'a'
    {path}:8: 'chosen' and 'rejected' are the same answer: 'a'
    {path}:9: 'chosen' and 'rejected' are the same answer: 'a'
    {path}:10: 'chosen' and 'rejected' are the same answer: 'a'
    and 2 more
  bad: not JSON (1)
    {path}:2: not JSON: Expecting property name enclosed in double quotes at column 2
  bad: missing key (1)
    {path}:3: missing key 'rejected' (the row has prompt, chosen)
  bad: unknown role (1)
    {path}:4: unknown role 'judge' in 'chosen[0]', expected {roles}; name it with --map role.judge=user
  no row: empty file (1)
    {tmp_path}/empty.jsonl: the file is empty
  left out: tie (1)
    {path}:5: all 2 responses have the score 1, no preference"""
    first = load_pairs([str(path), str(tmp_path / "empty.jsonl")])
    again = load_pairs([str(path), str(tmp_path / "empty.jsonl")])
    assert first.issues.format() == again.issues.format() == expected
    assert ids(first) == ["a.jsonl:1", "a.jsonl:13"]
    assert first.issues == again.issues == IssueReport.from_dict(json.loads(json.dumps(first.issues.to_dict())))
    assert first.issues.bad == 10
    assert (first.issues.rows, first.issues.used, sum(first.issues.skipped.values())) == (13, 2, 1)
    assert first.issues.noteworthy


@pytest.mark.parametrize("load_before", [False, True])
def test_strict_stops_at_the_first_bad_row_also_from_the_cache(tmp_path, load_before):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    if load_before:
        load_pairs([str(path)])
    with pytest.raises(DataError) as error:
        load_pairs([str(path)], strict=True)
    assert str(error.value) == (
        f"{path}:2: not JSON: Expecting property name enclosed in double quotes at column 2. "
        "Mend the row, or train on the others without --strict."
    )


def test_strict_does_not_mind_ties(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1), {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"}])
    assert len(load_pairs([path], strict=True)) == 1


def test_nothing_left(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError) as error:
        load_pairs([path])
    assert str(error.value) == (
        "no pairs are left of 3 rows: most are left out for 'missing key' (2), "
        f"such as {path}:1: missing key 'chosen' (the row has text)."
    )
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"^no pairs are left: .*b.jsonl: the file is empty.$"):
        load_pairs([f"{tmp_path}/b.jsonl"])


def test_single_response_rows_are_joined(tmp_path):
    rows = [{"prompt": "p", "response": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 2))]
    data = load_pairs([write(tmp_path / "a.jsonl", rows)])
    assert [(pair.chosen, pair.rejected) for pair in data] == [("b", "a")]
    assert (data.issues.rows, data.issues.pairs) == (3, 1)
    three = load_pairs([f"{tmp_path}/a.jsonl"], scored="all")
    assert [(pair.chosen, pair.rejected) for pair in three] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert three.fingerprint != data.fingerprint


def test_second_load_comes_from_the_cache_and_a_change_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    first = load_pairs([write(path, [row(1)])])
    entries = list((tmp_path / "cache" / "pairs").iterdir())
    again = load_pairs([str(path)])
    assert list((tmp_path / "cache" / "pairs").iterdir()) == entries
    assert again.fingerprint == first.fingerprint
    changed = load_pairs([write(path, [row(2)])])
    assert changed.fingerprint != first.fingerprint
    assert changed[0].chosen == "yes 2"
    assert first[0].chosen == "yes 1"  # what was loaded does not change under a running training


def test_fingerprint_is_the_same_from_another_place(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [row(1)])
    monkeypatch.chdir(tmp_path)
    assert load_pairs([path]).fingerprint == load_pairs(["a.jsonl"]).fingerprint == load_pairs(path).fingerprint
    assert load_pairs([path], cache_dir=str(tmp_path / "other")).fingerprint == load_pairs([path]).fingerprint


@pytest.mark.parametrize("damage", ["cut", "remove", "report"])
def test_damaged_cache_entry_is_built_anew(tmp_path, damage):
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(100)])
    load_pairs([path])
    entry = next(iter((tmp_path / "cache" / "pairs").iterdir()))
    if damage == "cut":
        os.truncate(entry / "pairs.arrow", 100)
    else:
        (entry / {"remove": "pairs.arrow", "report": "complete.json"}[damage]).unlink()
    assert len(load_pairs([path])) == 100


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    path = write(tmp_path / "a.jsonl", [row(1)])
    with pytest.raises(DataError) as error:
        load_pairs([path], cache_dir=str(tmp_path / "file"))
    assert str(error.value) == (
        f"cannot write the data cache '{tmp_path}/file/pairs': Not a directory. "
        "Free some space, or set BTRM_CACHE to a folder on another disk."
    )


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1), {}])
    with pytest.raises(DataError):
        load_pairs([path], strict=True)
    assert list((tmp_path / "cache" / "pairs").iterdir()) == []


def racing(path, ready, both):
    """Read pairs in a child, when both children are ready to."""
    Path(ready).touch()
    while not all(Path(one).exists() for one in both):
        time.sleep(0.001)
    data = load_pairs([path])
    print(len(data), data.fingerprint, data[2999].chosen)


def test_processes_that_race_all_succeed(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(3000)])
    ready, logs = ([tmp_path / f"{what} {n}" for n in range(2)] for what in ("ready", "log"))
    running = [processes.start(racing, path, ready[n], ready, log=logs[n])[0] for n in range(2)]
    assert processes.wait(running) == [0, 0]
    outputs = {log.read_text() for log in logs}
    assert outputs == {f"3000 {load_pairs([path]).fingerprint} yes 2999\n"}
    assert len(list((tmp_path / "cache" / "pairs").iterdir())) == 1


def test_rows_in_memory():
    data = pairs_from_rows([row(1), {"bad": 1}, row(2)], name="sample")
    assert ids(data) == ["sample:1", "sample:3"]
    assert data.issues.bad == 1
    assert data.fingerprint == pairs_from_rows([row(1), {"bad": 1}, row(2)], name="sample").fingerprint
    assert data.fingerprint != pairs_from_rows([row(1), {"bad": 1}, row(3)], name="sample").fingerprint
    with pytest.raises(DataError, match="no pairs are left: rows:1: missing key 'chosen'"):
        pairs_from_rows([{"bad": 1}])
    with pytest.raises(DataError, match="no pairs: the data holds no rows"):
        pairs_from_rows([])


def test_prompt_hash_is_sha256_of_the_canonical_json():
    prompt = [{"role": "user", "content": " Héllo\n"}]
    digest = hashlib.sha256('[["user","Héllo"]]'.encode()).digest()
    assert prompt_hash(prompt) == int.from_bytes(digest[:8], "big")
    assert prompt_hash([{"role": "system", "content": "Héllo"}]) != prompt_hash(prompt)


def prompts(data: PairData) -> set[str]:
    return {pair.prompt[0]["content"].strip() for pair in data}


prompt_numbers = st.lists(st.integers(0, 12), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(prompt_numbers, st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_split_keeps_prompts_apart_whatever_the_order(numbers, fraction, random):
    rows = [row(i, prompt=f"Question {n}?" + " " * (i % 2), id=str(i)) for i, n in enumerate(numbers)]
    train, held = split_held_out(pairs_from_rows(rows), fraction)
    assert not prompts(train) & prompts(held)
    assert sorted(ids(train) + ids(held), key=int) == [str(i) for i in range(len(rows))]
    assert ids(train) == sorted(ids(train), key=int)
    distinct = len(set(numbers))
    assert len(train) >= 1
    assert (len(held) >= 1) == (fraction > 0 and distinct > 1)
    random.shuffle(rows)
    shuffled = split_held_out(pairs_from_rows(rows), fraction)
    assert [set(ids(part)) for part in shuffled] == [set(ids(train)), set(ids(held))]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.9))
def test_split_holds_out_about_the_fraction(number, fraction):
    data = pairs_from_rows([row(n) for n in range(number)])
    train, held = split_held_out(data, fraction)
    assert abs(len(held) - fraction * number) <= 1 or len(held) == 1 or len(train) == 1
    smallest = sorted(data.prompt_hash_P.tolist())[: len(held)]
    assert sorted(held.prompt_hash_P.tolist()) == smallest


def test_split_parts_are_data_of_their_own(tmp_path):
    data = load_pairs([write(tmp_path / "a.jsonl", [*[row(n) for n in range(40)], {"bad": 1}])])
    train, held = split_held_out(data, 0.25)
    assert (len(train), len(held)) == (30, 10)
    assert len({data.fingerprint, train.fingerprint, held.fingerprint}) == 3
    assert train.issues.bad == 1
    assert held.issues == IssueReport(rows=10, pairs=10)
    assert np.array_equal(held.prompt_hash_P, [prompt_hash(pair.prompt) for pair in held])
    assert [r["id"] for r in held.rows(0, 5)] == ids(held)[:5]
    with pytest.raises(DataError, match="held-out fraction is 1, expected at least 0 and below 1"):
        split_held_out(data, 1)


def test_overlap_with_the_evaluation_data_is_dropped_and_counted():
    train = pairs_from_rows([row(n, id=f"t{n}") for n in range(10)])
    held = pairs_from_rows([row(n, prompt=f"  Question {n}?") for n in (3, 4, 99)])
    kept, number = drop_overlap(train, held)
    assert number == 2
    assert ids(kept) == [f"t{n}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert kept.fingerprint != train.fingerprint
    assert kept.issues.format() == (
        "10 rows read: 8 pairs, 2 left out\n"
        "  left out: prompt also in the evaluation data (2)\n"
        "    t3: prompt also in the evaluation data\n"
        "    t4: prompt also in the evaluation data"
    )
    assert train.issues.skipped == {}
    assert drop_overlap(kept, held) == (kept, 0)
    with pytest.raises(DataError, match="all 10 training pairs have a prompt that is also in the evaluation data"):
        drop_overlap(train, train)


def test_issue_without_a_line_names_the_file_alone():
    assert str(RowIssue("a.jsonl", 0, "the file is empty")) == "a.jsonl: the file is empty"
    assert str(RowIssue("a.jsonl", 7, "bad")) == "a.jsonl:7: bad"


def test_pairs_can_be_pickled(tmp_path):
    import pickle

    data = load_pairs([write(tmp_path / "a.jsonl", [row(n) for n in range(5)])])
    train = pickle.loads(pickle.dumps(split_held_out(data, 0.2)[0]))
    assert len(train) == 4
    assert train[0].rejected == "no"


def test_subsets_are_parts_of_a_source_that_the_user_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(0, subset="math"), row(1), row(2, subset="chat")])
    assert load_pairs([path]).dataset["subset"][:] == ["math", "a", "chat"]
    assert load_pairs([f"chat={path}"]).dataset["subset"][:] == ["chat/math", "chat", "chat"]
    assert load_pairs([f"code={path}"]).dataset["subset"][:] == ["code/math", "code", "code/chat"]
