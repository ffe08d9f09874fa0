"""Gemma 3 text models (270M, 1B): Gemma's chat format on a model with two rotary bases and sliding windows.

The format is that of Gemma 1 and 2 on a larger vocabulary. Five of six layers look back over a window and have a rotary
base of their own. The checkpoints with images (4B and larger) have another `model_type` and are not claimed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl
from btrm_core.families.hookspecs import require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BOS, PAD = "<bos>", "<pad>"
CONTROL_TOKENS = ("<start_of_turn>", "<end_of_turn>")


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """The text models alone; with images, it is `gemma3`."""
    return bool(config.model_type == "gemma3_text")


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary, and name BOS."""
    require_tokens(tokenizer, (BOS, PAD, *CONTROL_TOKENS), "the Gemma chat format")
    if tokenizer.bos_token != BOS:
        tokenizer.bos_token = BOS
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Gemma 3 has a pad token of its own."""
    return PadToken(PAD, reason="Gemma's own pad token")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """The learning rate is assumed, not tuned: gemma-2b's, for models of at most its size."""
    return Recipe(
        learning_rate=1e-5,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        example_model="google/gemma-3-1b-it",
        tiny=TinyShape(
            model_type="gemma3_text",
            config={
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                },
            },
            special_tokens={"bos_token": BOS, "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": PAD},
            control_tokens=CONTROL_TOKENS,
        ),
    )
