"""What a run may go on with (equal contents wherever they lie, equal settings), and what it leaves at its end."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import trajectories
from support.trajectories import Trajectory, distance, metrics, trajectory

from btrm_core import run as run_module
from btrm_core.config import apply, read_settings
from btrm_core.errors import CheckpointError, ConfigError
from btrm_core.model import read_manifest
from btrm_core.settings import RunConfig
from btrm_core.training import loop, resume
from btrm_core.training.identity import _compared, differences, refuse_changes
from btrm_core.training.saving import room_needed
from btrm_core.weights import weights_digest

EXACT = 1e-6
SEAMS = import_module("btrm_core.training.seams")
SAVING = {"output__save_every": 4, "output__eval_every": 2}
ON = {"output__resume": "auto"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def whole(root: Path) -> Trajectory:
    return trajectory(root, root / "whole", **SAVING)


@pytest.fixture
def unfinished(whole: Trajectory, tmp_path: Path) -> Path:
    """The uninterrupted run as it was when it had saved its first checkpoint."""
    output = tmp_path / "run"
    shutil.copytree(whole.directory.parent / "resume", output / "resume")
    shutil.rmtree(output / "resume" / "step-00000008")
    shutil.copy(whole.directory.parent / "metrics.jsonl", output)
    return output


def test_moved_and_renamed_data_and_weights_are_the_same(
    root: Path, whole: Trajectory, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "train.jsonl", "held_out.jsonl"):
        there, here = root / name, tmp_path / f"moved {name}"
        shutil.copytree(there, here) if there.is_dir() else shutil.copy(there, here)
    monkeypatch.chdir(tmp_path)
    values = {
        "model__name": "moved base",
        "data__train": ("moved train.jsonl",),
        "data__eval": (str(tmp_path / "moved held_out.jsonl"),),
    }
    assert distance(trajectory(root, unfinished, **SAVING, **ON, **values), whole) < EXACT


def _fewer_merges(base: Path) -> None:
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]
    path.write_text(json.dumps(content))


def _other_weights(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [(_fewer_merges, r"training pairs: \w+… -> \w+….*tokenizer: \w+… -> \w+…"), (_other_weights, r"base weights: ")],
)
def test_another_tokenizer_or_base_under_the_same_name_is_refused(
    root: Path, unfinished: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(CheckpointError, match=told):
        trajectories.train(root, unfinished, **SAVING, **ON, model__name=str(tmp_path / "base"))


def test_other_evaluation_pairs_are_refused_and_forced_they_forget_the_best(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keeping = {**SAVING, "output__keep_best": True}
    _stop_after(tmp_path / "run", root, 5, **keeping)
    rows = (root / "held_out.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(rows[1:]) + "\n")
    other = {"data__eval": (str(tmp_path / "other.jsonl"),)}
    with pytest.raises(CheckpointError, match=r"evaluation pairs: \w+… -> \w+…"):
        trajectories.train(root, tmp_path / "run", **keeping, **ON, **other)
    capsys.readouterr()
    outcome = trajectories.train(root, tmp_path / "run", **keeping, **ON, **other, output__force_resume=True)
    assert "is forgotten: the evaluation pairs are others" in capsys.readouterr().err
    assert outcome.evaluation is not None
    assert outcome.evaluation["pairs"] == 2


def _stop_after(output: Path, root: Path, steps: int, **values: Any) -> None:
    """A run that is asked to stop in a step, and leaves a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        step = loop.train_step

        def stopping(session: Any, batches: Any, around: Any, *, stop: bool) -> Any:
            return step(session, batches, around, stop=stop or batches.index == steps - 1)

        patch.setattr(loop, "train_step", stopping)
        outcome = trajectories.train(root, output, **values)
    assert (outcome.directory, outcome.progress.step, outcome.exit_code) == (None, steps, 143)


