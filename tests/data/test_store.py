from __future__ import annotations

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
from support.chat_samples import make_chat
from support.encoding import Endless

from btrm_core.data import encode
from btrm_core.data.curate.held_out import split_held_out
from btrm_core.data.pairs import load_pairs, pairs_from_rows
from btrm_core.data.store import TokenStore, encode_pairs
from btrm_core.errors import DataError


@pytest.fixture(scope="module")
def chat():
    return make_chat()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def row(number, **more):
    return {"id": f"p{number}", "prompt": f"Question {number}?", "chosen": f"yes, {number}", "rejected": "no", **more}


TURNS = [{"role": "user", "content": "a question " * 20}, {"role": "assistant", "content": "an answer"}]


def conversation(number, answer):
    return [*TURNS, {"role": "user", "content": f"and {number}?"}, {"role": "assistant", "content": answer}]


def test_stored_tokens_are_the_finished_sequences(chat):
    data = pairs_from_rows([row(n, subset=f"s{n % 2}", margin=n or None, weight=n + 1) for n in range(5)])
    encoded = encode_pairs(data, chat, 64)
    assert len(encoded) == 5
    for index, pair in enumerate(data):
        chosen, rejected = chat.encode([pair.chosen_conversation, pair.rejected_conversation])
        assert [ids.tolist() for ids in encoded.pair(index).sequences] == [chosen, rejected]
        shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        assert encoded.group(index).shared == shared
        assert encoded.lengths_P2[index].tolist() == [len(chosen), len(rejected)]
        assert (encoded.id(index), encoded.subset(index)) == (pair.id, pair.subset)
    assert encoded.subsets() == ["s0", "s1", "s0", "s1", "s0"]
    assert encoded.margin_P.tolist() == [0, 1, 2, 3, 4]
    assert encoded.weight_P.tolist() == [1, 2, 3, 4, 5]
    assert encoded.index_P.tolist() == [0, 1, 2, 3, 4]
    assert {array.dtype.name for array in (encoded.chosen_P, encoded.rejected_P)} == {"int32"}
    assert encoded.margin_P.dtype == encoded.weight_P.dtype == np.float32
    assert encoded.group(0).tokens.dtype == np.int32
    report = encoded.report
    assert (report["given"], report["encoded"], report["with_margin"], report["dropped"]) == (5, 5, 4, {})
    assert report["tokens"] == sum(len(encoded.group(i).tokens) for i in range(5))
    assert report["pair_tokens"] == encoded.lengths_P2.sum()
    assert report["groups"] == encoded.num_groups == 5
    assert report["longest"] == encoded.lengths_P2.max()
    assert encoded.describe() == ""


def test_tokens_are_views_of_the_file(chat):
    encoded = encode_pairs(pairs_from_rows([row(n) for n in range(3)]), chat, 64)
    tokens = encoded.group(1).tokens
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    with pytest.raises(IndexError, match="pair 3 of 3"):
        encoded.pair(3)
    with pytest.raises(IndexError, match="group 3 of 3"):
        encoded.group(3)


def test_cut_and_dropped_pairs_are_counted(chat):
    plain = row(0)
    long_prompt = {"id": "cut", "chosen": conversation(1, "yes"), "rejected": conversation(1, "no")}
    long_answer = row(2, id="long", chosen="word " * 200)
    encoded = encode_pairs(pairs_from_rows([plain, long_prompt, long_answer]), chat, 64)
    assert [encoded.id(i) for i in range(len(encoded))] == ["p0", "cut"]
    assert encoded.index_P.tolist() == [0, 1]
    report = encoded.report
    assert (report["given"], report["encoded"], report["truncated"], report["dropped_turns"]) == (3, 2, 1, 2)
    assert report["dropped"] == {"answer longer than max_length 64": 1}
    assert report["examples"] == {"answer longer than max_length 64": ["long"]}
    assert report["longest"] <= 64
    assert encoded.describe() == (
        "1 of 3 pairs cut to 64 tokens; 1 dropped (answer longer than max_length 64; such as long)"
    )


