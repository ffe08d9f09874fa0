"""Two models on the same pairs; best of N."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from support.reward_samples import made

from btrm_core.errors import DataError
from btrm_core.evaluation.best_of_n import best_of_n, expected_best
from btrm_core.evaluation.compare import compare, difference, kappa, mcnemar, smallest_detectable
from btrm_core.evaluation.text import comparison_text


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (10, 3), (6, 6), (80, 120)])
def test_mcnemar_is_that_of_statsmodels(only_first, only_second):
    from statsmodels.stats.contingency_tables import mcnemar as reference

    table = [[50, only_first], [only_second, 20]]
    assert mcnemar(only_first, only_second) == pytest.approx(min(1.0, reference(table, exact=True).pvalue))


def test_kappa_is_that_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    first = rng.integers(-1, 2, 300)
    second = np.where(rng.uniform(size=300) < 0.6, first, rng.integers(-1, 2, 300))
    assert kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert kappa(np.ones(3), np.ones(3)) is None


def test_equal_models_show_no_difference():
    first = made(200)
    found = compare(first, dataclasses.replace(first, model="twin"))
    assert (found.overall.verdict, found.overall.difference, found.overall.p_value) == ("no difference shown", 0.0, 1.0)
    assert (found.agreement, found.kappa, found.margin_correlation) == (1.0, 1.0, pytest.approx(1.0))
    assert found.disagreements == ()
    assert 0 < found.overall.smallest_detectable < 0.05


def test_a_better_model_is_shown_and_the_sides_can_be_changed():
    rng = np.random.default_rng(1)
    good = made(600, shift=2.0)
    bad = dataclasses.replace(made(600, seed=9, shift=0.0), model="bad", reward_P2=rng.normal(0, 1, (600, 2)))
    found, turned = compare(good, bad), compare(bad, good)
    assert found.overall.verdict == "the first model is better"
    assert turned.overall.verdict == "the second model is better"
    assert turned.overall.difference == pytest.approx(-found.overall.difference)
    assert found.overall.interval is not None
    assert found.overall.interval.low <= found.overall.difference <= found.overall.interval.high
    assert {part.name for part in found.subsets} == {"easy", "hard"}
    assert all(part.p_corrected >= part.p_value for part in found.subsets)
    gaps = [abs(d.first_margin - d.second_margin) for d in found.disagreements]
    assert gaps == sorted(gaps, reverse=True)
    assert all(np.sign(d.first_margin) != np.sign(d.second_margin) for d in found.disagreements)
    assert found.to_dict()["overall"]["verdict"] == found.overall.verdict


def test_twelve_subsets_of_noise_show_nothing():
    """Without correction about half of such data sets would show a difference in some subset."""
    shown = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        names = [f"s{i % 12}" for i in range(600)]
        first, second = (
            dataclasses.replace(made(600), subset_P=names, reward_P2=rng.normal(0, 1, (600, 2))) for _ in range(2)
        )
        shown += any(part.shown for part in compare(first, second).subsets)
    assert shown <= 2


def test_pairs_are_matched_by_id_whatever_their_order():
    first = made(30)
    order = np.random.default_rng(0).permutation(30)[:20]
    found = compare(first, first.select(order))
    assert (found.overall.pairs, found.only_in_first, found.only_in_second) == (20, 10, 0)
    assert found.agreement == 1.0
    renamed = dataclasses.replace(first.select(order), id_P=[f"other{i}" for i in range(20)])
    assert compare(first, renamed).agreement == 1.0  # the texts are the same
    renamed = dataclasses.replace(renamed, prompt_P=np.arange(20, dtype=np.uint64))
    with pytest.raises(DataError, match="share no pair: no id is in both"):
        compare(first, renamed)


def test_equal_ids_of_different_pairs_are_told_apart():
    """Ids are a prompt's, or begin anew in every source: order and gaps must not mix the pairs up."""
    first = dataclasses.replace(made(40), id_P=[str(i // 2) for i in range(40)])
    missing = dataclasses.replace(first, reward_P2=first.reward_P2.copy())
    missing.reward_P2[:20:2] = math.nan
    for one, other in (
        (first, first.select(np.arange(39, -1, -1))),
        (missing, first),
        (first, first.select(np.arange(1, 40))),
        (first, first.select(np.r_[20:40, 0:20])),
    ):
        found = compare(one, other)
        assert (found.agreement, found.overall.difference, found.by_id) == (1.0, 0.0, False)
    # Without prompts the ids must do, and that is said.
    unknown = dataclasses.replace(made(40), prompt_P=np.arange(40, dtype=np.uint64))
    found = compare(made(40), unknown)
    assert (found.agreement, found.by_id) == (1.0, True)
    assert "is it the same data?" in comparison_text(found)
    even, odd = made(40), made(40)
    even.reward_P2[1::2], odd.reward_P2[::2] = math.nan, math.nan
    with pytest.raises(DataError, match="no pair has rewards of both"):
        compare(even, odd)


def test_pairs_without_reward_are_not_compared():
    first, second = made(30), made(30)
    second.reward_P2[:5] = math.nan
    assert compare(first, second).overall.pairs == 25


def test_the_smallest_detectable_difference_is_that_of_the_published_formula():
    # Connor 1987: n = (z_level sqrt(p) + z_power sqrt(p - d^2))^2 / d^2
    for pairs, differing in ((1000, 0.1), (300, 0.3), (5000, 0.02)):
        size = smallest_detectable(pairs, differing)
        needed = (1.959964 * math.sqrt(differing) + 0.841621 * math.sqrt(differing - size**2)) ** 2 / size**2
        assert needed == pytest.approx(pairs, rel=1e-4)
    assert smallest_detectable(5, 0.1) == 0.1  # even if one model were right on all of these, nothing would be shown


def test_the_smallest_detectable_difference_is_shown_four_times_in_five():
    rng = np.random.default_rng(5)
    pairs, differing = 1000, 0.1
    size = smallest_detectable(pairs, differing)
    shown = 0
    for _ in range(400):
        kind = rng.choice(3, size=pairs, p=[(differing + size) / 2, (differing - size) / 2, 1 - differing])
        shown += mcnemar(int((kind == 0).sum()), int((kind == 1).sum())) < 0.05
    assert shown / 400 == pytest.approx(0.8, abs=0.08)


def test_repeated_prompts_make_differences_harder_to_see():
    rng = np.random.default_rng(2)
    first, second = rng.normal(0.3, 1, 100), rng.normal(0, 1, 100)
    repeat = np.repeat(np.arange(100), 8)
    alone = difference("", first[repeat], second[repeat], np.arange(800))
    together = difference("", first[repeat], second[repeat], repeat)
    assert together.smallest_detectable > 2 * alone.smallest_detectable
    assert difference("", first[:1], second[:1], np.zeros(1, dtype=np.int64)).interval is None


def every_choice(rewards, gold, n):
    """The expectation by going through all choices of n answers; ties are broken in all ways."""
    total = []
    for chosen in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in chosen)
        total.append(np.mean([gold[i] for i in chosen if rewards[i] == best]))
    return float(np.mean(total))


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_the_mean_over_all_choices(seed):
    rng = np.random.default_rng(seed)
    rewards, gold = rng.integers(0, 4, 7).astype(float), rng.normal(size=7)
    found = expected_best(rewards, gold, 7)
    # Tied answers in a choice stand for the mean of all that are tied: the expectation is the same.
    assert found.tolist() == pytest.approx([every_choice(rewards, gold, n) for n in range(1, 8)])


def test_best_of_n_curve():
    found = best_of_n([[1, 2, 3], [3, 2, 1, 0], [1.0]], [[0, 1, 2], [0, 1, 2, 3], [1.0]])
    assert (found.prompts, found.left_out) == (2, 1)
    assert [point.n for point in found.curve] == [1, 2, 3]
    assert found.curve[0].gold == found.curve[0].oracle == found.curve[0].random == 1.25
    assert found.curve[0].kl == 0
    assert found.curve[2].kl == pytest.approx(math.log(3) - 2 / 3)
    assert found.curve[2].gold == pytest.approx((2 + every_choice([3, 2, 1, 0], [0, 1, 2, 3], 3)) / 2)
    assert all(point.regret == pytest.approx(point.oracle - point.gold) for point in found.curve)
    large = best_of_n([np.arange(1000.0)], [np.arange(1000.0)])
    assert large.curve[-1].gold == pytest.approx(999)


def test_best_of_n_says_what_is_wrong():
    with pytest.raises(DataError, match="expected one each per prompt"):
        best_of_n([[1, 2]], [])
    with pytest.raises(DataError, match="prompt 1 has 2 rewards and 3 gold values"):
        best_of_n([[1, 2]], [[1, 2, 3]])
    with pytest.raises(DataError, match="no prompt has two answers"):
        best_of_n([[1, math.nan]], [[1, 2]])