def test_a_best_model_that_is_gone_is_forgotten(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeping = {**SAVING, "output__keep_best": True}
    _stop_after(tmp_path / "run", root, 5, **keeping)
    shutil.rmtree(tmp_path / "run" / "best")
    record = tmp_path / "run" / "resume" / "step-00000005"
    state = json.loads((record / "trainer.json").read_text())
    state["progress"]["best_loss"] = 0.0  # no later evaluation can be lower
    (record / "trainer.json").write_text(json.dumps(state))
    (record / "COMPLETE").write_text("")
    outcome = trajectories.train(root, tmp_path / "run", **keeping, **ON)
    assert "(loss 0.0000) is forgotten: its model is not there" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "run" / "model")
    assert manifest["evaluation"] == outcome.evaluation
    losses = [row["loss"] for row in _evaluations(tmp_path / "run") if row["step"] > 5]
    assert manifest["evaluation"]["loss"] == min(losses)


def _evaluations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "eval"]


def test_report_and_model_come_from_one_state(root: Path, tmp_path: Path) -> None:
    """Early stopping alone keeps the best model too, and shows the rewards that this model gives."""
    from btrm_core.scoring import Scorer

    values = {"output__eval_every": 1, "train__early_stopping": 3, "train__learning_rate": 0.05, "train__max_steps": 40}
    outcome = trajectories.train(root, tmp_path / "run", **values, train__epochs=20.0)
    rows = _evaluations(tmp_path / "run")
    assert outcome.progress.stopped is not None
    assert outcome.evaluation is not None
    best = min(rows, key=lambda row: row["loss"])
    assert best["step"] < rows[-1]["step"]
    assert outcome.evaluation["loss"] == pytest.approx(best["loss"])
    scorer = Scorer(str(tmp_path / "run"))
    example = outcome.examples[0]
    pair = json.loads((root / "held_out.jsonl").read_text().splitlines()[0])
    assert pair["chosen"][-1]["content"] == example["chosen"][1]
    sides = ([pair[side][-1]["content"]] for side in ("chosen", "rejected"))
    chosen, rejected = scorer.pair_rewards([pair["chosen"][:-1]], *sides)[0]
    assert (chosen, rejected) == pytest.approx((example["chosen"][0], example["rejected"][0]), abs=1e-4)
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("asked", [{"output__keep_best": True}, {"train__early_stopping": 2}])
def test_the_best_needs_evaluation_pairs(root: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    flag = "--keep-best" if "output__keep_best" in asked else "--early-stopping"
    with pytest.raises(ConfigError, match=f"{flag} needs evaluation pairs: give --eval-data SRC"):
        trajectories.train(root, tmp_path / "run", **asked, data__eval=(), data__held_out_fraction=0.0)


def test_an_edited_position_is_noticed(root: Path, unfinished: Path) -> None:
    record = unfinished / "resume" / "step-00000004" / "trainer.json"
    record.write_text(record.read_text().replace('"step": 4', '"step": 7'))
    with pytest.raises(CheckpointError, match=r"the content of trainer\.json has changed since it was written"):
        trajectories.train(root, unfinished, **SAVING, **ON)


def test_a_checkpoint_of_an_earlier_version_goes_on(root: Path, whole: Trajectory, unfinished: Path) -> None:
    """It recorded paths and the rows' fingerprint, no digests of contents, and left its mark empty."""
    record = unfinished / "resume" / "step-00000004"
    state = json.loads((record / "trainer.json").read_text())
    for name in ("training pairs", "evaluation pairs", "tokenizer", "base weights", "btrm"):
        del state["identity"][name]
    state["identity"] |= {"model.name": "/elsewhere/base", "data.train": ["/elsewhere/train.jsonl"], "data.eval": []}
    state["identity"] |= {"train.epochs": 2.0, "train.max_steps": None, "model.revision": None}
    del state["progress"]["best_step"], state["schedule"]
    (record / "trainer.json").write_text(json.dumps(state))
    (record / "COMPLETE").write_text("")
    assert distance(trajectory(root, unfinished, **SAVING, **ON), whole) < EXACT


def test_a_setting_that_a_newer_version_added_had_its_default() -> None:
    before = {"btrm": "0.1.0", "train.seed": 0}
    assert differences(before, {**before, "loss.centering": 0.0, "btrm": "0.2.0"}) == {}
    assert differences(before, {**before, "loss.centering": 0.5}) == {"loss.centering": "loss.centering: 0.0 -> 0.5"}


def test_dropout_on_adapters_depends_on_the_rows(root: Path, tmp_path: Path) -> None:
    lora = {**SAVING, "lora__rank": 2, "lora__dropout": 0.1}
    _stop_after(tmp_path / "run", root, 5, **lora)
    with pytest.raises(CheckpointError, match=r"train\.tokens_per_batch: 300 -> 5000"):
        trajectories.train(root, tmp_path / "run", **lora, **ON, train__tokens_per_batch=5000)


def test_dropout_of_the_base_model_depends_on_rows_and_processes_too() -> None:
    config = read_settings(None, {"family": "llama3", "model.dropout": True, "lora.rank": 2})
    before = {**json.loads(json.dumps(_compared(config))), "btrm": "0.1.0", "processes": 1}
    assert "train.tokens_per_batch" in before
    with pytest.raises(CheckpointError, match=r"processes: 1 -> 2 \(which dropout draws by\); use the settings"):
        refuse_changes(Path("step-1"), before, {**before, "processes": 2}, config.output)
    forced = read_settings(None, {"output.force_resume": True}).output
    refuse_changes(Path("step-1"), before, {**before, "processes": 2}, forced)
    without = {**before, "model.dropout": False}
    refuse_changes(Path("step-1"), without, {**without, "processes": 2}, config.output)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"tokenizer.chat_template": "a.jinja"}, {"tokenizer.chat_template": "moved/b.jinja"}),
        ({"family": None}, {"family": "llama3"}),
        ({"lora.targets": ("q_proj", "v_proj")}, {"lora.targets": ("v_proj", "q_proj")}),
        ({"data.map": ("prompt=question",)}, {"data.map": ("prompt=text",)}),
        ({"data.format": None}, {"data.format": "hh"}),
    ],
)
def test_other_words_for_the_same_are_the_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Template, family and pairs are compared by what they are; the order of layers says nothing."""
    made, other = ({**_compared(apply(RunConfig(), given)), "btrm": "0.1.0"} for given in (before, now))
    assert differences(made, other) == {}


def test_what_a_base_model_is(root: Path, tmp_path: Path) -> None:
    """Its configuration counts as its weights do, in whichever file they are; where they came from does not."""
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    known = {weights_digest(str(base), None)}
    described = json.loads((base / "config.json").read_text())

    def digest(**changed: Any) -> str:
        (base / "config.json").write_text(json.dumps({**described, **changed}))
        return weights_digest(str(base), None)

    assert {digest(transformers_version="5.1", _name_or_path="elsewhere", use_cache=False)} == known
    assert {digest(rms_norm_eps=1e-3)} != known
    (base / "model.safetensors").unlink()
    found = []
    for content in (b"one", b"two"):
        (base / "pytorch_model.bin").write_bytes(content)
        found.append(digest())
    assert len({*found, *known}) == 3


def test_other_subsets_of_the_evaluation_pairs_are_others(root: Path, tmp_path: Path) -> None:
    values = {**SAVING, "output__best_by": "chat.accuracy"}
    rows = [json.loads(line) for line in (root / "held_out.jsonl").read_text().splitlines()]
    for name, subsets in (("one", ("chat", "chat", "code")), ("two", ("chat", "code", "code"))):
        lines = [json.dumps({**row, "subset": subset}) for row, subset in zip(rows, subsets, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    _stop_after(tmp_path / "run", root, 5, **values, data__eval=(str(tmp_path / "one.jsonl"),))
    with pytest.raises(CheckpointError, match=r"evaluation pairs: \w+… -> \w+…"):
        trajectories.train(root, tmp_path / "run", **values, **ON, data__eval=(str(tmp_path / "two.jsonl"),))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_model_that_becomes_nan_is_not_the_best(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = SEAMS.pair_rewards

    def diverging(engine: Any, *arguments: Any, **keywords: Any) -> Any:
        found = rewards(engine, *arguments, **keywords)
        evaluations.append(found)
        return found if len(evaluations) == 1 else found * np.nan

    evaluations: list[Any] = []
    monkeypatch.setattr(SEAMS, "pair_rewards", diverging)
    outcome = trajectories.train(root, tmp_path / "run", output__keep_best=True, output__eval_every=5)
    assert len(evaluations) == 2
    assert read_manifest(tmp_path / "run" / "model")["training"]["steps"] == 5
    assert outcome.evaluation is not None
    assert np.isfinite(outcome.evaluation["loss"])


def test_a_run_that_stopped_early_is_finished(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "output__eval_every": 1,
        "train__early_stopping": 1,
        "train__learning_rate": 0.05,
        "train__max_steps": 40,
        "train__epochs": 20.0,
        **ON,
    }
    first = trajectories.train(root, tmp_path / "run", **values)
    assert first.progress.stopped is not None
    again = trajectories.train(root, tmp_path / "run", **values)
    assert "this run is finished" in capsys.readouterr().err
    assert (again.directory, again.evaluation) == (first.directory, first.evaluation)


def test_the_best_of_all_starts_becomes_the_final_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that stopped after its hours, and of one that was finished and is made longer."""
    rewards, order = SEAMS.pair_rewards, iter([3.0, 9.0, 1.0, 2.0, 0.5, 0.1])

    def ranked(*arguments: Any, **keywords: Any) -> Any:
        found = rewards(*arguments, **keywords)
        return np.stack([np.full(len(found), next(order)), np.zeros(len(found))], axis=1)

    monkeypatch.setattr(SEAMS, "pair_rewards", ranked)
    keeping = {"output__keep_best": True, "output__save_every": 2, "output__eval_every": 2, **ON}
    hours = {**keeping, "train__max_hours": 1e-9}
    steps = []
    for given in (hours, hours, hours, {**keeping, "train__max_steps": 4}, {**keeping, "train__max_steps": 6}):
        trajectories.train(root, tmp_path / "run", **given)
        steps.append(read_manifest(tmp_path / "run" / "model")["training"]["steps"])
    assert steps == [1, 2, 2, 2, 2]
    assert not (tmp_path / "run" / "best").exists()


