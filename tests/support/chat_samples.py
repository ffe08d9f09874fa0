"""Small tokenizers, templates and families that the chat tests share. Everything is made in memory."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btrm_core import families
from btrm_core.chat.format import ChatFormat, prepare_chat
from btrm_core.families.family import Family
from btrm_core.families.hookspecs import PadToken, TinyShape, hookimpl
from btrm_core.model.toy import toy_tokenizer

TEXTS = [
    "The capital of France is Paris, and the river is the Seine.",
    "Hello, how are you? I'm doing great. How can I help you today?",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Übermut tut selten gut. 你好，世界！ Привет, мир. ¿Qué tal? 🙂",
]

HEADERS = TinyShape(  # like Llama 3
    "llama",
    special_tokens={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    control_tokens=("<|reserved_0|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
CHATML = TinyShape(  # like SmolLM2: BOS opens every turn
    "llama",
    special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    control_tokens=("<|reserved_0|>",),
)

HEADERS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
TURNS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
INST_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }}[/INST]{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"
)


class Plugin:
    """A family that gives the answers it was made with."""

    def __init__(self, template: str | None = None, pad: PadToken | None = None) -> None:
        self._answers = {"template": template, "pad": pad}

    @hookimpl
    def chat_template(self) -> Any:
        return self._answers["template"]

    @hookimpl
    def pad_token(self) -> Any:
        return self._answers["pad"]


def family(template: str | None = None, pad: PadToken | None = None) -> Family:
    return Family("sample", "tests 0", Plugin(template, pad))


def byte_tokenizer(shape: TinyShape = HEADERS) -> Any:
    return toy_tokenizer(shape, TEXTS, vocab_size=400)


def metaspace_tokenizer() -> Any:
    """Like Mistral's: `▁` before every stretch of text, byte fallback, control tokens inside the model's vocabulary.

    Two merges build `</s>` out of letters, so that text reaches the control token unless something prevents it.
    """
    pieces = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *(chr(c) for c in range(33, 127)), "he", "ll", "▁he", "▁hell", "▁hello", "</", "s>", "▁<", "▁a"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("▁he", "ll"), ("▁hell", "o"), ("<", "/"), ("s", ">"), ("</", "s>")]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [*merges, ("▁", "<"), ("▁", "a")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["[INST]", "[/INST]"],
    )


def unigram_tokenizer() -> Any:
    """Like T5's: a Unigram model with its control tokens in the vocabulary, and a normalizer."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((chr(c), -4.0) for c in range(33, 127))]
    backend = Tokenizer(models.Unigram([*pieces, ("▁hello", -3.0), ("</s", -3.5)], unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def chat_format(kind: str) -> ChatFormat:
    """A ready format of one of three kinds: headers (Llama 3), chatml (SmolLM2), inst (Mistral)."""
    tokenizer, template = {
        "headers": lambda: (byte_tokenizer(HEADERS), HEADERS_TEMPLATE),
        "chatml": lambda: (byte_tokenizer(CHATML), CHATML_TEMPLATE),
        "inst": lambda: (metaspace_tokenizer(), INST_TEMPLATE),
    }[kind]()
    return prepare_chat(tokenizer, None, family(template))


KINDS = ("headers", "chatml", "inst")


def make_chat(family="llama3", texts=("the quick brown fox", "a question", "an answer")):
    from transformers import LlamaConfig

    loaded = families.load(family)
    return prepare_chat(toy_tokenizer(loaded.recipe().tiny, texts), LlamaConfig(), loaded)
