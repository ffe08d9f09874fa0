"""Answers that no run can use, one fault each: refused where they are asked, with family, origin, hook and value."""

from __future__ import annotations

import pytest

from btrm_core.chat import prepare_chat
from btrm_core.config import read_settings
from btrm_core.errors import FamilyError
from btrm_core.families.discovery import load
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.toy import toy_model, toy_tokenizer

TOKENIZER = toy_tokenizer(
    TinyShape("x", special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, control_tokens=("<pad>",)), [], 300
)
HOOK = "from btrm_core import PadToken, Recipe, TinyShape, hookimpl\n\n@hookimpl\ndef {hook}({takes}):\n    {body}\n"


def answer(install, hook, body, takes="", **arguments):
    install(HOOK.format(hook=hook, takes=takes, body=body))
    with pytest.raises(FamilyError) as caught:
        load("foo").ask(hook, **arguments)
    text = str(caught.value)
    assert text.startswith(f"family 'foo' (btrm-foo 1.0): hook {hook}")
    assert text.isprintable()
    return text.removeprefix(f"family 'foo' (btrm-foo 1.0): hook {hook}")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("learning_rate=-1e-3", "learning_rate is -0.001; expected a finite number, above 0, or None"),
        ("learning_rate='1e-5'", "learning_rate is '1e-5'; expected a finite number"),
        ("learning_rate=float('nan')", "learning_rate is nan; expected a finite number"),
        ("learning_rate=True", "learning_rate is True; expected a finite number"),
        ("pairs_per_step=8.5", "pairs_per_step is 8.5; expected a whole number, above 0, or None"),
        ("pairs_per_step=0", "pairs_per_step is 0; expected a whole number"),
        ("max_length=10**30", "max_length is 1" + "0" * 30),
        ("epochs=float('inf')", "epochs is inf; expected a finite number"),
        ("warmup_ratio=2", "warmup_ratio is 2; expected a finite number, 0 or more, at most 1, or None"),
        ("weight_decay=-1", "weight_decay is -1; expected a finite number, 0 or more, or None"),
        ("attention=('warp',)", "attention names 'warp'; expected some of flash, varlen, flex, sdpa, eager"),
        ("attention=('flaxh',)", "or nothing to allow all. Did you mean 'flash'?"),
        ("attention='sdpa'", "attention is 'sdpa'; expected a tuple of names"),
        ("attention=(1,)", "attention names 1; expected some of"),
        ("example_model=7", "example_model is 7; expected the id of a model, or None"),
        ("tiny=dict()", "tiny is {}; expected a TinyShape, or None"),
        ("tiny=TinyShape(None)", "tiny.model_type is None; expected the model_type of a transformers config"),
        ("tiny=TinyShape('x', [1])", "tiny.config is [1]; expected values of the model's config by their names"),
        ("tiny=TinyShape('x', {1: 2})", "tiny.config is {1: 2}; expected values"),
        ("tiny=TinyShape('x', {'a': {2}})", "tiny.config is {'a': {2}}; expected values that config.json can hold"),
        ("tiny=TinyShape('x', {'vocab_size': 5})", "tiny.config names vocab_size; expected no such value"),
        ("tiny=TinyShape('x', {'hidden_size': 0})", "tiny.config has hidden_size 0; expected a whole number from 1 to"),
        ("tiny=TinyShape('x', {'hidden_size': '8'})", "tiny.config has hidden_size '8'; expected a whole number"),
        ("tiny=TinyShape('x', {'num_hidden_layers': 10**4})", "tiny.config has num_hidden_layers 10000; expected"),
        ("tiny=TinyShape('x', {}, {'pad_token': None})", "tiny.special_tokens is {'pad_token': None}; expected texts"),
        ("tiny=TinyShape('x', {}, {'paddy': 'x'})", "tiny.special_tokens names 'paddy'; expected some of bos_token"),
        (
            "tiny=TinyShape('x', control_tokens='<x>')",
            "tiny.control_tokens is '<x>'; expected a tuple of at most",
        ),
        ("tiny=TinyShape('x', control_tokens=('y',) * 5000)", "tiny.control_tokens is ('y', 'y'"),
    ],
)
def test_a_recipe_that_no_run_can_follow_is_refused(install, recipe, said):
    assert said in answer(install, "recipe", f"return Recipe({recipe})")


@pytest.mark.parametrize("recipe", ["attention=['sdpa', 'eager']", "attention=None", "learning_rate=1, epochs=2"])
def test_a_recipe_that_means_something_is_taken(install, recipe):
    install(HOOK.format(hook="recipe", takes="", body=f"return Recipe({recipe})"))
    assert load("foo").recipe().weight_decay == 0.001


@pytest.mark.parametrize(
    ("pad", "said"),
    [
        ("None", ": token is None; expected a text of at most 256 letters"),
        ("b'<pad>'", ": token is b'<pad>'; expected a text"),
        ("' '", ": token is ' '; expected a text"),
        ("'x' * 10**6, new=True", ": token is 'xxxxxxx"),
        ("'<\\ud800>', new=True", r": token is '<\ud800>'; expected a text"),
        ("'<pad>', new='no'", ": new is 'no'; expected True or False"),
        ("'<pad>', reason=None", ": reason is None; expected text"),
    ],
)
def test_a_pad_token_that_is_none_is_refused(install, pad, said):
    assert said in answer(install, "pad_token", f"return PadToken({pad})")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("'x' * (1 << 21)", ": the template has 2,097,152 letters; expected at most 1,048,576"),
        ("'{# \\ud800 #}'", ": the template has half of a surrogate pair; expected text that UTF-8 can hold"),
    ],
)
def test_a_template_that_no_file_can_hold_is_refused(install, template, said):
    assert answer(install, "chat_template", f"return {template}") == said