def test_a_model_of_other_settings_or_data_is_not_begun_anew_unasked(
    root: Path, whole: Trajectory, tmp_path: Path
) -> None:
    run, rows = tmp_path / "run", (root / "train.jsonl").read_text().splitlines()
    shutil.copytree(whole.directory, run / "model")
    made = (run / "model" / "btrm.json").read_bytes()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:20]) + "\n")
    told = r"--resume: the model in .*model was made otherwise \({}\); use the data and settings of before, choose an"
    for change, what in (
        ({"train__learning_rate": 1e-3}, r"train\.learning_rate: 0\.003 -> 0\.001"),
        ({"data__train": (str(tmp_path / "fewer.jsonl"),)}, "the training data is another"),
        ({"train__max_steps": 12, "train__seed": 1}, r"train\.seed: 0 -> 1"),
    ):
        with pytest.raises(CheckpointError, match=told.format(what)):
            trajectories.train(root, run, **SAVING, **ON, **change)
    assert (run / "model" / "btrm.json").read_bytes() == made
    anew = trajectories.train(root, run, **SAVING, **ON, output__overwrite=True, train__max_steps=2, train__seed=1)
    assert anew.progress.step == 2


def test_a_seed_may_be_as_large_as_a_number_can_be(root: Path, tmp_path: Path) -> None:
    assert trajectories.train(root, tmp_path / "run", train__seed=2**63 - 1, train__max_steps=2).progress.step == 2


