"""The toy: a tiny model shaped like a family, which a run without `--model` trains on the sample that ships with btrm.

Decides: how large the toy is and how its tokenizer is made. The family says only what makes its models its own
(`Recipe.tiny`); nothing here knows a family.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrm_core.cache import build_once
from btrm_core.data import sample_path
from btrm_core.errors import BtrmError, FamilyError, one_line
from btrm_core.families import Family
from btrm_core.files import text_sha256
from btrm_core.locks import Shared

if TYPE_CHECKING:
    from btrm_core.families import TinyShape

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


VOCABULARY = 2048
"""What the demo trains with, found by trying: see the README's figures."""


def toy_model(family: Family, cache_dir: Path) -> Path:
    """Directory of a tiny causal language model in the family's shape, with random weights; made once, then reused.

    Args:
        family: gives the tiny shape, in its recipe.
        cache_dir: the root of btrm's cache; the model lies under `toy/`, its name a digest of shape and sample, so that
            a change of either makes a new one.

    Raises:
        FamilyError: the family's recipe gives no `tiny` shape, or one that transformers refuses.
        DataError: the cache cannot be written.
    """
    tiny = family.recipe().tiny
    if tiny is None:
        raise FamilyError(
            f"family '{family.name}' ({family.origin}) gives no tiny model in its recipe, so there is nothing to train "
            "without --model; give --model ID|DIR and --data SRC"
        )
    description = json.dumps([SHAPE, VOCABULARY, dataclasses.asdict(tiny)], sort_keys=True, default=str)
    name = f"{family.name}-{text_sha256(description + Path(sample_path('train')).read_text('utf-8'))[:12]}"

    def build(folder: Path) -> None:
        try:
            build_toy(tiny, folder)
        except (BtrmError, OSError):
            raise
        except Exception as error:  # transformers and tokenizers raise whatever their many readers raise
            raise FamilyError(
                f"family '{family.name}' ({family.origin}): hook recipe: no toy can be made from its TinyShape of "
                f"model_type {tiny.model_type!r} ({one_line(error):.200}); expected values that transformers takes for "
                "a small causal language model"
            ) from error

    held = build_once(cache_dir / "toy" / name, build)
    _in_use[held.path] = held
    return held.path


_in_use: dict[Path, Shared] = {}
"""Toys that this process may still read: they stay in the cache until it ends."""


def build_toy(tiny: Any, directory: Path, **overrides: Any) -> None:
    """Write a tiny random causal language model and its tokenizer, trained on the sample, to `directory`.

    Args:
        tiny: the family's `TinyShape`: model type, settings of its configuration, control tokens.
        directory: where model and tokenizer are written; it must exist.
        **overrides: settings of the configuration, over those of `SHAPE` and of `tiny`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = toy_tokenizer(tiny, _sample_texts(), vocab_size=VOCABULARY)
    shape = {**SHAPE, **dict(tiny.config), **overrides}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(tiny.model_type, vocab_size=len(tokenizer), **ids, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _sample_texts() -> list[str]:
    texts = []
    for line in Path(sample_path("train")).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts += [message["content"] for side in ("chosen", "rejected") for message in row[side]]
    return texts


def toy_tokenizer(shape: TinyShape, texts: Iterable[str], vocab_size: int = 1024) -> Any:
    """Train a byte-level BPE tokenizer in memory, with the control tokens of a family.

    Deterministic: the same shape, texts and size give the same tokenizer, in any process.

    Args:
        shape: names the special tokens (bos, eos, unk, pad) and further control tokens; ids follow this order.
        texts: what to learn merges from; may be empty (then every byte is a token).
        vocab_size: upper bound of the vocabulary, control tokens included; at least 256 bytes plus control tokens.

    Returns:
        A `transformers.PreTrainedTokenizerFast`. It has a pad token only if the shape names one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = list(dict.fromkeys([*shape.special_tokens.values(), *shape.control_tokens]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, len(control) + 256),
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    extra = [token for token in shape.control_tokens if token not in shape.special_tokens.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=extra,
        **shape.special_tokens,
    )
