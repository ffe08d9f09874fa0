"""One trajectory where prompts have several pairs: whatever a step shares, cuts or repeats, the same is learnt.

Conversations branch at two turns, answers take part in several pairs, pairs are there twice and weigh differently. Any
layout, any token budget (trees cut over many rows), every ZeRO stage, adapters, recomputed activations, one process or
two: the same losses and rewards, in both orders of the pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import processes, trajectories
from support.trajectories import Trajectory, distance, trajectory

EXACT = 1e-5
STEPS = 5
COMMON: dict[str, Any] = {
    "train__max_steps": STEPS,
    "train__pairs_per_step": 12,
    "train__tokens_per_batch": 2000,
    "train__learning_rate": 1e-3,
}
BY_PAIR = {**COMMON, "data__group_by": "pair"}
LORA = {**COMMON, "lora__rank": 4, "train__learning_rate": 2e-2}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {**COMMON, "train__layout": "packed"},
    "padded": {**COMMON, "train__layout": "padded"},
    "trees cut into parts": {**COMMON, "train__tokens_per_batch": 150},
    "zero2": {**COMMON, "distributed__deepspeed": "zero2"},
    "zero3, checkpointing": {
        **COMMON,
        "distributed__deepspeed": "zero3",
        "model__gradient_checkpointing": True,
        "train__tokens_per_batch": 300,
    },
}
TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "as one": COMMON,
    "trees cut into parts, zero3": {
        **COMMON,
        "train__tokens_per_batch": 150,
        "distributed__deepspeed": "zero3",
    },
    "lora, zero2": {**LORA, "distributed__deepspeed": "zero2"},
    "by pair": BY_PAIR,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = trajectories.prepare(tmp_path_factory.mktemp("prompts"), rows=1)
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trajectories.branching_rows()))
    return root


@pytest.fixture(scope="module")
def two(root: Path) -> Any:
    """The runs of two processes, started first so that they are done when they are asked for."""
    group = processes.start(in_two_processes, str(root), str(root / "two"), log=root / "two.log", world=2)
    waited: list[int | None] = []

    def finished() -> Path:
        if not waited:
            waited.extend(processes.wait(group, timeout=240))
        assert waited == [0, 0], (root / "two.log").read_text()[-3000:]
        return root / "two"

    yield finished
    processes.wait(group, timeout=0)


def in_two_processes(root: str, output: str) -> None:
    """What each of two processes does."""
    Path(output).mkdir(exist_ok=True)
    trajectories.run_many(root, output, TWO_PROCESSES)


@pytest.fixture(scope="module")
def reference(root: Path, two: Any) -> Trajectory:
    found = trajectory(root, root / "reference", **COMMON)
    assert len(found.losses) == STEPS
    shared = [step["shared_percent"] for step in steps_of(root / "reference")]
    assert min(shared) > 60, "the pairs of a prompt share a step, and its tokens"
    return found


def steps_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if step["split"] == "train"]


@pytest.mark.parametrize("way", WAYS)
def test_the_way_does_not_matter(root: Path, reference: Trajectory, way: str) -> None:
    found = trajectory(root, root / way, **WAYS[way])
    assert distance(reference, found) < EXACT
    np.testing.assert_allclose(found.norms, reference.norms, rtol=1e-4)
    if "parts" in way:
        assert min(found.micro_batches) > 2 * max(reference.micro_batches)


def test_adapters(root: Path, reference: Trajectory, two: Any) -> None:
    alone = trajectory(root, root / "lora", **LORA)
    assert distance(alone, reference) > 0.01
    found = trajectory(root, root / "lora zero3", **LORA, distributed__deepspeed="zero3", train__layout="padded")
    assert distance(alone, found) < EXACT
    assert distance(alone, trajectories.stored(two(), "lora, zero2")) < EXACT


def test_the_order_is_another_one_by_pair(root: Path, reference: Trajectory, two: Any) -> None:
    by_pair = trajectory(root, root / "by pair", **BY_PAIR)
    assert distance(by_pair, reference) > 1e-3
    again = trajectory(root, root / "by pair, padded", **BY_PAIR, train__layout="padded")
    assert distance(by_pair, again) < EXACT
    assert distance(by_pair, trajectories.stored(two(), "by pair")) < EXACT
    shared = [np.mean([step["shared_percent"] for step in steps_of(root / run)]) for run in ("reference", "by pair")]
    assert shared[1] < shared[0]


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["as one", "trees cut into parts, zero3"])
def test_two_processes_are_one(reference: Trajectory, two: Any, way: str) -> None:
    assert distance(reference, trajectories.stored(two(), way)) < EXACT