def test_pairs_of_equal_tokens_are_dropped(chat):
    rows = [row(0), row(1, chosen="same", rejected="same  ")]  # the template strips the space
    encoded = encode_pairs(pairs_from_rows(rows), chat, 64)
    assert encoded.report["dropped"] == {"chosen and rejected are the same tokens": 1}
    assert encoded.describe() == "1 dropped (chosen and rejected are the same tokens; such as p1)"


def test_nothing_left(chat):
    with pytest.raises(DataError) as error:
        encode_pairs(pairs_from_rows([row(n) for n in range(3)]), chat, 8)
    assert str(error.value) == (
        "no pairs are left after encoding 3: most are dropped for 'answer longer than max_length 8' (3). "
        "Raise --max-length, or look at the pairs with: btrm doctor."
    )
    with pytest.raises(DataError, match="maximum length is 0 tokens, expected at least 1"):
        encode_pairs(pairs_from_rows([row(1)]), chat, 0)


def test_no_pairs_give_no_tokens(chat):
    _, nothing = split_held_out(pairs_from_rows([row(1)]), 0.5)
    encoded = encode_pairs(nothing, chat, 64)
    assert len(encoded) == 0
    assert encoded.chosen_P.dtype == np.int32
    assert len(encoded.places) == 0
    assert encoded.subsets() == []


class Counting:
    """A chat format that counts how often it encodes."""

    def __init__(self, chat):
        self.chat, self.calls = chat, 0
        self.tokenizer, self.template_sha256 = chat.tokenizer, chat.template_sha256

    def encode_groups(self, groups, max_length=None):
        self.calls += 1
        return self.chat.encode_groups(groups, max_length)


def test_encoding_is_reused_until_something_changes(chat, tmp_path):
    counting = Counting(chat)
    data = pairs_from_rows([row(n) for n in range(4)])
    first = encode_pairs(data, counting, 64)
    assert encode_pairs(data, counting, 64).folder == first.folder
    assert counting.calls == 1
    encode_pairs(data, counting, 63)
    encode_pairs(pairs_from_rows([row(n) for n in range(5)]), counting, 64)
    encode_pairs(data, counting, 64, cache_dir=str(tmp_path / "other"))
    counting.template_sha256 = "another"
    encode_pairs(data, counting, 64)
    counting.tokenizer = make_chat(texts=["other merges entirely"]).tokenizer
    encode_pairs(data, counting, 64)
    assert counting.calls == 6


def test_pickled_pairs_reopen_the_file(chat):
    encoded = encode_pairs(pairs_from_rows([row(n) for n in range(4)]), chat, 64)
    data = pickle.dumps(encoded)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.group(3).tokens.tolist() == encoded.group(3).tokens.tolist()
    shutil.rmtree(encoded.folder)
    assert encoded.group(2).shared == again.group(2).shared  # what is open stays readable
    with pytest.raises(DataError, match=r"cannot be read .*The cache was changed or removed"):
        pickle.loads(data)


