"""Runs of several processes: every launcher, one failure that ends them all, and directories that cannot be written.

Most runs here are forks (`processes`) that find what a launcher would have put into their environment; the launchers
themselves are started too, which is slow.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import processes, trajectories
from support.trajectories import distance, flags, metrics, read, trajectory
from transformers import AutoModelForSequenceClassification

from btrm_core import errors as errors_module
from btrm_core import run
from btrm_core.cli import main
from btrm_core.errors import CheckpointError, DataError
from btrm_core.files import output_lock
from btrm_core.model import RewardModel, build_model
from btrm_core.settings import RunConfig
from btrm_core.signals import STOPPING
from btrm_core.training import loop, prepare, resume, rewards
from btrm_core.training.processes import runtime
from btrm_core.training.processes.launch import Launched
from btrm_core.training.profiling import PARTS

EXACT = 1e-5
SECONDS_TO_END = 30.0
"""How long all processes may take to end after one failed, on a busy machine."""
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("runs"))


def launched(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a launcher with all that it starts, and leave none of it running."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # launchers pass it on
        output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


class Forked:
    """As `subprocess.Popen` of `python -m btrm_core ARGUMENTS`, from a process that has imported all of it."""

    def __init__(self, command: list[str], env: dict[str, str], process_group: int) -> None:
        interpreter, option, module, *arguments = command
        assert (interpreter, option, module) == (sys.executable, "-m", "btrm_core")
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.setpgid(0, process_group)
            os.environ.clear()
            os.environ.update(env)
            processes.ending(processes.command, *arguments)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def with_forks(*arguments: str) -> None:
    """`btrm ARGUMENTS` in a child; the processes that it launches are forks of it."""
    vars(sys.modules[Launched.__module__])["subprocess"] = types.SimpleNamespace(Popen=Forked)
    processes.command(*arguments)


def forked(*command: str) -> processes.Ended:
    """As `launched`, without a new interpreter anywhere."""
    return processes.ended(with_forks, *command[3:])


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.slow)])
def test_btrm_starts_processes_itself(root: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    done = start(sys.executable, "-m", "btrm_core", "train", "--processes", "2", *flags(root, tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = trajectory(root, tmp_path / "one")
    losses = [row["loss"] for row in metrics(tmp_path / "two")]
    assert losses == pytest.approx(alone.losses, abs=EXACT)
    assert done.stdout.count("model saved in") == 1
    assert done.stdout.startswith("held-out accuracy"), "results only"
    assert done.stderr.count("ln 2 = 0.6931") == 1, "one process speaks"
    assert "2 x CPU" in done.stderr


ACCELERATE = (
    *("accelerate", "launch", "--use_deepspeed", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
    *("--dynamo_backend=no", "--main_process_port=0", "-m", "btrm_core"),
)
DEEPSPEED = ("deepspeed", "--num_gpus=2", "--master_port={port}", "--module", "btrm_core")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, DEEPSPEED], ids=lambda command: command[0])
def test_other_launchers(root: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    port = processes.free_port()
    program, *options = (part.format(port=port) for part in launcher)
    given = flags(root, tmp_path / "run", train__max_steps=2)
    # through the interpreter: DeepSpeed's script names it in a way that fails for a path with a space
    done = launched(sys.executable, str(BIN / program), *options, "train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x CPU" in done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model" / "btrm.json").exists()


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_a_run(root: Path, tmp_path: Path) -> None:
    given = flags(root, tmp_path / "run", train__max_steps=100_000, train__epochs=1e5)
    log = tmp_path / "log"
    # a launcher that is a fork; those that it starts are not
    started = processes.start(processes.command, "train", "--processes", "2", *given, log=log)
    processes.until(lambda: len(metrics(tmp_path / "run")) >= 3, started, timeout=120)
    started[0].terminate()
    assert processes.wait(started, timeout=200) == [143], log.read_text()[-3000:]
    said = log.read_text()
    step = len(metrics(tmp_path / "run"))
    assert said.count(f"stopped after step {step}; go on with the same command and --resume") == 1, said[-3000:]
    assert (tmp_path / "run" / "resume" / f"step-{step:08d}" / "COMPLETE").exists()
    assert "Traceback" not in said


WORKER = """
import os, pathlib, signal, sys, time
stubborn = "stubborn" in sys.argv
for number in map(int, sys.argv[2].split(",")):
    signal.signal(number, lambda number, _: stubborn or sys.exit(128 + number))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
