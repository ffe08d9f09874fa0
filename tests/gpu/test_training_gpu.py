"""Whole runs on a GPU: no waiting within a micro-batch, the numbers of a CPU, and several GPUs over NCCL."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes, trajectories
from support.trajectories import distance, stored, trajectory

from btrm_core import families
from btrm_core.model.toy import build_toy
from btrm_core.scoring.scorer import Scorer
from btrm_core.training import loop
from btrm_core.training.processes import runtime

pytestmark = pytest.mark.gpu

SHORT: dict[str, Any] = {"train__max_steps": 4, "train__tokens_per_batch": 300}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("training"), layers=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_host_never_waits_within_a_micro_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """From the second step on, when everything is compiled: from rows in page-locked memory to the last gradient."""
    numbers, refused = itertools.count(), []
    step, total = loop.train_step, runtime.Runtime.sum

    def train_step(*arguments: Any, **options: Any) -> Any:
        if next(numbers) > 0:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            refused.append(True)
        try:
            return step(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def sum_(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")  # the micro-batches are done
        return total(self, tensor)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(runtime.Runtime, "sum", sum_)
    found = trajectory(root, tmp_path, **SHORT, model__gradient_checkpointing=checkpointing)
    assert len(refused) == SHORT["train__max_steps"] - 1
    assert min(found.micro_batches) > 1


def test_a_run_in_fp32_gives_the_numbers_of_separate_rows(root: Path, tmp_path: Path) -> None:
    values = {**SHORT, "model__dtype": "fp32"}
    expected = trajectory(root, tmp_path / "padded", **values, train__layout="padded")
    found = trajectory(root, tmp_path / "shared", **values)
    assert distance(found, expected) < 1e-3


def test_what_was_trained_in_bf16_is_scored_alike(root: Path, tmp_path: Path) -> None:
    found = trajectory(root, tmp_path, **SHORT)
    scorer = Scorer(str(found.directory))
    assert (scorer.device.type, scorer.dtype) == ("cuda", torch.bfloat16)
    assert scorer.self_test() < 2e-2


def test_real_memory_runs_out_and_half_the_budget_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the failed pass held is free again: the run ends with rows that fit."""
    place = trajectories.prepare(tmp_path / "wide", layers=1)
    tiny = families.load("llama3").recipe().tiny
    assert tiny is not None
    build_toy(tiny, place / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    run_steps, total = loop._run_steps, torch.cuda.get_device_properties(0).total_memory

    def limited(*arguments: Any) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
        run_steps(*arguments)

    monkeypatch.setattr(loop, "_run_steps", limited)
    values = {"train__pairs_per_step": 32, "train__tokens_per_batch": 4000, "train__max_steps": 2}
    try:
        found = trajectory(place, tmp_path / "run", **values, train__auto_budget=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with --tokens-per-batch" in capsys.readouterr().err
    assert len(found.losses) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_two_gpus_take_the_steps_of_one(root: Path, tmp_path: Path, stage: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = {**SHORT, "model__dtype": "fp32", "distributed__deepspeed": stage}
    expected = trajectory(root, tmp_path / "one", **values)
    log = tmp_path / "log"
    group = processes.start(trajectories.run_many, str(root), str(tmp_path), {"two": values}, log=log, world=2)
    assert processes.wait(group, timeout=600) == [0, 0], log.read_text()[-3000:]
    assert distance(stored(tmp_path, "two"), expected) < 1e-3