def test_an_answer_that_cannot_even_be_shown_is_refused(install):
    body = "return type('Odd', (), {'__repr__': lambda self: 1 / 0})()"
    said = answer(install, "claims", body, config=None)
    assert said == " answered with an object of Odd that cannot be shown (Odd); expected True, False or None"


@pytest.mark.parametrize(
    ("hook", "body"),
    [
        ("pad_token", "import itertools; COUNT.append(1); return PadToken(f'<{len(COUNT)}>', new=True)"),
        ("chat_template", "COUNT.append(1); return 'x' * 500 + str(len(COUNT))"),
        ("recipe", "COUNT.append(1); return Recipe(learning_rate=len(COUNT) / 1000)"),
        ("claims", "COUNT.append(1); return len(COUNT) == 1"),
        ("claims", "COUNT.append(1); return None if len(COUNT) == 1 else True"),
    ],
)
def test_an_answer_that_differs_at_the_second_asking_is_refused(install, hook, body):
    install("COUNT = []\n" + HOOK.format(hook=hook, takes="", body=body))
    with pytest.raises(FamilyError) as caught:
        load("foo").ask(hook, config=None, tokenizer=TOKENIZER)
    head = f"family 'foo' (btrm-foo 1.0): hook {hook} answers differently when asked a second time: "
    assert str(caught.value).startswith(head)
    first, second = str(caught.value).removeprefix(head).partition(";")[0].split(" and ")
    assert first != second


@pytest.mark.parametrize("change", ["add_tokens(['two words'])", "__setattr__('eos_token', '<pad>')"])
def test_a_hook_that_only_looks_may_not_change_the_tokenizer(install, change):
    tokenizer = toy_tokenizer(TinyShape("x", special_tokens={"eos_token": "</s>"}, control_tokens=("<pad>",)), [], 300)
    body = f"tokenizer.{change}; return PadToken('<pad>')"
    said = answer(install, "pad_token", body, "tokenizer", tokenizer=tokenizer)
    assert said.startswith(" changes the tokenizer, which it is given to look at")


def test_what_a_hook_does_to_the_config_changes_nothing(install):
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=77)
    install(HOOK.format(hook="claims", takes="config", body="config.vocab_size = 1; return True"))
    assert load("foo").claims(config) is True
    assert config.vocab_size == 77


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        ("w.fill_(DRAWS.random())", ": the head differs between two draws with the same seed"),
        ("setattr(w, 'data', w.double().zero_())", " gave a function that makes (1, 8) of torch.float64; expected one"),
        (
            "setattr(w, 'data', w[:, :3])",
            " gave a function that makes (1, 3) of torch.float32; expected one",
        ),
    ],
)
def test_a_head_is_filled_in_place_and_alike(install, fill, said):
    body = f"return lambda w: {fill}"
    install(f"import random\nDRAWS = random.Random()\n{HOOK.format(hook='init_head', takes='', body=body)}")
    with pytest.raises(FamilyError) as caught:
        load("foo").drawn_head(8)
    assert str(caught.value).startswith(f"family 'foo' (btrm-foo 1.0): hook init_head{said}")


@pytest.mark.parametrize(
    ("shape", "cause"),
    [
        ("'nonesuch'", "of model_type 'nonesuch' (ValueError: Unrecognized model identifier: nonesuch"),
        ("'t5'", "of model_type 't5' (ValueError: Unrecognized configuration class"),
        ("'llama', {'num_attention_heads': 3}", "not a multiple of the number of attention heads (3)"),
        ("'llama', {'hidden_act': 'nope'}", "(KeyError: 'nope')"),
    ],
)
def test_a_shape_that_transformers_refuses_names_the_family(install, tmp_path, shape, cause):
    install(HOOK.format(hook="recipe", takes="", body=f"return Recipe(tiny=TinyShape({shape}))"))
    with pytest.raises(FamilyError) as caught:
        toy_model(load("foo"), tmp_path)
    assert str(caught.value).startswith("family 'foo' (btrm-foo 1.0): hook recipe: no toy can be made from its Tiny")
    assert cause in str(caught.value)


def test_a_template_that_breaks_its_promise_names_family_and_origin_in_a_run(install, tmp_path):
    from btrm_core.training.prepare import choose

    shape = "TinyShape('llama', special_tokens={'eos_token': '</s>'}, control_tokens=('<pad>',))"
    install(
        HOOK.format(hook="recipe", takes="", body=f"return Recipe(tiny={shape})")
        + "\n@hookimpl\ndef chat_template(): return 'always the same'\n"
    )
    with pytest.raises(FamilyError) as caught:
        choose(read_settings(None, {"family": "foo", "data.cache_dir": str(tmp_path)}))
    assert str(caught.value).startswith("family 'foo' (btrm-foo 1.0): chat template (family foo) loses or changes")
    with pytest.raises(FamilyError, match=r"^chat template \(family foo\)"):
        prepare_chat(TOKENIZER, None, load("foo"))
