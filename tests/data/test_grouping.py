"""Several responses to a prompt: computed together, each once, with the losses of their pairs or of their ranking."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import trajectories
from support.chat_samples import make_chat
from support.tiny_models import tiny_model

from btrm_core.data import encode
from btrm_core.data.pairs import load_pairs, pairs_from_rows
from btrm_core.data.store import encode_pairs
from btrm_core.errors import BtrmError, ConfigError
from btrm_core.evaluation.figures import figures_of
from btrm_core.model.reward import RewardModel
from btrm_core.packing.forms import RowForm
from btrm_core.packing.steps import StepBudget, plan_epoch
from btrm_core.training.loss import bradley_terry, plackett_luce
from btrm_core.training.micro_batches import build_micro_batch

FORM = RowForm("shared", "varlen", 1, 0)


def scored_row(number, scores, **more):
    responses = [f"answer {number} {i} " * (i + 1) for i in range(len(scores))]
    return {"id": f"p{number}", "prompt": f"the question {number}?", "responses": responses, "scores": scores, **more}


ROWS = [
    scored_row(0, [3, 1, 2]),
    {"id": "lone", "prompt": "a question", "chosen": "yes", "rejected": "no"},
    scored_row(1, [1, 1, 5, 4]),
    scored_row(2, [2, 1]),
    {"id": "lone2", "prompt": "a question", "chosen": "yes", "rejected": "no"},
    scored_row(3, [7, 7, 1]),
]


@pytest.fixture(scope="module")
def chat():
    return make_chat()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def written(directory, rows):
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def encoded(chat, tmp_path, rows=ROWS, scored="all", ties="skip", max_length=128):
    return encode_pairs(load_pairs([written(tmp_path, rows)], scored=scored, ties=ties), chat, max_length)


def sides(pairs, index):
    return [ids.tolist() for ids in pairs.pair(index).sequences]


def test_a_prompt_is_one_group_and_each_conversation_is_there_once(chat, tmp_path):
    pairs = encoded(chat, tmp_path)
    assert len(pairs) == 3 + 1 + 5 + 1 + 1 + 2
    assert np.diff(pairs.first_pair_G).tolist() == [3, 2, 5, 1, 2], "the two equal prompts are one group"
    assert [len(pairs.group(g).leaf) for g in range(5)] == [3, 2, 4, 2, 3]
    assert [pairs.id(i) for i in (3, 4)] == ["lone", "lone2"]
    assert sides(pairs, 3) == sides(pairs, 4), "equal pairs are two terms of the loss on two rewards"
    units = pairs.places.unit_P
    assert units.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5]
    np.testing.assert_allclose(np.bincount(units, pairs.weight_P), 1, rtol=1e-6)
    for g in range(pairs.num_groups):
        sequences = [ids.tolist() for ids in pairs.group(g).sequences]
        assert len({tuple(sequence) for sequence in sequences}) == len(sequences)
        for i in pairs.pairs_of(np.array([g])):
            assert sides(pairs, i) == [sequences[pairs.chosen_P[i]], sequences[pairs.rejected_P[i]]]
            assert pairs.lengths_P2[i].tolist() == [len(side) for side in sides(pairs, i)]
    assert pairs.pairs_of(np.array([2, 0])).tolist() == [5, 6, 7, 8, 9, 0, 1, 2]


def test_pairs_of_one_prompt_meet_wherever_they_are(chat, tmp_path):
    rows = [
        {"id": f"{n} {turn}", "prompt": f"the question {n}?", "chosen": f"yes {turn} {n}", "rejected": "no"}
        for turn in range(3)
        for n in range(4)
    ]
    pairs = encoded(chat, tmp_path, rows)
    assert np.diff(pairs.first_pair_G).tolist() == [3, 3, 3, 3]
    assert [pairs.id(i) for i in range(6)] == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert pairs.index_P.tolist()[:6] == [0, 4, 8, 1, 5, 9]
    assert [len(pairs.group(g).leaf) for g in range(4)] == [4, 4, 4, 4], "the common answer is there once"
    assert pairs.report["tokens"] < pairs.report["pair_tokens"] / 2
    for i, (chosen, rejected) in enumerate(pairs.lengths_P2):
        assert [len(side) for side in sides(pairs, i)] == [chosen, rejected]
        row = rows[pairs.index_P[i]]
        conversation = [{"role": "user", "content": row["prompt"]}]
        expected = [[*conversation, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        assert sides(pairs, i) == chat.encode(expected)


def test_turns_of_a_conversation_and_prompts_that_differ_in_space_are_kept_exactly(chat, tmp_path):
    rows = [
        {"prompt": "a question", "chosen": "yes", "rejected": "no"},
        {"prompt": "a question  ", "chosen": "yes", "rejected": "no, never"},
    ]
    pairs = encoded(chat, tmp_path, rows)
    assert pairs.num_groups == 1, "templates drop such space, so these are told to be one prompt"
    for i, row in enumerate(rows):
        conversation = [{"role": "user", "content": row["prompt"]}]
        expected = [[*conversation, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        assert sides(pairs, i) == chat.encode(expected)


def test_groups_survive_a_split_and_lost_pairs(chat, tmp_path):
    data = load_pairs([written(tmp_path, ROWS)], scored="all")
    kept = np.array([1, 2, 3, 5, 6, 8, 9])  # the first pair of each ranking is gone
    part = encode_pairs(data.select(kept, "some", data.issues), chat, 128)
    assert np.diff(part.first_pair_G).tolist() == [2, 1, 3, 1]


def test_an_over_long_prompt_is_cut_alike_for_all_its_responses(chat, tmp_path):
    long = scored_row(0, [4, 3, 2, 1])
    long["prompt"] = "an early question " * 12 + long["prompt"]
    lone = {"prompt": long["prompt"], "chosen": long["responses"][0], "rejected": "no"}
    most = int(encoded(chat, tmp_path, [long], max_length=512).lengths_P2.max()) - 20
    pairs = encoded(chat, tmp_path, [long, lone], max_length=most)
    assert pairs.report["truncated"] == len(pairs) == 7
    assert pairs.num_groups == 1
    tree = pairs.group(0)
    assert len(tree.leaf) == 5, "a response that is cut otherwise in every pair would be there again"
    assert tree.shared > 20, "what is left of the prompt is there once"
    assert pairs.lengths_P2.max() <= most


def test_a_response_that_does_not_fit_costs_the_others_nothing(chat, tmp_path):
    row = scored_row(0, [1, 2, 3, 4])
    row["responses"][1] = "an answer that is too long " * 40
    pairs = encoded(chat, tmp_path, [row])
    assert len(pairs) == 3
    assert sum(pairs.report["dropped"].values()) == 3
    assert len(pairs.group(0).leaf) == 3
    assert pairs.weight_P.sum() == pytest.approx(1.0), "what is left weighs as much as all"


def test_chunks_end_between_prompts_and_never_within_a_ranking(chat, tmp_path, monkeypatch):
    whole = encoded(chat, tmp_path)
    monkeypatch.setattr(encode, "CHUNK_PAIRS", 2)
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "other"))
    pairs = encoded(chat, tmp_path)
    assert np.diff(pairs.first_pair_G).tolist() == np.diff(whole.first_pair_G).tolist()
    for g in range(pairs.num_groups):
        assert pairs.group(g).tokens.tolist() == whole.group(g).tokens.tolist()
    many = [{"prompt": "a question", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
    split = encoded(chat, tmp_path, [*many, scored_row(0, [3, 1, 2], prompt="a question")])
    assert np.diff(split.first_pair_G).tolist() == [2, 2, 2, 2, 4], "a prompt with more pairs than a chunk holds"


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("ranking", ["pairs", "plackett-luce"])
def test_rewards_losses_and_gradients_are_those_of_separate_passes(chat, tmp_path, layout, ranking):
    pairs = encoded(chat, tmp_path)
    model = RewardModel(tiny_model("llama3", vocab_size=1024), "eager")
    kernel = "padded" if layout == "padded" else "eager"
    micro = build_micro_batch(pairs, np.arange(len(pairs)), RowForm(layout, kernel, 1, 0))
    rewards_S = model(micro.batch)
    chosen_P, rejected_P = micro.sides(rewards_S)
    alone = [torch.cat([_alone(model, ids) for ids in pairs.pair(i).sequences]) for i in range(len(pairs))]
    apart_P2 = torch.stack(alone)
    torch.testing.assert_close(torch.stack([chosen_P, rejected_P], 1), apart_P2, rtol=0, atol=2e-5)
    if ranking == "pairs":
        together = (bradley_terry(chosen_P, rejected_P) * micro.weight_P).sum()
        apart = (bradley_terry(apart_P2[:, 0], apart_P2[:, 1]) * torch.from_numpy(pairs.weight_P)).sum()
    else:
        order = (micro.ranking_R, micro.wins_R, micro.chosen_entry_P, micro.rejected_entry_P)
        together = (plackett_luce(rewards_S[micro.entry_R], *order) * micro.weight_P).sum()
        apart = sum(_ranking_loss(pairs, unit, apart_P2) for unit in range(pairs.places.num_units))
    assert together.item() == pytest.approx(apart.item(), abs=2e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (together, apart)]
    for left, right in zip(*gradients, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, rtol=0, atol=2e-5)


def _alone(model, ids):
    from btrm_core.packing.rows import pad_rows
    from btrm_core.packing.trees import grow

    return model(pad_rows([grow([ids.tolist()])]).batch())


def _ranking_loss(pairs, unit, rewards_P2):
    """The definition, choice by choice, from the scores' order."""
    scores = {0: [3, 2, 1], 3: [5, 4, 1, 1], 5: [7, 7, 1]}.get(unit, [2, 1])
    ids = pairs.places.of_units(np.array([unit]))
    rewards, wins = {}, Counter()
    for i in ids.tolist():
        rewards[int(pairs.chosen_P[i])], rewards[int(pairs.rejected_P[i])] = rewards_P2[i]
        wins[int(pairs.chosen_P[i])] += 1
    best_first = sorted(rewards, key=lambda s: -wins[s])
    total, choices = 0, 0
    for place, s in enumerate(best_first):
        rest = [t for t, score in zip(best_first, scores, strict=True) if score <= scores[place]]
        if scores[place] > min(scores):
            total, choices = total + torch.stack([rewards[t] for t in rest]).logsumexp(0) - rewards[s], choices + 1
    return total / choices


