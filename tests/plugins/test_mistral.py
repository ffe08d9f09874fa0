"""The mistral family's answers for its two vocabularies."""

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
from transformers import AutoTokenizer, MistralConfig, MixtralConfig

from btrm_core.errors import FamilyError
from btrm_core.families.discovery import detect, load
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.toy import toy_tokenizer

VERSIONS = ["mistral-v1", "mistral-v3"]


@pytest.fixture(scope="module")
def family():
    return load("mistral")


@pytest.fixture(scope="module", params=VERSIONS)
def tokenizer(request, family):
    if request.param == "mistral-v3":
        return family.setup_tokenizer(toy(family), None)
    shape = TinyShape("mistral", special_tokens=family.recipe().tiny.special_tokens)
    return family.setup_tokenizer(toy_tokenizer(shape, ["What is 2 + 2?"], 600), None)


@pytest.mark.parametrize("size", [300, 32000, 32002, 32768])
def test_claims_mistral_7b_and_toys(family, size):
    assert family.claims(MistralConfig(vocab_size=size))
    assert detect(MistralConfig(vocab_size=size)).name == "mistral"


def test_does_not_claim_nemo_or_mixtral(family):
    assert not family.claims(MistralConfig(vocab_size=131072))
    assert not family.claims(MixtralConfig(vocab_size=32000))


def test_setup_tokenizer_refuses_a_foreign_vocabulary(family):
    foreign = toy_tokenizer(TinyShape("mistral", special_tokens={"eos_token": "<|im_end|>"}), [], 300)
    with pytest.raises(FamilyError, match="has no <s>, </s>, <unk>, which the Mistral chat format needs"):
        family.setup_tokenizer(foreign, None)


def test_setup_tokenizer_names_bos_and_eos(family):
    tokenizer = toy(family)
    tokenizer.bos_token, tokenizer.eos_token = "</s>", "<s>"
    tokenizer = family.setup_tokenizer(tokenizer, None)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_pad_token_is_the_unknown_token(family, tokenizer):
    check_pad(family, tokenizer, "<unk>")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_keeps_the_contract(family, tokenizer, name):
    check_conversation(tokenizer, family.chat_template(tokenizer), CONVERSATIONS[name], "</s>")


def test_chat_template_spaces_as_the_vocabulary_needs(family):
    messages = talk("s:Be brief.", "u:Hi", "a:Hello", "u:Bye", "a:Bye")
    control = toy(family)
    assert text(control, family.chat_template(control), messages) == (
        "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST] Bye</s>"
    )
    plain = toy_tokenizer(TinyShape("mistral", special_tokens=family.recipe().tiny.special_tokens), [], 300)
    assert text(plain, family.chat_template(plain), messages) == (
        "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Bye [/INST] Bye</s>"
    )


def test_chat_template_gives_a_system_message_its_own_instruction_where_none_follows(family, tokenizer):
    template = family.chat_template(tokenizer)
    assert text(tokenizer, template, talk("s:Sing.", "a:La")) == text(tokenizer, template, talk("u:Sing.", "a:La"))
    assert text(tokenizer, template, talk("s:Sing.")) == text(tokenizer, template, talk("u:Sing."))


def test_chat_template_refuses_unknown_roles(family, tokenizer):
    check_roles(tokenizer, family.chat_template(tokenizer))


def test_the_tokenizer_survives_saving(family, tokenizer, tmp_path):
    check_reload(tokenizer, family.chat_template(tokenizer), "mistral", tmp_path)


def test_init_head_is_btrms(family):
    assert family.ask("init_head", hidden_size=8).given_by == "btrm default"


def test_recipe(family):
    check_recipe(family, 5e-6, "mistralai/Mistral-7B-Instruct-v0.2")
    assert family.recipe().attention == ()
    check_toy_model(family)


@pytest.mark.hub
@pytest.mark.parametrize("version", VERSIONS)
def test_real_tokenizers_keep_the_contract(family, real_tokenizers, version, tmp_path):
    tokenizer = family.setup_tokenizer(AutoTokenizer.from_pretrained(real_tokenizers / version), None)
    template = family.chat_template(tokenizer)
    for messages in CONVERSATIONS.values():
        check_conversation(tokenizer, template, messages, "</s>")
    check_pad(family, tokenizer, "<unk>")
    check_reload(tokenizer, template, "mistral", tmp_path)


def mistrals_own_ids(model_file, version, messages):
    """What Mistral's encoder does (mistral-common's InstructTokenizerV1 and V3), on SentencePiece alone."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    out = [model.bos_id()]
    system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            content, system = system + content, ""
            if version == "mistral-v1":
                out += model.encode(f"[INST] {content} [/INST]")
            else:
                out += [model.piece_to_id("[INST]"), *model.encode(content), model.piece_to_id("[/INST]")]
        elif message["role"] == "assistant":
            out += [*model.encode(content if version == "mistral-v1" else content.rstrip(" ")), model.eos_id()]
    return out


@pytest.mark.hub
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("loaded", ["new", "legacy off", "saved", "prepending"])
def test_ids_are_those_of_mistrals_own_encoder_however_the_tokenizer_was_loaded(
    family, real_tokenizers, version, loaded, tmp_path
):
    from tokenizers import normalizers

    directory = real_tokenizers / version
    tokenizer = AutoTokenizer.from_pretrained(directory, legacy=loaded != "legacy off")
    if loaded == "saved":
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if loaded == "prepending":  # as in the tokenizer.json of the first releases
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    tokenizer = family.setup_tokenizer(tokenizer, None)
    # Runs of spaces are left out: from a bare tokenizer.model, transformers 5 ranks the merges of spaces wrongly.
    names = ["one turn", "several turns", "system", "two systems", "same role twice", "empty answer", "unicode"]
    extra = [talk("u:Hi\n", "a:Do it. "), talk("u:\tx", "a:\ny\n\n")]
    for messages in [*(CONVERSATIONS[name] for name in names), *extra]:
        expected = mistrals_own_ids(directory / "tokenizer.model", version, messages)
        assert ids(tokenizer, family.chat_template(tokenizer), messages) == expected
