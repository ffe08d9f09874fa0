"""Several machines: two torchrun agents on this one, what they need not share, and what is said when it goes wrong."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import types
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import processes, trajectories
from support.trajectories import flags, metrics, trajectory
from torch.distributed import run

from btrm_core import cache
from btrm_core.cli import main
from btrm_core.config import read_settings
from btrm_core.errors import ConfigError
from btrm_core.training.processes import agreement
from btrm_core.training.processes import runtime as runtime_module
from btrm_core.training.processes.join import Place, _own_gpu, _refuse_shared_gpus, place

EXACT = 1e-5
SECONDS_TO_END = 30.0
"""How long both nodes may take to end after one was told to, on a busy machine."""
NODES = ("--nnodes=2", "--nproc-per-node=1")
ENDLESS = {"train__max_steps": 5_000, "train__epochs": 1e4}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("nodes"))


def torchrun(cache_directory: str, options: list[str]) -> None:
    """A torchrun agent in a child; its processes are new ones."""
    os.environ["BTRM_CACHE"] = cache_directory
    run.main(options)


@contextlib.contextmanager
def nodes(tmp_path: Path, meeting: list[list[str]], arguments: list[list[str]]) -> Iterator[list[ForkServerProcess]]:
    """One torchrun agent per "machine", each with its own cache; what they print goes to `node-N`."""
    started = []
    for node, options in enumerate(meeting):
        command = [*NODES, *options, "-m", "btrm_core", "train", *arguments[node]]
        started += processes.start(torchrun, str(tmp_path / f"cache-{node}"), command, log=tmp_path / f"node-{node}")
    try:
        yield started
    finally:
        for process in started:
            process.terminate()  # the agent ends its processes
        processes.wait(started, timeout=30)


def said(tmp_path: Path, node: int) -> str:
    """What a node printed, without the log of its agent, whose words on parting depend on which one is first."""
    return re.sub(r"^[IWE]\d{4} \d\d:.*\n?", "", (tmp_path / f"node-{node}").read_text(), flags=re.MULTILINE)


def static(port: int) -> list[list[str]]:
    return [[f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"] for node in range(2)]


@pytest.mark.slow
def test_two_nodes_share_nothing_but_the_result(root: Path, tmp_path: Path) -> None:
    given = flags(root, tmp_path / "two")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{processes.free_port()}", "--rdzv-id=one"]
    with nodes(tmp_path, [meeting, meeting], [given, given]) as started:
        alone = trajectory(root, tmp_path / "one")
        assert processes.wait(started) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert [row["loss"] for row in metrics(tmp_path / "two")] == pytest.approx(alone.losses, abs=EXACT)
    assert [row["step"] for row in metrics(tmp_path / "two")] == list(range(1, trajectories.STEPS + 1))
    both = said(tmp_path, 0) + said(tmp_path, 1)
    for once in ("model saved in", "ln 2 = 0.6931", "2 x CPU"):
        assert both.count(once) == 1, both
    assert "" in (said(tmp_path, 0), said(tmp_path, 1)), "only the process of rank 0 speaks"
    assert (tmp_path / "two" / "model" / "btrm.json").exists()
    for node in range(2):
        built = list((tmp_path / f"cache-{node}" / "encoded").iterdir())
        assert built, "each node builds its own cache"
        assert [cache.damage(entry) for entry in built] == [None] * len(built)


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = flags(root, output, **ENDLESS, output__save_every=1000)
    with nodes(tmp_path, static(processes.free_port()), [given, given]) as started:
        processes.until(lambda: len(metrics(output)) >= 3, started)
        started[1].terminate()
        told = time.monotonic()
        codes = processes.wait(started)
        assert time.monotonic() - told < SECONDS_TO_END
    step = len(metrics(output))
    assert 0 not in codes, "or a scheduler takes the run for finished"
    assert said(tmp_path, 0).count(f"stopped after step {step}; go on with the same command and --resume") == 1
    more = flags(root, output, **ENDLESS, output__save_every=1000, output__resume="auto", train__max_hours=1e-6)
    log = tmp_path / "log"
    assert processes.wait(processes.start(processes.command, "train", *more, log=log, world=2)) == [0, 0]
    assert f"resuming from {output}/resume/step-{step:08d} after step {step}" in log.read_text()
    assert [row["step"] for row in metrics(output)] == list(range(1, step + 2))


@pytest.mark.slow
def test_a_node_that_fails_before_it_has_settings_ends_the_other(root: Path, tmp_path: Path) -> None:
    good = flags(root, tmp_path / "run")
    bad = flags(root, tmp_path / "run", model__name=str(tmp_path / "nowhere"))
    with nodes(tmp_path, static(processes.free_port()), [good, bad]) as started:
        assert 0 not in processes.wait(started, timeout=60)
    both = said(tmp_path, 0) + said(tmp_path, 1)
    assert len(re.findall("^btrm: ", both, re.MULTILINE)) == 1, both
    assert re.search(r"^btrm: .*nowhere", said(tmp_path, 1), re.MULTILINE), both


def differing(given: list[list[str]], packages: str = "") -> None:
    """`btrm train` in a child, with other arguments and other packages in the second process."""
    rank = int(os.environ["RANK"])
    agreement.SEEN_WITHIN_SECONDS = 0.5  # a network file system may need more
    if rank == 1 and packages:
        sys.path.insert(0, packages)
    processes.command("train", *given[rank])


def both_say(tmp_path: Path, given: list[list[str]], packages: str = "") -> str:
    """What two processes print that refuse to train together."""
    group = processes.start(differing, given, packages, log=tmp_path / "log", world=2)
    codes = processes.wait(group)
    text = (tmp_path / "log").read_text()
    assert codes == [2, 2], text
    assert "Traceback" not in text
    lines = re.findall("^btrm: .*", text, re.MULTILINE)
    assert len(lines) == 1, text
    return str(lines[0])


def test_other_versions_are_named(root: Path, tmp_path: Path) -> None:
    info = tmp_path / "packages" / "transformers-5.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.1\n")
    given = flags(root, tmp_path / "run")
    line = both_say(tmp_path, [given, given], str(info.parent))
    here = socket.gethostname()
    assert re.fullmatch(
        rf"btrm: process 1 on {here} has transformers 5\.0\.1, but process 0 on {here} has 5\.[\d.]+: "
        "all processes of a run need the same",
        line,
    ), line


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"train__seed": 5}, "has train.seed 5, but process 0 on .* has 0: all processes"),
        ({"data__train": "{root}/fewer.jsonl"}, "has data [0-9a-f]{12}, but process 0 on .* has [0-9a-f]{12}: all"),
    ],
    ids=["settings", "data"],
)
def test_other_settings_and_data_are_named(root: Path, tmp_path: Path, changed: dict[str, object], told: str) -> None:
    lines = (root / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "fewer.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    values = {key: value.format(root=root) if isinstance(value, str) else value for key, value in changed.items()}
    line = both_say(tmp_path, [flags(root, tmp_path / "run"), flags(root, tmp_path / "run", **values)])
    assert re.match(f"btrm: process 1 on .* {told}", line), line


def test_checkpoints_need_one_output_directory(root: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "a", tmp_path / "b"]
    line = both_say(tmp_path, [flags(root, output, output__save_every=5) for output in outputs])
    assert re.fullmatch(
        rf"btrm: process 1 on \S+ does not see what process 0 on \S+ writes to {outputs[0]}: every process writes its "
        r"part of a checkpoint, so --output must be a directory that all machines share \(without --save-every and "
        r"--resume it may be otherwise\)",
        line,
    ), line
    assert not metrics(outputs[0]), "known before the first step"


def test_without_checkpoints_the_output_need_not_be_shared(root: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "a", tmp_path / "b"]
    given = [flags(root, output, output__keep_best=True, output__eval_every=5) for output in outputs]
    group = processes.start(differing, given, log=tmp_path / "log", world=2)
    assert processes.wait(group) == [0, 0], (tmp_path / "log").read_text()
    assert "this run cannot save a checkpoint when it is asked to stop" in (tmp_path / "log").read_text()
    assert (outputs[0] / "model" / "btrm.json").exists()
    assert not outputs[1].exists()


def test_a_checkpoint_that_would_lack_a_part_is_not_written(root: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "a", tmp_path / "b"]
    given = [flags(root, output, **ENDLESS) for output in outputs]
    group = processes.start(differing, given, log=tmp_path / "log", world=2)
    processes.until(lambda: len(metrics(outputs[0])) >= 2, group)
    group[1].terminate()
    assert processes.wait(group) == [2, 2]
    text = (tmp_path / "log").read_text()
    place = re.escape(str(outputs[0] / "resume"))
    assert re.search(f"^btrm: process 1 on .* writes to {place}: every process writes", text, re.MULTILINE), text
    assert not list((outputs[0] / "resume").iterdir())


def first_of(output: Path, directories: list[Path]) -> None:
    """In each process of a group: leave the rank of the first that shares this one's directory."""
    config = read_settings(None, {"train.learning_rate": 1e-5, "train.weight_decay": 0.0})
    with runtime_module.group(config), runtime_module.start(config) as runtime:
        first = agreement.first_that_shares(directories[runtime.rank], runtime)
        (output / f"rank {runtime.rank}").write_text(str(first))
    runtime_module.leave()