def test_chunks_and_workers_do_not_change_a_byte(chat, tmp_path, monkeypatch):
    rows = [row(n, chosen="word " * (n % 70) + "yes") for n in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, _ = split_held_out(load_pairs([str(tmp_path / "a.jsonl")]), 0.1)
    whole = encode_pairs(data, chat, 64, cache_dir=str(tmp_path / "whole"))
    monkeypatch.setattr(encode, "CHUNK_PAIRS", 10)
    done: list[int] = []
    one = encode_pairs(data, chat, 64, cache_dir=str(tmp_path / "one"), progress=done.append)
    two = encode_pairs(data, chat, 64, cache_dir=str(tmp_path / "two"), workers=2)
    assert done == [*range(10, len(data), 10), len(data)]
    for name in ("groups.arrow", "pairs.arrow"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert whole.report == one.report == two.report
    assert 0 < whole.report["encoded"] < whole.report["given"]
    for encoded in (one, two):
        assert [encoded.group(i).tokens.tolist() for i in range(encoded.num_groups)] == [
            whole.group(i).tokens.tolist() for i in range(whole.num_groups)
        ]
        assert [encoded.id(i) for i in range(len(encoded))] == [whole.id(i) for i in range(len(whole))]


def test_an_encoding_process_that_dies_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "CHUNK_PAIRS", 2)
    with pytest.raises(DataError, match=r"an encoding process ended early \(exit code 9\)"):
        encode_pairs(pairs_from_rows([row(n, prompt=f"end {n}") for n in range(20)]), Endless(), 64, workers=2)
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_damaged_entry_is_encoded_anew(chat):
    data = pairs_from_rows([row(n) for n in range(4)])
    first = encode_pairs(data, chat, 64)
    (first.folder / "groups.arrow").write_bytes(b"cut")
    again = encode_pairs(data, chat, 64)
    assert isinstance(again, TokenStore)
    assert len(again) == 4


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("content'] ", "content'][:230] ", "assistant"),
        ("in messages", "in messages[-3:]", "system"),
        ("content'] ", "content'].split('</think>')[-1] ", "assistant"),
        ("content'] ", "content'] | replace('one two', 'one  two') ", "user"),
    ],
    ids=["cut", "dropped", "thoughts", "spaces"],
)
def test_messages_that_the_template_changes_are_counted(chat, old, new, lost):
    talk = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "one two"}]
    plain = [{"role": "user", "content": "Hi"}]
    rows = [
        {"id": "long", "prompt": talk, "chosen": "<think>so</think>" + "yes " * 60, "rejected": "no"},
        {"id": "plain", "prompt": plain, "chosen": "yes", "rejected": "no"},
    ]
    data = pairs_from_rows(rows)
    assert encode_pairs(data, chat, 512).report["altered"] == {}
    changed = dataclasses.replace(chat, template=chat.template.replace(old, new), template_sha256=new)
    assert changed.template != chat.template
    report = encode_pairs(data, changed, 512).report
    reason = f"the chat template drops or changes the text of a message of the {lost}"
    assert report["altered"] == {reason: 1}
    assert report["examples"] == {reason: ["long"]}
    assert report["encoded"] == 2
    assert encode_pairs(data, changed, 512).describe() == f"in 1 {reason} (such as long)"


def test_the_files_are_no_larger_than_tokens_and_indices(chat):
    """Six pairs of four answers to each of forty long prompts, spread over the data."""
    sides = [(a, b) for a in range(4) for b in range(a)]
    rows = [
        {"prompt": f"{'a question ' * 10}{n}?", "chosen": f"yes {a} {n} " * 3, "rejected": f"yes {b} {n} " * 3}
        for a, b in sides
        for n in range(40)
    ]
    encoded = encode_pairs(pairs_from_rows(rows), chat, 256)
    assert (encoded.num_groups, len(encoded)) == (40, 240)
    trees = [encoded.group(g) for g in range(40)]
    tokens = sum(len(tree.tokens) for tree in trees)
    assert encoded.report["tokens"] == tokens < encoded.report["pair_tokens"] / 5
    indices = sum(tree.edges.size + len(tree.leaf) + 5 for tree in trees)
    groups = (encoded.folder / "groups.arrow").stat().st_size
    assert groups <= 4 * (tokens + indices) + 2000
    texts = sum(len(encoded.id(i)) + len(encoded.subset(i)) + 8 for i in range(240))
    assert (encoded.folder / "pairs.arrow").stat().st_size <= 240 * 44 + texts + 4000


def test_a_store_of_ids_is_one_like_any_other():
    groups = [([[5, 6, 7], [5, 6], [5, 8]], [(0, 1), (2, 1)]), ([[9], [4, 4]], [(1, 0)])]
    made = TokenStore.of_ids(groups)
    again = pickle.loads(pickle.dumps(made))
    for store in (made, again):
        assert (len(store), store.num_groups, store.first_pair_G.tolist()) == (3, 2, [0, 2, 3])
        assert [ids.tolist() for ids in store.group(0).sequences] == groups[0][0]
        assert [[ids.tolist() for ids in store.pair(i).sequences] for i in range(3)] == [
            [[5, 6, 7], [5, 6]],
            [[5, 8], [5, 6]],
            [[4, 4], [9]],
        ]
        assert store.lengths_P2.tolist() == [[3, 2], [2, 2], [2, 1]]
        assert len(store.longest(2)) == 2
        assert [len(tree.tokens) for tree in store.longest(2)] == [3, 3]