def test_after_its_hours_a_run_goes_on(root: Path, tmp_path: Path) -> None:
    first = trajectories.train(root, tmp_path / "run", **ON, train__max_hours=1e-9)
    assert (first.progress.step, (first.directory or tmp_path).name) == (1, "model")
    assert [path.name for path in resume.complete(tmp_path / "run" / "resume")] == ["step-00000001"]


def test_a_longer_run_goes_on_and_says_what_becomes_of_the_learning_rate(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trajectory(root, tmp_path / "run", **SAVING)
    capsys.readouterr()
    again = trajectories.train(root, tmp_path / "run", **SAVING, **ON)
    assert (again.directory, again.exit_code) == (tmp_path / "run" / "model", 0)
    assert re.search(r"this run is finished \(10 steps\); --epochs N", capsys.readouterr().err)
    longer = trajectories.train(root, tmp_path / "run", **SAVING, **ON, train__max_steps=12)
    said = capsys.readouterr().err
    assert longer.progress.step == 12
    assert "the run now has 12 steps instead of 10: the learning rate follows its new schedule from step 9 on" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 13))


def test_hours_count_from_this_start_unless_all_are_asked_for(root: Path, unfinished: Path, tmp_path: Path) -> None:
    record = unfinished / "resume" / "step-00000004"
    state = json.loads((record / "trainer.json").read_text())
    state["progress"]["seconds"] = 7200.0
    (record / "trainer.json").write_text(json.dumps(state))
    (record / "COMPLETE").write_text("")
    shutil.copytree(unfinished, tmp_path / "all")
    done = trajectories.train(root, unfinished, **SAVING, **ON, train__max_hours=1.0)
    assert (done.progress.step, done.progress.stopped) == (trajectories.STEPS, None)
    cut = trajectories.train(root, tmp_path / "all", **SAVING, **ON, train__max_total_hours=1.0)
    assert (cut.progress.step, cut.progress.stopped) == (5, "after 1 hours, as asked")


