"""Going on with another number of processes, or under another ZeRO stage with a fresh optimiser.

Runs of two processes are made once, all in one group, and gone on with by one process; and the other way round. What
is loaded is compared bit for bit with what was saved: every fp32 weight and every moment of Adam, by name. The losses
that follow are those of the run that went on by itself, which cannot be seen in bf16, where other rows round otherwise.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from support import processes, trajectories
from support.trajectories import distance, metrics, stored

from btrm_core.errors import CheckpointError
from btrm_core.model.base import gathered
from btrm_core.settings import OutputConfig
from btrm_core.training import reshard, resume
from btrm_core.training.identity import refuse_changes
from btrm_core.training.processes import join

EXACT = 1e-5
SAVED, LAST = 2, 4
LORA = {"lora__rank": 4, "train__learning_rate": 2e-2}
BF16 = {"model__dtype": "bf16"}
ZERO2, ZERO3 = ({"distributed__deepspeed": f"zero{stage}"} for stage in (2, 3))
MODES: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2": ZERO2,
    "zero3": ZERO3,
    "zero1 bf16": BF16,  # an optimiser of another class
    "zero3 lora": {**LORA, **ZERO3},
}
UP = {name: values for name, values in MODES.items() if name != "zero2"}  # as zero1, with the same optimiser
MORE: dict[str, dict[str, Any]] = {
    "zero2": ZERO2,
    "zero2 bf16": {**BF16, **ZERO2},
    "zero3 bf16": {**BF16, **ZERO3},
    "zero1 lora": LORA,
    "zero2 bf16 lora": {**BF16, **LORA, **ZERO2},
    "zero3 offload": {"distributed__deepspeed": "zero3-offload"},
    "zero2 offload": {"distributed__deepspeed": "zero2-offload"},
}
# a weight decay that would be seen if it were applied to the wrong parameters
COMMON = {"output__save_every": SAVED, "train__max_steps": LAST, "train__weight_decay": 0.5, "output__keep_last": 1}
ON = {"output__resume": "auto"}
SECONDS = 3.0
MOMENTS = ("exp_avg", "exp_avg_sq")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def noting(root: str, output: str, runs: dict[str, dict[str, Any]]) -> None:
    """Runs in this process group that leave what they saved and loaded: `NAME saved.pt` and `NAME loaded.pt`."""
    with pytest.MonkeyPatch.context() as patch:
        save, load = resume.save, resume.load

        def saving(session: Any, *rest: Any) -> Path:
            note(session.engine, session.job.output.with_name(f"{session.job.output.name} saved.pt"))
            return save(session, *rest)

        def loading(session: Any, path: Path) -> Any:
            progress = load(session, path)
            note(session.engine, session.job.output.with_name(f"{session.job.output.name} loaded.pt"))
            return progress

        patch.setattr(resume, "save", saving)
        patch.setattr(resume, "load", loading)
        trajectories.run_many(root, output, runs)


def note(engine: Any, file: Path) -> None:
    """Write everything that the next step depends on, whole, by name."""
    found: dict[str, Any] = {}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # by itself DeepSpeed does this before the second group of parameters has made its first step
        engine.optimizer._hp_optimizer_states_linked = False
        link()
    for name, parameter in engine.module.named_parameters():
        with gathered(parameter):
            found[name] = parameter.detach().clone()
        if parameter.requires_grad:
            found[f"{name} master"] = safe_get_full_fp32_param(parameter).clone()
            for key in MOMENTS if any(MOMENTS[0] in state for state in engine.optimizer.state.values()) else ():
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    groups = engine.optimizer.param_groups
    found["groups"] = [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups]
    found["groups"] += [float(state.get("step", 0)) for state in engine.optimizer.state.values()]
    if torch.distributed.get_rank() == 0:
        torch.save(found, file)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("universal"))


@pytest.fixture(scope="module")
def by_one(root: Path) -> Path:
    """Whole runs of one process."""
    return whole_runs(root, root / "by one", 1, UP)


@pytest.fixture(scope="module")
def by_two(root: Path) -> Path:
    """Whole runs of two processes, one of each mode."""
    return whole_runs(root, root / "by two", 2, MODES)


def whole_runs(root: Path, output: Path, world: int, modes: dict[str, dict[str, Any]]) -> Path:
    output.mkdir()
    run_in(world, root, output, {name: {**COMMON, **values} for name, values in modes.items()})
    return output


def run_in(world: int, root: Path, output: Path, runs: dict[str, dict[str, Any]]) -> str:
    """Do the runs in a group of processes; returns what they said."""
    log = output / "log"
    group = processes.start(noting, str(root), str(output), runs, log=log, world=world)
    assert processes.wait(group, timeout=240) == [0] * world, log.read_text()[-9000:]
    return log.read_text()


def unfinished(whole: Path, name: str, output: Path) -> Path:
    """A copy of a run as it was when it had saved its checkpoint, with what a crash in a conversion leaves."""
    shutil.copytree(whole / name / "resume", output / "resume")
    shutil.copy(whole / name / "metrics.jsonl", output)
    (output / "resume" / f".step-{SAVED:08d}.universal" / "state").mkdir(parents=True)
    return output


def notes(whole: Path, name: str, output: Path, now: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved, and what was loaded."""
    return torch.load(whole / f"{name} saved.pt"), torch.load(output / f"{now} loaded.pt")


