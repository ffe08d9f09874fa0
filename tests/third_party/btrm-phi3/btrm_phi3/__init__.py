"""Phi-3 mini and medium, 4k context: <|user|> ... <|end|> turns, no BOS.

The tokenizer names <|endoftext|> as EOS and as pad token at once; a token that Microsoft left without a meaning pads
here. The longer contexts choose their rotary frequencies by the length of the batch and are not claimed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl
from btrm_core.families.hookspecs import require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

END, PAD = "<|end|>", "<|placeholder1|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """Tell the short context from the long ones by the rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return config.model_type == "phi3" and rope.get("rope_type", "default") == "default"


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary; the turn's end is EOS here."""
    require_tokens(tokenizer, (*ROLES, END, PAD), "the Phi-3 chat format")
    if tokenizer.eos_token != END:
        tokenizer.eos_token = END
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Not the tokenizer's own, which is EOS."""
    return PadToken(PAD, reason="reserved by Microsoft and never written; no resize")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """The learning rate is assumed, not tuned."""
    return Recipe(
        learning_rate=5e-6,
        max_length=4096,
        example_model="microsoft/Phi-3-mini-4k-instruct",
        tiny=TinyShape(
            model_type="phi3",
            config={"sliding_window": 64},
            special_tokens={"eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"},
            control_tokens=(*ROLES, END, PAD),
        ),
    )
