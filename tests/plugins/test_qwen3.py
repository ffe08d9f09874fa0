"""The qwen3 family's answers."""

from __future__ import annotations

import pytest
from support.family_checks import (
    CONVERSATIONS,
    check_conversation,
    check_pad,
    check_recipe,
    check_reload,
    check_roles,
    check_toy_model,
    ids,
    talk,
    text,
    toy,
)
from transformers import AutoTokenizer, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from btrm_core.errors import FamilyError
from btrm_core.families.discovery import detect, load
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.toy import toy_tokenizer


@pytest.fixture(scope="module")
def family():
    return load("qwen3")


@pytest.fixture(scope="module")
def tokenizer(family):
    return family.setup_tokenizer(toy(family), None)


def test_claims_the_dense_models_of_both_generations(family):
    for config in (Qwen2Config(), Qwen3Config()):
        assert detect(config).name == "qwen3"
    assert not family.claims(Qwen3MoeConfig())


def test_setup_tokenizer_refuses_a_foreign_vocabulary(family):
    foreign = toy_tokenizer(TinyShape("qwen2", special_tokens={"eos_token": "<|endoftext|>"}), [], 300)
    with pytest.raises(FamilyError, match=r"has no <\|im_start\|>, <\|im_end\|>, which the Qwen chat format needs"):
        family.setup_tokenizer(foreign, None)


def test_setup_tokenizer_names_eos_as_a_base_checkpoint_does_not(family):
    base = toy_tokenizer(
        TinyShape(
            "qwen3",
            special_tokens={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
            control_tokens=("<|im_start|>", "<|im_end|>"),
        ),
        [],
        300,
    )
    assert family.setup_tokenizer(base, None).eos_token == "<|im_end|>"
    assert family.pad_answer(base).value.token == "<|endoftext|>"


def test_pad_token_is_qwens_own(family, tokenizer):
    check_pad(family, tokenizer, "<|endoftext|>")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_keeps_the_contract(family, tokenizer, name):
    check_conversation(tokenizer, family.chat_template(tokenizer), CONVERSATIONS[name], "<|im_end|>")


def test_chat_template_writes_the_documented_format(family, tokenizer):
    template = family.chat_template(tokenizer)
    assert text(tokenizer, template, talk("s:Be brief.", "u:Hi", "a:<think>hm</think>Hello!")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>hm</think>Hello!<|im_end|>"
    )
    assert text(tokenizer, template, talk("u:Hi"), prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_refuses_unknown_roles(family, tokenizer):
    check_roles(tokenizer, family.chat_template(tokenizer))


def test_the_tokenizer_survives_saving(family, tokenizer, tmp_path):
    check_reload(tokenizer, family.chat_template(tokenizer), "qwen3", tmp_path)


def test_recipe(family):
    check_recipe(family, 5e-6, "Qwen/Qwen3-8B")
    assert family.recipe().attention == ()
    check_toy_model(family)
    assert family.ask("init_head", hidden_size=8).given_by == "btrm default"


@pytest.fixture(scope="module")
def real(family, real_tokenizers):
    return family.setup_tokenizer(AutoTokenizer.from_pretrained(real_tokenizers / "qwen3"), None)


@pytest.mark.hub
def test_the_real_tokenizer_keeps_the_contract(family, real, tmp_path):
    template = family.chat_template(real)
    for messages in CONVERSATIONS.values():
        check_conversation(real, template, messages, "<|im_end|>")
    check_pad(family, real, "<|endoftext|>")
    check_reload(real, template, "qwen3", tmp_path)


@pytest.mark.hub
def test_the_ids_are_those_of_chatml(family, real):
    """The tokenizer's own for every piece between control tokens."""
    start, end, newline = 151644, 151645, 198
    assert ids(real, family.chat_template(real), talk("s:Be brief.", "u:Hi", "a:Hello!")) == [
        *(start, 8948, newline, 3430, 9814, 13, end, newline),
        *(start, 872, newline, 13048, end, newline),
        *(start, 77091, newline, 9707, 0, end),
    ]


@pytest.mark.hub
def test_the_template_agrees_with_qwens_but_for_thoughts(family, real):
    conversation = CONVERSATIONS["system"]
    own = text(real, real.chat_template, conversation)
    assert own.replace("<think>\n\n</think>\n\n", "") == text(real, family.chat_template(real), conversation) + "\n"