def goes_on(root: Path, whole: Path, output: Path, world: int, modes: dict[str, dict[str, Any]]) -> None:
    """Go on from copies of whole runs with another number of processes, and compare with the whole runs."""
    for name in modes:
        unfinished(whole, name, output / name)
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")}
    said = run_in(world, root, output, {name: {**COMMON, **values, **ON} for name, values in modes.items()})
    for name in modes:
        saved, loaded = notes(whole, name, output, name)
        assert saved.keys() == loaded.keys()
        assert sum(key.endswith(MOMENTS) for key in saved) >= 4
        wrong = [key for key in saved if key != "groups" and not torch.equal(saved[key], loaded[key])]
        assert not wrong, f"{name}: {wrong}"
        assert saved["groups"] == loaded["groups"], name
        assert len(metrics(output / name)) == LAST
        if "bf16" not in name:
            assert distance(stored(output, name), stored(whole, name)) < EXACT, name
        place = output / name / "resume" / f".step-{SAVED:08d}.universal"
        message = f"processes: {3 - world} -> {world}; converting the checkpoint in {place} meanwhile"
        assert said.count(message) == 1, said[-3000:]
        assert [path.name for path in place.parent.iterdir()] == [f"step-{SAVED:08d}"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("step-*/state/*.pt")} == kept
    assert "***" not in said, "DeepSpeed's tools keep quiet"


def test_two_processes_become_one(root: Path, by_two: Path, tmp_path: Path) -> None:
    goes_on(root, by_two, tmp_path / "a [b] (c)+ d", 1, MODES)


def test_one_process_becomes_two(root: Path, by_one: Path, tmp_path: Path) -> None:
    goes_on(root, by_one, tmp_path / "a [b] (c)+ d", 2, UP)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_more_modes(root: Path, tmp_path: Path, world: int) -> None:
    goes_on(root, whole_runs(root, tmp_path / "whole", 3 - world, MORE), tmp_path / "then", world, MORE)


RESTARTS: dict[str, dict[str, Any]] = {"zero1": ZERO3, "zero3": {}, "zero3 lora": LORA, "zero1 bf16": {**BF16, **ZERO3}}