def test_a_conversation_of_two_rankings_has_a_place_in_both(chat, tmp_path):
    first, second = scored_row(0, [3, 1, 2]), scored_row(0, [1, 2, 3])
    second["responses"][0] = "another answer"
    pairs = encoded(chat, tmp_path, [first, second])
    micro = build_micro_batch(pairs, np.arange(len(pairs)), FORM)
    assert pairs.num_groups == 1
    assert len(pairs.group(0).leaf) == 4
    assert micro.ranking_R.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(micro.wins_R[:3].tolist()) == sorted(micro.wins_R[3:].tolist()) == [0, 1, 2]
    assert len(set(micro.entry_R.tolist())) == 4
    places = micro.entry_R[micro.chosen_entry_P], micro.entry_R[micro.rejected_entry_P]
    assert [place.tolist() for place in places] == [micro.chosen_P.tolist(), micro.rejected_P.tolist()]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_plackett_luce_is_the_likelihood_of_the_order(rewards):
    tensor, size = torch.tensor(rewards, dtype=torch.float32), len(rewards)
    wins = torch.arange(size - 1, -1, -1)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    chosen, rejected = torch.tensor(pairs).unbind(1)
    loss = plackett_luce(tensor, torch.zeros(size, dtype=torch.long), wins, chosen, rejected)
    likelihood = math.prod(math.exp(rewards[i]) / sum(map(math.exp, rewards[i:])) for i in range(size - 1))
    assert loss.tolist() == pytest.approx([-math.log(likelihood) / (size - 1)] * len(pairs), abs=1e-4)


