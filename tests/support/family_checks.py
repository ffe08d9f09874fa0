"""What every family's template and pad policy must keep to, checked on any tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btrm_core.model.toy import toy_tokenizer

NAMES = {"s": "system", "u": "user", "a": "assistant"}


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages from "u:Hello"-like texts."""
    return [{"role": NAMES[turn[0]], "content": turn[2:]} for turn in turns]


CONVERSATIONS = {
    "one turn": talk("u:What is 2 + 2?", "a:Four."),
    "several turns": talk("u:Hello", "a:Hi!", "u:What is 2 + 2?", "a:Do you mean 4?"),
    "system": talk("s:Be brief.", "u:What is 2 + 2?", "a:4"),
    "two systems": talk("s:Be brief.", "s:Be kind.", "u:Hello", "a:Hi"),
    "late system": talk("u:Hello", "a:Hi", "s:Be brief.", "u:What is 2 + 2?", "a:4"),
    "system before an answer": talk("s:Tell a joke.", "a:Knock, knock."),
    "same role twice": talk("u:Hello", "u:Are you there?", "a:Yes.", "a:I am."),
    "answer first": talk("a:How can I help?", "u:What is 2 + 2?", "a:4"),
    "empty question": talk("u:", "a:Yes?"),
    "empty answer": talk("u:Hello", "a:"),
    "all empty": talk("s:", "u:", "a:"),
    "unicode": talk("u:naïve 日本語 🙂 \u200d مرحبا", "a:Ünïcode 👩\u200d👩\u200d👧 ¿qué?"),
    "lines": talk("u:one\n\ntwo\n  three", "a:```\ncode\n```"),
}
SYSTEM_AND_MORE = [name for name, messages in CONVERSATIONS.items() if any(m["role"] == "system" for m in messages)]


def toy(family, texts=("What is 2 + 2? Hello, be brief.",)):
    """The family's own toy tokenizer."""
    return toy_tokenizer(family.recipe().tiny, texts, 600)


def text(tokenizer, template, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)


def ids(tokenizer, template, messages, prompt=False):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False, add_generation_prompt=prompt
    )


def check_conversation(tokenizer, template, messages, terminal):
    """One BOS, one fixed terminal token, nothing lost or reordered, and the prompt's ids begin the conversation's."""
    rendered, encoded = text(tokenizer, template, messages), ids(tokenizer, template, messages)
    if tokenizer.bos_token is not None:
        assert encoded[0] == tokenizer.bos_token_id
        assert encoded.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(encoded[-1]) == terminal
    assert rendered.endswith(terminal)
    at = 0
    for message in messages:
        at = rendered.index(message["content"].strip(), at) + len(message["content"].strip())
    prompt = ids(tokenizer, template, messages[:-1], prompt=True)
    assert encoded[: len(prompt)] == prompt
    assert tokenizer.decode(encoded[len(prompt) : -1]).strip() == messages[-1]["content"].strip()
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == encoded


def check_roles(tokenizer, template, unknown=("tool", "bot", "User")):
    """A role that the template does not know is refused with its name."""
    for role in unknown:
        with pytest.raises(Exception, match=f"unknown role '{role}': expected system, user or assistant"):
            text(tokenizer, template, [{"role": role, "content": "x"}])


def check_pad(family, tokenizer, expected):
    """The pad token is in the vocabulary, special in meaning, and no conversation contains it."""
    pad = family.pad_token(tokenizer)
    assert (pad.token, pad.new) == (expected, False)
    assert pad.reason
    pad_id = tokenizer.convert_tokens_to_ids(pad.token)
    template = family.chat_template(tokenizer)
    assert all(pad_id not in ids(tokenizer, template, messages) for messages in CONVERSATIONS.values())


def check_reload(tokenizer, template, model_type, directory: Path):
    """A saved tokenizer gives the same ids, with the checkpoint's config beside it and without."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(directory)
    alone = AutoTokenizer.from_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    beside = AutoTokenizer.from_pretrained(directory)
    for messages in CONVERSATIONS.values():
        expected = ids(tokenizer, template, messages)
        assert ids(alone, template, messages) == expected
        assert ids(beside, template, messages) == expected


def check_toy_model(family):
    """The recipe's tiny shape builds a model of the family's own kind, which the family claims and which runs."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny, tokenizer = family.recipe().tiny, toy(family)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        tiny.model_type, vocab_size=len(tokenizer), num_key_value_heads=1, num_labels=1, **sizes, **tiny.config
    )
    assert family.claims(config)
    config.pad_token_id = tokenizer.convert_tokens_to_ids(family.pad_token(tokenizer).token)
    model = AutoModelForSequenceClassification.from_config(config)
    encoded = ids(tokenizer, family.chat_template(tokenizer), CONVERSATIONS["system"])
    assert torch.isfinite(model(torch.tensor([encoded])).logits).all()
    assert all(getattr(tokenizer, role) == token for role, token in tiny.special_tokens.items())


def check_recipe(family, learning_rate, example_model):
    recipe = family.recipe()
    assert (recipe.learning_rate, recipe.example_model) == (learning_rate, example_model)
    assert (recipe.pairs_per_step, recipe.max_length, recipe.epochs) == (512, 4096, 1.0)
    assert (recipe.warmup_ratio, recipe.weight_decay) == (0.03, 0.001)
    assert set(recipe.attention) <= {"flash", "varlen", "flex", "sdpa", "eager"}
