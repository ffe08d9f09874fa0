"""Packed, prefix-shared rows give the rewards and gradients of separate forward passes.

The reference is always transformers' own eager attention on one unpadded sequence at a time. float64
here is float64 throughout (`true_float64`), so 1e-10 leaves no room for an approximation; float32 is
compared too because it is what tests elsewhere and users see. Negative controls show that the same
comparison notices a wrong window, wrong positions and a wrong mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.exactness import DEFAULT, OTHERS, TOLERANCE, Results, difference, precisely, reward_model
from support.tiny_models import (
    CONFIGS,
    SOFTCAPPED,
    WINDOWED,
    awkward_groups,
    gradients,
    tiny_model,
    true_float64,
    weights_for,
)

from btrm_core.model.reward import RewardModel
from btrm_core.packing.batch import Batch
from btrm_core.packing.forest import Forest, PairPlaces
from btrm_core.packing.forms import PADDED, RowForm, collate
from btrm_core.packing.steps import StepBudget, plan_epoch
from btrm_core.packing.trees import Tree


@functools.cache
def separate(name: str, dtype: torch.dtype) -> Results:
    """Rewards and gradients of one unpadded eager pass per sequence, computed once per model."""
    groups = awkward_groups()
    model = RewardModel(tiny_model(name, dtype), PADDED)
    with precisely(dtype), model.own_attention():
        alone = [g for group in groups for g in group.unshared()]
        rewards_S = torch.cat([model(collate([g], kernel=PADDED)) for g in alone])
        return rewards_S.detach(), gradients(model, rewards_S, weights_for(groups, dtype))


def packed(
    model: RewardModel, batches: Sequence[Batch], dtype: torch.dtype, order: Sequence[int] | None = None
) -> Results:
    """Rewards and gradients of packed rows; `order` puts their rewards into the order of the groups."""
    with precisely(dtype):
        rewards_S = torch.cat([model(batch) for batch in batches])
        if order is not None:
            rewards_S = rewards_S[torch.tensor(np.argsort(order))]
        return rewards_S.detach(), gradients(model, rewards_S, weights_for(awkward_groups(), dtype))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_row_equals_separate_passes(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    check_one_row(name, DEFAULT[name], dtype, checkpointing)


@pytest.mark.parametrize(("name", "kernel"), OTHERS)
def test_one_row_through_another_kernel_equals_separate_passes(name: str, kernel: str) -> None:
    check_one_row(name, kernel, torch.float64, True)
    check_one_row(name, kernel, torch.float32, False)


def check_one_row(name: str, kernel: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model = reward_model(name, kernel, dtype, checkpointing=checkpointing)
    batch = collate(awkward_groups(), kernel=kernel, multiple_of=16)
    assert batch.shared > 0
    assert difference(packed(model, [batch], dtype), separate(name, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_without_sharing_equals_separate_passes(name: str) -> None:
    model = reward_model(name, DEFAULT[name], torch.float64)
    batch = collate(awkward_groups(), kernel=DEFAULT[name], share_prefix=False)
    assert batch.computed == batch.useful
    assert difference(packed(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_lines_equal_separate_passes(name: str) -> None:
    model = reward_model(name, PADDED, torch.float64)
    batch = collate(awkward_groups(), kernel=PADDED)
    assert difference(packed(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_lines_through_a_packing_kernel_equal_separate_passes(name: str) -> None:
    model = reward_model(name, DEFAULT[name], torch.float64, checkpointing=True)
    batch = collate(awkward_groups(), kernel=PADDED)
    assert difference(packed(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_planned_rows_with_a_pair_over_the_budget_equal_separate_passes(name: str) -> None:
    groups = [g for g in awkward_groups() if len(g.leaf) == 2]
    number = np.arange(len(groups))
    places = PairPlaces(Forest.of(groups), number, 2 * number, 2 * number + 1, number)
    kernel = DEFAULT[name]
    made = plan_epoch(places, RowForm("shared", kernel, 1, 0), StepBudget(len(groups), 48, world=2))
    rows = [row for rank in made.step(0).rows for row in rank]
    assert max(sum(len(groups[i].tokens) for i in row) for row in rows) > 48
    model, alone = reward_model(name, kernel, torch.float64), reward_model(name, PADDED, torch.float64)
    with true_float64():
        rewards_P2 = torch.zeros(len(groups), 2, dtype=torch.float64)
        for row in rows:
            pairs = torch.tensor(row)
            rewards_P2 = rewards_P2.index_put(
                (pairs,), model(collate([groups[i] for i in row], kernel=kernel)).view(-1, 2)
            )
        expected_P2 = torch.cat([alone(collate([g], kernel=PADDED)) for g in groups]).view(-1, 2)
        weights = weights_for(groups, torch.float64)
        got, want = gradients(model, rewards_P2.flatten(), weights), gradients(alone, expected_P2.flatten(), weights)
    assert difference((rewards_P2.detach(), got), (expected_P2.detach(), want)) < 1e-10


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_flex_with_checkpointing_equals_separate_passes(name: str, flex_on_cpu: None) -> None:
    model = reward_model(name, "flex", torch.float64, checkpointing=True)
    batch = collate(awkward_groups(), kernel="flex", multiple_of=128)
    assert difference(packed(model, [batch], torch.float64), separate(name, torch.float64)) < 1e-10


# --- negative controls: the comparison above must notice each of these ---------------------------


def row_offsets_as_positions(batch: Batch) -> None:
    batch.position_ids = torch.arange(batch.computed)[None]


def window_on_row_offsets(batch: Batch) -> None:
    assert batch.visibility is not None
    batch.visibility.position_T = torch.arange(batch.computed)


def plain_causal_mask(batch: Batch) -> None:
    assert batch.visibility is not None
    batch.visibility.end_T = torch.full_like(batch.visibility.end_T, batch.computed)


def siblings_see_each_other(batch: Batch) -> None:
    assert batch.visibility is not None
    visibility = batch.visibility
    for tokens, _ in visibility.readers:
        visibility.end_T[int(tokens[0]) : int(visibility.end_T[tokens].max())] = visibility.end_T[tokens].max()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (row_offsets_as_positions, tuple(CONFIGS)),
        (plain_causal_mask, tuple(CONFIGS)),
        (siblings_see_each_other, tuple(CONFIGS)),
        (window_on_row_offsets, WINDOWED),
    ],
)
def test_a_wrong_mask_or_position_is_noticed(spoil: Callable[[Batch], None], names: tuple[str, ...]) -> None:
    for name in names:
        if name in SOFTCAPPED:
            continue  # the dense kernel, whose mask is spoilt here, has no soft-cap
        model = reward_model(name, "sdpa", torch.float64)
        batch = collate(awkward_groups(), kernel="sdpa")
        spoil(batch)
        results = packed(model, [batch], torch.float64)
        assert float((results[0] - separate(name, torch.float64)[0]).abs().max()) > 1e-2, name


@pytest.mark.parametrize("name", WINDOWED)
def test_a_wrong_window_is_noticed(name: str) -> None:
    kernel = DEFAULT[name]
    model = reward_model(name, kernel, torch.float64, sliding_window=10)
    results = packed(model, [collate(awkward_groups(), kernel=kernel)], torch.float64)
    assert float((results[0] - separate(name, torch.float64)[0]).abs().max()) > 1e-2


def test_a_lost_softcap_is_noticed() -> None:
    model = reward_model("gemma2", "eager", torch.float64, attn_logit_softcapping=None)
    results = packed(model, [collate(awkward_groups(), kernel="eager")], torch.float64)
    assert float((results[0] - separate("gemma2", torch.float64)[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_transformers_own_packing_by_positions_is_noticed(name: str) -> None:
    """Handing transformers only the positions of a shared row cuts tails off from their prefix."""
    model = reward_model(name, "sdpa", torch.float64)
    batch = collate([g for g in awkward_groups() if g.shared > 10], kernel="sdpa")
    with true_float64():
        right = model(batch)
        model.use_kernel(PADDED)
        batch.visibility = None
        wrong = model(batch)
    assert float((right - wrong).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_scale_on_which_differences_are_measured(name: str) -> None:
    rewards_S, found = separate(name, torch.float32)
    assert 2 < float(rewards_S.abs().max()) < 5
    assert 1.5 < max(float(gradient.abs().max()) for gradient in found.values()) < 8


def test_groups_cover_what_they_should() -> None:
    groups: list[Tree] = awkward_groups()
    tails = [length - g.shared for g in groups for length in g.lengths]
    assert 0 in tails
    assert 1 in tails
    assert any(g.shared == 0 for g in groups)
    assert {len(g.leaf) for g in groups} >= {1, 2, 4}