if sys.argv[3] == os.environ["RANK"]:
    exec(sys.argv[4])
while True:
    time.sleep(60)
"""


def launching(place: Path, rank: str = "", end: str = "", *more: str) -> None:
    """A launcher of two processes in a child; they end by signals alone, and that of rank `rank` by `end`."""
    vars(sys.modules[Launched.__module__]).update(AT_ONCE_SECONDS=0.5, SHUTDOWN_SECONDS=0.5)
    numbers = ",".join(str(int(number)) for number in STOPPING)
    sys.exit(Launched(["-c", WORKER, str(place), numbers, rank, end, *more], 2).wait())


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_to_the_launcher_reaches_all(tmp_path: Path, number: signal.Signals) -> None:
    started = processes.start(launching, tmp_path, log=tmp_path / "log")
    processes.until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), started)
    os.kill(int(started[0].pid or 0), number)
    assert processes.wait(started, timeout=60) == [128 + number], (tmp_path / "log").read_text()


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
@pytest.mark.parametrize("rank", "01")
def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path: Path, rank: str, end: str, code: int) -> None:
    started = processes.start(launching, tmp_path, rank, end, log=tmp_path / "log")
    assert processes.wait(started, timeout=60) == [code], (tmp_path / "log").read_text()


def test_a_second_ctrl_c_waits_for_nobody_and_is_no_success(tmp_path: Path) -> None:
    started = processes.start(launching, tmp_path, "", "", "stubborn", log=tmp_path / "log")
    processes.until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), started)
    os.kill(int(started[0].pid or 0), signal.SIGINT)
    time.sleep(1)
    assert started[0].is_alive(), "the first is waited for"
    os.kill(int(started[0].pid or 0), signal.SIGINT)
    assert processes.wait(started, timeout=60) == [130], (tmp_path / "log").read_text()


def failing(error: str, root: str, output: str, **values: Any) -> None:
    """`btrm train` in a child; in the second process the third step fails."""
    if os.environ["RANK"] == "1":
        step = loop.train_step

        def broken(engine: Any, batches: Any, *rest: Any, **more: Any) -> Any:
            if batches.index == 2 and error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if batches.index == 2:
                raise {"user": DataError, "bug": ValueError}[error]("the pairs of this process are gone")
            return step(engine, batches, *rest, **more)

        loop.train_step = broken
    processes.command("train", *flags(Path(root), Path(output), **values))


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        ("user", r"^btrm: the pairs of this process are gone$", 2),
        ("bug", r"^btrm: this is a bug; please report it with the lines above$", 1),
        ("kill", r"^btrm: another process of this run has ended; its own message is above, .* --resume$", -9),
    ],
)
def test_one_failure_ends_all_and_is_told_once(root: Path, tmp_path: Path, error: str, message: str, code: int) -> None:
    log = tmp_path / "log"
    group = processes.start(failing, error, str(root), str(tmp_path / "run"), log=log, world=2)
    processes.until(lambda: not all(process.is_alive() for process in group), group, timeout=120)
    first = time.monotonic()
    codes = processes.wait(group, timeout=60)
    assert time.monotonic() - first < SECONDS_TO_END
    said = log.read_text()
    assert codes[1] == code, said[-3000:]
    assert codes[0] in (1, 2)
    assert len(re.findall(message, said, re.MULTILINE)) == 1, said[-3000:]
    assert len(re.findall("^btrm: ", said, re.MULTILINE)) == 1, said[-3000:]
    assert said.count("Traceback") == (1 if error == "bug" else 0), said[-3000:]


def stopped_early(root: str, output: str) -> None:
    """`btrm train` in a child; the first process is asked to stop while it prepares data, the second waits for it."""

    def told_to_stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    prepare._load_data = told_to_stop  # type: ignore[assignment]
    processes.command("train", *flags(Path(root), Path(output)))


def test_a_signal_while_data_is_prepared_ends_all_at_once(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    group = processes.start(stopped_early, str(root), str(tmp_path / "run"), log=log, world=2)
    assert processes.wait(group, timeout=200)[0] == 143, log.read_text()[-3000:]
    assert group[1].exitcode in (143, 2), "told by the other, or by the connection that is gone"
    assert re.findall("^btrm: .*", log.read_text(), re.MULTILINE) == ["btrm: stopped by SIGTERM"]


def agent(ready: Path) -> None:
    """As torchrun: it starts a process that joins a run, and waits for it."""
    if (child := os.fork()) == 0:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        with runtime.group(RunConfig()):
            ready.write_text(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_agent_leaves_no_process_training(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    started = processes.start(agent, ready, log=tmp_path / "log")
    processes.until(lambda: ready.exists() and bool(ready.read_text()), started)
    started[0].kill()
    processes.wait(started)
    state = Path(f"/proc/{ready.read_text()}/stat")
    end = time.monotonic() + SECONDS_TO_END
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["default", "yarn", "longrope"])
def test_zero3_trains_with_the_frequencies_that_every_reader_computes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, whatever type DeepSpeed gives to tensors that are made while weights are spread over processes."""
    scaled: dict[str, dict[str, Any]] = {
        "default": {},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
        "longrope": {
            "short_factor": [1.1, 1.3, 1.7, 2.3],
            "long_factor": [3.3, 4.7, 5.9, 7.1],
            "original_max_position_embeddings": 256,
        },
    }
    file = trajectories.prepare(tmp_path) / "base" / "config.json"
    rotary = {"rope_type": kind, "rope_theta": 500_000.0, **scaled[kind]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rotary}))
    trained: list[RewardModel] = []

    def kept(*given: Any) -> Any:
        made = build_model(*given)
        trained.append(made[0])
        return made

    monkeypatch.setattr(run, "build_model", kept)
    few = {**_of("zero3", 300), "train__max_steps": 1}
    trajectories.train(tmp_path, tmp_path / "run", **few, model__dtype="bf16")
    reader = AutoModelForSequenceClassification.from_pretrained(file.parent, dtype=torch.bfloat16)
    found, expected = trained[0].base_model.model.rotary_emb.inv_freq, reader.model.rotary_emb.inv_freq
    assert expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_killed_group_goes_on(root: Path, tmp_path: Path) -> None:
    """Kill -9 of one of two processes under ZeRO-3; then again two processes, and another time one alone."""
    values = {"distributed__deepspeed": "zero3"}
    log = tmp_path / "log"
    run, every = tmp_path / "run", {"output__save_every": 2}
    group = processes.start(failing, "kill", str(root), str(run), log=log, world=2, **values, **every)
    whole = trajectory(root, tmp_path / "whole", **values)
    assert processes.wait(group)[1] == -signal.SIGKILL, log.read_text()[-3000:]
    assert [path.name for path in resume.complete(run / "resume")] == ["step-00000002"]
    shutil.copytree(run, tmp_path / "alone")
    runs = {"run": {**values, "output__resume": "auto"}}
    group = processes.start(trajectories.run_many, str(root), str(tmp_path), runs, log=log, world=2)
    alone = trajectory(root, tmp_path / "alone", **values, output__resume="auto")
    assert processes.wait(group) == [0, 0], log.read_text()[-3000:]
    assert distance(trajectories.stored(tmp_path, "run"), whole) < EXACT
    assert distance(alone, whole) < EXACT


