"""Gemma 2: Gemma's chat format on a model with soft-capped attention and alternating sliding windows.

The vocabulary and the template are those of Gemma 1. What differs is the attention: its logits are soft-capped, which
the fused kernels of PyTorch cannot do, so the recipe names the kernels that can.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl, require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BOS, PAD = "<bos>", "<pad>"
CONTROL_TOKENS = ("<start_of_turn>", "<end_of_turn>")


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """Gemma 1 and 3 have a `model_type` of their own."""
    return bool(config.model_type == "gemma2")


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary, and name BOS."""
    require_tokens(tokenizer, (BOS, PAD, *CONTROL_TOKENS), "the Gemma chat format")
    if tokenizer.bos_token != BOS:
        tokenizer.bos_token = BOS
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Gemma 2 has a pad token of its own."""
    return PadToken(PAD, reason="Gemma's own pad token")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """The published values for Gemma 1; the learning rate is assumed: half of gemma-2b's, for a larger model."""
    return Recipe(
        learning_rate=5e-6,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        # SDPA and torch's variable-length kernel have no soft-cap: they would drop it without a word.
        attention=("flash", "flex", "eager"),
        example_model="google/gemma-2-9b-it",
        tiny=TinyShape(
            model_type="gemma2",
            config={
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 64,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            special_tokens={"bos_token": BOS, "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": PAD},
            control_tokens=CONTROL_TOKENS,
        ),
    )
