from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.scorer_samples import CONVERSATIONS, FAMILIES, change_json, reference, reward_model

from btrm_core.cli import main
from btrm_core.errors import CheckpointError, ConfigError
from btrm_core.preflight.verify import verify
from btrm_core.scoring import Scorer, export, write_onnx


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    return {family: reward_model(root / family, family) for family in FAMILIES}


def rewards(directory: Path) -> np.ndarray:
    return Scorer(str(directory), device="cpu", dtype="fp32").rewards(CONVERSATIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_exported_as_it_is_is_the_same_model(models: dict[str, Path], family: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(models[family]), str(tmp_path / "out"), "--compat", "v4"])
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(rewards(tmp_path / "out"), rewards(models[family]))
    checks, _ = verify(str(tmp_path / "out"))
    assert {check.verdict for check in checks} == {"ok"}, checks
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    assert config["torch_dtype"] == "float32"
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
    )


def test_a_model_in_bf16_carries_the_rewards_it_gives(models: dict[str, Path], tmp_path: Path) -> None:
    said = export(str(models["llama3"]), str(tmp_path / "half"), dtype="bf16")
    assert "bfloat16" in said
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    made = json.loads((tmp_path / "half" / "btrm.json").read_text())
    assert made["dtype"] == "bfloat16"
    assert Scorer(str(tmp_path / "half"), device="cpu", dtype="bf16").self_test() < 0.05
    export(str(tmp_path / "half"), str(tmp_path / "again"), dtype="fp32")
    chat = Scorer(str(tmp_path / "again"), device="cpu").chat
    np.testing.assert_allclose(
        rewards(tmp_path / "again"), reference(tmp_path / "half", chat, CONVERSATIONS), atol=1e-5
    )


def test_readers_that_would_ignore_the_head_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="SGLang ignores the reward head of MistralForSequenceClassification"):
        export(str(models["mistral"]), str(out), target="sglang")
    with pytest.raises(CheckpointError, match="text-embeddings-inference"):
        export(str(models["llama3"]), str(out), target="tei")
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        export(str(models["llama3"]), str(out), target="vlm")
    assert not out.exists()
    export(str(models["llama3"]), str(out), target="sglang")
    assert out.exists()


def test_what_cannot_be_exported_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = str(models["llama3"]), tmp_path / "out"
    with pytest.raises(ConfigError, match="choose another place"):
        export(source, source)
    with pytest.raises(ConfigError, match="dtype 'fp16'"):
        export(source, str(out), dtype="fp16")
    export(source, str(out))
    with pytest.raises(CheckpointError, match="overwrite"):
        export(source, str(out))
    made = json.loads((out / "btrm.json").read_text())
    vectors = [{**vector, "reward": vector["reward"] + 1} for vector in made["self_test"]]
    change_json(out / "btrm.json", self_test=vectors)
    with pytest.raises(CheckpointError, match="gives other rewards"):
        export(str(out), str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("change", ["no pad", "pad is eos", "another end", "no problem type"])
def test_a_model_of_another_trainer_becomes_one_that_can_be_checked(
    models: dict[str, Path], tmp_path: Path, change: str
) -> None:
    foreign = Path(shutil.copytree(models["llama3"], tmp_path / "foreign"))
    (foreign / "btrm.json").unlink()
    settings, config = foreign / "tokenizer_config.json", foreign / "config.json"
    if change == "no pad":
        change_json(settings, pad_token=None)
        change_json(config, pad_token_id=None)
    elif change == "pad is eos":
        change_json(settings, pad_token=json.loads(settings.read_text())["eos_token"])
    elif change == "another end":
        template = foreign / "chat_template.jinja"
        template.write_text(template.read_text() + "{{ '\\n' }}")
    else:
        change_json(config, problem_type=None)
    expected = Scorer(str(foreign), device="cpu").rewards(CONVERSATIONS)
    assert "a self-test were added" in export(str(foreign), str(tmp_path / "out"))
    opened = Scorer(str(tmp_path / "out"), device="cpu")
    assert opened.manifest["self_test"]
    assert opened.self_test() <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "regression"
    np.testing.assert_allclose(opened.rewards(CONVERSATIONS), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_onnx_gives_the_rewards_and_is_kept_only_then(
    models: dict[str, Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(models[family]), str(out), "--onnx"])
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(str(out / "model.onnx"))
    scorer = Scorer(str(out), device="cpu")
    for ids, reward in zip(scorer.chat.encode(CONVERSATIONS), scorer.rewards(CONVERSATIONS), strict=True):
        found = session.run(["rewards"], {"input_ids": [ids], "attention_mask": [[1] * len(ids)]})[0]
        assert found[0] == pytest.approx(reward, abs=1e-4)
    (out / "model.onnx").unlink()
    before = sorted(out.iterdir())
    monkeypatch.setattr("btrm_core.scoring.onnx._run", lambda file, sequences, pad_id: np.zeros((2, len(sequences))))
    with pytest.raises(CheckpointError, match="ONNX Runtime's rewards are off by"):
        write_onnx(out)
    assert sorted(out.iterdir()) == before


def test_a_library_that_onnx_lacks_is_named_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = CliRunner().invoke(main, ["export", str(models["llama3"]), str(tmp_path / "out"), "--onnx"])
    assert (result.exit_code, "pip install 'btrm[onnx]'" in result.output) == (2, True), result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, ["export", str(models["llama3"]), "--push-to", "me/x", "--onnx"])
    assert (result.exit_code, "give OUT" in result.output) == (2, True)
