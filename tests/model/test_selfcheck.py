"""The first loss of an untrained head must be near ln 2; and what is compared before it is of a bearable length."""

import re

import numpy as np
import pytest
from support.tiny_models import group, tiny_model

from btrm_core.errors import TrainingError
from btrm_core.model import selfcheck
from btrm_core.model.reward import RewardModel
from btrm_core.model.selfcheck import check_first_loss, expected_first_loss, self_check, shortened
from btrm_core.packing import Batch

IDS = [f"pair-{i}" for i in range(200)]


@pytest.mark.parametrize("spread", [0.0001, 0.1, 0.5, 1.0, 3.0])
def test_random_heads_pass(spread):
    rng = np.random.default_rng(0)
    for _ in range(50):
        # a head that knows nothing, with a mean as large as a random direction gives
        margin = rng.normal(rng.normal(0, 0.3) * spread, spread, size=200)
        first = check_first_loss(np.stack([margin, np.zeros_like(margin)], axis=1), IDS)
        assert first.warning is None


@pytest.mark.parametrize("mean", [2.4, -2.4])
def test_sides_told_apart_before_training_are_remarked_on(mean):
    """Sound data does that, too: a refusal that is always the same text. The run goes on."""
    margin = np.random.default_rng(0).normal(mean, 0.5, size=200)
    first = check_first_loss(np.stack([margin, np.zeros_like(margin)], axis=1), IDS)
    assert first.loss == pytest.approx(np.logaddexp(0, -margin).mean())
    assert re.fullmatch(r"the first loss is .*, and an untrained head on these pairs is expected .*", first.warning)


def test_equal_rewards_stop_the_run():
    with pytest.raises(TrainingError, match="chosen and rejected get the same reward in every pair before training"):
        check_first_loss(np.repeat(np.arange(5.0)[:, None], 2, axis=1), IDS)


def test_a_head_of_zeros_is_called_that():
    with pytest.raises(TrainingError, match="every reward is 0 before training, because the head, or"):
        check_first_loss(np.zeros((5, 2)), IDS)


def test_rewards_that_are_not_finite_name_the_pairs():
    rewards = np.random.default_rng(0).normal(size=(200, 2))
    rewards[7, 1] = np.nan
    with pytest.raises(TrainingError, match=r"1 of 200 pairs have a reward that is not finite .*\(first: pair-7\)"):
        check_first_loss(rewards, IDS)


def test_expected_excess_is_an_eighth_of_the_variance():
    margin = np.random.default_rng(0).normal(0, 0.2, size=100_000)
    expected, _ = expected_first_loss(margin)
    assert np.logaddexp(0, -margin).mean() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("longest", [3, 12, 30, 47])
def test_a_long_group_loses_its_beginning_and_keeps_its_answers(longest):
    tree = group(40, 7, 5, 1)
    whole, cut = tree.sequences, shortened(tree, longest).sequences
    assert max(map(len, cut)) == longest
    first = min(47 - longest, 40)  # the shortest keeps its last token
    for before, after in zip(whole, cut, strict=True):
        assert after.tolist() == before[first : first + longest].tolist()
    assert shortened(tree, 47) is tree
    assert [len(ids) for ids in shortened(group(0, 50, 2), 10).sequences] == [10, 1]


def test_long_groups_are_compared_in_part(monkeypatch):
    """Transformers' own eager attention of a separate pass takes memory with the square of the length."""

    class Watched(RewardModel):
        def forward(self, batch: Batch):
            lengths.append(batch.input_ids.shape[1] if batch.visibility is None else int(batch.position_ids.max()) + 1)
            return super().forward(batch)

    lengths: list[int] = []
    monkeypatch.setattr(selfcheck, "CHECKED_TOKENS", 20)
    assert self_check(Watched(tiny_model("llama3"), "varlen"), [group(60, 7, 5), group(3, 4, 2)]).ok
    assert max(lengths) == 20
