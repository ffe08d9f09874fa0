"""Nothing is lost: a run that was killed, asked to stop, or whose checkpoint was damaged goes on as if nothing was.

Uninterrupted runs are the measure: losses of every step and rewards at the end agree to 1e-6. Runs that are killed are
forked from a process that has imported everything; the others run in this one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std
from safetensors.torch import load_file
from support import processes, trajectories
from support.trajectories import Trajectory, distance, metrics, read, trajectory

from btrm_core import files
from btrm_core import run as run_module
from btrm_core.config import read_settings
from btrm_core.errors import CheckpointError, DataError
from btrm_core.signals import Stopped
from btrm_core.training import report, resume
from btrm_core.training.processes.runtime import group, start
from btrm_core.training.report import Reporter

EXACT = 1e-6
SEAMS = import_module("btrm_core.training.seams")
LIVES = int(os.environ.get("BTRM_LIVES", "3"))
"""How often a run is killed; 20 and more must also meet it while it saves."""
MODES: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2": {"distributed__deepspeed": "zero2"},
    "zero3": {"distributed__deepspeed": "zero3"},
    "lora": {"lora__rank": 4, "lora__dropout": 0.1, "train__learning_rate": 2e-2},
    "bf16": {"model__dtype": "bf16"},
}
SAVING = {"output__save_every": 3, "output__eval_every": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(root: Path) -> Trajectory:
    """The uninterrupted run that the others are compared with."""
    return trajectory(root, root / "whole", output__eval_every=2)


@pytest.fixture
def stopped(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output directory of a run that was asked to stop in its fifth step, mid-epoch, with two checkpoints."""
    _signal_after(monkeypatch, 5, signal.SIGTERM)
    outcome = trajectories.train(root, tmp_path / "run", **SAVING)
    monkeypatch.undo()
    assert (outcome.directory, outcome.progress.step, outcome.signal) == (None, 6, signal.SIGTERM)
    assert [path.name for path in resume.complete(tmp_path / "run" / "resume")] == ["step-00000003", "step-00000006"]
    return tmp_path / "run"


def _signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal when a step has been logged."""
    _after_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def _after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something when a step has been logged."""
    log = Reporter.log

    def wrapped(self: Reporter, split: str, done: int, figures: Any) -> None:
        log(self, split, done, figures)
        if (split, done) == ("train", step):
            act()

    monkeypatch.setattr(Reporter, "log", wrapped)


def killed_after(step: int, root: str, output: str, values: dict[str, Any]) -> None:
    """A run, in a child, that ends by kill -9 when a step has been logged."""
    with pytest.MonkeyPatch.context() as patch:
        _signal_after(patch, step, signal.SIGKILL)
        trajectories.train(Path(root), Path(output), **values)


@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed(root: Path, tmp_path: Path, mode: str, drawn: random.Random) -> None:
    values = {**MODES[mode], **SAVING}
    step = drawn.randint(4, 9)
    output = tmp_path / f"killed after step {step}"
    child = processes.start(killed_after, step, str(root), str(output), values, log=tmp_path / "log")
    whole = trajectory(root, tmp_path / "whole", **values)
    assert processes.wait(child) == [-signal.SIGKILL], (tmp_path / "log").read_text()[-3000:]
    assert len(metrics(output)) == step
    assert not (output / "model").exists()
    found = trajectory(root, output, **values, output__resume="auto")
    assert distance(found, whole) < EXACT
    assert metrics(output, "eval")[-1]["loss"] == pytest.approx(
        metrics(tmp_path / "whole", "eval")[-1]["loss"], abs=EXACT
    )
    assert [row["step"] for row in metrics(output, "eval")] == [2, 4, 6, 8, 10]


@pytest.mark.timeout(900)
def test_killed_at_any_moment_of_a_save(root: Path, tmp_path: Path, drawn: random.Random) -> None:
    """A run that saves after every step is killed again and again, most times while it saves, and always goes on."""
    steps = 12 * LIVES
    values = {"train__max_steps": steps, "train__epochs": 100.0, "output__resume": "auto"}
    output, log = tmp_path / "run", tmp_path / "log"
    during = 0
    for _ in range(LIVES):
        before = _newest(output)
        child = processes.start(trajectories.trajectory, root, output, log=log, **{**values, "output__save_every": 1})
        processes.until(lambda before=before: _newest(output) > before, child)
        time.sleep(drawn.uniform(0, 0.4))
        child[0].kill()
        assert processes.wait(child) == [-signal.SIGKILL]
        during += bool(list((output / "resume").glob(".step-*")))
        assert _newest(output) > before
    found = trajectory(root, output, **values)
    assert not list((output / "resume").glob(".step-*")), "what was left half-written is removed"
    assert distance(found, trajectory(root, tmp_path / "whole", **values)) < EXACT
    assert during or LIVES < 20, "no kill came during a save"


