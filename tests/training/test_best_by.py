"""Which evaluation is the best one, by any of its figures, and what a finished run says of its held-out pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import trajectories

from btrm_core.data import load_evaluation
from btrm_core.errors import ConfigError, DataError
from btrm_core.evaluation import badness, check_figure, figures_of
from btrm_core.evaluation.figures import Judged, by_subset
from btrm_core.model import read_manifest
from btrm_core.training import write_training_report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = trajectories.prepare(tmp_path_factory.mktemp("best_by"))
    rows = [json.loads(line) for line in (made / "held_out.jsonl").read_text().splitlines()]
    named = [{**row, "subset": name} for row, name in zip(rows, ("chat", "chat", "code"), strict=True)]
    (made / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    return made


def evaluations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "eval"]


def test_lower_is_better_once_a_figure_is_turned() -> None:
    judged = Judged(np.array([1, 1, -1]), np.ones(3), ["a", "a", "b"])
    figures = figures_of(judged, np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    assert badness(figures, "accuracy") == -2 / 3
    assert badness(figures, "b.accuracy") == -1.0
    assert badness(figures, "a.reward_margin") == 0.5
    assert badness(figures, "b.loss") == pytest.approx(np.log1p(np.exp(-3)))
    assert (badness(figures, "brier"), badness(figures, "ece")) == (figures["brier"], figures["ece"])
    alone = figures_of(Judged(np.array([1, 1]), np.ones(2), ["a", "a"]), np.array([[1.0, 0.0], [0.0, 2.0]]))
    for figure in ("loss", "brier", "ece", "accuracy", "reward_margin"):
        assert badness(figures, f"a.{figure}") == badness(alone, figure) == badness(alone, f"a.{figure}")
    # A named set whose rows name subsets: all of its pairs together.
    sets = ("chat", "code")
    judged = Judged(np.ones(4, int), np.ones(4), ["chat/x", "chat/x", "chat/y", "code"], sets)
    rewards = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    figures, chat = figures_of(judged, rewards), figures_of(Judged(np.ones(3, int), np.ones(3), [""] * 3), rewards[:3])
    for figure in ("loss", "brier", "ece", "accuracy", "reward_margin"):
        check_figure(f"chat.{figure}", judged.subset_P, sets)
        assert badness(figures, f"chat.{figure}") == pytest.approx(badness(chat, figure))


def test_rewards_that_are_no_numbers_are_left_out_and_counted() -> None:
    judged = Judged(np.array([1, 1, -1, 1]), np.array([1, 1, 1, 0.5]), ["a", "a", "b", "b"])
    rewards = np.array([[np.nan, 0.0], [0.0, 2.0], [3.0, -np.inf], [1.0, 0.0]])
    figures = figures_of(judged, rewards)
    assert (figures["pairs"], figures["unscored"], figures["undecided"], figures["accuracy"]) == (1, 2, 1, 0.0)
    json.dumps(figures, allow_nan=False)
    assert (badness(figures, "a.accuracy"), badness(figures, "b.accuracy")) == (0.0, math.inf)
    with pytest.raises(DataError, match="none of the 3 evaluation pairs has two finite rewards"):
        figures_of(judged, np.full((4, 2), np.nan))


def test_an_accuracy_has_its_interval() -> None:
    figures = figures_of(Judged(np.ones(3, int), np.ones(3), [""] * 3), np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    low, high = figures["accuracy_interval"]
    assert 0 < low < 2 / 3 < high < 1


def test_a_figure_that_there_will_not_be_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    check_figure("chat.accuracy", ["chat", "code"])
    with pytest.raises(ConfigError, match=r"chat\.acuracy is no figure here; .* Did you mean 'chat\.accuracy'"):
        check_figure("chat.acuracy", ["chat", "code"])
    check_figure("chat.ece", ["chat", "chat"])
    with pytest.raises(ConfigError, match=r"expected loss, brier, ece, accuracy, reward_margin\."):
        check_figure("chat.accuracy", ["", ""])
    with pytest.raises(ConfigError, match=r"--best-by maths\.accuracy is no figure here"):
        trajectories.train(root, tmp_path / "run", output__best_by="maths.accuracy")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("by", ["code.reward_margin", "code.loss", "accuracy"])
def test_the_model_that_is_best_by_the_figure_becomes_the_final_one(root: Path, tmp_path: Path, by: str) -> None:
    outcome = trajectories.train(
        root, tmp_path / "run", output__best_by=by, output__eval_every=1, train__learning_rate=0.05, train__max_steps=8
    )
    rows = evaluations(tmp_path / "run")
    best = min(rows, key=lambda row: badness(row, by))
    manifest = read_manifest(tmp_path / "run" / "model")
    assert badness(manifest["evaluation"], by) == badness(best, by)
    kept = next(row for row in rows if row["step"] == manifest["training"]["steps"])
    assert badness(kept, by) == badness(best, by)  # several may be equally good
    # the rewards kept for the report are those of the model that was saved
    assert outcome.held_out is not None
    assert figures_of_rewards(outcome.held_out)["loss"] == pytest.approx(manifest["evaluation"]["loss"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    low, high = manifest["evaluation"]["accuracy_interval"]
    accuracy, pairs = (manifest["evaluation"][key] for key in ("accuracy", "pairs"))
    assert f"| all | {pairs} | {accuracy:.3f} | {low:.3f} to {high:.3f} |" in card


def figures_of_rewards(rewards: Any) -> dict[str, Any]:
    return figures_of(Judged(np.zeros(len(rewards)), rewards.probability_P, rewards.subset_P), rewards.reward_P2)


def test_several_sources_are_reported_apart(root: Path, tmp_path: Path) -> None:
    """Also where their files are called alike, or their rows name the same subsets."""
    rows = [json.loads(line) for line in (root / "held_out.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in row.items() if key != "subset"} for row in rows]
    marked = [{**row, "subset": subset} for row, subset in zip(rows, ("easy", "hard", "easy"), strict=True)]
    for folder, content in (("a", plain), ("b", plain[:2]), ("c", marked), ("d", marked[:2])):
        (tmp_path / folder).mkdir()
        lines = [json.dumps(row) for row in content]
        (tmp_path / folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    a, b, c, d = (str(tmp_path / folder / "test.jsonl") for folder in "abcd")
    parts = {"c": 3, "c/easy": 2, "c/hard": 1, "d": 2, "d/easy": 1, "d/hard": 1}
    for given, expected in (
        ((a, b), {"a/test": 3, "b/test": 2}),
        ((f"x={a}", f"y={b}"), {"x": 3, "y": 2}),
        ((f"x={a}", b), {"test": 2, "x": 3}),
        ((f"c={c}", f"d={d}"), parts),
        ((c, d), {f"{name[0]}/test{name[1:]}": count for name, count in parts.items()}),
        ((c,), {"easy": 2, "hard": 1}),
    ):
        read = load_evaluation(given, cache_dir=str(tmp_path / "cache"))
        names = [pair.subset for pair in read]
        found = {row.name: row.pairs for row in by_subset(names, np.ones(len(names)), read.sets)}
        assert found == expected, given
    values = {"data__eval": (f"c={c}", f"d={d}"), "output__best_by": "d.accuracy", "train__max_steps": 2}
    outcome = trajectories.train(root, tmp_path / "run", **values)
    assert outcome.evaluation is not None
    assert {row["name"]: row["pairs"] for row in outcome.evaluation["subsets"]} == parts


def test_a_finished_run_writes_its_report(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = trajectories.train(root, tmp_path / "run", train__max_steps=4, output__eval_every=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')  # what a disk that was full for a while has left
    told = write_training_report(outcome)
    page = tmp_path / "run" / "report" / "report.html"
    assert told == f"report: {page}"
    text = page.read_text(encoding="utf-8")
    assert "Loss over the steps of training" in text
    assert (page.parent / "training.png").is_file()
    values = json.loads((page.parent / "report.json").read_text())
    assert outcome.evaluation is not None
    assert values["evaluations"][0]["accuracy"]["half"] == outcome.evaluation["accuracy"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert write_training_report(outcome).startswith("no report: a report needs matplotlib")
