"""Gemma 1: turns between <start_of_turn> and <end_of_turn>, no system role.

The format has no system role, so a system message opens the user turn that follows it (or stands as a user turn of its
own if none follows). A conversation ends in <end_of_turn> itself, without the line break that Google's template adds,
so that the reward is read at the token that ends the turn.
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
    """Gemma 2 and 3 have a `model_type` of their own."""
    return bool(config.model_type == "gemma")


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary, and name BOS."""
    require_tokens(tokenizer, (BOS, PAD, *CONTROL_TOKENS), "the Gemma chat format")
    if tokenizer.bos_token != BOS:
        tokenizer.bos_token = BOS
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Gemma has a pad token of its own."""
    return PadToken(PAD, reason="Gemma's own pad token")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """Values published for gemma-2b-it reward models (RLHFlow)."""
    return Recipe(
        learning_rate=1e-5,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        example_model="google/gemma-2b-it",
        tiny=TinyShape(
            model_type="gemma",
            config={"head_dim": 32},
            special_tokens={"bos_token": BOS, "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": PAD},
            control_tokens=CONTROL_TOKENS,
        ),
    )