def _newest(output: Path) -> int:
    """Step of the newest complete checkpoint."""
    found = resume.complete(output / "resume")
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_says_how_to_go_on(
    root: Path, tmp_path: Path, whole: Trajectory, number: int, code: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    values = {"output__eval_every": 2}
    child = processes.start(signalled, str(root), str(output), values, number, log=log)
    assert processes.wait(child) == [code], log.read_text()[-3000:]
    done = len(metrics(output))
    assert 2 <= done < trajectories.STEPS
    said = log.read_text()
    assert f"step {done}: checkpoint saved in {output / 'resume' / f'step-{done:08d}'}" in said
    assert f"stopped after step {done}; go on with the same command and --resume" in said
    assert "Traceback" not in said
    found = trajectory(root, output, **values, output__resume="auto")
    assert distance(found, whole) < EXACT


@pytest.mark.parametrize("every", [3, 1000])
def test_asked_to_stop_while_it_evaluates_a_run_saves_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Trajectory, every: int
) -> None:
    """Also in the evaluation after the last step (1000), when there is no model yet."""
    output, rewards = tmp_path / "run", SEAMS.pair_rewards

    def signalled(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return rewards(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(SEAMS, "pair_rewards", signalled)
        outcome = trajectories.train(root, output, output__eval_every=every)
    step = min(every, trajectories.STEPS)
    assert (outcome.directory, outcome.progress.step, outcome.exit_code) == (None, step, 143)
    assert [path.name for path in resume.complete(output / "resume")] == [f"step-{step:08d}"]
    assert metrics(output, "eval") == []
    assert distance(trajectory(root, output, output__eval_every=every, output__resume="auto"), whole) < EXACT
    expected = [*range(every, trajectories.STEPS, every), trajectories.STEPS]
    assert [row["step"] for row in metrics(output, "eval")] == expected, "what was broken off is done again"


def test_an_evaluation_that_runs_out_of_memory_is_done_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Trajectory
) -> None:
    """In smaller rows, and before the next step."""
    budgets, rewards = [], SEAMS.pair_rewards

    def first_without_room(*arguments: Any, **keywords: Any) -> Any:
        budgets.append(keywords["tokens_per_batch"])
        if len(budgets) == 2:
            raise torch.OutOfMemoryError("no room")
        return rewards(*arguments, **keywords)

    monkeypatch.setattr(SEAMS, "pair_rewards", first_without_room)
    values = {"output__eval_every": 2, "train__auto_budget": True, "train__tokens_per_batch": 5000}
    assert distance(trajectory(root, tmp_path, **values), whole) < 1e-5
    assert budgets == [5000, 5000, 2500, 2500, 2500, 2500]
    assert [row["step"] for row in metrics(tmp_path, "eval")] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGTERM, Stopped, 143), (signal.SIGINT, KeyboardInterrupt, None)]
)
def test_before_the_first_step_a_signal_stops_at_once(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[BaseException],
    code: int | None,
) -> None:
    """There is nothing to save yet, and loading a large model takes minutes."""
    build = run_module.build_model

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return build(*arguments)

    monkeypatch.setattr(run_module, "build_model", signalled)
    with pytest.raises(error) as caught:
        trajectories.train(root, tmp_path / "run")
    assert getattr(caught.value, "code", None) == code
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def signalled(root: str, output: str, values: dict[str, Any], number: int) -> None:
    """`btrm train` in a child that gets a signal in its third step."""
    with pytest.MonkeyPatch.context() as patch:
        _signal_after(patch, 2, number)
        processes.command("train", *trajectories.flags(Path(root), Path(output), **values))


def test_going_on_from_a_signal(root: Path, stopped: Path, whole: Trajectory) -> None:
    """Also the evaluation of the step that the run was stopped after is done, before the next step."""
    assert [row["step"] for row in metrics(stopped, "eval")] == [2, 4]
    assert distance(trajectory(root, stopped, **SAVING, output__resume="auto"), whole) < EXACT
    found, expected = (metrics(output, "eval") for output in (stopped, whole.directory.parent))
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [2, 4, 6, 8, 10]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=EXACT)


