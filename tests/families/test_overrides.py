"""The run's own settings, asked before the family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from btrm_core import families
from btrm_core.config import read_settings
from btrm_core.errors import ConfigError
from btrm_core.families.hookspecs import TinyShape
from btrm_core.families.overrides import Overrides
from btrm_core.model.toy import toy_tokenizer


def settings(pad_token=None, chat_template=None, init_std=None):
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token=pad_token, chat_template=chat_template),
        head=SimpleNamespace(init_std=init_std),
    )


@pytest.fixture(scope="module")
def tokenizer():
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    control = (
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
    )
    return toy_tokenizer(TinyShape("llama", special_tokens=special, control_tokens=control), ["the cat the dog"], 400)


def test_settings_left_alone_are_no_opinion(tokenizer):
    plugin = Overrides(settings())
    assert plugin.pad_token(tokenizer) is None
    assert plugin.chat_template() is None
    assert plugin.init_head() is None


def test_a_run_config_is_accepted_and_beats_the_family(tokenizer, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}", encoding="utf-8")
    config = read_settings(
        None,
        {
            "tokenizer.pad_token": "<|reserved_special_token_1|>",
            "tokenizer.chat_template": str(template),
            "head.init_std": 0.5,
        },
    )
    family = families.load("llama3", config)
    assert family.pad_answer(tokenizer).given_by == "run settings"
    assert family.pad_token(tokenizer).token == "<|reserved_special_token_1|>"
    assert family.template_answer(tokenizer).given_by == "run settings"
    assert family.chat_template(tokenizer) == template.read_text(encoding="utf-8")
    assert family.ask("init_head", hidden_size=4).given_by == "run settings"
    torch.manual_seed(0)
    weight = torch.empty(1, 10_000)
    family.init_head(10_000)(weight)
    assert weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_pad_token_outside_the_vocabulary_is_new(tokenizer):
    pad = Overrides(settings(pad_token="<|my_pad|>")).pad_token(tokenizer)
    assert (pad.token, pad.new) == ("<|my_pad|>", True)
    pad = Overrides(settings(pad_token="<|reserved_special_token_0|>")).pad_token(tokenizer)
    assert (pad.token, pad.new) == ("<|reserved_special_token_0|>", False)


@pytest.mark.parametrize(
    ("token", "role"), [("<|eot_id|>", "end-of-sequence"), ("<|begin_of_text|>", "beginning-of-sequence")]
)
def test_padding_with_eos_or_bos_is_refused_by_the_name_of_the_setting(tokenizer, token, role):
    with pytest.raises(ConfigError) as caught:
        families.load("llama3", settings(pad_token=token)).pad_token(tokenizer)
    assert str(caught.value) == (
        f"tokenizer.pad_token '{token}' is the tokenizer's {role} token; padding with it would move the position at "
        "which the reward is read. Name a token that data never holds, or leave tokenizer.pad_token unset"
    )


def test_an_ordinary_token_cannot_pad(tokenizer):
    assert "a" in tokenizer.get_vocab()
    with pytest.raises(ConfigError) as caught:
        families.load("llama3", settings(pad_token="a")).pad_token(tokenizer)
    assert str(caught.value) == (
        "tokenizer.pad_token 'a' is an ordinary token of the vocabulary, which occurs in data: name a special token or "
        "one that is not in the vocabulary yet, or leave the setting out"
    )


def test_an_empty_pad_token_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token is empty"):
        Overrides(settings(pad_token=" ")).pad_token(tokenizer)


def test_a_template_file_that_cannot_be_read_is_refused(tmp_path):
    missing = tmp_path / "none.jinja"
    with pytest.raises(ConfigError) as caught:
        families.load("llama3", settings(chat_template=str(missing))).ask("chat_template", tokenizer=None)
    assert str(caught.value) == (
        f"tokenizer.chat_template: cannot read {missing} (No such file or directory); give the path of a Jinja file"
    )
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        Overrides(settings(chat_template=str(binary))).chat_template()
    empty = tmp_path / "empty.jinja"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="is empty; give the path"):
        Overrides(settings(chat_template=str(empty))).chat_template()


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_a_meaningless_spread_of_the_head_is_refused(std):
    with pytest.raises(ConfigError, match=r"head\.init_std is .*; it must be a finite number, 0 or more"):
        Overrides(settings(init_std=std)).init_head()