def test_a_pair_of_plackett_luce_is_bradley_terry_with_centering():
    rewards = torch.tensor([0.4, -1.1, 2.0, 2.5])
    order = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 2]), torch.tensor([1, 3])
    expected = bradley_terry(rewards[[0, 2]], rewards[[1, 3]], centering=0.1)
    torch.testing.assert_close(plackett_luce(rewards, *order, centering=0.1), expected)


@given(st.floats(-4, 4), st.floats(0.5, 1), st.floats(0, 0.4))
def test_soft_labels_are_cross_entropy(logit, probability, smoothing):
    loss = bradley_terry(
        torch.tensor([logit]), torch.zeros(1), probability_P=torch.tensor([probability]), label_smoothing=smoothing
    )
    sure = probability * (1 - smoothing) + (1 - probability) * smoothing
    expected = sure * math.log1p(math.exp(-logit)) + (1 - sure) * math.log1p(math.exp(logit))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_tie_pulls_both_rewards_together():
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    bradley_terry(chosen, rejected, probability_P=torch.tensor([0.5])).sum().backward()
    assert chosen.grad.item() == pytest.approx(1 / (1 + math.exp(-3)) - 0.5, abs=1e-6)
    assert rejected.grad.item() == -chosen.grad.item()


TIED = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie"}


