"""Mistral 7B Instruct v0.1 to v0.3 and others with its vocabularies: [INST] ... [/INST] around instructions.

There are two vocabularies: in v0.1 and v0.2 `[INST]` is plain text, in v0.3 it is a control token, and the spacing
around it differs. Both templates give the ids of Mistral's own encoder (mistral-common), except that a system message
opens the instruction that follows it, never the last one, so that a prompt's ids begin the whole conversation's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl, require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTROL_TOKENS = ("[INST]", "[/INST]")
# 32768 and a few added tokens. Mistral Nemo and later have 131072 (the "tekken" vocabulary, another chat format).
MAX_VOCAB_SIZE = 32_776


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """Mixtral and Mistral 3 have a `model_type` of their own; Nemo shares it, with a larger vocabulary."""
    return bool(config.model_type == "mistral" and config.vocab_size <= MAX_VOCAB_SIZE)


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary; leave it to the template to write the space before a word.

    Whether a SentencePiece tokenizer puts a space after a control token by itself depends on how it was loaded and
    changes when it is saved and loaded again. The templates write that space, so here the tokenizer stops doing it.
    """
    from tokenizers import pre_tokenizers

    require_tokens(tokenizer, SPECIAL_TOKENS.values(), "the Mistral chat format")
    for role, token in SPECIAL_TOKENS.items():
        if getattr(tokenizer, role) != token:
            setattr(tokenizer, role, token)
    backend = tokenizer.backend_tokenizer
    if "▁" in tokenizer.get_vocab():
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Mistral has no pad token, and spells unknown characters in bytes."""
    return PadToken("<unk>", reason="never written, because unknown characters are spelled in bytes; no resize")


@hookimpl
def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Read the template of the vocabulary at hand."""
    control = all(token in tokenizer.get_vocab() for token in CONTROL_TOKENS)
    name = "chat_template.jinja" if control else "chat_template_v1.jinja"
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """Values published for Mistral-7B-Instruct-v0.2 reward models (RLHFlow)."""
    return Recipe(
        learning_rate=5e-6,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        example_model="mistralai/Mistral-7B-Instruct-v0.2",
        tiny=TinyShape(
            model_type="mistral",
            config={"sliding_window": 128},
            special_tokens=SPECIAL_TOKENS,
            control_tokens=CONTROL_TOKENS,
        ),
    )
