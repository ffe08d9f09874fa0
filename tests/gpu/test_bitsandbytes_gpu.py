"""4-bit weights and 8-bit states on a GPU: a whole run, and the same rewards after saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.trajectories import prepare, train, trajectory

from btrm_core.scoring.scorer import Scorer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'btrm[qlora]'")
    return prepare(tmp_path_factory.mktemp("bitsandbytes"), layers=2)


@pytest.mark.parametrize("merge", [True, False])
def test_qlora_gives_the_same_rewards_after_saving(root: Path, tmp_path: Path, merge: bool) -> None:
    values: dict[str, Any] = {"lora__rank": 4, "model__quantize": "4bit", "train__learning_rate": 2e-2}
    outcome = train(root, tmp_path, **values, lora__merge=merge)
    assert outcome.directory is not None
    made = json.loads((outcome.directory / "btrm.json").read_text())
    assert made["adapters"]["merged"] is merge
    # another arrangement of bf16 sums, nothing else
    assert Scorer(str(outcome.directory)).self_test() < 2e-2


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-8bit-paged"])
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_eight_bits_train_like_thirty_two(root: Path, tmp_path: Path, name: str, stage: str) -> None:
    values: dict[str, Any] = {"model__dtype": "fp32", "model__attention": "eager", "distributed__deepspeed": stage}
    expected = trajectory(root, tmp_path / "expected", **values)
    found = trajectory(root, tmp_path / "found", **values, train__optimizer=name)
    assert found.losses[1] == pytest.approx(expected.losses[1], abs=1e-3)
    moved = abs(expected.losses[-1] - expected.losses[0])
    assert abs(found.losses[-1] - expected.losses[-1]) < moved / 5
