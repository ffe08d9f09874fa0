"""The contract between btrm and a model family: six questions, each with a default.

A family is a module or an instance that answers some of these questions with functions marked `@hookimpl`, published
under the entry-point group `btrm.families`. For each question btrm asks the run's own settings, then the family, then
its defaults; the first answer that is not None wins. An implementation may take fewer arguments than the specification,
and must be deterministic: every process of a run asks for itself and must get the same answer. What is quick to ask is
asked twice, and every answer is checked where it is asked (`answers`).

The docstrings below are the reference text. What transformers knows about a model already (its attention, rotary
positions, soft-capping) is no question here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from btrm_core.errors import FamilyError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PROJECT = "btrm"


ENTRY_POINT_GROUP = "btrm.families"


HOOKS = ("claims", "setup_tokenizer", "pad_token", "chat_template", "init_head", "recipe")


hookspec = pluggy.HookspecMarker(PROJECT)


hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class PadToken:
    """Which token fills up a padded batch, and why that one.

    A token that is in the vocabulary already is preferred: a new one costs an embedding row and changes the shape of
    the checkpoint.
    """

    token: str
    """The token as the vocabulary spells it, e.g. "<unk>"."""
    new: bool = False
    """True adds the token to the vocabulary, with one embedding row initialised to the mean of the others."""
    reason: str = ""
    """Half a sentence for `btrm families NAME --model M`."""


@dataclass(frozen=True)
class TinyShape:
    """A toy of the family: what the demo trains and what the tests build, without any download."""

    model_type: str
    """The transformers `model_type`, e.g. "llama"."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Config keywords that make the toy one of the family (sliding window, soft-capping, rotary base), no sizes."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token, unk_token, pad_token as in the real tokenizer; leave out what the real one lacks."""
    control_tokens: tuple[str, ...] = ()
    """Further control tokens of the vocabulary that the template and the pad policy need."""


@dataclass(frozen=True)
class Recipe:
    """Recommended defaults for training this family; None leaves a value to btrm's default."""

    learning_rate: float | None = None
    pairs_per_step: int | None = None
    max_length: int | None = None
    """Longest conversation, in tokens; longer ones lose their oldest turns."""
    epochs: float | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    attention: tuple[str, ...] = ()
    """Attention kernels that compute this architecture exactly, best first, of flash, varlen, flex, sdpa, eager.
    Empty allows all of them."""
    example_model: str | None = None
    """Hub id of the checkpoint that the values were chosen for."""
    tiny: TinyShape | None = None


@hookspec(firstresult=True)
def claims(config: PretrainedConfig) -> bool | None:
    """Is this checkpoint one of yours?

    Asked: once per start, before any weights are read; of every installed family when the user names none, and of the
        named one otherwise.

    Args:
        config: the checkpoint's transformers config. Architectures share `model_type` (Llama 2 and Llama 3 do), so
            look at what tells them apart; `rope_theta` reads the rotary base wherever this version keeps it.

    Returns:
        True if the family is made for this checkpoint, False if it is not. None has the meaning of False. A family
        without this hook is never detected, but can be named for any checkpoint.

    Default: nobody claims a checkpoint; a run that names no family stops and lists those installed.

    Since: 0.1
    """


@hookspec(firstresult=True)
def setup_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> PreTrainedTokenizerBase | None:
    """Which tokenizer should encode the conversations?

    Asked: once per process, right after the tokenizer is loaded and before the questions below. The place to check that
        the vocabulary has the control tokens that your template writes (see `require_tokens`).

    Args:
        tokenizer: the checkpoint's own; it may be changed in place.
        config: the checkpoint's transformers config, not to be changed.

    Returns:
        The tokenizer to use: the same object, or another one. It must survive `save_pretrained` and reload, because
        the trained checkpoint carries it and is used without this plugin. None leaves the tokenizer as it is.

    Default: the checkpoint's tokenizer, with truncation on the left and padding on the right.

    Since: 0.1
    """


