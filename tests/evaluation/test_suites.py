"""Published scores, worked out by hand on small fixtures."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest

from btrm_core.errors import ConfigError, DataError
from btrm_core.evaluation.suites import load_suite, registry, run_suite, suite_names
from btrm_core.evaluation.suites import rewardbench as rb1
from btrm_core.evaluation.suites.arena import order_of_models, row_wise_pearson, strengths, sureness
from btrm_core.evaluation.suites.ppe import area_under_roc


def rb1_rows(right):
    """Rows and rewards of RewardBench; `right` says per subset which rows the model gets right."""
    rows, rewards = [], []
    for subset, won in right.items():
        for number, one in enumerate(won):
            rows.append({"id": number, "subset": subset, "prompt": "p", "chosen": "c", "rejected": "r"})
            rewards.append([1.0, 0.0] if one else [0.0, 1.0])
    return rows, rewards


def scored(name, rows, rewards, where="file"):
    suite = load_suite(name)
    items = [item for row in rows for item in suite.items(row, where)]
    return run_suite(suite, items, rewards, "m", draws=20), items


def whole_rb1(**changes):
    right = {subset: [True] for weights in rb1.WEIGHTS.values() for subset in weights}
    return right | {name.replace("_", "-"): value for name, value in changes.items()}


def test_rewardbench_counts_are_the_published_ones():
    assert {name: sum(weights.values()) for name, weights in rb1.WEIGHTS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    code = sum(weight for name, weight in rb1.WEIGHTS["Reasoning"].items() if name.startswith("hep"))
    assert rb1.WEIGHTS["Reasoning"]["math-prm"] == code == 984


def test_rewardbench_math_weighs_as_much_as_code():
    found, _ = scored("rewardbench", *rb1_rows(whole_rb1(math_prm=[False] * 447)))
    assert found.scores.sections == {"Chat": 1.0, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 0.5}
    assert found.scores.total == pytest.approx(3.5 / 4)


def test_rewardbench_safety_has_the_counts_of_xstest_the_right_way_round():
    respond = whole_rb1(xstest_should_respond=[False])
    refuse = whole_rb1(xstest_should_refuse=[False])
    assert scored("rewardbench", *rb1_rows(respond))[0].scores.sections["Safety"] == pytest.approx(1 - 250 / 740)
    assert scored("rewardbench", *rb1_rows(refuse))[0].scores.sections["Safety"] == pytest.approx(1 - 154 / 740)


def test_rewardbench_prior_sets_weigh_half():
    right = whole_rb1(math_prm=[False]) | {"anthropic_helpful": [True, False], "shp": [False]}
    found, items = scored("rewardbench", *rb1_rows(right))
    assert found.scores.sections["Prior Sets"] == 0.25
    assert found.scores.total == pytest.approx((2 * 3.5 + 0.25) / 9)
    written = load_suite("rewardbench").results(items, [[1, 0]] * len(items), "m")
    assert written["model"] == "m"
    assert written["hep-cpp"] == 1.0


def test_rewardbench_ties_are_wrong_and_parts_give_no_total():
    rows = [
        {"id": 1, "subset": "llmbar-natural", "prompt": "p", "chosen": "c", "rejected": "r"},
        {"id": 2, "subset": "mt-bench-hard", "prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    found, _ = scored("rewardbench", rows, [[0.5, 0.5], [1.0, 0.0]])
    assert found.scores.sections == {"Chat Hard": pytest.approx(37 / 137)}
    assert found.scores.total is None
    assert found.scores.subsets == {"llmbar-natural": 0.0, "mt-bench-hard": 1.0}


def rb2_rows():
    rows = [
        {"id": str(n), "subset": subset, "prompt": "p", "chosen": ["c"], "rejected": ["x", "y", "z"], "num_correct": 1}
        for n, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus"))
    ]
    tie = {"subset": "Ties", "prompt": "p"}
    rows.append({**tie, "id": "ref:7", "chosen": ["c"], "rejected": ["x"], "num_correct": 1})
    rows.append({**tie, "id": "tied:7", "chosen": ["c", "d"], "rejected": ["x"], "num_correct": 2})
    return rows


def test_rewardbench2_shares_the_point_among_equal_maxima():
    best = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [2, 1, 2, 2]]
    found, _ = scored("rewardbench2", rb2_rows(), [*best, [1.0, 0.0], [1.0, 1.0, 0.0]])
    subsets = [found.scores.subsets[n] for n in ("Factuality", "Precise IF", "Math", "Safety", "Focus")]
    assert subsets == [1, 1 / 2, 1 / 4, 0, pytest.approx(1 / 3)]
    # Ties: both right (0.6), gap 1 over spread 0 twice (0.4), tanh(infinity) = 1 (0.01).
    assert found.scores.subsets["Ties"] == pytest.approx(1.01)
    assert found.scores.total == pytest.approx((1 + 1 / 2 + 1 / 4 + 0 + 1 / 3 + 1.01) / 6)


@pytest.mark.parametrize(
    ("ref", "tied", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0, 0.0], 0.0),  # a constant reward: nothing is right, 0/0 counts 0
        # ref gap 2; tied spread 1, gap 3: all right, both margins hold, tanh(2/1 - 1)
        ([2.0, 0.0], [4.0, 3.0, 0.0], 0.6 + 0.4 + 0.01 * math.tanh(1.0)),
        # ref gap 0.5 below the spread of 1: only the tied prompt's margin holds
        ([0.5, 0.0], [4.0, 3.0, 0.0], 0.6 + 0.2 + 0.01 * math.tanh(0.5 - 1)),
        # the tied prompt is wrong: gap -1 over spread 2
        ([2.0, 0.0], [4.0, 2.0, 3.0], 0.3 + 0.01 * math.tanh(-1 / 2 - 1)),
    ],
)
def test_rewardbench2_ties(ref, tied, expected):
    rows = rb2_rows()[-2:]
    found, _ = scored("rewardbench2", rows, [ref, tied])
    assert found.scores.subsets["Ties"] == pytest.approx(expected)
    assert found.scores.total is None


def test_rewardbench2_refuses_ids_of_ties_it_does_not_know():
    row = {**rb2_rows()[-1], "id": "seven"}
    with pytest.raises(DataError, match="expected ref:NUMBER or tied:NUMBER"):
        load_suite("rewardbench2").items(row, "file")


def rm_row(domain, number=0):
    return {"id": number, "domain": domain, "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}


def test_rm_bench_levels_by_hand():
    # Rewards grow with polish: concise 1, detailed 2, markdown 3, right answers 0.5 more.
    polish = [1.5, 2.5, 3.5, 1.0, 2.0, 3.0]
    found, _ = scored("rm-bench", [rm_row("chat")], [polish])
    # hard: right concise against wrong detailed: lost. normal: won. easy: won.
    assert found.scores.sections == {"chat": pytest.approx(2 / 3), "hard": 0.0, "normal": 1.0, "easy": 1.0}
    assert found.scores.total is None


def test_rm_bench_pools_safety_and_averages_domains():
    rows = [
        rm_row("chat"), rm_row("code"), rm_row("math"),
        rm_row("safety-refuse"), rm_row("safety-response"), rm_row("safety-response", 1),
    ]  # fmt: skip
    all_right, all_wrong, tied = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0] * 6
    found, items = scored("rm-bench", rows, [all_right, all_wrong, tied, all_right, all_wrong, all_wrong])
    assert found.scores.sections["safety"] == pytest.approx(1 / 3)
    assert found.scores.total == pytest.approx((1 + 0 + 0 + 1 / 3) / 4)
    written = load_suite("rm-bench").results(items, [all_right] * 6, "m")
    assert (written[0]["score_chosen"], written[0]["score_rejected"], written[0]["domain"]) == (
        [1] * 3,
        [0] * 3,
        "chat",
    )
    with pytest.raises(DataError, match="2 chosen and 3 rejected"):
        load_suite("rm-bench").items({**rm_row("chat"), "chosen": ["a", "b"]}, "file")
    with pytest.raises(DataError, match="'domain' is 'poetry', expected one that begins with chat"):
        load_suite("rm-bench").items(rm_row("poetry"), "file")


def judge_row(source, label, pair_id="1"):
    return {
        "pair_id": pair_id, "original_id": pair_id, "source": source, "question": "q", "label": label,
        "response_model": "m", "response_A": "a", "response_B": "b",
    }  # fmt: skip


def test_judgebench_takes_a_tie_for_b():
    rows = [judge_row("mmlu-pro-math", "A>B"), judge_row("mmlu-pro-law", "B>A"), judge_row("livecodebench", "B>A")]
    found, items = scored("judgebench", rows, [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert found.scores.sections == {"mmlu-pro": 0.5, "livecodebench": 1.0}
    assert found.scores.total == pytest.approx(2 / 3)  # over pairs, not over sources
    written = load_suite("judgebench").results(items, [[1.0, 1.0]] * 3, "m")
    assert written[0]["judgments"][0]["decision"] == "B>A"
    with pytest.raises(DataError, match="expected A>B or B>A"):
        load_suite("judgebench").items(judge_row("mmlu-pro", "tie"), "file")


def test_llmbar_in_both_forms():
    own = {"input": "i", "output_1": "first", "output_2": "second", "label": 2}
    (item,) = load_suite("llmbar").items(own, "LLMBar:Adversarial_Neighbor")
    assert (item.subset, item.responses) == ("Neighbor", ("second", "first"))
    standard = {
        "id": "x", "subset": "natural",
        "chosen": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "bad"}],
    }  # fmt: skip
    rows = [standard, *({**standard, "subset": f"adver_{s}"} for s in ("neighbor", "GPTInst", "GPTOut", "manual"))]
    found, _ = scored("llmbar", rows, [[1, 0], [1, 0], [0, 1], [0, 0], [1, 0]])
    assert found.scores.sections == {"Natural": 1.0, "Adversarial": 0.5}
    assert found.scores.total == pytest.approx(3 / 5)
    with pytest.raises(DataError, match="expected 1 or 2"):
        load_suite("llmbar").items({**own, "label": 0}, "Natural")


def test_ppe_votes_and_answers():
    vote = {"question_id": "q", "prompt": "p", "response_1": "a", "response_2": "b"}
    suite = load_suite("ppe")
    assert suite.items({**vote, "winner": "undecided"}, "human") == []
    votes = [{**vote, "winner": "model_a"}, {**vote, "winner": "model_b"}]
    answers = {
        "question_id": 1,
        "prompt": "p",
        "scores": [True, False, False],
        **{f"response_{n}": "x" for n in (1, 2, 3)},
    }
    assert suite.items({**answers, "scores": [True, True, True]}, "math") == []
    rows = [*votes, answers]
    items = [item for row in rows for item in suite.items(row, "math")]
    found = run_suite(suite, items, [[1.0, 0.0], [1.0, 1.0], [2.0, 2.0, 1.0]], "m", draws=20)
    assert found.scores.subsets == {"human preference": 0.5, "math": 0.75}
    assert found.scores.sections["math, best of K"] == 0.5
    assert found.scores.total == 0.625
    # Rewards 2, 2, 1 of which the first is right: 1/3 of one; of two (2, 2), (2, 1), (2, 1): 1/2, 1, 0; of three 1/2.
    assert found.scores.sections["math, highest best of k"] == pytest.approx(0.5)
    # The best curve is 1/3, 2/3, 1: off by 1/3 - 1/3, 2/3 - 1/2 and 1 - 1/2.
    assert found.scores.sections["math, loss of best of k"] == pytest.approx((0 + 1 / 36 + 1 / 4) / 3)
    # The right answer ties with one wrong answer and beats the other.
    assert found.scores.sections["math, area under ROC"] == pytest.approx(0.75)
    with pytest.raises(DataError, match="neither 'winner'"):
        suite.items({"prompt": "p"}, "math")
    with pytest.raises(DataError, match="'scores' holds nan"):
        suite.items({**answers, "scores": [True, math.nan, False]}, "math")


def test_ppe_judges_the_pairs_that_a_row_names():
    row = {"prompt": "p", "scores": [0, 1, 0, 1], **{f"response_{n}": "x" for n in (1, 2, 3, 4)}}
    suite, rewards = load_suite("ppe"), [[3.0, 2.0, 2.0, 1.0]]
    # Of 0 > 1, 2 = 1, 0 > 3, 2 > 3 the right answer has half of one; of the two named ones half of one as well.
    for named, expected in (([[0, 1], [1, 2]], 1 / 4), ([], 1 / 8), (None, 1 / 8), ([[3, 0]], 0.0)):
        items = suite.items({**row, "sampled_conflict_pairs": named}, "math")
        assert suite.score(items, rewards).subsets == {"math": expected}
    for wrong in ([0, 2], [1, 4], [1, 2, 0]):
        with pytest.raises(DataError, match="a right and a wrong answer"):
            suite.items({**row, "sampled_conflict_pairs": [wrong]}, "math")


def ppe_vote(a, b, winner, **more):
    row = {"question_id": f"{a}{b}{winner}", "prompt": "p", "response_1": "x", "response_2": "y"}
    return {**row, "model_a": a, "model_b": b, "winner": winner, **more}


def test_ppe_order_of_models():
    # Votes: A > B > C > D; rewards swap C and D and agree otherwise.
    rows = [ppe_vote(*pair, "model_a", language="English") for pair in ("AB", "AB", "BC", "BC", "BC", "CD", "CD")]
    rows += [ppe_vote("B", "A", "tie"), ppe_vote("A", "B", "model_b", is_code=True, language="German")]
    rewards = [[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2 + [[1.0, 1.0], [0.0, 1.0]]
    suite = load_suite("ppe")
    items = [item for row in rows for item in suite.items(row, "human")]
    found = run_suite(suite, items, rewards, "m", draws=5)
    # Of eight votes that are no tie, two are wrong (those of C against D).
    assert found.scores.subsets["human preference"] == pytest.approx(6 / 8)
    assert found.scores.subsets["human preference, English"] == pytest.approx(5 / 7)
    assert found.scores.subsets["human preference, code"] == 1.0
    # Ranks 1234 against 1243: Spearman 1 - 6 * 2 / (4 * 15), Kendall (5 - 1) / 6.
    assert found.scores.sections["human preference, Spearman of models"] == pytest.approx(0.8)
    assert found.scores.sections["human preference, Kendall of models"] == pytest.approx(4 / 6)
    # B has 1.5 of 4 against A and all of C, by votes and by rewards; A and D met one model, C's rewards do not vary.
    assert found.scores.sections["human preference, row-wise Pearson of models"] == pytest.approx(1.0)
    two = [item for item in items if {item.row["model_a"], item.row["model_b"]} == {"A", "B"}]
    assert "human preference, Spearman of models" not in suite.score(two, [[1.0, 0.0]] * len(two)).sections


def test_bradley_terry_strengths():
    # Two models, 3 wins against 1: a difference of ln 3 but for the prior.
    found = strengths(np.array([[0.0, 3.0], [1.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(math.log(3.001 / 1.001), abs=1e-5)
    # A circle of equal wins leaves all equal, whoever met whom.
    assert np.ptp(strengths(np.array([[0.0, 2, 0], [0, 0, 2], [2, 0, 0]]))) == 0


def test_strengths_are_those_of_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(5)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    wins = np.zeros((3, 6, 6))
    for i, j in pairs:
        wins[:, i, j], wins[:, j, i] = generator.integers(1, 40, 3), generator.integers(1, 40, 3)
    found = strengths(wins)
    for wins_MM, strength_M in zip(wins, found, strict=True):
        design = np.array([np.eye(6)[i] - np.eye(6)[j] for i, j in pairs] * 2)
        weights = [wins_MM[i, j] for i, j in pairs] + [wins_MM[j, i] for i, j in pairs]
        fit = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=1000)
        fit.fit(design, [1] * len(pairs) + [0] * len(pairs), sample_weight=weights)
        assert strength_M == pytest.approx(fit.coef_[0] - fit.coef_[0].mean(), abs=2e-3)
    # Two islands of models that never met: each is of mean 0 within the whole, and nothing runs away.
    islands = np.zeros((4, 4))
    islands[0, 1], islands[1, 0], islands[2, 3], islands[3, 2] = 3, 1, 1, 1
    assert strengths(islands) == pytest.approx([0.5491, -0.5491, 0, 0], abs=1e-3)


def test_row_wise_pearson_is_scipys_mean_over_models():
    from scipy.stats import pearsonr

    generator = np.random.default_rng(6)
    met = np.triu(generator.integers(1, 9, (5, 5)), 1)
    wins = [np.triu(generator.integers(0, met + 1), 1) for _ in range(2)]
    both = np.array([one + (met - one).T - np.diag(np.diag((met - one).T)) for one in wins], dtype=float)
    met = met + met.T
    rates = [one / np.where(met, met, 1) for one in both]
    rows = [pearsonr(*(np.delete(rate[row], row) for rate in rates)).statistic for row in range(5)]
    assert row_wise_pearson(both) == pytest.approx(np.mean(rows))
    assert row_wise_pearson(np.zeros((2, 3, 3))) is None


def test_how_sure_the_order_of_models_is_by_hand():
    # Votes separate all three; rewards put the first below the others, which overlap: -1, -1, 0 of three pairs.
    votes = np.array([[3.0, 2.0, 1.0], [3.1, 2.1, 1.1]])
    rewards = np.array([[0.0, 1.0, 2.0], [0.1, 2.0, 1.5]])
    found = sureness(np.array([3.0, 2.0, 1.0]), np.array([votes, rewards]))
    assert found["separability of models"] == pytest.approx(2 / 3)
    assert found["agreement of intervals of models"] == pytest.approx(-2 / 3)
    # The first is never the stronger, the second in one of two draws: (0 - 1)^2 twice and (1/2 - 1)^2.
    assert found["Brier score of pairs of models"] == pytest.approx((1 + 1 + 1 / 4) / 3)
    # With many votes and rewards that agree, everything is sure; models that only met themselves are left out.
    games = [(a, b, 1.0, 1.0) for a, b in ("AB", "BC", "AC") for _ in range(200)]
    games += [(b, a, 1.0, 1.0) for a, b in ("AB", "BC", "AC") for _ in range(40)]
    sure = order_of_models([*games, ("A", "A", 0.5, 0.5), ("D", "D", 0.5, 0.5)])
    assert sure["separability of models"] == sure["agreement of intervals of models"] == 1.0
    assert sure["Brier score of pairs of models"] == 0.0
    turned = order_of_models([(a, b, vote, 1 - reward) for a, b, vote, reward in games])
    assert (turned["agreement of intervals of models"], turned["Brier score of pairs of models"]) == (-1.0, 1.0)


def test_area_under_the_roc_curve_by_hand():
    assert area_under_roc([(3.0, 1.0), (1.0, 1.0), (2.0, 0.0), (0.0, 0.0)]) == 0.75
    assert area_under_roc([(1.0, 1.0), (1.0, 0.0)]) == 0.5
    assert area_under_roc([(math.nan, 1.0), (math.nan, 0.0), (1.0, 1.0), (0.0, 0.0)]) == 0.25


def test_a_prompt_may_be_messages():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = rb1_rows({"shp": [True]})[0][0]
    (item,) = load_suite("rewardbench").items({**row, "prompt": turns}, "file")
    assert item.prompt == turns
    for wrong in ([], ["a"], [{"role": "user"}], None):
        with pytest.raises(DataError, match=r"'prompt' (holds|is).*expected text"):
            load_suite("rewardbench").items({**row, "prompt": wrong}, "file")


@pytest.mark.parametrize("name", suite_names())
def test_what_could_not_be_scored_is_wrong_and_counted(name):
    rows = {
        "rewardbench": [rb1_rows({"alpacaeval-easy": [True, True]})[0][0]] * 2,
        "rewardbench2": rb2_rows()[:1] * 2,
        "rm-bench": [rm_row("chat")] * 2,
        "judgebench": [judge_row("mmlu-pro", "A>B")] * 2,
        "llmbar": [{"input": "i", "output_1": "a", "output_2": "b", "label": 1}] * 2,
        "ppe": [{"prompt": "p", "response_1": "a", "response_2": "b", "winner": "model_a"}] * 2,
    }[name]
    suite = load_suite(name)
    items = [item for row in rows for item in suite.items(row, "Natural")]
    nothing = [[math.nan] * len(item.responses) for item in items]
    found = run_suite(suite, items, nothing, "m", draws=5)
    assert (found.items, found.unscored) == (2, 2)
    assert all(value == 0 for value in found.scores.subsets.values())
    with pytest.raises(DataError, match="hold no item"):
        run_suite(suite, [], [], "m")


def test_intervals_are_resampled_within_subsets():
    rows, rewards = rb1_rows(whole_rb1(alpacaeval_easy=[True, False] * 50))
    suite = load_suite("rewardbench")
    items = [
        item.__class__(**{**vars(item), "unit": f"{item.unit}:{n}"})
        for n, item in enumerate(i for row in rows for i in suite.items(row, "f"))
    ]
    found = run_suite(suite, items, rewards, "m")
    chat = found.intervals["Chat"]
    share = 100 / 358
    assert chat.half_width == pytest.approx(1.96 * share * 0.05, rel=0.15)
    assert found.intervals["Safety"].half_width == 0.0  # one item a subset: nothing to draw from
    assert found.intervals["total"].half_width == pytest.approx(chat.half_width / 4, rel=1e-6)


def test_strangers_bring_their_own(monkeypatch):
    def items(row, where):
        yield from [] if row["known"] else load_suite("rewardbench").items({}, where)

    good = SimpleNamespace(NAME="mine", SOURCES="org/name", items=items, score=None, results=None)
    bad = SimpleNamespace(NAME="half")

    def points(group):
        assert group == "btrm.suites"
        return [
            EntryPoint("mine", "tests_good", group), EntryPoint("half", "tests_half", group),
            EntryPoint("broken", "no_such_module_at_all", group), EntryPoint("ppe", "tests_good", group),
        ]  # fmt: skip

    monkeypatch.setattr(registry, "entry_points", points)
    monkeypatch.setitem(__import__("sys").modules, "tests_good", good)
    monkeypatch.setitem(__import__("sys").modules, "tests_half", bad)
    assert suite_names() == [
        "rewardbench", "rewardbench2", "rm-bench", "judgebench", "llmbar", "ppe", "broken", "half", "mine"
    ]  # fmt: skip
    mine = load_suite("mine")
    assert (mine.NAME, mine.SOURCES, mine.items({"known": True}, "file")) == ("mine", ["org/name"], [])
    with pytest.raises(ConfigError, match=r"suite 'mine' \(tests_good\) fails in items\(\): KeyError: 'known'"):
        mine.items({}, "file")
    with pytest.raises(DataError, match="'subset' is NoneType"):
        mine.items({"known": False}, "file")
    assert load_suite("ppe").NAME == "ppe"
    with pytest.raises(ConfigError, match="has no SOURCES, items, score, results"):
        load_suite("half")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        load_suite("broken")
    with pytest.raises(ConfigError, match="Did you mean 'rewardbench'"):
        load_suite("rewardbnch")
