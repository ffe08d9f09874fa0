"""btrm's own answers, asked last."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btrm_core.families import defaults
from btrm_core.families.hookspecs import PadToken, TinyShape
from btrm_core.model.toy import toy_tokenizer


def tokenizer_with(special: dict[str, str], *control: str) -> PreTrainedTokenizerFast:
    return toy_tokenizer(TinyShape("llama", special_tokens=special, control_tokens=control), [], 400)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A vocabulary of whole words: whatever it does not know becomes the unknown token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


def test_claims_has_no_default():
    assert not hasattr(defaults, "claims")


def test_setup_tokenizer_keeps_the_tokenizer_and_sets_the_sides():
    tokenizer = tokenizer_with({"eos_token": "</s>"})
    tokenizer.padding_side, tokenizer.truncation_side = "left", "right"
    assert defaults.setup_tokenizer(tokenizer) is tokenizer
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")


def test_pad_token_prefers_the_tokenizers_own():
    tokenizer = tokenizer_with({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
    assert defaults.pad_token(tokenizer) == PadToken("<pad>", reason="the tokenizer's own pad token")


@pytest.mark.parametrize("role", ["eos_token", "bos_token"])
def test_pad_token_that_is_eos_or_bos_is_passed_over_for_unknown(role):
    tokenizer = tokenizer_with({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    tokenizer.pad_token = getattr(tokenizer, role)
    assert defaults.pad_token(tokenizer).token == "<unk>"


def test_pad_token_is_never_an_unknown_token_that_text_produces():
    pad = defaults.pad_token(word_tokenizer(unk_token="<unk>"))
    assert (pad.token, pad.new) == ("[PAD]", True)


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        (
            ("<|image_pad|>", "<|reserved_special_token_1|>", "<|reserved_special_token_2|>"),
            "<|reserved_special_token_1|>",
        ),
        (("<|im_start|>", "<unused7>", "[control_9]"), "<unused7>"),
        (("[control_9]",), "[control_9]"),
        (("<|reserved_0|>", "<PAD>"), "<PAD>"),
    ],
)
def test_pad_token_takes_a_reserved_token(control, expected):
    tokenizer = tokenizer_with({"eos_token": "</s>"}, *control)
    pad = defaults.pad_token(tokenizer)
    assert (pad.token, pad.new) == (expected, False)
    assert pad.token in tokenizer.get_vocab()


def test_pad_token_falls_back_to_one_new_token():
    pad = defaults.pad_token(tokenizer_with({"eos_token": "</s>"}, "<|im_start|>"))
    assert pad == PadToken("[PAD]", new=True, reason=pad.reason)
    assert "one embedding row" in pad.reason


def test_pad_token_ignores_ordinary_added_tokens():
    tokenizer = tokenizer_with({"eos_token": "</s>"})
    tokenizer.add_tokens(["reserved"])
    assert defaults.pad_token(tokenizer).token == "[PAD]"


def test_chat_template_is_the_checkpoints():
    tokenizer = tokenizer_with({"eos_token": "</s>"})
    assert defaults.chat_template(tokenizer) is None
    tokenizer.chat_template = "{{ messages }}"
    assert defaults.chat_template(tokenizer) == "{{ messages }}"
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert defaults.chat_template(tokenizer) == "{{ 1 }}"


@pytest.mark.parametrize("hidden_size", [16, 4096])
def test_init_head_has_the_variance_of_the_paper(hidden_size):
    torch.manual_seed(0)
    draws = torch.empty(200_000 // hidden_size, hidden_size)
    fill = defaults.init_head(hidden_size)
    for row in draws.split(1):
        fill(row)
    assert torch.isfinite(draws).all()
    assert draws.var().item() == pytest.approx(1 / (hidden_size + 1), rel=0.02)


def test_init_head_fills_a_parameter_in_place_from_the_global_generator():
    head = torch.nn.Parameter(torch.zeros(1, 8))
    fill = defaults.init_head(8)
    torch.manual_seed(3)
    fill(head)
    first = head.detach().clone()
    torch.manual_seed(3)
    fill(head)
    assert torch.equal(first, head)
    assert first.abs().min() > 0


def test_recipe_leaves_nothing_open_that_a_run_needs():
    recipe = defaults.recipe()
    assert (recipe.learning_rate, recipe.pairs_per_step, recipe.max_length) == (5e-6, 64, 2048)
    assert (recipe.epochs, recipe.warmup_ratio, recipe.weight_decay) == (1.0, 0.03, 0.001)
    assert (recipe.attention, recipe.example_model, recipe.tiny) == ((), None, None)
