"""4-bit base weights and 8-bit optimizer states: real ones where bitsandbytes is installed, and every refusal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.trajectories import Trajectory, distance, prepare, run_card, train, trajectory

from btrm_core.cli import main
from btrm_core.config import read_settings
from btrm_core.errors import ConfigError
from btrm_core.model import quantized
from btrm_core.preflight.plan.memory import EIGHT_BIT_MOMENT, FOUR_BIT_BYTES
from btrm_core.scoring.scorer import Scorer
from btrm_core.training.processes.zero import deepspeed_config
from btrm_core.training.session import Outcome

EXACT = 1e-5
QLORA: dict[str, Any] = {
    "lora__rank": 4,
    "model__quantize": "4bit",
    "train__learning_rate": 2e-2,
    "train__max_steps": 4,
    "data__max_length": 512,
}


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'btrm[qlora]'")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("quantized"))


def rewards(root: Path, outcome: Outcome, dtype: str) -> tuple[np.ndarray, list[float]]:
    """Of the held-out pairs: from the saved directory, and from the live model at the end of training."""
    rows = [json.loads(line) for line in (root / "held_out.jsonl").read_text().splitlines()]
    conversations = [row[side] for row in rows for side in ("chosen", "rejected")]
    live = [example[side][0] for example in outcome.examples for side in ("chosen", "rejected")]
    return Scorer(str(outcome.directory), dtype=dtype, device="cpu").rewards(conversations), live


# --- 4-bit weights


def test_four_bits_apart_and_merged_give_the_live_rewards(
    bitsandbytes: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trajectory(root, root / "plain", **{**QLORA, "model__quantize": "none"})
    apart = train(root, root / "apart", **QLORA, lora__merge=False)
    merged = train(root, root / "merged", **QLORA)
    for outcome in (apart, merged):
        found, live = rewards(root, outcome, "fp32")
        np.testing.assert_allclose(found, live, atol=EXACT, rtol=0)
        assert np.abs(np.subtract(live, plain.rewards)).max() > 1e-3  # the weights were rounded to 4 bits
    assert apart.directory is not None
    assert "quantization_config" not in json.loads((apart.directory / "config.json").read_text())
    # on some CPUs bitsandbytes repacks weights for evaluation, in a way that takes no layer as narrow as this one's
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    printed, chat = run_card(apart.directory)
    assert printed == pytest.approx(Scorer(str(apart.directory), device="cpu").rewards([chat])[0], abs=EXACT)


def test_the_merged_model_is_the_dequantised_base_and_the_adapters(bitsandbytes: Any, root: Path) -> None:
    still = {**QLORA, "train__learning_rate": 1e-12}  # adapters stay what they begin as: no change
    outcome = train(root, root / "still", **still)
    assert outcome.directory is not None
    base, saved = load_file(root / "base" / "model.safetensors"), load_file(outcome.directory / "model.safetensors")
    assert set(saved) - {"score.weight"} == set(base) - {"lm_head.weight"}
    config = json.loads((outcome.directory / "config.json").read_text())
    assert "quantization_config" not in config
    for name, weight in saved.items():
        if "_proj" in name:
            packed, state = bitsandbytes.functional.quantize_4bit(
                base[name], quant_type="nf4", compress_statistics=True
            )
            expected = bitsandbytes.functional.dequantize_4bit(packed, state)
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
            assert not torch.equal(weight, base[name])
        elif name != "score.weight":
            assert torch.equal(weight, base[name])


def test_merging_four_bits_in_bf16_is_measured(bitsandbytes: Any, root: Path) -> None:
    outcome = train(root, root / "bf16", **QLORA, model__dtype="bf16")
    assert outcome.directory is not None
    change = json.loads((outcome.directory / "btrm.json").read_text())["adapters"]["largest_reward_change"]
    assert 1e-4 < change < 0.1
    assert Scorer(str(outcome.directory), dtype="bf16", device="cpu").self_test() < change / 100


@pytest.mark.parametrize(
    "values",
    [
        QLORA,
        {**QLORA, "model__dtype": "bf16", "distributed__deepspeed": "zero2-offload"},
        {"train__optimizer": "adamw-8bit", "train__max_steps": 4},
        {"train__optimizer": "adamw-8bit", "train__max_steps": 4, "model__dtype": "bf16"},
    ],
    ids=["4bit", "4bit-bf16-offload", "8bit", "8bit-bf16"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    bitsandbytes: Any, root: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    whole = trajectory(root, tmp_path / "whole", **values)
    train(root, tmp_path / "cut", **values, output__save_every=2)
    (tmp_path / "cut" / "model").rename(tmp_path / "away")
    resumed = trajectory(root, tmp_path / "cut", **values, output__resume="auto")
    assert distance(whole, resumed) == 0.0


def test_bytes_of_packed_weights_and_moments_are_those_planned(bitsandbytes: Any) -> None:
    weight = torch.randn(512, 1024)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.nbytes + state.state2.absmax.nbytes  # the tables of codes are shared
    assert packed.nbytes + scales == FOUR_BIT_BYTES * weight.numel()
    parameter = torch.nn.Parameter(weight)
    made = quantized.optimizer([{"params": [parameter]}], eight_bits().train, world=1)
    parameter.grad = torch.ones_like(weight)
    made.step()
    moments = [made.state[parameter][name] for name in ("state1", "absmax1", "state2", "absmax2")]
    assert sum(moment.nbytes for moment in moments) == 2 * EIGHT_BIT_MOMENT * weight.numel()


# --- 8-bit optimizers


def eight_bits(**values: Any) -> Any:
    return read_settings(None, {"train.optimizer": "adamw-8bit", "train.learning_rate": 1e-3, **values})


@pytest.fixture(scope="module")
def reference(root: Path) -> Trajectory:
    return trajectory(root, root / "reference")


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_eight_bits_train_like_thirty_two(bitsandbytes: Any, root: Path, reference: Trajectory, stage: str) -> None:
    found = trajectory(root, root / f"8bit {stage}", train__optimizer="adamw-8bit", distributed__deepspeed=stage)
    assert found.losses[0] == reference.losses[0]
    # the first update is right (a dummy step before it would make it a quarter too small), later ones are near
    assert found.losses[1] == pytest.approx(reference.losses[1], abs=1e-4)
    assert 0 < distance(found, reference) < 0.1
    moved = abs(reference.losses[-1] - reference.losses[0])
    assert abs(found.losses[-1] - reference.losses[-1]) < moved / 5


def test_small_groups_keep_thirty_two_bits_and_equal_torchs_own(bitsandbytes: Any, root: Path) -> None:
    """Below 4,096 elements bitsandbytes keeps fp32 states, so that a run of small adapters shows the wiring exactly."""
    small = {"lora__rank": 1, "lora__targets": "q_proj,v_proj", "train__learning_rate": 2e-2}
    expected = trajectory(root, root / "small", **small)
    found = trajectory(root, root / "small 8bit", **small, train__optimizer="adamw-8bit")
    assert distance(expected, found) < EXACT


def test_a_partition_that_cannot_be_counted_is_refused(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "LARGEST_PARTITION", 100)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(150))]}]
    quantized.optimizer(groups, eight_bits().train, world=2)
    with pytest.raises(ConfigError) as caught:
        quantized.optimizer(groups, eight_bits().train, world=1)
    assert str(caught.value) == (
        "--optimizer adamw-8bit: one process would update 150 parameters, and bitsandbytes counts to 100; use more "
        "GPUs, --lora-rank, or --optimizer adamw"
    )


# --- refusals


@pytest.mark.parametrize("preset", ["zero3", "zero3-offload"])
def test_four_bits_are_refused_under_zero3(preset: str) -> None:
    config = read_settings(None, {"model.quantize": "4bit", "lora.rank": 4, "distributed.deepspeed": preset})
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config, 1)
    assert str(caught.value) == (
        f"--quantize 4bit with --deepspeed {preset}: ZeRO-3 cuts weights into pieces, and packed 4-bit weights lose "
        "their scales by it; use --deepspeed zero1 or zero2"
    )


@pytest.mark.parametrize("preset", ["zero2-offload", "zero3", "zero3-offload"])
def test_eight_bits_are_refused_where_the_optimizer_is_cut_or_moved(preset: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(eight_bits(**{"distributed.deepspeed": preset}), 1)
    assert str(caught.value) == (
        f"--optimizer adamw-8bit with --deepspeed {preset}: 8-bit states are known to be right only where the "
        "optimizer stays whole on its GPU; use --deepspeed zero1 or zero2, or --optimizer adamw"
    )


def test_the_usual_optimizer_is_deepspeeds_as_before() -> None:
    made = deepspeed_config(read_settings(None, {"train.learning_rate": 1e-3}), 1)
    assert made["optimizer"]["type"] == "AdamW"
    assert "zero_allow_untested_optimizer" not in made
    assert "optimizer" not in deepspeed_config(eight_bits(), 1)


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--lora-rank", "2", "--quantize", "4bit"], "--quantize 4bit"),
        (["--optimizer", "adamw-8bit"], "--optimizer adamw-8bit"),
    ],
)
def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], flag: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = CliRunner().invoke(main, ["train", "--family", "llama3", "--output", str(tmp_path), *flags])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"btrm: {flag} needs bitsandbytes, which is not installed; pip install 'btrm[qlora]'"
    )


def test_paged_states_need_a_gpu(bitsandbytes: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; tests/gpu trains with paged states")
    with pytest.raises(ConfigError) as caught:
        quantized.require(eight_bits(**{"train.optimizer": "adamw-8bit-paged"}))
    assert str(caught.value) == (
        "--optimizer adamw-8bit-paged needs a GPU, whose memory it spills from, and torch sees none; use --optimizer "
        "adamw-8bit"
    )
