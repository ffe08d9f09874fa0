"""What each built-in family makes of the golden conversations: rendered text and ids, compared with files.

The text and the ids of tiny in-memory tokenizers are compared in every run, the ids of the real tokenizers where these
are at hand. `pytest --update-golden` writes the files anew; the change then says why.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from btrm_core import families
from btrm_core.chat.format import ChatFormat, prepare_chat
from btrm_core.model.toy import toy_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
SPELLED = "control tokens as text"

# variant (also the real tokenizer's directory) -> families that use it, changes to the family's tiny shape
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "gemma": (("gemma", "gemma2"), {}),
    "gemma3": (("gemma3",), {}),
    "qwen3": (("qwen3",), {}),
    "mistral-v1": (("mistral",), {"control_tokens": ()}),
    "mistral-v3": (("mistral",), {}),
    "llama3": (("llama3",), {}),
    "llama3.1": (
        ("llama3",),
        {
            "control_tokens": (
                "<|finetune_right_pad_id|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|end_of_text|>",
            )
        },
    ),
    "llama3-first": (
        ("llama3",),
        {
            "special_tokens": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
            "control_tokens": (
                "<|eot_id|>",
                "<|reserved_special_token_0|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
            ),
        },
    ),
}
PAIRS = [(variant, family) for variant, (users, _) in VARIANTS.items() for family in users]
REAL = [(variant, users[0]) for variant, (users, _) in VARIANTS.items()]


@functools.cache
def tiny_format(variant: str, family: str) -> ChatFormat:
    loaded = families.load(family)
    shape = dataclasses.replace(loaded.recipe().tiny, **VARIANTS[variant][1])
    texts = [message["content"] for conversation in CONVERSATIONS.values() for message in conversation]
    return prepare_chat(toy_tokenizer(shape, texts, vocab_size=512), None, loaded)


@functools.cache
def real_format(directory: Path, family: str) -> ChatFormat:
    return prepare_chat(AutoTokenizer.from_pretrained(directory), None, families.load(family))


def compare(variant: str, values: dict[str, dict[str, Any]], update: bool) -> None:
    """Compare (or with `update` replace) part of a golden file: name -> key -> value."""
    path = GOLDEN / f"{variant}.json"
    golden = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if update:
        for name, keys in values.items():
            golden.setdefault(name, {}).update(keys)
        path.write_text(dump(golden), encoding="utf-8")
    for name, keys in values.items():
        assert name in golden, f"{path.name} does not know {name!r}: run pytest --update-golden"
        assert {key: golden[name].get(key) for key in keys} == keys, name


def dump(golden: dict[str, dict[str, Any]]) -> str:
    """Write JSON with one line per value, so that a change reads well."""
    blocks = []
    for name, keys in golden.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items()]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def named_tokens(chat: ChatFormat) -> dict[str, Any]:
    return {"bos": chat.tokenizer.bos_token, "terminal": chat.terminal_token, "pad": chat.pad.token}


def control_ids(chat: ChatFormat, ids: list[int]) -> list[int]:
    return [index for index in ids if index in chat.control_ids]


@pytest.mark.parametrize(("variant", "family"), PAIRS)
def test_text_and_tiny_ids(variant, family, update_golden):
    chat = tiny_format(variant, family)
    ids = chat.encode(list(CONVERSATIONS.values()))
    values = {
        name: {"text": chat.render(conversation), "tiny_ids": sequence}
        for (name, conversation), sequence in zip(CONVERSATIONS.items(), ids, strict=True)
    }
    compare(variant, {"format": named_tokens(chat), **values}, update_golden)


@pytest.mark.hub
@pytest.mark.parametrize(("variant", "family"), REAL)
def test_real_ids(variant, family, real_tokenizers, update_golden):
    chat = real_format(real_tokenizers / variant, family)
    ids = dict(zip(CONVERSATIONS, chat.encode(list(CONVERSATIONS.values())), strict=True))
    values = {name: {"text": chat.render(c), "ids": ids[name]} for name, c in CONVERSATIONS.items()}
    compare(variant, {"format": {**named_tokens(chat), "pad_id": chat.pad_id}, **values}, update_golden)
    assert chat.num_new_tokens == 0
    for name, sequence in ids.items():
        if chat.bos_id is not None:
            assert (sequence[0], sequence.count(chat.bos_id)) == (chat.bos_id, 1)
        assert sequence[-1] == chat.terminal_id
        assert chat.pad_id not in sequence
        if name != SPELLED:
            conversation = CONVERSATIONS[name]
            own = chat.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
            assert sequence == own


@pytest.mark.hub
@pytest.mark.parametrize("name", ["four messages", "one exchange"])
def test_real_ids_are_those_of_the_publishers_own_templates(name, real_tokenizers):
    conversation = CONVERSATIONS[name]
    llama = AutoTokenizer.from_pretrained(real_tokenizers / "llama3")
    own = llama.apply_chat_template(conversation, tokenize=True, return_dict=False)
    assert real_format(real_tokenizers / "llama3", "llama3").encode([conversation])[0] == own
    gemma = AutoTokenizer.from_pretrained(real_tokenizers / "gemma")
    own = gemma.apply_chat_template(conversation, tokenize=True, return_dict=False)
    newline = gemma.convert_tokens_to_ids("\n")
    assert [*real_format(real_tokenizers / "gemma", "gemma").encode([conversation])[0], newline] == own


@pytest.mark.parametrize(("variant", "family"), PAIRS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_no_text_produces_a_control_token(variant, family, data):
    check_no_injection(tiny_format(variant, family), data)


@pytest.mark.hub
@pytest.mark.parametrize(("variant", "family"), [pair for pair in REAL if pair[0] in ("gemma", "llama3", "mistral-v3")])
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_produces_a_control_token_of_a_real_tokenizer(variant, family, real_tokenizers, data):
    check_no_injection(real_format(real_tokenizers / variant, family), data)


def check_no_injection(chat: ChatFormat, data: st.DataObject) -> None:
    """Arbitrary text, control tokens spelled out included, leaves only the template's own control tokens."""
    written = st.sampled_from([*list(chat.encoder.controls)[:12], "<", "</s>", "[INST]", " ", "▁", "\U0010fffd"])
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    content = st.lists(st.one_of(text, written), min_size=1, max_size=5).map(lambda parts: "x" + "".join(parts) + "x")
    conversation = [{"role": role, "content": data.draw(content)} for role in ("system", "user", "assistant")]
    benign = [{**message, "content": "x"} for message in conversation]
    ids, plain = chat.encode([conversation])[0], chat.encode([benign])[0]
    assert control_ids(chat, ids) == control_ids(chat, plain)
    assert chat.encoder.encode_hidden(chat.render(benign), {}) == plain
    decoded = chat.tokenizer.decode(ids, skip_special_tokens=False).replace("▁", " ")  # SentencePiece writes " " so
    for message in conversation:
        assert message["content"].replace("▁", " ") in decoded
