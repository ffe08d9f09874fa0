"""The first loss of an untrained head must be near ln 2."""

import re

import numpy as np
import pytest

from btrm_core.errors import TrainingError
from btrm_core.model.selfcheck import check_first_loss, expected_first_loss

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