def test_who_shares_a_directory_with_whom(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "b", tmp_path / "missing"]
    group = processes.start(first_of, tmp_path, places, log=tmp_path / "log", world=5)
    assert processes.wait(group) == [0] * 5, (tmp_path / "log").read_text()
    assert [(tmp_path / f"rank {rank}").read_text() for rank in range(5)] == list("01014")
    assert not list((tmp_path / "a").iterdir()), "nothing is left there"


def in_a_group_of_its_own(root: str, output: str) -> None:
    """A program that has made its process group with torch alone, as no launcher does, and then trains."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert "LOCAL_RANK" not in os.environ
    trajectories.train(Path(root), Path(output), train__max_steps=1)
    runtime_module.leave()


def test_a_process_group_that_is_there_is_taken(root: Path, tmp_path: Path) -> None:
    child = processes.start(in_a_group_of_its_own, str(root), str(tmp_path / "run"), log=tmp_path / "log")
    assert processes.wait(child) == [0], (tmp_path / "log").read_text()[-3000:]
    assert len(metrics(tmp_path / "run")) == 1


def joining(variables: dict[str, str], *given: str) -> None:
    """`btrm train` in a child, with a launcher's variables."""
    os.environ.update(variables)
    processes.command("train", "--family", "llama3", "--set", "distributed.join_seconds=2", *given)