def test_two_runs_do_not_share_a_directory(root: Path, tmp_path: Path) -> None:
    with (
        output_lock(tmp_path, is_main=True),
        pytest.raises(CheckpointError, match=rf"another run \(process {os.getpid()}\) is writing to .*choose another"),
    ):
        trajectories.train(root, tmp_path)
    trajectories.train(root, tmp_path, train__max_steps=1)


def test_an_output_directory_that_cannot_be_written(root: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write to the output directory /proc/btrm: "):
        trajectories.train(root, Path("/proc/btrm"))


def on_a_small_disk(size: int, *arguments: str) -> None:
    """`btrm` in a child that cannot write files larger than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    processes.command(*arguments)


@pytest.mark.parametrize("saving", ["checkpoint", "model"])
def test_a_full_disk_leaves_nothing_half_written(root: Path, tmp_path: Path, saving: str) -> None:
    trajectories.train(root, tmp_path / "first", train__max_steps=1)  # what is cached and lasts is there
    output, log = tmp_path / "run", tmp_path / "log"
    values = {"output__save_every": 2} if saving == "checkpoint" else {}
    child = processes.start(on_a_small_disk, 150_000, "train", *flags(root, output, **values), log=log)
    said_code = processes.wait(child)
    said = log.read_text()
    assert said_code == [2], said[-3000:]
    place = output / "resume" / "step-00000002" if saving == "checkpoint" else output / "model"
    message = (
        rf"^btrm: the disk is full while saving {re.escape(str(place))}; nothing was left behind\. Free some space$"
    )
    assert re.search(message, said, re.MULTILINE), said[-3000:]
    assert "Traceback" not in said
    left = [p.name for p in output.rglob("*") if p.name not in (".lock", "metrics.jsonl", "resume")]
    assert left == []


def test_a_run_goes_on_while_there_is_no_room_for_a_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before stays, it is tried again at the next one, and the model is that of an undisturbed run."""
    free = iter([2**40, 1000, 2**40])  # asked before the first step, and for every checkpoint but the first
    monkeypatch.setattr("btrm_core.files.free_bytes", lambda directory: next(free))
    output = tmp_path / "run"
    found = trajectory(root, output, output__save_every=1, train__max_steps=4)
    said = capsys.readouterr().err
    assert re.search(
        rf"^step 2: no checkpoint, the disk of {re.escape(str(output / 'resume'))} has 0\.00 GB free and one takes "
        r"0\.00 GB; training goes on .*: until then step-00000001 is the last$",
        said,
        re.MULTILINE,
    ), said
    assert re.findall(r"^step (\d): checkpoint saved", said, re.MULTILINE) == ["1", "3"]
    assert next(free, None) is None
    monkeypatch.undo()
    assert distance(found, trajectory(root, tmp_path / "whole", train__max_steps=4)) == 0


def test_out_of_memory_goes_on_with_a_smaller_budget(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the run had had the small budget from the start, whatever the step had gathered before."""
    small = {stage: trajectory(root, tmp_path / f"{stage} small", **_of(stage, 250)) for stage in ("zero1", "zero3")}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(_refuse_long_rows)
    try:
        for stage, expected in small.items():
            output = tmp_path / stage
            found = read(trajectories.train(root, output, **_of(stage, 1000), train__auto_budget=True), output)
            assert found.micro_batches == expected.micro_batches
            assert distance(found, expected) < 1e-6
        with pytest.raises(
            errors_module.TrainingError, match=r"out of memory \(no room\); try --tokens-per-batch 500; --auto"
        ):
            trajectories.train(root, tmp_path / "told", **_of("zero1", 1000))
    finally:
        hook.remove()


def _of(stage: str, budget: int) -> dict[str, Any]:
    few = {"train__max_steps": 4, "data__max_length": 96}
    return {"distributed__deepspeed": stage, "train__tokens_per_batch": budget, **few}


def _refuse_long_rows(module: torch.nn.Module, arguments: Any) -> None:
    if type(module).__name__ == "LlamaDecoderLayer" and module.training and arguments[0].shape[1] > 260:
        raise torch.OutOfMemoryError("no room")


def test_profile_says_where_the_time_goes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectories.train(root, tmp_path / "run", output__profile=True)
    said = capsys.readouterr().err
    assert "mean of 3 after 2 of warm-up" in said
    for part in PARTS:
        assert re.search(rf"^  {part} +\d+\.\d ms +\d+\.\d%$", said, re.MULTILINE), said
    assert (tmp_path / "run" / "profile.json.gz").stat().st_size > 1000
    trajectories.train(root, tmp_path / "short", output__profile=True, train__max_steps=2)
    assert "--profile: the run ended before step 3, so nothing was measured" in capsys.readouterr().err


def test_evaluation_needs_no_equal_shares(root: Path, tmp_path: Path) -> None:
    """Three held-out pairs over two processes: every process makes as many passes, and all rewards arrive."""
    assert rewards.CHUNK > 3
    group = processes.start(
        trajectories.run_many,
        str(root),
        str(tmp_path),
        {"two": {"output__eval_every": 5}},
        log=tmp_path / "log",
        world=2,
    )
    alone = trajectory(root, tmp_path / "alone", output__eval_every=5)
    assert processes.wait(group) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    two = [row["loss"] for row in metrics(tmp_path / "two", "eval")]
    assert two == pytest.approx([row["loss"] for row in metrics(tmp_path / "alone", "eval")], abs=EXACT)
    assert distance(trajectories.stored(tmp_path, "two"), alone) < EXACT


def test_one_process_trains_twice(root: Path, tmp_path: Path) -> None:
    """As in a notebook: the first run leaves nothing behind that the second stumbles over."""
    for name in ("one", "two"):
        done = CliRunner().invoke(main, ["train", *flags(root, tmp_path / name, train__max_steps=1)])
        assert done.exit_code == 0, done.output
    assert metrics(tmp_path / "one")[0]["loss"] == metrics(tmp_path / "two")[0]["loss"]
