"""Rewards of pairs to an evaluation, through a file and back."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest
from support.reward_samples import made

from btrm_core.data.pairs import prompt_hash
from btrm_core.errors import DataError
from btrm_core.evaluation.assess import assess
from btrm_core.evaluation.reading import read_scores
from btrm_core.evaluation.scores import UNKNOWN, PairRewards, PairText, write_scores


def changed(rewards, **columns):
    return dataclasses.replace(rewards, **columns)


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.jsonl.gz", "deep/scores.parquet"])
@pytest.mark.parametrize("text", [True, False])
def test_every_figure_comes_back_from_the_file(tmp_path, name, text):
    rewards = made(text=text)
    rewards.reward_P2[4, 1] = math.nan
    rewards.tokens_P2[:, 0] = UNKNOWN
    rewards.data_margin_P[2] = math.nan
    other = made(5, seed=4, text=text, model="other")
    write_scores([rewards, other], tmp_path / name)
    again, second = read_scores(tmp_path / name)
    assert assess(again).to_dict() == assess(rewards).to_dict()
    assert assess(second).to_dict() == assess(other).to_dict()
    assert (again.text(7) if again.text else None) == (rewards.text(7) if text else None)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [name.rpartition("/")[2]]


def test_the_names_are_those_of_rewardbench(tmp_path):
    write_scores([made(3)], tmp_path / "s.jsonl")
    row = json.loads((tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {"id", "subset", "prompt", "text_chosen", "text_rejected", "scores_chosen", "scores_rejected"} <= set(row)
    assert row["results"] == float(row["scores_chosen"] > row["scores_rejected"])


def test_a_file_of_rewardbench_is_read(tmp_path):
    rows = [
        {"id": 31, "subset": "alpacaeval-easy", "scores_chosen": 1.5, "scores_rejected": [0.5], "results": 1,
         "text_chosen": "<s>[INST] hi [/INST] hello", "text_rejected": "<s>[INST] hi [/INST] go"},
        {"id": 32, "subset": "alpacaeval-easy", "scores_chosen": None, "scores_rejected": 0.5, "results": 0,
         "text_chosen": "a", "text_rejected": "b"},
    ]  # fmt: skip
    with gzip.open(tmp_path / "rb.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    (found,) = read_scores(tmp_path / "rb.jsonl.gz")
    assert (found.model, found.id_P) == (str(tmp_path / "rb.jsonl.gz"), ["31", "32"])
    assert found.prompt_P[0] != found.prompt_P[1]
    evaluation = assess(found)
    assert (evaluation.given, evaluation.unscored, evaluation.accuracy.half) == (2, 1, 1.0)
    assert evaluation.length[0].unit == "characters"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no pair"),
        ("{", "at line 1"),
        ('{"id": 1}', "missing key 'scores_chosen'"),
        ('{"scores_chosen": "high", "scores_rejected": 1}', "expected a number or null"),
        ("[1]", "line 1 is list"),
        *(
            (json.dumps({"scores_chosen": 2.0, "scores_rejected": 1.0} | wrong), message)
            for wrong, message in (
                ({"scores_chosen": 10**400}, "'scores_chosen' is '1000.*expected a number"),
                ({"scores_chosen": [1.0, 2.0]}, r"'scores_chosen' is '\[1.0, 2.0\]'"),
                ({"probability": "high"}, "'probability' is 'high', expected a number"),
                ({"probability": 2}, r"'probability' is 2, expected 0.5 \(a tie\) to 1"),
                ({"margin": ["big"]}, "'margin' is 'big'"),
                ({"tokens_chosen": "12"}, "line 1: 'tokens_chosen' is '12'"),
            )
        ),
    ],
)
def test_files_that_are_none_say_what_is_wrong(tmp_path, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / "s.jsonl")


def test_what_other_writers_call_missing_is_missing(tmp_path):
    rows = [
        {"scores_chosen": [[2.0]], "scores_rejected": 1, "probability": math.nan, "margin": math.nan,
         "tokens_chosen": math.nan, "tokens_rejected": 10**30, "characters_chosen": 5.0, "characters_rejected": 6,
         "text_chosen": "a", "text_rejected": "b", "prompt": ["no message", 3]},
        {"scores_chosen": math.nan, "scores_rejected": 1.0},
    ]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_scores(tmp_path / "s.jsonl")
    assert found.tokens_P2.tolist() == [[UNKNOWN, UNKNOWN]] * 2
    assert found.characters_P2[0].tolist() == [5, 6]
    assert (found.probability_P[0], math.isnan(found.data_margin_P[0])) == (1.0, True)
    assert assess(found).unscored == 1


def test_answers_that_are_conversations_bring_their_prompt(tmp_path):
    chosen, rejected = ([{"role": "user", "content": "q"}, {"role": "assistant", "content": c}] for c in "ab")
    row = {"scores_chosen": 1.0, "scores_rejected": 0.0, "text_chosen": chosen, "text_rejected": rejected}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_scores(tmp_path / "s.jsonl")
    assert found.text(0) == PairText((("user", "q"),), "a", "b")
    # The same pair read as data has the same prompt.
    assert found.prompt_P[0] == prompt_hash([{"role": "user", "content": " q\n"}])


def test_a_broken_gzip_file_is_one_line(tmp_path):
    whole = gzip.compress(json.dumps({"scores_chosen": 1.0, "scores_rejected": 0.0}).encode() * 99)
    (tmp_path / "s.jsonl.gz").write_bytes(whole[:20] + bytes([whole[20] ^ 255]) + whole[21:])
    with pytest.raises(DataError, match=r"s\.jsonl\.gz, at line"):
        read_scores(tmp_path / "s.jsonl.gz")


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_scores(tmp_path / "none.jsonl")
    (tmp_path / "s.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        read_scores(tmp_path / "s.parquet")
    with pytest.raises(DataError, match="cannot write"):
        write_scores([made(2)], tmp_path / "s.parquet" / "inside.jsonl")


def test_an_evaluation_by_hand():
    rewards = made(4, text=False)
    rewards.reward_P2[:] = [[1, 0], [0, 2], [3, 3], [5, 1]]
    found = assess(changed(rewards, subset_P=["a", "a", "b", "b"], data_margin_P=np.array([1.0, 1.0, 2.0, 2.0])))
    assert (found.data, found.given, found.undecided, found.unscored) == ("held/out.jsonl", 4, 0, 0)
    assert found.accuracy.half == 0.625
    assert found.calibration.before.loss == pytest.approx(
        np.mean([math.log1p(math.exp(-m)) for m in (1.0, -2.0, 0.0, 4.0)])
    )
    assert [(s.name, s.accuracy.half, s.reward_margin) for s in found.subsets] == [("a", 0.5, -0.5), ("b", 0.75, 2.0)]
    assert found.subset_mean == 0.625
    assert [(b.low, b.accuracy.half) for b in found.by_data_margin] == [(1.0, 0.5), (2.0, 0.75)]
    assert [(b.low, b.high, b.accuracy.half) for b in found.by_margin] == [
        (0.0, 0.0, 0.5),
        (1.0, 1.0, 1.0),
        (2.0, 2.0, 0.0),
        (4.0, 4.0, 1.0),
    ]
    assert [(case.place, case.id) for case in found.worst] == [(1, "row:1")]
    # most confident first: right, wrong, right, half
    assert found.risk_area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1.5 / 4) / 4)


def test_separation_is_the_area_under_the_roc_curve():
    from sklearn.metrics import roc_auc_score

    rewards = made(200)
    rewards.reward_P2[:] = rewards.reward_P2.round(1)  # with ties
    labels = np.tile([1, 0], 200)
    found = assess(rewards).rewards
    assert found.separation == pytest.approx(roc_auc_score(labels, rewards.reward_P2.reshape(-1)))
    assert found.between_prompts is not None
    assert 0 < found.between_prompts < 0.6


def test_ties_of_the_data_and_missing_rewards_are_left_out_and_counted():
    rewards = made(10)
    rewards.probability_P[:3] = 0.5
    rewards.reward_P2[2:5, 0] = [math.nan, math.nan, math.inf]
    found = assess(rewards)
    assert (found.given, found.undecided, found.unscored, found.accuracy.pairs) == (10, 3, 2, 5)
    assert all(case.place >= 5 for case in found.worst)


def test_rewards_too_large_for_figures_are_none():
    rewards = made(6)
    rewards.reward_P2[:2] = [[1e308, -1e308], [1.0, -1e200]]
    found = assess(rewards)
    assert (found.unscored, found.accuracy.pairs) == (2, 4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_to_judge_is_said():
    with pytest.raises(DataError, match=r"no pairs to evaluate of held/out\.jsonl"):
        assess(made(4).select(np.array([], dtype=np.int64)))
    with pytest.raises(DataError, match="is a tie"):
        assess(changed(made(4), probability_P=np.full(4, 0.5)))
    with pytest.raises(DataError, match="two finite rewards"):
        assess(changed(made(4), reward_P2=np.full((4, 2), np.nan)))


@pytest.mark.parametrize("rewards", [np.zeros((6, 2)), np.tile([1.0, 0.0], (6, 1)), np.tile([0.0, 1.0], (6, 1))])
def test_all_ties_all_right_all_wrong_have_defined_figures(rewards):
    found = assess(changed(made(6), reward_P2=rewards))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["accuracy"]["pairs"] == 6
    assert found.calibration.after is None
    assert found.suspects is None


def test_one_pair_has_defined_figures():
    found = assess(made(1))
    json.dumps(found.to_dict(), allow_nan=False)
    assert (found.accuracy.pairs, found.accuracy.bootstrap, found.subsets) == (1, None, ())


def test_suspects_are_pairs_that_calibrated_rewards_contradict():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 3, 2000)
    won = rng.uniform(size=2000) < 1 / (1 + np.exp(-margin))
    margin = np.where(won, margin, -margin)
    margin[[10, 20]] = -12.0
    rewards = changed(made(2000), reward_P2=np.stack([margin, np.zeros(2000)], axis=1))
    found = assess(rewards)
    assert {case.place for case in found.worst[:2]} == {10, 20}
    assert found.suspects is not None
    assert 2 <= found.suspects < 100
    assert all(case.probability < 0.05 for case in found.worst[: min(found.suspects, len(found.worst))])


def test_texts_follow_their_pairs():
    joined = PairRewards.joined([made(3), made(2, seed=1)])
    assert len(joined) == 5
    picked = joined.select(np.array([4, 0]))
    assert (picked.text(0).chosen, picked.text(1).chosen) == ("good 1", "good 0")
    assert PairRewards.joined([made(3), made(2, text=False)]).text is None


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz", "s.parquet"])
def test_half_a_surrogate_pair_breaks_no_file(tmp_path, name):
    rewards = changed(made(2), text=lambda i: PairText((("user", "\ud800"),), "ok \udfff", "bad"))
    write_scores([rewards], tmp_path / name)
    assert read_scores(tmp_path / name)[0].text(0).chosen.startswith("ok")
