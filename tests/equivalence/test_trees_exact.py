"""Rows of trees give the rewards and gradients of separate forward passes.

What `test_packed_exact` shows for prompts with responses, for trees of any depth: branches below branches, sequences
that end where others go on, edges of one token, paths longer than every window, pairs given several times, trees cut
into parts because they exceed the budget. The reference is the same, transformers' own eager attention on one unpadded
sequence at a time, and so are the tolerances.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.exactness import DEFAULT, OTHERS, TOLERANCE, Results, difference, precisely, reward_model
from support.tiny_models import CONFIGS, SOFTCAPPED, WINDOW, WINDOWED, deep_sequences, deep_tree, gradients, tiny_model

from btrm_core.data.store import TokenStore
from btrm_core.model.reward import RewardModel
from btrm_core.packing.batch import Batch
from btrm_core.packing.cuts import split
from btrm_core.packing.forms import PADDED, RowForm, collate
from btrm_core.packing.steps import StepBudget, plan_epoch
from btrm_core.packing.trees import Tree, grow, part
from btrm_core.training.loss import bradley_terry
from btrm_core.training.micro_batches import build_micro_batch

DEPTHS = (1, 2, 3, 4, 5)


def trees() -> list[Tree]:
    """One tree of each depth, and a second of the deepest with a sequence given twice."""
    sequences = deep_sequences(5, 1)
    return [*(deep_tree(depth) for depth in DEPTHS), grow([*sequences, sequences[2]])]


def weights_S(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + 0.3).to(dtype) / 8


@functools.cache
def separate(name: str, dtype: torch.dtype) -> Results:
    """Rewards and gradients of one unpadded eager pass per sequence, computed once per model."""
    model = RewardModel(tiny_model(name, dtype), PADDED)
    alone = [one for tree in trees() for one in tree.unshared()]
    with precisely(dtype), model.own_attention():
        rewards_S = torch.cat([model(collate([one], kernel=PADDED)) for one in alone])
        return rewards_S.detach(), gradients(model, rewards_S, weights_S(len(alone), dtype))


def in_rows(model: RewardModel, batches: Sequence[Batch], dtype: torch.dtype, places: Sequence[int] = ()) -> Results:
    """Rewards and gradients of rows; `places` says which sequence each reward is of, if they are not in order."""
    with precisely(dtype):
        rewards_S = torch.cat([model(batch) for batch in batches])
        if len(places):
            rewards_S = rewards_S[torch.tensor(np.argsort(places))]
        return rewards_S.detach(), gradients(model, rewards_S, weights_S(len(rewards_S), dtype))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_trees_equals_separate_passes(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model = reward_model(name, DEFAULT[name], dtype, checkpointing=checkpointing)
    batch = collate(trees(), kernel=DEFAULT[name], multiple_of=16)
    assert batch.shared > batch.computed, "most tokens are shared"
    assert difference(in_rows(model, [batch], dtype), separate(name, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "kernel"), OTHERS)
def test_a_row_of_trees_through_another_kernel_equals_separate_passes(name: str, kernel: str) -> None:
    for dtype in (torch.float64, torch.float32):
        model = reward_model(name, kernel, dtype, checkpointing=dtype == torch.float64)
        batch = collate(trees(), kernel=kernel)
        assert difference(in_rows(model, [batch], dtype), separate(name, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2"])
def test_flex_on_trees_equals_separate_passes(name: str, flex_on_cpu: None) -> None:
    model = reward_model(name, "flex", torch.float64, checkpointing=True)
    batch = collate(trees(), kernel="flex", multiple_of=128)
    assert difference(in_rows(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trees_without_sharing_equal_separate_passes(name: str, layout: str) -> None:
    kernel = PADDED if layout == "padded" else DEFAULT[name]
    model = reward_model(name, kernel, torch.float64)
    batch = collate(trees(), kernel=kernel, share_prefix=False)
    assert batch.shared == 0
    assert difference(in_rows(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_trees_cut_over_several_rows_equal_separate_passes(name: str) -> None:
    kernel, budget = DEFAULT[name], 60
    model = reward_model(name, kernel, torch.float64, checkpointing=True)
    batches, places, first = [], [], 0
    for tree in trees():
        for members in split(tree, budget):
            piece = part(tree, members)
            assert len(piece.tokens) <= budget or len(members) == 1
            batches.append(collate([piece], kernel=kernel))
            places += [first + place for place in members]
        first += len(tree.leaf)
    assert len(batches) > len(trees()), "some are cut"
    assert difference(in_rows(model, batches, torch.float64, places), separate(name, torch.float64)) < 1e-10


def store() -> TokenStore:
    """Pairs over trees of several depths: some given several times, their weights unequal."""
    rng, groups = np.random.default_rng(3), []
    for depth in (1, 3, 4):
        sequences = [*deep_sequences(depth), [50, 51]]
        pairs = [tuple(rng.choice(len(sequences), 2, replace=False).tolist()) for _ in range(6)]
        groups.append((sequences, [*pairs, *pairs[:2]]))  # the same ids on both sides: two terms of the loss
    made = TokenStore.of_ids(groups)
    made.weight_P = np.linspace(0.2, 2.0, len(made), dtype=np.float32)
    return made


def step_loss(model: RewardModel, pairs: TokenStore, form: RowForm, budget: int) -> tuple[Results, int]:
    """Loss and gradients of one step, its rows laid out for two processes as a run lays them out."""
    made = plan_epoch(pairs.places, form, StepBudget(len(pairs), budget, world=2))
    rows = [row for rank in made.step(0).rows for row in rank]
    model.zero_grad()
    total = torch.zeros(1, dtype=torch.float64)
    for row in rows:
        micro = build_micro_batch(pairs, row, form)
        chosen_P, rejected_P = micro.sides(model(micro.batch))
        loss = (bradley_terry(chosen_P, rejected_P) * micro.weight_P).sum()
        loss.backward()
        total += loss.detach()
    return (total, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}), len(rows)


@functools.cache
def pairs_alone(name: str) -> Results:
    """Loss and gradients of every pair's own two passes and weight, computed once per model."""
    pairs, model = store(), reward_model(name, PADDED, torch.float64, checkpointing=True)
    with precisely(torch.float64):
        both = [model(collate([one], kernel=PADDED)) for i in range(len(pairs)) for one in pairs.pair(i).unshared()]
        chosen_P, rejected_P = torch.cat(both).view(-1, 2).unbind(1)
        loss = (bradley_terry(chosen_P, rejected_P) * torch.from_numpy(pairs.weight_P)).sum()
        loss.backward()
    return loss.detach().view(1), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("layout", "budget"), [("shared", 400), ("shared", 45), ("packed", 90), ("padded", 120)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_weighted_pairs_equals_separate_passes(name: str, layout: str, budget: int) -> None:
    """Every pair's own two passes and weight against the rows of a run, trees cut where they exceed the budget."""
    pairs = store()
    kernel = PADDED if layout == "padded" else DEFAULT[name]
    model = reward_model(name, kernel, torch.float64, checkpointing=True)
    with precisely(torch.float64):
        found, rows = step_loss(model, pairs, RowForm(layout, kernel, 1, 0), budget)
    assert (rows > pairs.num_groups) == (budget < 400), "trees are cut"
    loss, expected = pairs_alone(name)
    scale = max(1.0, float(loss), *(float(value.abs().max()) for value in expected.values()))
    assert difference(found, (loss, expected)) < 1e-10 * scale


# --- negative controls: the comparison above must notice each of these ---------------------------


def a_cousin_is_seen(batch: Batch) -> None:
    """What one branch may see reaches into the next."""
    visibility = batch.visibility
    assert visibility is not None
    for tokens, _ in visibility.readers[:1]:
        visibility.end_T[int(tokens[0]) :] = visibility.end_T[int(tokens[0])]


def a_grandparent_is_lost(batch: Batch) -> None:
    """The first token of every tree is seen by its first branch only."""
    visibility = batch.visibility
    assert visibility is not None
    roots = torch.nonzero(visibility.position_T == 0).flatten()
    visibility.end_T[roots] = roots + 1


def branches_go_on_counting(batch: Batch) -> None:
    batch.position_ids = torch.arange(batch.computed)[None]


def the_window_counts_row_offsets(batch: Batch) -> None:
    assert batch.visibility is not None
    batch.visibility.position_T = torch.arange(batch.computed)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (a_cousin_is_seen, tuple(CONFIGS)),
        (a_grandparent_is_lost, tuple(CONFIGS)),
        (branches_go_on_counting, tuple(CONFIGS)),
        (the_window_counts_row_offsets, WINDOWED),
    ],
)
def test_a_wrong_mask_or_position_is_noticed(spoil: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if name in SOFTCAPPED:
            continue  # the dense kernel, whose mask is spoilt here, has no soft-cap
        model = reward_model(name, "sdpa", torch.float64)
        batch = collate(trees(), kernel="sdpa")
        spoil(batch)
        results = in_rows(model, [batch], torch.float64)
        assert float((results[0] - separate(name, torch.float64)[0]).abs().max()) > 1e-2, name


@pytest.mark.parametrize("lost", ["a reader", "an ancestor"])
def test_a_wrong_gather_is_noticed(lost: str) -> None:
    model = reward_model("llama3", "varlen", torch.float64)
    batch = collate(trees(), kernel="varlen")
    visibility = batch.visibility
    assert visibility is not None
    assert visibility.key_index_K is not None
    if lost == "a reader":
        tokens, keys = visibility.readers[0]
        visibility.readers = ((tokens, keys.view(len(tokens), -1)[:, :-1].flatten()), *visibility.readers[1:])
    else:
        run = next(number for number, run in enumerate(visibility.runs) if run.prefix)
        visibility.key_index_K[visibility.key_starts[run]] = visibility.runs[run].start
    rewards_S, found = in_rows(model, [batch], torch.float64)
    right_S, expected = separate("llama3", torch.float64)
    reward_error = float((rewards_S - right_S).abs().max())
    gradient_error = difference((right_S, found), (right_S, expected))
    assert (reward_error < 1e-10) == (lost == "a reader")
    assert gradient_error > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_scale_on_which_differences_are_measured(name: str) -> None:
    rewards_S, found = separate(name, torch.float32)
    assert 2 < float(rewards_S.abs().max()) < 6
    assert 1.5 < max(float(gradient.abs().max()) for gradient in found.values()) < 8


def test_trees_cover_what_they_should() -> None:
    made = trees()
    ways = [tree.edges[:, 2].tolist() for tree in made]

    def depth(parents: list[int], edge: int) -> int:
        return 1 + (depth(parents, parents[edge]) if parents[edge] >= 0 else 0)

    assert [max(depth(way, edge) for edge in range(len(way))) for way in ways][:5] == list(DEPTHS)
    assert any(set(tree.leaf.tolist()) & set(tree.edges[:, 2].tolist()) for tree in made), "inner ends"
    assert sum(int((tree.edges[:, 1] - tree.edges[:, 0] == 1).sum()) for tree in made) > 5, "edges of one token"
    assert max(int(tree.lengths.max()) for tree in made) > 3 * WINDOW
    assert any(len(set(tree.leaf.tolist())) < len(tree.leaf) for tree in made), "a sequence given twice"