def test_ties_are_skipped_or_count_half(chat, tmp_path):
    rows = [TIED, *ROWS]
    assert (encoded(chat, tmp_path, rows).probability_P == 1).all()
    pairs = encoded(chat, tmp_path, rows, ties="half")
    assert pairs.probability_P.tolist().count(0.5) == 3  # declared, and one pair of equal scores in two rankings
    assert len(pairs) == len(encoded(chat, tmp_path, rows)) + 3
    worst = encoded(chat, tmp_path, [scored_row(0, [1, 1, 1])], scored="best-vs-worst", ties="half")
    assert worst.probability_P.tolist() == [0.5]


def test_soft_labels_come_from_the_data_and_are_checked(chat, tmp_path):
    sure = {"prompt": "a question", "chosen": "yes", "rejected": "no", "probability": 0.8}
    rows = [sure, {**sure, "probability": 0.3}, {**sure, "probability": "high"}]
    data = load_pairs([written(tmp_path, rows)])
    assert encode_pairs(data, chat, 64).probability_P.tolist() == pytest.approx([0.8])
    examples = str(data.issues.examples)
    assert "'probability' is 0.3, expected 0.5 (a tie) to 1" in examples
    assert "swap chosen and rejected" in examples
    assert "'probability' is 'high', expected a finite number" in examples


def test_ties_decide_no_evaluation(chat):
    sure = {"prompt": "a question", "chosen": "yes", "rejected": "no"}
    pairs = encode_pairs(pairs_from_rows([sure, {**sure, "prompt": "b", "probability": 0.5}]), chat, 64)
    figures = figures_of(pairs.judged, np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert (figures["accuracy"], figures["pairs"], figures["undecided"]) == (1.0, 1, 1)
    tied = encode_pairs(pairs_from_rows([{**sure, "probability": 0.5}]), chat, 64)
    with pytest.raises(BtrmError, match="every evaluation pair is a tie"):
        figures_of(tied.judged, np.zeros((1, 2)))


def test_a_plan_keeps_a_prompt_together(chat, tmp_path):
    pairs = encoded(chat, tmp_path)
    made = plan_epoch(pairs.places, FORM, StepBudget(pairs_per_step=2, tokens_per_batch=512, world=2))
    seen = np.concatenate([step.pair_ids for step in made])
    assert sorted(seen.tolist()) == list(range(len(pairs)))
    assert made.num_steps == 3, "a ranking counts as one pair"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = trajectories.prepare(tmp_path_factory.mktemp("rankings"), rows=8)
    rng = np.random.default_rng(0)
    rows = [scored_row(n, rng.permutation(5)[: 2 + n % 3].tolist()) for n in range(24)]
    written(root, rows)
    return root


@pytest.mark.parametrize("ranking", ["pairs", "plackett-luce"])
def test_one_trajectory_of_rankings(root, tmp_path, ranking):
    common = {
        "data__train": (str(root / "rows.jsonl"),),
        "data__scored": "all",
        "loss__ranking": ranking,
        "train__max_steps": 4,
    }
    shared = trajectories.trajectory(root, tmp_path / "shared", **common)
    padded = trajectories.trajectory(
        root, tmp_path / "padded", **common, train__layout="padded", train__tokens_per_batch=2000
    )
    assert trajectories.distance(shared, padded) < 1e-5
    if ranking == "plackett-luce":
        pairs = trajectories.trajectory(root, tmp_path / "pairs", **{**common, "loss__ranking": "pairs"})
        assert trajectories.distance(shared, pairs) > 1e-4, "the ranking's loss is another one"


def test_what_a_ranking_loss_does_not_know_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"loss.ranking=plackett-luce knows no loss.margin"):
        trajectories.train(root, tmp_path / "a", loss__ranking="plackett-luce", loss__margin=True)
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "probability": 0.9} for n in range(8)]
    with pytest.raises(ConfigError, match="takes no soft labels"):
        trajectories.train(root, tmp_path / "b", loss__ranking="plackett-luce", data__train=(written(tmp_path, rows),))
