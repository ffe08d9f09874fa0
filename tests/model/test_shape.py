"""MFU against arithmetic by hand."""

import pytest
from transformers import GPT2Config, LlamaConfig

from btrm_core.errors import CheckpointError
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.shape import check_vocabulary, mfu_per_token_rate
from btrm_core.model.toy import toy_tokenizer


def test_a_llama_on_an_h100_by_hand():
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    matrices = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128) + 64
    attention = 6 * 4 * 16 * 2 * 100
    expected = 100 * (6 * matrices + attention) / (989e12 * 8)
    rate = mfu_per_token_rate(config, "NVIDIA H100 80GB HBM3", 8, 100.0)
    assert rate == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_said_is_not_said():
    config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    assert mfu_per_token_rate(config, "Some New GPU", 1, 100.0) is None
    assert mfu_per_token_rate(GPT2Config(n_layer=1), "NVIDIA H200", 1, 100.0) is None


def test_tokens_beyond_the_embeddings_may_only_be_ones_that_nothing_writes():
    shape = TinyShape("llama", special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = toy_tokenizer(shape, ["hello"], 300)
    size = len(tokenizer)
    config = LlamaConfig(vocab_size=size)
    check_vocabulary(tokenizer, config, "m")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, config, "m", written={tokenizer.eos_token_id, None})
    with pytest.raises(CheckpointError) as caught:
        check_vocabulary(tokenizer, config, "m", written={size})
    assert str(caught.value).startswith(
        f"the tokenizer of m has {size + 1} tokens, but the model has embeddings for {size}: '<image>' is {size}; "
    )
    tokenizer.add_tokens(["a word"])
    with pytest.raises(CheckpointError, match=f"'a word' is {size + 1}"):
        check_vocabulary(tokenizer, config, "m")
    padded = toy_tokenizer(shape, ["hello"], 300)
    padded.add_special_tokens({"pad_token": "[PAD]"})  # new: it gets a row
    check_vocabulary(padded, config, "m", written={size})
