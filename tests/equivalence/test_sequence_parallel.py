"""One trajectory with the tokens of each row over several processes, as with one process.

Rows are of trees (prompts with several pairs, conversations that branch) and of whatever length they come out at. ZeRO
1, 2 and 3, recomputed activations, adapters, one key head that every process needs a copy of, two rows at once in four
processes, evaluations in between: the same losses, rewards and weights. A run goes on from the checkpoint of one whose
rows were shared by another number of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import processes, trajectories
from support.tiny_models import awkward_groups, tiny_model
from support.trajectories import Trajectory, distance, metrics, stored, trajectory

from btrm_core import families, run
from btrm_core.cli.train import train
from btrm_core.config import read_settings
from btrm_core.errors import ConfigError
from btrm_core.model import read_manifest
from btrm_core.model.parallel.check import divide_rows
from btrm_core.model.parallel.share import RowShare
from btrm_core.model.reward import RewardModel
from btrm_core.model.toy import build_toy

EXACT = 1e-5
STEPS, SAVED = 4, 2
BY_TWO = {"distributed__sequence_parallel": 2}
COMMON: dict[str, Any] = {
    "train__max_steps": STEPS,
    "train__pairs_per_step": 12,
    "train__tokens_per_batch": 700,
    "train__learning_rate": 1e-3,
}
WATCHED = {**COMMON, "output__eval_every": 1, "output__save_every": SAVED, "output__keep_last": STEPS}
ZERO3 = {"distributed__deepspeed": "zero3", "model__gradient_checkpointing": True, "train__tokens_per_batch": 150}
# at four times this rate the run is so unstable that the order of a sum shows in its fourth step
LORA = {"lora__rank": 4, "train__learning_rate": 5e-3, "distributed__deepspeed": "zero2"}
ONE_KEY_HEAD = "one key head, adapters"
TWO: dict[str, dict[str, Any]] = {
    "zero1": {**WATCHED, **BY_TWO},
    "zero3, checkpointing": {**WATCHED, **BY_TWO, **ZERO3},
    "a pair a row": {**COMMON, **BY_TWO, "train__tokens_per_batch": 1, "model__activation_offload": True},
    ONE_KEY_HEAD: {**COMMON, **BY_TWO, **LORA},
    "gone on": {**WATCHED, **BY_TWO, "output__resume": "auto"},
}
FOUR: dict[str, dict[str, Any]] = {"two rows at once": {**COMMON, **BY_TWO, "train__tokens_per_batch": 40}}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = trajectories.prepare(tmp_path_factory.mktemp("sequences"), rows=1, layers=2)
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trajectories.branching_rows()))
    tiny = families.load("llama3").recipe().tiny
    (root / ONE_KEY_HEAD).mkdir()
    build_toy(tiny, root / ONE_KEY_HEAD, **trajectories.SHAPE, num_hidden_layers=2, num_key_value_heads=1)
    return root


@pytest.fixture(scope="module")
def reference(root: Path) -> Trajectory:
    """The run of one process, with its checkpoints."""
    found = trajectory(root, root / "alone", **WATCHED)
    assert len(set(found.losses)) == STEPS
    return found


def done(root: Path, name: str, runs: dict[str, dict[str, Any]], world: int) -> Path:
    """Do the runs in a group of processes; where they have left everything."""
    output, log = root / name, root / f"{name}.log"
    output.mkdir(exist_ok=True)
    group = processes.start(trajectories.run_many, str(root), str(output), runs, log=log, world=world)
    assert processes.wait(group, timeout=240) == [0] * world, log.read_text()[-3000:]
    return output


@pytest.fixture(scope="module")
def two(root: Path, reference: Trajectory) -> Path:
    """What two processes have done that share every row; the last run goes on from a checkpoint of one process."""
    unfinished(root / "alone", root / "two" / "gone on")
    own_base = {**TWO[ONE_KEY_HEAD], "model__name": str(root / ONE_KEY_HEAD)}
    return done(root, "two", {**TWO, ONE_KEY_HEAD: own_base}, 2)


def unfinished(whole: Path, output: Path) -> Path:
    """A copy of a run as it was after its first checkpoint."""
    output.mkdir(parents=True)
    shutil.copytree(whole / "resume" / f"step-{SAVED:08d}", output / "resume" / f"step-{SAVED:08d}")
    shutil.copy(whole / "metrics.jsonl", output)
    return output


def same(found: Trajectory, alone: Trajectory) -> None:
    """Losses, norms, rewards at the end, weights."""
    assert distance(found, alone) < EXACT
    assert found.norms == pytest.approx(alone.norms, rel=1e-4)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=EXACT, rtol=0)


@pytest.mark.parametrize("way", ["zero1", "zero3, checkpointing", "a pair a row"])
def test_two_that_share_rows_are_one(two: Path, reference: Trajectory, way: str) -> None:
    found = stored(two, way)
    same(found, reference)
    if way == "a pair a row":
        assert min(found.micro_batches) > 4 * max(reference.micro_batches)


def test_adapters_and_a_key_head_that_every_process_needs(root: Path, two: Path, reference: Trajectory) -> None:
    values = {**COMMON, **LORA, "model__name": str(root / ONE_KEY_HEAD)}
    alone = trajectory(root, root / "one key head alone", **values)
    assert distance(alone, reference) > 100 * EXACT
    same(stored(two, ONE_KEY_HEAD), alone)


def test_two_rows_at_once(root: Path, reference: Trajectory) -> None:
    found = stored(done(root, "four", FOUR, 4), "two rows at once")
    same(found, reference)
    assert min(found.micro_batches) > 1


def test_evaluations_are_those_of_one(root: Path, two: Path, reference: Trajectory) -> None:
    alone = metrics(root / "alone", "eval")
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    for way in ("zero1", "zero3, checkpointing"):
        for line, expected in zip(metrics(two / way, "eval"), alone, strict=True):
            for figure in ("loss", "accuracy", "reward_margin", "pairs"):
                assert line[figure] == pytest.approx(expected[figure], abs=EXACT)
        vectors, expected_vectors = (read_manifest(run / "model")["self_test"] for run in (two / way, root / "alone"))
        for vector, expected in zip(vectors, expected_vectors, strict=True):
            assert vector["input_ids"] == expected["input_ids"]
            assert vector["reward"] == pytest.approx(expected["reward"], abs=EXACT)


def test_tokens_are_counted_once(root: Path, two: Path, reference: Trajectory) -> None:
    for line, expected in zip(metrics(two / "zero1"), metrics(root / "alone"), strict=True):
        assert line["pairs"] == expected["pairs"] == COMMON["train__pairs_per_step"]
        useful = [row["useful_tokens_per_second"] / row["pairs_per_second"] for row in (line, expected)]
        assert useful[0] == pytest.approx(useful[1])


def test_going_on_with_shared_rows(two: Path, reference: Trajectory) -> None:
    same(stored(two, "gone on"), reference)


@pytest.mark.parametrize("way", ["zero1", "zero3, checkpointing"])
def test_going_on_alone(root: Path, two: Path, reference: Trajectory, way: str) -> None:
    output = unfinished(two / way, root / f"{way}, alone")
    values = {key: value for key, value in TWO[way].items() if key not in BY_TWO}
    same(trajectory(root, output, **values, output__resume="auto"), reference)


def test_processes_must_divide(root: Path, tmp_path: Path) -> None:
    config = read_settings(None, trajectories.settings(root, tmp_path / "run", **BY_TWO))
    told = (
        "--sequence-parallel 2 with 1 process: expected a number of processes that it divides; give --gpus N (on a CPU "
        "--processes N, to another launcher its own flag) with N = 2 or a multiple"
    )
    for attempt in (run.train, run.dry_run):
        with pytest.raises(ConfigError) as caught:
            attempt(config)
        assert str(caught.value) == told
    with pytest.raises(ConfigError, match="--sequence-parallel 2 with 3 processes: "):
        CliRunner().invoke(train, ["--processes", "3", "--sequence-parallel", "2"], catch_exceptions=False)
    assert "steps: 4" in run.dry_run(read_settings(None, trajectories.settings(root, tmp_path, **TWO["zero1"])), 2)


def test_heads_must_divide(root: Path, tmp_path: Path) -> None:
    values = trajectories.settings(root, tmp_path / "run", distributed__sequence_parallel=3)
    with pytest.raises(ConfigError) as caught:
        run.dry_run(read_settings(None, values), processes=3)
    assert str(caught.value) == (
        "--sequence-parallel 3: the model has 4 attention heads, which 3 processes cannot share equally; expected one "
        "of 1, 2, 4"
    )


def test_padded_lines_cannot_be_shared(root: Path, tmp_path: Path) -> None:
    values = trajectories.settings(root, tmp_path / "run", **BY_TWO, train__layout="padded")
    with pytest.raises(ConfigError, match=r"^--sequence-parallel 2 with train.layout=padded: only packed rows can be"):
        run.dry_run(read_settings(None, values), processes=2)
    model = RewardModel(tiny_model("llama3"))  # one that was found not to be exact in packed rows
    with pytest.raises(ConfigError, match=r"^--sequence-parallel 2 needs packed rows, and this model cannot be"):
        divide_rows(model, RowShare(0, 2, None), awkward_groups())
