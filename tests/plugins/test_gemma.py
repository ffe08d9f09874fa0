"""The answers of the gemma, gemma2 and gemma3 families; they share the template, the first two the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import btrm_gemma
import btrm_gemma2
import btrm_gemma3
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
from transformers import AutoTokenizer, Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig

from btrm_core.config import apply
from btrm_core.data.sample import sample_path
from btrm_core.errors import FamilyError
from btrm_core.families.discovery import detect, load
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.toy import build_toy, toy_tokenizer
from btrm_core.run import train
from btrm_core.settings import RunConfig

CONFIGS = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    return load(request.param)


@pytest.fixture(scope="module")
def tokenizer(family):
    return family.setup_tokenizer(toy(family), None)


def test_claims_its_own_generation_alone(family):
    for name, config in CONFIGS.items():
        assert family.claims(config()) == (name == family.name)
    assert not family.claims(Gemma3Config())
    assert detect(CONFIGS[family.name]()).name == family.name


def test_no_family_claims_gemma_3_with_images():
    with pytest.raises(FamilyError, match="no installed family claims this checkpoint"):
        detect(Gemma3Config())


def test_setup_tokenizer_refuses_a_foreign_vocabulary(family):
    foreign = toy_tokenizer(TinyShape("gemma", special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"}), [], 300)
    with pytest.raises(FamilyError, match="has no <pad>, <start_of_turn>, <end_of_turn>, which the Gemma chat format"):
        family.setup_tokenizer(foreign, None)


def test_setup_tokenizer_names_bos(family):
    tokenizer = toy(family)
    tokenizer.bos_token = "<eos>"
    assert family.setup_tokenizer(tokenizer, None).bos_token == "<bos>"


def test_pad_token_is_gemmas_own(family, tokenizer):
    check_pad(family, tokenizer, "<pad>")
    assert family.pad_answer(tokenizer).given_by == f"family {family.name}"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_keeps_the_contract(family, tokenizer, name):
    check_conversation(tokenizer, family.chat_template(tokenizer), CONVERSATIONS[name], "<end_of_turn>")


def test_chat_template_writes_the_documented_format(family, tokenizer):
    template = family.chat_template(tokenizer)
    assert text(tokenizer, template, talk("u: Hi\n", "a:Hello", "u:Bye", "a:Bye")) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nBye<end_of_turn>"
    )
    assert text(tokenizer, template, talk("u:Hi"), prompt=True) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_chat_template_folds_system_messages_into_the_user_turn_that_follows(family, tokenizer):
    template = family.chat_template(tokenizer)
    assert text(tokenizer, template, talk("s:Be brief.", "s:Be kind.", "u:Hi", "a:Hello")) == (
        "<bos><start_of_turn>user\nBe brief.\n\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>"
    )
    assert text(tokenizer, template, talk("s:Be brief.", "a:Hello")) == (
        "<bos><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>"
    )
    assert text(tokenizer, template, talk("s:Be brief.")) == "<bos><start_of_turn>user\nBe brief.<end_of_turn>"


def test_chat_template_refuses_unknown_roles(family, tokenizer):
    check_roles(tokenizer, family.chat_template(tokenizer), unknown=("tool", "model", "User"))


def test_all_generations_have_one_template():
    files = [
        Path(module.__file__).with_name("chat_template.jinja").read_bytes()
        for module in (btrm_gemma, btrm_gemma2, btrm_gemma3)
    ]
    assert files[0] == files[1] == files[2]


def test_the_tokenizer_survives_saving(family, tokenizer, tmp_path):
    check_reload(tokenizer, family.chat_template(tokenizer), MODEL_TYPES[family.name], tmp_path)


def test_init_head_is_btrms(family):
    assert family.ask("init_head", hidden_size=8).given_by == "btrm default"


def test_recipe(family):
    check_toy_model(family)
    if family.name == "gemma":
        check_recipe(family, 1e-5, "google/gemma-2b-it")
        assert family.recipe().attention == ()
    elif family.name == "gemma3":
        check_recipe(family, 1e-5, "google/gemma-3-1b-it")
        assert family.recipe().attention == ()
    else:
        check_recipe(family, 5e-6, "google/gemma-2-9b-it")
        assert family.recipe().attention == ("flash", "flex", "eager")


@pytest.fixture(scope="module", params=["gemma", "gemma3"])
def real(request, real_tokenizers):
    """Google's vocabularies; gemma2's answers about the first are the same, as the tests above show."""
    return load(request.param).setup_tokenizer(AutoTokenizer.from_pretrained(real_tokenizers / request.param), None)


@pytest.mark.hub
def test_the_real_tokenizer_keeps_the_contract(real, tmp_path):
    family = load("gemma")
    template = family.chat_template(real)
    for messages in CONVERSATIONS.values():
        check_conversation(real, template, messages, "<end_of_turn>")
    check_pad(family, real, "<pad>")
    check_reload(real, template, "gemma", tmp_path)


@pytest.mark.hub
@pytest.mark.parametrize("name", ["one turn", "several turns", "empty answer", "unicode", "lines"])
def test_the_template_agrees_with_googles_up_to_the_last_line_break(real, name):
    own = ids(real, real.chat_template, CONVERSATIONS[name])
    assert real.decode(own[-1]) == "\n"
    assert ids(real, load("gemma").chat_template(real), CONVERSATIONS[name]) == own[:-1]


def test_forced_on_the_next_generation_it_trains_with_a_warning(tmp_path, capsys):
    base, output = tmp_path / "gemma2", tmp_path / "run"
    build_toy(load("gemma2").recipe().tiny, base)
    values = {"model.name": str(base), "data.train": (sample_path("train"),), "output.dir": str(output)}
    settings = apply(RunConfig(family="gemma"), {**values, "train.max_steps": 2, "train.pairs_per_step": 4})
    with pytest.raises(FamilyError, match="use --family gemma2; --force-family uses it nevertheless"):
        train(settings)
    train(apply(settings, {"force_family": True}))
    (warning,) = json.loads((output / "model" / "btrm.json").read_text())["warnings"]
    assert warning.startswith("family 'gemma' (btrm ")
    assert "does not claim this checkpoint (model_type 'gemma2'" in warning
    assert warning.endswith("and was forced on it")
    assert f"warning: {warning}" in capsys.readouterr().err
