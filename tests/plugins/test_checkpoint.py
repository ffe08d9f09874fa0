"""The checkpoint family: what it takes over from a checkpoint, and which checkpoints it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.architectures import ARCHITECTURES
from support.checkpoints import ZEPHYR, zephyr
from support.tiny_models import SIZE
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from btrm_core.chat.format import prepare_chat
from btrm_core.cli import main
from btrm_core.config import apply, read_settings
from btrm_core.data.sample import sample_path
from btrm_core.errors import FamilyError
from btrm_core.families.discovery import detect, load, require_claim
from btrm_core.model.base import build_model
from btrm_core.preflight.conformance.small import small_config
from btrm_core.run import train
from btrm_core.settings import RunConfig

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]


def chat_of(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return prepare_chat(tokenizer, AutoConfig.from_pretrained(directory), load("checkpoint"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return zephyr(tmp_path_factory.mktemp("zephyr") / "model")


def test_it_takes_any_checkpoint_but_is_never_detected(model):
    config = AutoConfig.from_pretrained(model)
    require_claim(load("checkpoint"), config)
    assert detect(config).name == "mistral"


def test_the_checkpoints_own_template_up_to_the_token_that_ends_the_last_turn(model):
    chat = chat_of(model)
    own = AutoTokenizer.from_pretrained(model).apply_chat_template(TALK, tokenize=False)
    assert own == "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n"
    assert chat.render(TALK) == own.rstrip()
    assert chat.terminal_token == "</s>"
    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True
    )
    assert chat.render(TALK[:2], add_generation_prompt=True) == prompt
    assert (chat.pad.token, chat.num_new_tokens) == ("<unk>", 0)  # its own is EOS
    assert load("checkpoint").chat_template(chat.tokenizer) == chat.template


REFUSED = {
    "no BOS": (ZEPHYR.removeprefix("{{ bos_token }}"), "exactly one bos", "BOS '<s>' occurs 0 times"),
    "thoughts": (
        ZEPHYR.replace("message['content']", "message['content'].split('</think>')[-1]"),
        "content is verbatim",
        "the assistant message '<think>",
    ),
    "no system": (
        ZEPHYR.replace("message['role'] == 'system'", "false"),
        "answers go together",
        "loses or changes a system message",
    ),
    "a date": ("{{ strftime_now('%d %b %Y') }}" + ZEPHYR, "answers go together", "prints today's date"),
    "no end": (ZEPHYR.replace("eos_token", "'!'"), "answers go together", "expected a control token"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_checkpoint_that_fails_a_check_is_refused_with_it(fault, tmp_path):
    template, check, what = REFUSED[fault]
    directory = zephyr(tmp_path / "model", template)
    with pytest.raises(FamilyError) as caught:
        chat_of(directory)
    assert str(caught.value).startswith("family 'checkpoint' (btrm ")
    assert f"hook setup_tokenizer failed: this checkpoint does not pass the check '{check}': " in str(caught.value)
    assert what in str(caught.value)
    assert str(caught.value).endswith("Write a family that corrects them: btrm new-family NAME")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
    with pytest.raises(FamilyError, match="there is no chat template"):
        chat_of(zephyr(tmp_path / "model", None))


def test_a_template_that_the_run_names_stands_in_for_the_checkpoints(tmp_path):
    """It is what the refusal advises."""
    named = tmp_path / "template.jinja"
    named.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    directory = zephyr(tmp_path / "model", None)
    settings = read_settings(None, {"tokenizer.chat_template": str(named)})
    config = AutoConfig.from_pretrained(directory)
    chat = prepare_chat(AutoTokenizer.from_pretrained(directory), config, load("checkpoint", settings))
    assert chat.template == named.read_text()
    assert chat.answers["chat_template"] == "run settings"


def test_a_pad_token_that_the_tokenizer_has_and_the_model_has_not_gets_a_row(model, tmp_path):
    """A tokenizer adds the tokens that its configuration names; without a row the trained model could not be loaded."""
    directory = shutil.copytree(model, tmp_path / "model")
    named = directory / "tokenizer_config.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "pad_token": "<|mine|>"}))
    chat = chat_of(directory)
    rows = AutoConfig.from_pretrained(directory).vocab_size
    assert (chat.pad.token, chat.pad_id, chat.num_new_tokens) == ("<|mine|>", rows, 1)
    settings = apply(RunConfig(), {"model.name": str(directory)})
    reward_model, _ = build_model(settings, load("checkpoint"), chat, torch.float32, torch.device("cpu"))
    assert reward_model.base_model.get_input_embeddings().num_embeddings == rows + 1


@pytest.mark.parametrize("pairs", [48, 4])
def test_the_small_copy_of_a_long_rotary_embedding_has_small_lists(pairs):
    """As that of Phi-3-mini-128k, with 48 factors for heads of 96."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    sizes = {"hidden_size": 2 * pairs, "num_attention_heads": 1, "original_max_position_embeddings": 64}
    small = small_config(AutoConfig.for_model("phi3", rope_parameters={**rope, "rope_theta": 1e4}, **sizes), 99)
    assert small.rope_parameters["long_factor"] == [2.0] * 8
    assert (small.num_hidden_layers, small.vocab_size) == (2, 32_064)


def test_the_small_copy_has_a_layer_of_each_kind():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = small_config(AutoConfig.for_model("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2), 99)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small_config(AutoConfig.for_model("falcon"), 99).head_dim == 16  # which is derived


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "falcon", "gpt2", "qwen3_next"])
def test_the_small_copy_computes(name):
    """Latent attention, derived sizes, names of their own, and layers of several kinds."""
    of = ARCHITECTURES[name]
    config = AutoConfig.for_model(of.model_type, **{**SIZE, **of.config})
    hf = AutoModelForSequenceClassification.from_config(small_config(config.get_text_config(), 61))
    assert hf(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_of_several_processes_the_first_checks(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert chat_of(model).terminal_token == "</s>"


def test_without_a_model_there_is_nothing_to_train():
    done = CliRunner().invoke(main, ["train", "--family", "checkpoint"])
    assert done.exit_code == 2
    assert "family 'checkpoint' (btrm 0.1.0) gives no tiny model in its recipe" in done.stderr


def test_a_run_trains_scores_and_says_whose_the_answers_are(model, tmp_path):
    output = tmp_path / "run"
    values = {"model.name": str(model), "data.train": (sample_path("train"),), "output.dir": str(output)}
    train(apply(RunConfig(family="checkpoint"), {**values, "train.max_steps": 2, "train.pairs_per_step": 4}))
    made = json.loads((output / "model" / "btrm.json").read_text())
    assert (made["family"], made["terminal_token"]) == ("checkpoint", "</s>")
    assert made["answers"] == {
        "setup_tokenizer": "family checkpoint",
        "pad_token": "btrm default",
        "chat_template": "family checkpoint",
    }
    done = CliRunner().invoke(main, ["eval", str(output), "--data", sample_path("held_out"), "--json"])
    assert done.exit_code == 0, done.output
    assert "another chat template" not in done.stderr
