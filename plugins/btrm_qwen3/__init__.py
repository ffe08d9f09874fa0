"""Qwen 2.5 and Qwen 3 dense models, base and instruct: ChatML turns, no BOS.

Messages are written as they are: unlike Qwen's, the template adds no default system message, and neither adds an empty
<think> block to the last answer nor takes such blocks out of earlier ones, so an answer has the same ids wherever it
stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btrm_core import PadToken, Recipe, TinyShape, hookimpl
from btrm_core.families.hookspecs import require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# Qwen 1.5 to 2.5 are all "qwen2".
MODEL_TYPES = ("qwen2", "qwen3")


@hookimpl
def claims(config: PretrainedConfig) -> bool:
    """The mixtures of experts and the models with images have a `model_type` of their own."""
    return bool(config.model_type in MODEL_TYPES)


@hookimpl
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a foreign vocabulary (models distilled into Qwen bring their own tokens), and name EOS.

    Base checkpoints name the pad token as EOS, which is <|im_end|> here.
    """
    require_tokens(tokenizer, (START, END, PAD), "the Qwen chat format")
    if tokenizer.eos_token != END:
        tokenizer.eos_token = END
    return tokenizer


@hookimpl
def pad_token() -> PadToken:
    """Qwen has a pad token of its own."""
    return PadToken(PAD, reason="Qwen's own pad token")


@hookimpl
def chat_template() -> str:
    """Read the template beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@hookimpl
def recipe() -> Recipe:
    """The learning rate is assumed, not tuned: that of the 7B models of other families."""
    return Recipe(
        learning_rate=5e-6,
        pairs_per_step=512,
        max_length=4096,
        epochs=1.0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        example_model="Qwen/Qwen3-8B",
        tiny=TinyShape(
            model_type="qwen3",
            config={"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
            special_tokens={"eos_token": END, "pad_token": PAD},
            control_tokens=(START,),
        ),
    )