def test_what_was_left_half_written_is_removed(root: Path, unfinished: Path) -> None:
    left = [unfinished / "resume" / "step-00000009", unfinished / ".best-x1", unfinished / ".model-old-2"]
    left += [unfinished / ".building-3", unfinished / "resume" / ".step-00000010.tmp"]
    for path in left:
        path.mkdir(parents=True)
        os.utime(path, (1e9, 1e9))
    left.append(unfinished / ".probe-4")
    left[-1].touch()
    resume.clean(unfinished / "resume")
    assert not any(path.exists() for path in left)
    assert (unfinished / "resume" / "step-00000004" / "COMPLETE").exists()


def test_a_disk_without_room_for_the_model_is_refused_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "probe", lambda _: 100_000)
    with pytest.raises(CheckpointError, match=r"has 0\.00 GB free, but the run needs .* GB for its model; free some"):
        trajectories.train(root, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert metrics(tmp_path / "run") == []


@pytest.mark.parametrize(("every", "kept", "checkpoints"), [(3, 1000, 3), (3, 1, 2), (1000, 1000, 1), (1, 1000, 9)])
def test_room_is_asked_for_no_more_checkpoints_than_the_run_writes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, kept: int, checkpoints: int
) -> None:
    """Ten steps: `--keep-last 1000` must not refuse a disk that has room for all that will ever be there."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(run_module, "check_room", lambda session, _: asked.append(room_needed(session)))
    monkeypatch.setattr(run_module, "fit", lambda session, progress, _: progress)
    monkeypatch.setattr(run_module, "finish", lambda session, progress, _: progress)
    for saving in ({}, {"output__save_every": every, "output__keep_last": kept}):
        trajectories.train(root, tmp_path / "run", **saving)
    (model, one), (same, needed) = asked
    assert (same, needed) == (model, checkpoints * one)
