"""Data sets looked through, filtered and written in the standard format."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random

import numpy as np
import pytest
from click.testing import CliRunner
from support.scorer_samples import reward_model

from btrm_core.cli import main
from btrm_core.cli.data import held_out_name
from btrm_core.config import apply
from btrm_core.data import load_pairs
from btrm_core.data.curate import load_prompts, overview, survey, write_pairs
from btrm_core.data.curate.select import token_lengths
from btrm_core.data.curate.similar import has_passage, near_duplicates, ngrams, passages, signature, word_hashes
from btrm_core.data.pairs import pairs_from_rows
from btrm_core.errors import DataError
from btrm_core.model import load_chat
from btrm_core.preflight.doctor.case import _read as read_as_training
from btrm_core.settings import RunConfig

LONG = " ".join(f"word{n}" for n in range(60))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("curate") / "model")


def btrm(*arguments):
    return CliRunner().invoke(main, ["data", *(str(a) for a in arguments)])


def rows_of(*triples, **more):
    return [{"prompt": p, "chosen": c, "rejected": r, **more} for p, c, r in triples]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ngrams_are_of_consecutive_words_without_case_and_punctuation():
    first, second = word_hashes("The cat, sat ON the mat."), word_hashes("the CAT sat on the mat")
    assert first.tolist() == second.tolist()
    assert len(ngrams(first, 5)) == 2
    assert len(set(ngrams(word_hashes(LONG), 5).tolist())) == 56
    assert ngrams(word_hashes("a b"), 5).shape == (1,)
    assert ngrams(word_hashes(""), 5).shape == (0,)
    assert ngrams(word_hashes("a b c"), 3).tolist() != ngrams(word_hashes("c b a"), 3).tolist()


def jaccard(left, right):
    a, b = (set(ngrams(word_hashes(text), 5).tolist()) for text in (left, right))
    return len(a & b) / len(a | b)


def test_signatures_estimate_how_much_texts_overlap():
    drawn = random.Random(0)
    words = LONG.split()
    errors = []
    for _ in range(200):
        changed = [w if drawn.random() > 0.05 else "other" for w in words]
        estimate = (signature(LONG) == signature(" ".join(changed))).mean()
        errors.append(estimate - jaccard(LONG, " ".join(changed)))
    assert abs(np.mean(errors)) < 0.02  # unbiased
    assert np.std(errors) < 0.08  # sqrt(J (1 - J) / 64)


def test_near_duplicates_are_found_once_and_point_back():
    texts = ["something else entirely", LONG, "short", LONG + " tail", "other " * 30, LONG.upper(), "short", ""]
    found = near_duplicates(texts)
    assert found.tolist()[:5] == [-1, -1, -1, 1, -1]
    assert found[5] in (1, 3)
    assert found[6] == 2
    assert found[7] == -1
    assert near_duplicates([]).shape == (0,)


def test_passages_of_thirteen_words():
    known = passages(["so " + LONG, "too short to have one"])
    start, middle = " ".join(LONG.split()[:13]), " ".join(LONG.split()[20:33])
    assert list(has_passage([f"x {middle}, y", start, " ".join(LONG.split()[:12]), ""], known)) == [
        True,
        True,
        False,
        False,
    ]
    assert list(has_passage([LONG], passages([]))) == [False]


def data(*triples, **more):
    return pairs_from_rows(rows_of(*triples, **more))


def test_circles_among_the_answers_to_a_prompt():
    circle = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    assert survey(data(*circle)).cycles["prompts"] == 1
    assert survey(data(*circle[:2], ("p", "a", "c"))).cycles["prompts"] == 0
    assert survey(data(*circle[:2], ("q", "c", "a"))).cycles["prompts"] == 0
    contradiction = survey(data(("p", "a", "b"), ("p", "b", "a"))).cycles
    assert (contradiction["prompts"], contradiction["contradictory pairs"]) == (1, 2)
    leading_in = survey(data(("p", "x", "a"), *circle, ("p", "c", "y")))
    assert leading_in.cycles["prompts"] == 1


def test_what_a_survey_counts():
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "<|eot_id|> a"},
        {"role": "user", "content": "v"},
    ]
    rows = [
        {"prompt": talk, "chosen": "yes [INST]", "rejected": "no", "margin": 2.0, "subset": "x"},
        {"prompt": "p", "chosen": "b", "rejected": "cc", "weight": 0.5},
        {"prompt": "p", "chosen": "b", "rejected": "dd", "probability": 0.7},
    ]
    found = survey(pairs_from_rows(rows))
    assert found.roles == {"user": 4, "system": 1, "assistant": 1}
    assert found.turns == {1: 2, 4: 1}
    assert found.pairs_per_prompt == {1: 1, 2: 1}
    assert found.labels == {"certain": 2, "soft": 1, "with a margin": 1, "weighted": 1}
    assert found.control_tokens == {"<|eot_id|>": 1, "[INST]": 1}
    assert (found.tokens, found.against) == (None, None)
    assert json.loads(json.dumps(found.to_dict()))["pairs_per_prompt"] == {"1": 1, "2": 1}


def test_other_data_is_found_by_prompt_and_by_passage():
    passage = " ".join(LONG.split()[10:40])
    found = survey(
        data((LONG, "a", "b"), ("q", "a", "b"), (f"Read: {passage}", "a", "b")), against=data((LONG, "x", "y"))
    )
    assert (found.against["same prompt"], found.against["13 words in a row"]) == (1, 1)
    assert len(found.against["examples"]) == 2


def test_tokens_are_those_of_the_model_and_trees_share_every_beginning(model):
    chat = load_chat(model)
    pairs = data(*[("the same prompt", f"answer {a}", f"answer {b}") for a, b in itertools.combinations("wxyz", 2)])
    found = survey(pairs, chat=chat).tokens
    question = {"role": "user", "content": "the same prompt"}
    ids = chat.encode([[question, {"role": "assistant", "content": f"answer {a}"}] for a in "wxyz"])
    nodes = {tuple(one[: n + 1]) for one in ids for n in range(len(one))}
    assert found["trees"] == len(nodes)
    both = list(itertools.combinations(ids, 2))
    assert found["separate"] == sum(len(a) + len(b) for a, b in both)
    assert found["padded"] == 2 * 6 * max(map(len, ids))  # fewer than eight pairs: one batch
    assert found["shared"] == sum(len({tuple(x[: n + 1]) for x in pair for n in range(len(x))}) for pair in both)
    assert found["padded_over_trees"] == pytest.approx(found["padded"] / found["trees"])
    assert token_lengths(pairs, chat).tolist() == [[len(a), len(b)] for a, b in both]


def test_trees_of_prompts_do_not_depend_on_batches(model, monkeypatch):
    chat = load_chat(model)
    pairs = data(*[(f"prompt {n % 3}", f"a{n}", f"b{n}") for n in range(12)])
    whole = survey(pairs, chat=chat).tokens
    monkeypatch.setattr(overview, "_TOGETHER", 5)
    assert survey(pairs, chat=chat).tokens == whole


EVERY_FORM = [
    {"prompt": "p1", "chosen": "a", "rejected": "b"},
    {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"prompt": "p2", "responses": ["x", "y", "z"], "scores": [1, 3, 2]},
    {"prompt": "p3", "response_a": "A", "response_b": "B", "winner": "b", "id": "own"},
    {"prompt": "p4", "response_a": "A", "response_b": "B", "winner": "tie"},
    {"prompt": [{"role": "system", "content": "é"}, {"role": "user", "content": "u"}], "chosen": "a",
     "rejected": "b", "margin": 1.5, "weight": 0.25, "subset": "s", "probability": 0.8},
    {"chosen": 1, "rejected": 2},
]  # fmt: skip


def values(pairs):
    return [(p.id, p.subset, p.prompt, p.chosen, p.rejected, p.margin, p.weight, p.probability) for p in pairs]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_what_convert_writes_are_the_pairs_that_training_reads(tmp_path, ending):
    rows = (
        EVERY_FORM
        if ending != "parquet"
        else [r for r in EVERY_FORM if "\ud800" not in json.dumps(r, ensure_ascii=False)]
    )
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / f"out.{ending}"
    result = btrm("convert", source, "-o", target, "--which-pairs", "all", "--ties", "half")
    assert result.exit_code == 0, result.output
    direct = load_pairs([str(source)], scored="all", ties="half")
    again = load_pairs([str(target)], ties="half")
    assert again.issues.bad == 0
    assert values(again) == values(direct)
    assert "1 bad row" in result.stdout
    assert f"{len(direct):,} pairs written to {target}" in result.stdout
    twice = tmp_path / f"twice.{ending}"
    write_pairs(again, twice)
    assert values(load_pairs([str(twice)], ties="half")) == values(direct)


@pytest.mark.parametrize("rule", ["best-vs-worst", "best-vs-each", "all", "random"])
def test_settings_of_training_and_flags_of_convert_mean_the_same_pairs(tmp_path, rule):
    completions = [{"response": f"r{n}", "overall_score": n * 1.5} for n in range(4)]
    rows = [{"instruction": f"p{n}", "completions": completions, "chosen": "x", "rejected": "y"} for n in range(5)]
    source, target = (
        write(tmp_path / "in.jsonl", [*rows, {"prompt": "q", "chosen": "a", "rejected": "b"}]),
        tmp_path / "out.jsonl",
    )
    result = btrm("convert", source, "-o", target, "--which-pairs", rule, "--format", "ultrafeedback")
    assert result.exit_code == 0, result.output
    assert "another format" in result.stdout
    config = apply(RunConfig(), {"data.scored": rule, "data.format": "ultrafeedback"})
    trained, written = read_as_training(config, [str(source)]), load_pairs([str(target)])
    assert values(written) == values(trained)
    assert {pair.margin for pair in written} == {1.5 * (int(p.chosen[1]) - int(p.rejected[1])) for p in trained}
    wrong = btrm("convert", source, "-o", tmp_path / "no.jsonl", "--format", "rewardbemch")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "expected one of standard, hh, sharegpt" in wrong.stderr
    assert "Did you mean 'rewardbench'" in wrong.stderr
    assert "ultrafeedback, helpsteer" in " ".join(btrm("convert", "--help").stdout.split())


def test_equal_pairs_give_equal_bytes(tmp_path):
    pairs = data(("p", "a", "b"))
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_pairs(pairs, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()))["chosen"][-1]["content"] == "a"


def test_every_pair_left_out_has_a_counted_reason(tmp_path, model):
    passage = " ".join(LONG.split()[:20])
    rows = [
        {"prompt": "keep", "chosen": "a", "rejected": "b", "margin": 3},
        {"prompt": "keep", "chosen": "a", "rejected": "b", "margin": 3},
        {"prompt": "weak", "chosen": "a", "rejected": "b", "margin": 1},
        {"prompt": "none", "chosen": "a", "rejected": "b"},
        {"prompt": "test", "chosen": "a", "rejected": "b", "margin": 3},
        {"prompt": f"As in {passage}", "chosen": "a", "rejected": "b", "margin": 3},
        {"prompt": "long", "chosen": "word " * 200, "rejected": "b", "margin": 3},
        {"prompt": "tie", "response_a": "A", "response_b": "B", "winner": "tie"},
        *({"prompt": f"more {n}", "chosen": "a", "rejected": "b", "margin": 2} for n in range(9)),
    ]
    source = write(tmp_path / "in.jsonl", rows)
    other = write(tmp_path / "test.jsonl", rows_of(("test", "x", "y"), (LONG, "x", "y")))
    target = tmp_path / "out.jsonl"
    arguments = ("convert", source, "-o", target, "--dedupe", "--min-margin", 2, "--decontaminate", other)
    result = btrm(*arguments, "--max-tokens", 150, "--model", model, "--sample", 6, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["left_out"] == {
        "tie": 1,
        "repeats an earlier pair": 1,
        "margin below 2, or none given": 2,
        "prompt also in the other data": 1,
        "prompt has 13 words in a row of the other data": 1,
        "longer than 150 tokens": 1,
        "not in the sample": 4,
    }
    assert report["rows"] == report["pairs"] + sum(report["left_out"].values()) == 17
    assert report["written"] == {str(tmp_path / "out.jsonl"): 6}
    again = btrm(*arguments, "--max-tokens", 150, "--model", model, "--sample", 6, "--overwrite")
    assert again.exit_code == 0
    assert "left out on purpose" in again.stdout or "not in the sample" in again.stdout


def test_every_row_with_a_prompt_counts_as_contamination(tmp_path):
    turns = [[("user", "two"), ("assistant", x), ("user", "more"), ("assistant", x)] for x in "ab"]
    of_its_own = [[{"role": role, "content": text} for role, text in one] for one in turns]
    rows = [
        {"prompt": "one", "response_a": "a", "response_b": "b", "winner": "tie"},
        {"conversation_a": of_its_own[0], "conversation_b": of_its_own[1], "winner": "model_a"},
    ]
    of_prompts = [{"turns": 3, "question": "four", "answer": "42"}, {"prompt": "five"}, {"x": 1}]
    other = write(tmp_path / "test.jsonl", [*rows, *of_prompts])
    talk = {"prompt": of_its_own[0][:-1], "chosen": "x", "rejected": "y"}
    source = write(tmp_path / "in.jsonl", [*rows_of(*[(p, "x", "y") for p in ("one", "three", "four", "five")]), talk])
    result = btrm("convert", source, "-o", tmp_path / "out.jsonl", "--decontaminate", other, "--json")
    assert json.loads(result.stdout)["left_out"] == {"prompt also in the other data": 4}
    assert "1 rows of --decontaminate hold no prompt" in result.stderr
    against = btrm("inspect", source, "--against", other, "--json", "--no-near")
    found = json.loads(against.stdout)["against"]
    assert (found["prompts"], found["rows without a prompt"], found["same prompt"]) == (5, 1, 4)
    with pytest.raises(DataError, match=r"no row of .* holds a prompt"):
        load_prompts([str(write(tmp_path / "no.jsonl", [{"x": 1}]))])


def test_names_that_are_no_text_are_told_as_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(b'{"prompt": "q", "chosen": "a", "rejected": "b", "\\ud801": 1}\n{"\\ud802": 1}\n')
    for arguments in (("inspect", path, "--json"), ("inspect", path), ("convert", path, "-o", tmp_path / "o.jsonl")):
        result = btrm(*arguments)
        assert result.exit_code == 0, result.output
        assert "\ufffd" in result.stdout
    with pytest.raises(DataError, match="the row has \ufffd"):
        load_pairs([str(path)], strict=True)


def test_a_split_by_prompt_shares_no_prompt(tmp_path):
    source = write(tmp_path / "in.jsonl", rows_of(*[(f"p{n // 2}", f"a{n}", f"b{n}") for n in range(60)]))
    result = btrm("convert", source, "-o", tmp_path / "out.jsonl.gz", "--split-by-prompt", 0.2)
    assert result.exit_code == 0, result.output
    train, held = (load_pairs([str(tmp_path / n)]) for n in ("out.jsonl.gz", "out.held_out.jsonl.gz"))
    assert (len(train), len(held)) == (48, 12)
    assert not set(train.prompt_hash_P.tolist()) & set(held.prompt_hash_P.tolist())
    assert held_out_name(tmp_path / "x.parquet").name == "x.held_out.parquet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "out.txt"), "cannot tell the format of out.txt from its ending"),
        (("-o", "SOURCE"), "exists already; name another output"),
        (("-o", "NEW", "--max-tokens", "9"), "--max-tokens needs a tokenizer"),
        (("-o", "NEW", "--family", "llama3"), "name the model with --model"),
        (("-o", "NEW", "--min-margin", "9"), "no pair is left: all 1 are left out for 'margin below 9, or none given'"),
        (("-o", "NEW", "--min-margin", "nan"), "--min-margin is nan; expected a finite number"),
        (
            ("-o", "NEW", "--split-by-prompt", "0.5"),
            "holds out no pair of 1: expected a share above 0 and pairs of two",
        ),
        (("-o", "NEW", "--sample", "0"), "--sample is 0; expected at least 1 pair"),
        (("-o", "NEW", "--split-by-prompt", "1.5"), "the held-out fraction is 1.5"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, arguments, message):
    source = write(tmp_path / "in.jsonl", rows_of(("p", "a", "b")))
    places = {"SOURCE": str(source), "NEW": str(tmp_path / "new.jsonl")}
    result = btrm("convert", source, *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "new.jsonl").exists()


def test_inspect_prints_and_reports(tmp_path, model):
    source = write(tmp_path / "in.jsonl", rows_of(*[(f"p{n // 2} {LONG}", f"a{n}", f"b{n}") for n in range(30)]))
    result = btrm("inspect", source, "--model", model, "--against", source, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    for what in ("Near-duplicate prompts", "Tokens (30 pairs counted)", "same prompt", "times"):
        assert what in result.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<details") == 30
    assert page.count("<svg ") == 2
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert values["survey"]["tokens"]["pairs"] == 30
    as_json = json.loads(btrm("inspect", source, "--no-near", "--json").stdout)
    assert (as_json["pairs"], as_json["near_duplicates"]) == (30, None)


def test_writing_follows_a_link_and_leaves_devices_alone(tmp_path):
    from btrm_core.data.curate.write import check_target

    (tmp_path / "link.jsonl").symlink_to(tmp_path / "disk.jsonl")
    assert check_target(tmp_path / "link.jsonl") == (tmp_path / "disk.jsonl").resolve()
    for path in ("/dev/null", "/dev/stdout", "-"):
        with pytest.raises(DataError, match="is no file"):
            check_target(path, overwrite=True)
