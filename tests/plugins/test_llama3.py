"""The llama3 family's answers."""

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
from transformers import AutoTokenizer, LlamaConfig, MistralConfig

from btrm_core.errors import FamilyError
from btrm_core.families.discovery import detect, load
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.toy import toy_tokenizer

REAL = {"llama3-first": "<|reserved_special_token_0|>", "llama3": "<|reserved_special_token_0|>"}
REAL["llama3.1"] = "<|finetune_right_pad_id|>"


@pytest.fixture(scope="module")
def family():
    return load("llama3")


@pytest.fixture(scope="module")
def tokenizer(family):
    return family.setup_tokenizer(toy(family), None)


@pytest.fixture(scope="module", params=REAL)
def real(request, family, real_tokenizers):
    return request.param, family.setup_tokenizer(AutoTokenizer.from_pretrained(real_tokenizers / request.param), None)


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_claims_llama_3_by_its_rotary_base(family, rope):
    assert family.claims(LlamaConfig(**rope))
    assert family.claims(LlamaConfig(hidden_size=16, num_attention_heads=2, vocab_size=100, **rope))
    assert detect(LlamaConfig(**rope)).name == "llama3"


def test_claims_llama_31_with_its_scaled_positions(family):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert family.claims(LlamaConfig(rope_parameters={**rope, "original_max_position_embeddings": 8192}))


@pytest.mark.parametrize("theta", [1e4, 1e5, 1e6], ids=["Llama 2", "SmolLM2", "Code Llama"])
def test_does_not_claim_others_of_its_architecture(family, theta):
    assert not family.claims(LlamaConfig(rope_theta=theta))


def test_does_not_claim_another_architecture_with_its_rotary_base(family):
    assert not family.claims(MistralConfig(rope_theta=5e5))


def test_setup_tokenizer_refuses_a_foreign_vocabulary(family):
    foreign = toy_tokenizer(TinyShape("llama", special_tokens={"bos_token": "<s>", "eos_token": "</s>"}), [], 300)
    foreign.name_or_path = "some/model"
    with pytest.raises(FamilyError) as caught:
        family.setup_tokenizer(foreign, None)
    assert str(caught.value) == (
        f"family 'llama3' ({family.origin}): hook setup_tokenizer failed: the tokenizer of some/model has no "
        "<|begin_of_text|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>, which the Llama 3 chat format needs: "
        "the checkpoint's vocabulary is not this family's. Choose the family that the checkpoint was made for, or "
        "write one"
    )


def test_setup_tokenizer_names_bos(family):
    shape = family.recipe().tiny
    nameless = TinyShape("llama", special_tokens={"eos_token": "<|eot_id|>"}, control_tokens=shape.control_tokens)
    tokenizer = toy_tokenizer(nameless, [], 400)
    with pytest.raises(FamilyError, match=r"has no <\|begin_of_text\|>"):
        family.setup_tokenizer(tokenizer, None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin_of_text|>"]})
    assert family.setup_tokenizer(tokenizer, None).bos_token == "<|begin_of_text|>"


def test_pad_token_prefers_the_one_made_for_it(family, tokenizer):
    check_pad(family, tokenizer, "<|reserved_special_token_0|>")
    later = toy(family)
    later.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    check_pad(family, later, "<|finetune_right_pad_id|>")


def test_pad_token_without_a_reserved_token_is_btrms_choice(family):
    shape = TinyShape(
        "llama",
        special_tokens={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        control_tokens=("<|start_header_id|>", "<|end_header_id|>"),
    )
    answer = family.pad_answer(toy_tokenizer(shape, [], 400))
    assert (answer.value.token, answer.value.new, answer.given_by) == ("[PAD]", True, "btrm default")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_keeps_the_contract(family, tokenizer, name):
    check_conversation(tokenizer, family.chat_template(tokenizer), CONVERSATIONS[name], "<|eot_id|>")


def test_chat_template_writes_the_documented_format(family, tokenizer):
    rendered = text(tokenizer, family.chat_template(tokenizer), talk("s:Be brief.", "u: Hi\n", "a:Hello"))
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    )
    prompt = text(tokenizer, family.chat_template(tokenizer), talk("u:Hi"), prompt=True)
    assert prompt.endswith("Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_chat_template_refuses_unknown_roles(family, tokenizer):
    check_roles(tokenizer, family.chat_template(tokenizer))


def test_the_tokenizer_survives_saving(family, tokenizer, tmp_path):
    check_reload(tokenizer, family.chat_template(tokenizer), "llama", tmp_path)


def test_init_head_is_btrms(family):
    assert family.ask("init_head", hidden_size=8).given_by == "btrm default"


def test_recipe(family):
    check_recipe(family, 2e-6, "meta-llama/Meta-Llama-3-8B-Instruct")
    assert family.recipe().attention == ()
    check_toy_model(family)


@pytest.mark.hub
def test_real_tokenizers_keep_the_contract(family, real, tmp_path):
    name, tokenizer = real
    template = family.chat_template(tokenizer)
    for messages in CONVERSATIONS.values():
        check_conversation(tokenizer, template, messages, "<|eot_id|>")
    check_pad(family, tokenizer, REAL[name])
    check_reload(tokenizer, template, "llama", tmp_path)


@pytest.mark.hub
def test_the_template_agrees_with_metas(family, real):
    name, tokenizer = real
    header = 4 if name == "llama3-first" else 0  # its own template opens an answer after every conversation
    for messages in CONVERSATIONS.values():
        own = ids(tokenizer, tokenizer.chat_template, messages)
        assert ids(tokenizer, family.chat_template(tokenizer), messages) == own[: len(own) - header]
