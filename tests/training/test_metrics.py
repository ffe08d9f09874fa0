"""Metrics are sums: any split into parts gives the same figures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btrm_core.evaluation.figures import by_subset, standard_error
from btrm_core.training.loss import bradley_terry
from btrm_core.training.metrics import NORM, PairSums, named, summarise, token_figures


def sums_of(chosen, rejected, weight):
    sums = PairSums()
    sums.add_pairs(chosen, rejected, bradley_terry(chosen, rejected), weight)
    return sums.vector()


@given(st.integers(2, 20), st.data())
def test_any_partition_sums_to_the_same_report(n, data):
    generator = torch.Generator().manual_seed(n)
    chosen, rejected = torch.randn(2, n, generator=generator)
    weight = torch.rand(n, generator=generator) + 0.1
    cut = data.draw(st.integers(1, n - 1))
    whole = sums_of(chosen, rejected, weight)
    parts = sums_of(chosen[:cut], rejected[:cut], weight[:cut]) + sums_of(chosen[cut:], rejected[cut:], weight[cut:])
    a, b = summarise(named(whole)), summarise(named(parts))
    assert a == pytest.approx(b, rel=1e-6)


def test_figures_against_numpy():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0.5, 0.0, 3.0, -2.0])
    out = summarise(named(sums_of(chosen, rejected, torch.ones(4))))
    margin = (chosen - rejected).numpy()
    assert out["accuracy"] == (2 + 0.5) / 4
    assert out["ties"] == 1
    assert out["reward_margin"] == pytest.approx(margin.mean())
    assert out["reward_margin_std"] == pytest.approx(margin.std())
    assert out["chosen_std"] == pytest.approx(chosen.numpy().std())
    assert out["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-6)


def test_the_loss_is_weighted_by_the_pairs_weights():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    out = summarise(named(sums_of(chosen, rejected, torch.tensor([3.0, 1.0]))))
    low, high = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert out["loss"] == pytest.approx((3 * low + high) / 4, rel=1e-6)


def test_tokens():
    sums = PairSums()
    sums.add_tokens(computed=128, useful=150, shared=30)
    out = token_figures(named(sums.vector()), 2.0)
    assert out["tokens_per_second"] == 64
    assert out["padding_percent"] == pytest.approx(100 * 8 / 128)
    assert out["shared_percent"] == pytest.approx(20.0)


def test_subsets_and_standard_error():
    rows = by_subset(["b", "a", "b"], np.array([1.0, 0.0, -1.0]))
    assert [(r.name, r.pairs, r.accuracy, r.ties) for r in rows] == [("a", 1, 0.5, 1), ("b", 2, 0.5, 0)]
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert math.isnan(standard_error(0.5, 0))


def test_no_pairs_gives_no_figures():
    assert summarise(named(PairSums().vector())) == {"pairs": 0}


@pytest.mark.parametrize(("norm", "expected"), [(torch.tensor(2.5), 2.5), (torch.tensor([2.5]), 2.5), (2.5, 2.5)])
def test_the_norm_comes_with_the_sums(norm, expected):
    sums = PairSums()
    sums.add_stop(True)
    sums.add_stop(False)
    out = named(sums.vector(), norm)
    assert (out["asked_to_stop"], out[NORM]) == (1, expected)
    assert math.isnan(named(sums.vector())[NORM])