@hookspec(firstresult=True)
def pad_token(tokenizer: PreTrainedTokenizerBase) -> PadToken | None:
    """Which token pads?

    Asked: once per process, after `setup_tokenizer`.

    Args:
        tokenizer: the tokenizer in use, not to be changed: the core sets the pad token, and resizes if it is new.

    Returns:
        A `PadToken` that never occurs in data and is neither the end-of-sequence nor the beginning-of-sequence token
        nor the terminal token of the template: others who load the checkpoint look for the last token that is not
        padding, so a pad token with another meaning moves the reward. None leaves the choice to btrm.

    Default: the tokenizer's own pad token if it differs from EOS and BOS; else its unknown token, if text cannot
        produce it; else a token that the vocabulary reserves; else a new token `[PAD]` with one new embedding row.

    Since: 0.1
    """


@hookspec(firstresult=True)
def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How is a conversation written as text?

    Asked: once per process, after `setup_tokenizer`; the answer is rendered for every conversation and saved with the
        checkpoint.

    Args:
        tokenizer: the tokenizer in use, not to be changed. Look at it where one family has several vocabularies.

    Returns:
        Jinja source for the sandboxed environment of transformers. It writes `bos_token` exactly once (if there is
        one); loses no message, the system message included; ends every conversation in the same terminal token, where
        the reward is read; honours `add_generation_prompt`, such that the prompt's tokens begin the whole
        conversation's; depends on the messages alone, never on the date; and calls `raise_exception` for a role it
        does not know. None leaves the choice to btrm.

    Default: the template that the checkpoint carries; it is an error if there is none.

    Since: 0.1
    """


@hookspec(firstresult=True)
def init_head(hidden_size: int) -> Callable[[torch.Tensor], None] | None:
    """How does the reward head start?

    Asked: once per process when training starts from a model without a reward head.

    Args:
        hidden_size: the width of the backbone's last hidden state.

    Returns:
        A function that fills a float32 tensor of shape (1, hidden_size) in place, drawing from torch's global generator
        if it draws at all; btrm seeds it, so that all ranks agree. Import torch inside it. None leaves it to btrm.

    Default: a normal distribution with mean 0 and variance 1 / (hidden_size + 1) (arXiv:2009.01325).

    Since: 0.1
    """


@hookspec(firstresult=True)
def recipe() -> Recipe | None:
    """Which settings do you recommend?

    Asked: when settings are resolved, before anything is loaded, and by `btrm families`.

    Returns:
        A `Recipe`. Each value that is not None replaces btrm's default and gives way to the user's own setting. None
        recommends nothing.

    Default: learning rate 5e-6, 64 pairs per step, at most 2048 tokens, 1 epoch, 3 % warm-up, weight decay 0.001, any
        attention kernel.

    Since: 0.1
    """


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model: `text_config` if there is one, else all.

    Args:
        config: the checkpoint's transformers config.
    """
    nested = getattr(config, "text_config", None)
    return config if nested is None else nested


def rope_theta(config: Any) -> float | None:
    """The base of the rotary position embedding, or None if the config states none.

    transformers 5 keeps it in `rope_parameters` (one set, or one per kind of layer, of which full attention's is
    meant here); earlier versions keep it beside the other values. Both may stand in a nested `text_config`.

    Args:
        config: the checkpoint's transformers config.
    """
    config = text_config(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention") or parameters
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return None if theta is None else float(theta)


def require_tokens(tokenizer: Any, tokens: Iterable[str], purpose: str) -> None:
    """Refuse a tokenizer that lacks a control token, for use in `setup_tokenizer`.

    Args:
        tokenizer: the checkpoint's tokenizer.
        tokens: control tokens that must be in its vocabulary.
        purpose: whose they are, for the message, e.g. "the Llama 3 chat format".

    Raises:
        FamilyError: names every missing token.
    """
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise FamilyError(
            f"the tokenizer of {name} has no {', '.join(missing)}, which {purpose} needs: the checkpoint's vocabulary "
            "is not this family's. Choose the family that the checkpoint was made for, or write one"
        )