def test_processes_that_do_not_find_each_other(tmp_path: Path) -> None:
    """Every error within seconds: two to wait, three until a process that is not of rank 0 speaks."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used, free, lonely, twice = taken.getsockname()[1], *(processes.free_port() for _ in range(3))
        host = socket.gethostname()
        cases = {
            "in use": ([0], used, rf"port {used} is in use on {host}: choose another MASTER_PORT for all processes"),
            "mute": ([1], used, rf"127\.0\.0\.1:{used} \(MASTER_ADDR:MASTER_PORT\) is taken by something else than"),
            "nobody": ([1], free, rf"process 1 on {host} waited 2 s for rank 0 at .*: Connection refused\. Is it"),
            "missing": ([0], lonely, r"waited 2 s for 2 processes at .*: rank 1 did not come\. Look there for why; "),
            "twice": ([0, 1, 1], twice, r"RANK=1 is given to 2 processes: every one needs its own, from 0 on"),
        }
        groups = {}
        for name, (ranks, port, _) in cases.items():
            group = []
            for rank in ranks:
                variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2 if name != "twice" else 3}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                log = tmp_path / name
                group += processes.start(joining, {k: str(v) for k, v in variables.items()}, log=log)
            groups[name] = group
        for name, (_, _, message) in cases.items():
            codes = processes.wait(groups[name], timeout=60)
            text = (tmp_path / name).read_text()
            assert set(codes) == {2}, f"{name}: {codes} {text}"
            assert re.search(f"^btrm: {message}", text, re.MULTILINE), f"{name}: {text}"
            assert "Traceback" not in text


def variables(text: str) -> dict[str, str]:
    names = {"R": "RANK", "W": "WORLD_SIZE", "L": "LOCAL_RANK", "A": "MASTER_ADDR", "P": "MASTER_PORT"}
    names["LW"] = "LOCAL_WORLD_SIZE"
    return {names[item.split("=")[0]]: item.split("=")[1] for item in text.split()}


@pytest.mark.parametrize("text", ["", "W=1", "R=0 W=1 L=0 P=29500", "R=0 W=1", "A=node P=29500"])
def test_a_process_that_no_launcher_started_is_alone(text: str) -> None:
    assert place(variables(text)) is None


def test_a_launchers_variables() -> None:
    assert place(variables("R=9 W=16 L=1 LW=8 A=node P=29500")) == Place(9, 16, 1, "node", 29500)
    assert place(variables("R=1 W=2 A=node P=29500")) == Place(1, 2, 0, "node", 29500), "one process on each machine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("R=0 W=2", "RANK=0, WORLD_SIZE=2 without MASTER_ADDR: start with torchrun (or --gpus N, --processes N), or"),
        ("W=2 P=29500", "WORLD_SIZE=2 without MASTER_ADDR: start with torchrun"),
        ("A=node R=0", "MASTER_ADDR=node without WORLD_SIZE, MASTER_PORT: start with torchrun"),
        ("A=node P=29500 R=2 W=2", "RANK=2: expected 0 to 1 (WORLD_SIZE=2); start with torchrun"),
        ("A=node P=29500 R=0 W=2 L=2 LW=2", "LOCAL_RANK=2: expected 0 to 1 (LOCAL_WORLD_SIZE=2); start with"),
        ("A=node P=29500 R=0 W=2 L=0 LW=4", "LOCAL_WORLD_SIZE=4: expected 1 to 2 (WORLD_SIZE=2); start with"),
        ("A=node P=123456 R=0 W=2", "MASTER_PORT=123456: expected 1 to 65535 (TCP); start with"),
        ("A=node P=29500 R=zero W=2", "RANK=zero: expected a whole number; start with"),
        ("W=0 R=0 A=node P=29500", "RANK=0: expected 0 to -1 (WORLD_SIZE=0)"),
    ],
)
def test_variables_that_contradict_each_other(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place(variables(text))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--processes", "0"], "--processes 0: expected 1 or more"),
        (["--processes", "-2"], "--processes -2: expected 1 or more"),
        (["--gpus", "two"], "--gpus two: expected a number or all"),
        (
            ["--gpus", "2", "--processes", "2"],
            "--gpus 2 --processes 2: expected one of them; --gpus starts one process",
        ),
    ],
)
def test_how_many_processes(arguments: list[str], line: str) -> None:
    done = CliRunner().invoke(main, ["train", "--family", "llama3", *arguments])
    assert (done.exit_code, done.stderr.startswith(f"btrm: {line}")) == (2, True), done.stderr
    assert done.stderr.count("\n") == 1


def test_processes_of_a_launcher_start_none_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables("R=0 W=2 A=node P=29500").items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["train", "--family", "llama3", "--gpus", "8"])
    assert done.exit_code == 2
    assert done.stderr == (
        "btrm: --gpus 8: a launcher has started this process already (RANK=0, WORLD_SIZE=2); leave it out, and give "
        "the launcher the number of processes\n"
    )


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["train", "--family", "llama3", "--gpus", "8", "--dry-run"])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("btrm: --gpus 8: ")


def test_a_dry_run_starts_no_processes(tmp_path: Path) -> None:
    given = ["--family", "llama3", "--processes", "8", "--dry-run", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(main, ["train", *given])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_shown_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm's --gpus-per-task=1: the fourth process of a machine sees one GPU, and that is number 0."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found, more = _own_gpu(Place(3, 8, 3, "node", 29500))
    assert (found.rank, found.local_rank, taken) == (3, 0, [0])
    assert more == {"device_id": torch.device("cuda", 0)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"LOCAL_RANK=3, but torch sees 2 GPU\(s\) on .*: start 2 process\(es\) on it"
    ):
        _own_gpu(Place(3, 8, 3, "node", 29500))


def test_two_processes_with_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    identity = types.SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: identity)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    places = [Place(rank, 2, 0, "node", 29500) for rank in range(2)]
    store.set("btrm/gpu/0/1", f"{socket.gethostname()} GPU-2")
    _refuse_shared_gpus(store, places[0])
    store.set("btrm/gpu/0/1", f"{socket.gethostname()} GPU-1")
    with pytest.raises(ConfigError, match=r"processes 0 and 1 have the same GPU on .*: start one process per GPU"):
        _refuse_shared_gpus(store, places[0])