def test_an_evaluation_that_is_owed_may_end_a_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the evaluation that would have ended it early, a run ends where it would have."""
    values = {"train__early_stopping": 1, "output__best_by": "accuracy", "output__eval_every": 1}
    ended = trajectories.train(root, tmp_path / "whole", **values)
    assert 1 < ended.progress.step < trajectories.STEPS
    _signal_after(monkeypatch, ended.progress.step, signal.SIGTERM)
    assert trajectories.train(root, tmp_path / "run", **values).exit_code == 143
    monkeypatch.undo()
    found = trajectories.train(root, tmp_path / "run", **values, output__resume="auto")
    assert (found.progress.step, found.progress.stopped) == (ended.progress.step, ended.progress.stopped)
    assert found.progress.best_step == ended.progress.best_step


def test_a_budget_may_change(root: Path, stopped: Path, whole: Trajectory) -> None:
    found = trajectory(root, stopped, **SAVING, output__resume="auto", train__tokens_per_batch=5000)
    assert distance(found, whole) < 1e-5


def test_changes_are_refused_and_named(root: Path, stopped: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    rows = (root / "train.jsonl").read_text().splitlines()
    more.write_text("\n".join(rows[:-1]) + "\n")
    where = re.escape(str(stopped / "resume" / "step-00000006"))
    for values, message in (
        (
            {"train__learning_rate": 1e-3},
            r"train\.learning_rate: 0\.003 -> 0\.001; use the settings and data of before",
        ),
        (
            {"data__train": (str(more),)},
            r"training pairs: \w+… -> \w+…; use the settings and data of before",
        ),
        ({"distributed__deepspeed": "zero2"}, "ZeRO stage: 1 -> 2; the optimiser's state cannot be taken over"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot resume from {where}: {message}"):
            trajectories.train(root, stopped, **{**SAVING, "output__resume": "auto", **values})
    forced = {"output__resume": "auto", "output__force_resume": True}
    outcome = trajectories.train(root, stopped, **SAVING, **forced, train__learning_rate=1e-3)
    assert outcome.progress.step == trajectories.STEPS
    assert metrics(stopped)[-1]["learning_rate"] < 1e-3


def _rewritten(data: Path) -> None:
    data.write_text("\n".join(reversed(data.read_text().splitlines()[1:])) + "\n")


def _truncated(data: Path) -> None:
    os.truncate(data, data.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            _rewritten,
            CheckpointError,
            r"cannot resume from .*: training pairs: \w+… -> \w+…; use the settings and data of before",
        ),
        (
            _truncated,
            CheckpointError,
            r"cannot resume from .*: training pairs: \w+… -> \w+…; use the settings and data of before",
        ),
        (Path.unlink, DataError, r"train\.jsonl"),
    ],
)
def test_data_that_changes_under_a_run_is_noticed_by_the_next(
    root: Path, tmp_path: Path, whole: Trajectory, change: Callable[[Path], None], error: type, message: str
) -> None:
    """The run itself goes on with what it has read; another one refuses to go on from its checkpoints."""
    data = tmp_path / "train.jsonl"
    data.write_text((root / "train.jsonl").read_text())
    values = {**SAVING, "data__train": (str(data),)}
    with pytest.MonkeyPatch.context() as patch:
        _after_step(patch, 3, lambda: change(data))
        assert distance(trajectory(root, tmp_path / "run", **values), whole) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(error, match=message):
        trajectories.train(root, tmp_path / "run", **values, output__resume="auto")


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set_in_a_run(
    root: Path, tmp_path: Path, whole: Trajectory, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Only what is logged follows the clock: no step, no save and no limit of time does."""
    real, offset = time.time, [0.0]
    clock = lambda: real() + offset[0]  # noqa: E731
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(tqdm.std, "time", clock)  # it has its own name for it
    _after_step(monkeypatch, 4, lambda: offset.__setitem__(0, jump))
    found = trajectory(root, tmp_path, **SAVING, train__max_hours=0.5)
    assert distance(found, whole) == 0
    assert [path.name[-1] for path in resume.complete(tmp_path / "resume")] == ["6", "9"]
    rows = metrics(tmp_path)
    assert rows[4]["time"] - rows[3]["time"] == pytest.approx(jump, abs=60)
    assert all(0 < row["seconds"] < 60 for row in rows)


