from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.scorer_samples import CONVERSATIONS, base_model, change_json, reward_model

from btrm_core.errors import CheckpointError
from btrm_core.model.load import load_weights
from btrm_core.scoring.scorer import Scorer


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("loading") / "finished")


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "model"))


def refusal(model: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Scorer(str(model), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_base_model_has_no_head(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama3")
    assert refusal(base) == (
        f"{base} holds no reward head (score.weight is missing from its weights); expected a model trained by "
        f"`btrm train`, such as one made with --model {base}"
    )


def test_a_classifier_is_no_reward_model(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["score.weight"] = torch.zeros(3, 32)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    change_json(model / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert refusal(model) == f"{model} is a classifier of 3 labels; expected a reward model, with one"


def test_the_pad_token_must_not_be_eos(model: Path) -> None:
    change_json(model / "tokenizer_config.json", pad_token="<|eot_id|>")
    assert refusal(model) == (
        f"{model}: the pad token '<|eot_id|>' is the end-of-sequence token, so other programs would read the reward in "
        "another place; expected a pad token of its own in tokenizer_config.json and config.json"
    )


def test_the_pad_token_must_be_there_and_the_same_for_everyone(model: Path) -> None:
    change_json(model / "config.json", pad_token_id=7)
    assert f"{model}: pad_token_id in config.json is 7, but the tokenizer pads with " in refusal(model)
    change_json(model / "tokenizer_config.json", pad_token=None)
    assert refusal(model) == (f"{model}: the tokenizer names no pad token, expected pad_token in tokenizer_config.json")


def test_weights_must_be_whole_and_in_safetensors_form(model: Path) -> None:
    file = model / "model.safetensors"
    weights = load_file(file)
    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, file, {"format": "pt"})
    assert refusal(model) == f"the weights of {model} are incomplete: {lost} missing; copy the directory anew"
    file.write_bytes(file.read_bytes()[:1000])
    assert refusal(model) == f"{file} is cut off after 1,000 bytes; download or copy it anew"
    torch.save(weights, model / "pytorch_model.bin")
    file.unlink()
    assert refusal(model) == (
        f"{model} has no weights in safetensors form; expected model.safetensors or model.safetensors.index.json"
    )


def test_places_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "nothing") == f"there is no model directory {tmp_path / 'nothing'}"
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no model: neither ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal("someone/something") == (
        "the model someone/something is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give a "
        "local directory"
    )


def test_code_of_the_checkpoint_is_never_run(model: Path) -> None:
    change_json(
        model / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"},
    )
    (model / "own.py").write_text("raise SystemExit('it was run')")
    assert refusal(model).startswith(f"{model}: the configuration cannot be read: ")


def test_another_template_of_the_installed_family_is_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# older #}")
    change_json(model / "btrm.json", template_sha256=None, origin="btrm 0.0.1")
    with caplog.at_level(logging.WARNING, "btrm"):
        Scorer(str(model), device="cpu").rewards([])
    (record,) = caplog.records
    assert record.getMessage().startswith("the installed family 'llama3' (btrm ")
    assert "has another chat template than the one this model was trained with (btrm 0.0.1)" in record.getMessage()

    caplog.clear()
    for changes in (
        {"family": "not-installed"},
        {"family": "llama3", "answers": {"chat_template": "run settings"}},
        {"family": None},
    ):
        change_json(model / "btrm.json", **changes)
        Scorer(str(model), device="cpu")
    assert not caplog.records


@pytest.mark.parametrize("pad", ["<|eot_id|>", None], ids=["EOS", "none"])
def test_a_model_of_others_with_no_pad_token_of_its_own_scores_the_same_with_a_note(
    pad: str | None, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Scorer(str(model), device="cpu").rewards(CONVERSATIONS)
    (model / "btrm.json").unlink()
    change_json(model / "tokenizer_config.json", pad_token=pad)
    change_json(model / "config.json", pad_token_id=None)
    with caplog.at_level(logging.WARNING, "btrm"):
        scorer = Scorer(str(model), device="cpu")
        found = scorer.rewards(CONVERSATIONS)
        scorer.model.use_kernel("padded")
        padded = scorer.rewards(CONVERSATIONS)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(padded, expected, atol=1e-5, rtol=0)
    assert "btrm reads it at the last token of the conversation" in caplog.records[0].getMessage()


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(model: Path) -> None:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    change_json(model / "config.json", vocab_size=size - 500)
    assert refusal(model).startswith(
        f"the tokenizer of {model} has {size:,} tokens, but the model has embeddings for {size - 500:,}: "
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_stay_when_the_file_is_written_over(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = reward_model(tmp_path / "model")
    file = directory / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})
    hf = load_weights(directory, "auto", torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    with file.open("r+b") as stream:  # as `cp` and `rsync --inplace` do
        stream.write(b"\x00" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
