"""Llama 3, 3.1, 3.2 and 3.3: header tokens around each role, turns that end in <|eot_id|>.

The control tokens are Meta's; the template is btrm's and, unlike Meta's for 3.1 and later, writes no date, so a
conversation has the same ids every day. It also serves the first release of Llama 3, whose own template opens an
assistant turn after every conversation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl, require_tokens, rope_theta

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BOS = "<|begin_of_text|>"
CONTROL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Best first: Llama 3.1 and later have a token made for this; the first release only has tokens without a meaning.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
ROPE_THETA = 500_000.0


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """Tell Llama 3 from the others of its architecture by the rotary base.

    Llama 2 has 10 000, SmolLM2 100 000, Code Llama 1 000 000.
    """
    return bool(config.model_type == "llama" and rope_theta(config) == ROPE_THETA)


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary (models distilled into Llama 3 often bring their own), and name BOS."""
    require_tokens(tokenizer, (BOS, *CONTROL_TOKENS), "the Llama 3 chat format")
    if tokenizer.bos_token != BOS:
        tokenizer.bos_token = BOS
    return tokenizer


@hookimpl
def pad_token(tokenizer: PreTrainedTokenizerBase) -> PadToken | None:
    """Take a token that Meta reserved: Llama 3 has no pad token, and a new one would resize the embedding."""
    for token in PAD_TOKENS:
        if token in tokenizer.get_vocab():
            return PadToken(token, reason="reserved by Meta and never written; no resize")
    return None


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """Values published for Meta-Llama-3-8B-Instruct reward models (RLHFlow)."""
    return Recipe(
        learning_rate=2e-6,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        example_model="meta-llama/Meta-Llama-3-8B-Instruct",
        tiny=TinyShape(
            model_type="llama",
            config={"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}},
            special_tokens={"bos_token": BOS, "eos_token": "<|eot_id|>"},
            control_tokens=("<|end_of_text|>", "<|reserved_special_token_0|>", *CONTROL_TOKENS[:2]),
        ),
    )