def _published(staging: Path, target: Path, text: str) -> None:
    """Write a small directory and put it in its place."""
    staging.mkdir()
    (staging / "btrm.json").write_text(text)
    files.publish(staging, target)


def _seen_missing(target: Path, enough: Callable[[int, int], bool]) -> int:
    """Replace a directory again and again until `enough(times, times it was seen missing)`; return the latter."""
    _published(target.with_name("first"), target, "whole")
    over, missing = threading.Event(), [0]

    def watch() -> None:
        while not over.is_set():
            missing[0] += not target.exists()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        times = 0
        while not enough(times, missing[0]):
            _published(target.with_name("next"), target, str(times))
            assert (target / "btrm.json").read_text() == str(times)
            times += 1
    finally:
        over.set()
        watcher.join()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return missing[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two directories in one step")
def test_a_model_that_is_replaced_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _seen_missing(tmp_path / "model", lambda times, _: times == 300) == 0
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(files, "exchange", lambda *_: False)  # as on a file system that cannot
    end = time.monotonic() + 30
    assert _seen_missing(tmp_path / "model", lambda _, missing: missing > 0 or time.monotonic() > end) > 0


def test_what_cannot_be_exchanged_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert not files.exchange(tmp_path / "there", tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def _wandb_rows(directory: Path) -> tuple[str, list[int]]:
    """Id of an offline run and the steps it logged, from the records on disk (in the format of LevelDB's log)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("*.wandb")
    content, at, data = file.read_bytes(), 7, b""
    run_id, steps = "", []
    while at + 7 <= len(content):
        if at % 32768 > 32768 - 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # neither a whole record nor the last part of one
            continue
        record = Record.FromString(data)
        run_id, data = record.run.run_id or run_id, b""
        steps += [record.history.step.num] if record.HasField("history") else []
    return run_id, steps


def test_a_wandb_run_goes_on(root: Path, tmp_path: Path) -> None:
    values = {"output__report_to": "wandb"}
    output, log = tmp_path / "run", tmp_path / "log"
    for more in ({}, {"output__resume": "auto"}):
        child = processes.start(tracked, str(root), str(output), {**values, **more}, log=log)
        assert processes.wait(child) == [0], log.read_text()[-3000:]
    (first_id, before), (second_id, after) = map(_wandb_rows, sorted((output / "wandb").glob("offline-run-*")))
    assert before == [1, 2, 3, 4, 5, 6]
    assert after == [7, 8, 9, 10]
    assert first_id == second_id == (output / ".run_id").read_text().strip()
    assert report._run_id(output, 6) == first_id
    assert report._run_id(output, 0) != first_id, "a run that begins anew is another one"


def tracked(root: str, output: str, values: dict[str, Any]) -> None:
    """A run with wandb, in a child, that is asked to stop in its sixth step."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DISABLE_GIT="true")
    with pytest.MonkeyPatch.context() as patch:
        _signal_after(patch, 5, signal.SIGTERM)
        trajectories.train(Path(root), Path(output), **values)


def test_a_tensorboard_run_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same directory; steps that are done again, after a checkpoint at six, are there once."""
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {**SAVING, "output__report_to": "tensorboard"}
    _after_step(monkeypatch, 8, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trajectories.train(root, tmp_path, **values)
    monkeypatch.undo()
    trajectories.train(root, tmp_path, **values, output__resume="auto")
    assert len(list((tmp_path / "btrm").glob("events.*"))) == 2
    events = EventAccumulator(str(tmp_path / "btrm")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def test_every_checkpoint_holds_the_model(root: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 too: whole weights that transformers loads, with the rewards of the live engine."""
    from transformers import AutoModelForSequenceClassification

    values = {"distributed__deepspeed": "zero3", "output__save_every": 3, "output__keep_last": 5}
    trajectories.train(root, tmp_path, **values)
    checkpoints = resume.complete(tmp_path / "resume")
    assert [path.name[-1] for path in checkpoints] == ["3", "6", "9"]
    rewards = []
    for path in [*(path / "model" for path in checkpoints), tmp_path / "model"]:
        model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for vector in json.loads((path / "btrm.json").read_text())["self_test"]:
            with torch.no_grad():
                reward = model.eval()(input_ids=torch.tensor([vector["input_ids"]])).logits.item()
            assert reward == pytest.approx(vector["reward"], abs=EXACT)
            rewards.append(round(reward, 4))
    assert len(set(rewards)) == len(rewards), "the checkpoints are of different steps"


def test_the_oldest_are_removed(root: Path, tmp_path: Path) -> None:
    trajectories.train(root, tmp_path, output__save_every=2, output__keep_last=2)
    assert [path.name[-1] for path in sorted((tmp_path / "resume").iterdir())] == ["6", "8"]


def test_damage_is_named_and_the_one_before_is_used(root: Path, stopped: Path, whole: Trajectory) -> None:
    newest = stopped / "resume" / "step-00000006"
    state = next((newest / "state").glob("*optim_states.pt"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    name = state.relative_to(newest)
    message = f"the checkpoint {newest} is damaged: the content of {name} has changed since it was written"
    advice = "--resume latest-good goes on from the newest undamaged checkpoint"
    with pytest.raises(CheckpointError, match=re.escape(f"{message}; {advice}")):
        trajectories.train(root, stopped, **SAVING, output__resume="auto")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        trajectories.train(root, stopped, **SAVING, output__resume=str(newest))
    found = trajectory(root, stopped, **SAVING, output__resume="latest-good")
    assert distance(found, whole) < EXACT


def test_every_kind_of_damage(root: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = resume.complete(stopped / "resume")
    state = next((newest / "state").glob("*optim_states.pt"))
    size, name = state.stat().st_size, state.relative_to(newest)
    os.truncate(state, size // 2)
    config = read_settings(None, trajectories.settings(root, stopped))
    with group(config), start(config) as runtime:
        assert resume.damaged(newest, runtime) == (
            f"the checkpoint {newest} is damaged: {name} has {size // 2} bytes, expected {size}"
        )
        state.unlink()
        assert resume.damaged(newest, runtime) == f"the checkpoint {newest} is damaged: {name} is missing"
        for half in ('{"progress": ', "[]", '{"files": {}}'):
            (newest / "trainer.json").write_text(half)
            told = f"the checkpoint {newest} is damaged: (trainer.json cannot be read|the content of trainer.json has)"
            assert re.match(told, str(resume.damaged(newest, runtime))), half
        assert resume.damaged(older, runtime) is None
        (older / "model" / "btrm.json").unlink()
        capsys.readouterr()
        with pytest.raises(CheckpointError, match=r"every checkpoint in .*resume is damaged; without --resume"):
            resume.find("latest-good", stopped / "resume", runtime)
        assert capsys.readouterr().err.count("looking at the one before") == 2
        for path in (stopped, stopped / "resume", Path("latest")):
            with pytest.raises(CheckpointError, match=rf"no complete checkpoint .*; did you mean {newest}\?"):
                resume.find(str(path), stopped / "resume", runtime)


def test_nothing_to_resume_begins_anew(root: Path, tmp_path: Path, whole: Trajectory) -> None:
    found = trajectory(root, tmp_path, output__resume="auto", output__eval_every=2)
    assert distance(found, whole) == 0


def test_figures_that_find_no_room_end_no_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: Trajectory
) -> None:
    """A full disk, and a tracker whose server is gone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("accelerate.Accelerator.log", gone)
    outcome = trajectories.train(root, tmp_path / "run", output__eval_every=2)
    assert outcome.directory is not None
    found = load_file(outcome.directory / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in whole.weights.items())
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl: figures are lost from now on ([Errno 28] No space left on device)") == 1
    assert said.count("--report-to none: figures are lost from now on (the server is gone); training goes on") == 1


def test_rewind_drops_what_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"split": "train", "step": step} for step in (1, 2, 3, 4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"split": "tr')
    resume.rewind(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    file.write_text(file.read_text() + '{"split": "eval", "step": 1}\n{"split": "eval", "step": 2}\n')
    resume.rewind(file, 2)
    assert len(file.read_text().splitlines()) == 4
    resume.rewind(file, 2, owes_evaluation=True)
    assert len(file.read_text().splitlines()) == 3, "it is evaluated again"
    resume.rewind(tmp_path / "none.jsonl", 2)


def test_reading_needs_every_step(tmp_path: Path, root: Path) -> None:
    """The measure itself: a doubled line of metrics would be noticed."""
    outcome = trajectories.train(root, tmp_path, train__max_steps=2)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + file.read_text())
    with pytest.raises(AssertionError):
        read(outcome, tmp_path)
