"""Every figure against scipy, statsmodels or scikit-learn, or worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from btrm_core.evaluation import statistics
from btrm_core.evaluation.calibration import calibrate, fit_temperature, reliability, sigmoid
from btrm_core.evaluation.length import length_bias, length_buckets, longer_wins, preference_regression
from btrm_core.evaluation.statistics import (
    Interval,
    accuracy,
    bootstrap,
    bootstrap_mean,
    bootstrap_means,
    clusters,
    correlation,
    holm,
    wilson,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("successes", "number"), [(0, 1), (1, 1), (0, 20), (20, 20), (13, 20), (8651, 10000)])
def test_wilson_is_that_of_statsmodels(successes, number):
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(successes, number, method="wilson")
    found = wilson(successes, number)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)


def test_wilson_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one observation"):
        wilson(0, 0)


def test_ties_have_three_conventions():
    found = accuracy(np.array([1.0, 2.0, 0.0, -1.0]))
    assert (found.pairs, found.correct, found.ties) == (4, 2, 1)
    assert (found.half, found.strict, found.excluded) == (0.625, 0.5, pytest.approx(2 / 3))
    everything_tied = accuracy(np.zeros(3))
    assert (everything_tied.half, everything_tied.strict, everything_tied.excluded) == (0.5, 0.0, None)
    one = accuracy(np.array([0.3]))
    assert (one.half, one.bootstrap, one.prompts) == (1.0, None, 1)
    assert one.interval == one.wilson


def test_resampling_independent_pairs_agrees_with_wilson_and_scipy(rng):
    from scipy.stats import bootstrap as scipy_bootstrap

    margin_P = rng.normal(0.5, 1, 800)
    found = accuracy(margin_P)
    assert found.bootstrap is not None
    assert found.bootstrap.half_width == pytest.approx(found.wilson.half_width, rel=0.1)
    expected = scipy_bootstrap(
        ((margin_P > 0).astype(float),), np.mean, n_resamples=2000, method="percentile", random_state=0
    ).confidence_interval
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_equal_pairs_of_one_prompt_widen_the_interval_by_the_root_of_their_number(rng):
    margin_G = rng.normal(0.3, 1, 300)
    repeated_P, prompt_P = np.repeat(margin_G, 9), np.repeat(np.arange(300), 9)
    alone = accuracy(repeated_P)
    together = accuracy(repeated_P, prompt_P)
    assert alone.bootstrap is not None
    assert together.bootstrap is not None
    assert together.bootstrap.half_width / alone.bootstrap.half_width == pytest.approx(3, rel=0.15)
    assert together.interval == together.bootstrap
    assert together.prompts == 300


def test_the_order_of_pairs_and_names_of_prompts_do_not_matter(rng):
    margin_P, prompt_P = rng.normal(0, 1, 50), rng.integers(0, 10, 50)
    first = bootstrap_mean(margin_P, clusters(prompt_P, 50))
    again = bootstrap_mean(margin_P, clusters(prompt_P + 1000, 50))
    assert first == again


def test_any_figure_can_be_resampled(rng):
    value_P, cluster_P = rng.normal(2, 1, 400), clusters(np.repeat(np.arange(100), 4), 400)
    general = bootstrap(lambda places: float(value_P[places].mean()), cluster_P, draws=1000)
    sums = bootstrap_mean(value_P, cluster_P, draws=1000)
    assert general is not None
    assert sums is not None
    assert (general.low, general.high) == pytest.approx((sums.low, sums.high), abs=0.02)
    assert bootstrap(lambda places: 1.0, np.zeros(3, dtype=np.int64)) is None
    assert bootstrap(lambda places: math.nan, cluster_P, draws=10) is None


def test_holm_is_that_of_statsmodels(rng):
    from statsmodels.stats.multitest import multipletests

    p_values = rng.uniform(0, 0.2, 12).tolist()
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


def test_correlation_is_that_of_scipy(rng):
    from scipy.stats import pearsonr, spearmanr

    first, second = rng.normal(size=60), np.round(rng.normal(size=60), 1)
    assert correlation(first, second) == pytest.approx(pearsonr(first, second)[0])
    assert correlation(first, second, ranks=True) == pytest.approx(spearmanr(first, second)[0])
    assert correlation(first, np.zeros(60)) is None
    assert correlation(first[:1], second[:1]) is None


def test_loss_and_brier_are_those_of_scikit_learn(rng):
    from sklearn.metrics import brier_score_loss, log_loss

    margin_P = rng.normal(0.5, 2, 500)
    found = reliability(margin_P)
    # Sides in any order: the same pairs, half of them turned round.
    turned = np.arange(500) % 2 == 0
    label, likely = (~turned).astype(int), sigmoid(np.where(turned, -margin_P, margin_P))
    assert found.loss == pytest.approx(log_loss(label, likely))
    assert found.brier == pytest.approx(brier_score_loss(label, likely))


def test_calibration_error_against_bins_made_by_scikit_learn(rng):
    from sklearn.calibration import calibration_curve

    margin_P = rng.normal(0.5, 2, 1500)
    found = reliability(margin_P)
    confidence_P, correct_P = sigmoid(np.abs(margin_P)), margin_P > 0
    right, mean = calibration_curve(correct_P, confidence_P, n_bins=15, strategy="quantile")
    assert [one.pairs for one in found.bins] == [100] * 15
    assert [one.accuracy for one in found.bins] == pytest.approx(right.tolist(), abs=0.011)
    assert found.ece == pytest.approx(float(np.abs(right - mean).mean()), abs=0.002)


def test_soft_labels_are_targets():
    found = reliability(np.array([math.log(3), 0.0]), np.array([0.75, 0.6]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.loss == pytest.approx((entropy + math.log(2)) / 2)
    assert found.brier == pytest.approx(0.5 * 0.1**2)
    assert found.ece == pytest.approx(0.0)  # both sides of the second pair are as likely right


def test_the_temperature_that_made_the_labels_is_found(rng):
    from sklearn.linear_model import LogisticRegression

    true_P = rng.normal(0, 2, 20000)
    won_P = rng.uniform(size=20000) < sigmoid(true_P)
    margin_P = 3 * np.where(won_P, true_P, -true_P)
    found = calibrate(margin_P)
    assert found.temperature == pytest.approx(3, rel=0.05)
    reference = LogisticRegression(C=np.inf, fit_intercept=False).fit((3 * true_P)[:, None], won_P)
    assert found.temperature == pytest.approx(1 / reference.coef_[0, 0], rel=1e-3)
    assert found.after is not None
    assert found.after.loss < found.before.loss
    assert found.after.ece < 0.02 < found.before.ece


def test_a_temperature_is_judged_on_other_prompts_than_it_was_fitted_on():
    # Two prompts: one always wrong by a little, one mostly right by a lot. Neither half can be fitted by itself.
    margin_P, prompt_P = np.array([-0.1, -0.2, 5.0, 6.0]), np.array([4, 4, 9, 9])
    found = calibrate(margin_P, prompt_P)
    assert (found.after, found.halves) == (None, None)


@pytest.mark.parametrize("margins", [[], [0.0, 0.0], [1.0, 2.0], [-1.0, -2.0, 0.5], [1.0], [-1.0]])
def test_there_is_no_temperature_where_none_fits_best(margins):
    assert fit_temperature(np.array(margins)) is None


def test_longer_is_more_than_ten_per_cent():
    chosen, rejected = np.array([110, 112, 90, 100, 0, 5]), np.array([100, 100, 110, 100, 0, 0])
    assert length_buckets(chosen, rejected).tolist() == [0, 1, -1, 0, 0, 1]
    assert longer_wins(chosen, rejected) == pytest.approx((1 + 1 + 0 + 0.5 + 0.5 + 1) / 6)


def test_length_regression_is_that_of_statsmodels(rng):
    import statsmodels.api as sm

    margin, length = rng.normal(0, 2, 3000), rng.normal(0, 30, 3000)
    won = rng.uniform(size=3000) < sigmoid(0.8 * margin + 0.02 * length)
    turn = np.where(won, 1, -1)
    found = preference_regression(margin * turn, length * turn)
    scale = np.sqrt([(margin**2).mean(), (length**2).mean()])
    reference = sm.Logit(won.astype(int), np.stack([margin, length], axis=1) / scale).fit(disp=0).params
    assert found == pytest.approx(tuple(reference), rel=1e-5)
    assert preference_regression(np.array([1.0, 2.0]), np.array([0.0, 0.0])) is None
    assert preference_regression(np.array([1.0, 2.0]), np.array([3.0, 1.0])) is None  # nothing is wrong: no optimum


def test_length_bias_by_hand():
    margin = np.array([1.0, -1.0, 2.0, 0.5, -0.5])
    chosen, rejected = np.array([20, 20, 10, 10, 10]), np.array([10, 10, 20, 10, 10])
    found = length_bias(margin, chosen, rejected, np.arange(5), "tokens")
    assert found.longer_wins == pytest.approx((2 + 0 + 1) / 5)
    assert found.chosen_longer is not None
    assert found.chosen_shorter is not None
    assert found.similar is not None
    assert (found.chosen_longer.half, found.chosen_shorter.half, found.similar.half) == (0.5, 1.0, 0.5)
    assert found.controlled == 0.75
    alike = length_bias(np.array([1.0]), np.array([3]), np.array([3]), np.array([0]), "tokens")
    assert (alike.controlled, alike.correlation, alike.length_coefficient) == (None, None, None)


def test_intervals_have_a_half_width():
    assert Interval(0.2, 0.6).half_width == pytest.approx(0.2)
    assert statistics.z_value(0.9) == pytest.approx(1.6448536)


@pytest.mark.parametrize("most", [1, 3])
def test_draws_do_not_depend_on_how_many_are_made_at_once(most, monkeypatch, rng):
    """Few at a time are faster, and kept reports stay what they were."""
    cluster_P = np.repeat(np.arange(50), rng.integers(1, most + 1, size=50))
    value_P = rng.integers(0, 3, size=len(cluster_P)) / 2
    drawn = np.random.default_rng(statistics.SEED).integers(0, 50, size=(2000, 50))
    sums, counts = (np.bincount(cluster_P, weights=weights)[drawn].sum(axis=1) for weights in (value_P, None))
    for numbers in (4_000_000, 7 * 50):
        monkeypatch.setattr(statistics, "_DRAWN_TOGETHER", numbers)
        assert np.array_equal(bootstrap_means(value_P, cluster_P), sums / counts)
