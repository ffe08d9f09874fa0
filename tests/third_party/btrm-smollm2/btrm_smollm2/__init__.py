"""SmolLM2 135M, 360M and 1.7B: ChatML turns on a small Llama.

The tokenizer names one token for three things: <|im_end|> ends a turn, is EOS and is the pad token. Padding with it
would hide the token where the reward is read, so <|endoftext|> pads here. No system message is added to a conversation
that has none: the original template's introduces the assistant as SmolLM, which is not whom a reward model judges.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl, require_tokens, rope_theta

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# 135M and 360M, 1.7B. Llama 2 has 10 000, Llama 3 500 000.
ROPE_THETAS = (100_000.0, 130_000.0)
# 49152 and a few added tokens.
MAX_VOCAB_SIZE = 49_160


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """Tell SmolLM2 from the other Llamas by the rotary base and the vocabulary; SmolLM3 has its own `model_type`."""
    return config.model_type == "llama" and rope_theta(config) in ROPE_THETAS and config.vocab_size <= MAX_VOCAB_SIZE


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary."""
    require_tokens(tokenizer, (START, END, PAD), "the SmolLM2 chat format")
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Not the tokenizer's own, which is EOS."""
    return PadToken(PAD, reason="parts documents in pre-training and is in no conversation; no resize")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """The learning rate is assumed, not tuned: small models bear a higher one than large ones."""
    return Recipe(
        learning_rate=2e-5,
        pairs_per_step=32,
        max_length=2048,
        example_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        tiny=TinyShape(
            model_type="llama",
            config={"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETAS[0]}},
            special_tokens={"bos_token": START, "eos_token": END, "unk_token": PAD, "pad_token": END},
        ),
    )