def test_another_stage_with_a_fresh_optimizer(root: Path, by_one: Path, tmp_path: Path) -> None:
    """One process becomes two as well. At once the rewards are those of the checkpoint; later losses are its own."""
    restart = {**COMMON, **ON, "output__restart_optimizer": True}
    at_once = {**restart, "train__max_steps": SAVED, "output__force_resume": True}
    runs = {f"{name}, at once": {**at_once, **values} for name, values in RESTARTS.items()}
    runs |= {f"{name}, on": {**restart, **RESTARTS[name]} for name in ("zero1", "zero3")}
    for name in runs:
        unfinished(by_one, name.split(",")[0], tmp_path / name)
    said = run_in(2, root, tmp_path, runs)
    message = "--restart-optimizer: weights and position from the checkpoint, a fresh optimiser"
    assert said.count(message) == len(runs)
    for now in runs:
        name, _, how = now.partition(", ")
        saved, loaded = notes(by_one, name, tmp_path, now)
        weights = [key for key in saved if key != "groups" and not key.endswith(MOMENTS)]
        assert not [key for key in weights if not torch.equal(saved[key], loaded[key])], now
        assert not any(value.any() for key, value in loaded.items() if key.endswith(MOMENTS)), now
        before, after = stored(by_one, name), stored(tmp_path, now)
        if how == "on":
            assert after.losses[: SAVED + 1] == pytest.approx(before.losses[: SAVED + 1], abs=EXACT)
            assert abs(after.losses[-1] - before.losses[-1]) > EXACT
        elif "bf16" not in name:
            vectors = [
                json.loads((place / "model" / "btrm.json").read_text())["self_test"]
                for place in (by_one / name / "resume" / f"step-{SAVED:08d}", tmp_path / now)
            ]
            rewards = [[vector["reward"] for vector in some] for some in vectors]
            assert rewards[1] == pytest.approx(rewards[0], abs=1e-6), now
            assert len(set(rewards[0])) > 1


def test_another_stage_is_refused_without_it(root: Path, by_one: Path, tmp_path: Path) -> None:
    values = {**COMMON, **ON, **ZERO3}
    unfinished(by_one, "zero1", tmp_path)
    message = (
        f"cannot resume from {tmp_path / 'resume' / f'step-{SAVED:08d}'}: ZeRO stage: 1 -> 3; the optimiser's state "
        "cannot be taken over. Use those of before, or go on with the weights and a fresh optimiser by "
        "--restart-optimizer"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        trajectories.train(root, tmp_path, **values, output__force_resume=True)


def test_moments_of_eight_bits_are_not_cut_anew(tmp_path: Path) -> None:
    now = {"train.optimizer": "adamw-8bit", "processes": 2, "ZeRO stage": 1}
    for before, message in (
        ({**now, "processes": 1}, "processes: 1 -> 2"),
        ({**now, "train.optimizer": "adamw"}, "train.optimizer: 'adamw' -> 'adamw-8bit'"),
    ):
        with pytest.raises(CheckpointError, match=f": {message}; the optimiser's state cannot be taken over"):
            refuse_changes(tmp_path, before, now, OutputConfig(force_resume=True))
        refuse_changes(tmp_path, before, now, OutputConfig(restart_optimizer=True))


def on_a_small_disk(root: str, output: str, values: dict[str, Any]) -> None:
    """`btrm train` in a child that cannot write files larger than 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    processes.command("train", *trajectories.flags(Path(root), Path(output), **values))


def test_no_room_for_the_conversion(root: Path, by_two: Path, tmp_path: Path) -> None:
    output, log = unfinished(by_two, "zero1", tmp_path / "run"), tmp_path / "log"
    child = processes.start(on_a_small_disk, str(root), str(output), {**COMMON, **ON}, log=log)
    assert processes.wait(child) == [2], log.read_text()[-3000:]
    place = output / "resume" / f".step-{SAVED:08d}.universal"
    message = f"btrm: the disk is full while saving {place}; nothing was left behind. Free some space"
    assert log.read_text().splitlines()[-1] == message
    assert [path.name for path in place.parent.iterdir()] == [f"step-{SAVED:08d}"]


def slowly(root: str, output: str, runs: dict[str, dict[str, Any]]) -> None:
    """`noting` with a conversion that takes longer than a collective operation may."""
    convert = reshard._convert

    def slow(state: Path, place: Path) -> None:
        time.sleep(1.5 * SECONDS)
        convert(state, place)

    def loading(*arguments: Any) -> None:
        torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=SECONDS))
        load(*arguments)
        torch.distributed.distributed_c10d._set_pg_timeout(join.TIMEOUT)

    load = reshard.load_resharded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard, "_convert", slow)
        patch.setattr(reshard, "load_resharded", loading)
        noting(root, output, runs)


def test_a_long_conversion_is_waited_for(root: Path, by_one: Path, tmp_path: Path) -> None:
    unfinished(by_one, "zero1", tmp_path / "run")
    log, runs = tmp_path / "log", {"run": {**COMMON, **ON}}
    group = processes.start(slowly, str(root), str(tmp_path), runs, log=log, world=2)
    assert processes.wait(group) == [0, 0], log.read_text()[-3000:]
