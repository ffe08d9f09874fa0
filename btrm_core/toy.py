"""The embedded default: a tiny model shaped like a family, and the sample of preference pairs that ships with btrm.

Decides: how large the toy is and how its tokenizer is made. The family says only what makes its models its own
(`Recipe.tiny`); nothing here knows a family.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from btrm_core.config import apply, flat
from btrm_core.errors import FamilyError
from btrm_core.families import Family
from btrm_core.settings import RunConfig

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
SETTINGS: dict[str, Any] = {
    "data.max_length": 512,
    "train.pairs_per_step": 16,
    "train.learning_rate": 1e-3,
    "train.epochs": 3.0,
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.01,
}


def sample_path(part: str) -> str:
    """Path of the bundled pairs: `train` or `held_out` (prompt-disjoint)."""
    return str(resources.files("btrm_core") / "sample" / f"{part}.jsonl")


def embedded_settings(config: RunConfig, family: Family, cache_dir: Path) -> RunConfig:
    """Fill in the toy base model, the sample and settings that suit them, where the run says nothing."""
    current = flat(config)
    values: dict[str, Any] = {"model.name": str(toy_model(family, cache_dir))}
    if not config.data.train:
        values["data.train"] = (sample_path("train"),)
        if not config.data.eval:
            values["data.eval"] = (sample_path("held_out"),)
    values.update({k: v for k, v in SETTINGS.items() if current[k] is None})
    if config.output.dir is None:
        values["output.dir"] = f"runs/{family.name}-demo"
    return apply(config, values)


def toy_model(family: Family, cache_dir: Path) -> Path:
    """Directory of a tiny causal language model in the family's shape, with random weights; made once, then reused.

    Raises:
        FamilyError: the family's recipe gives no `tiny` shape.
    """
    tiny = family.recipe().tiny
    if tiny is None:
        raise FamilyError(
            f"family '{family.name}' ({family.origin}) gives no tiny model in its recipe, so there is nothing to train "
            "without --model; give --model ID|DIR and --data SRC"
        )
    description = json.dumps([SHAPE, VOCABULARY, dataclasses.asdict(tiny)], sort_keys=True, default=str)
    digest = hashlib.sha256((description + Path(sample_path("train")).read_text("utf-8")).encode()).hexdigest()[:12]
    target = cache_dir / "toy" / f"{family.name}-{digest}"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".toy-"))
        build_toy(tiny, staging)
        try:
            staging.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(staging, ignore_errors=True)
    return target


def build_toy(tiny: Any, directory: Path, **overrides: Any) -> None:
    """Write a tiny random causal language model and its tokenizer, trained on the sample, to `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from btrm_core.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(tiny, _sample_texts(), vocab_size=VOCABULARY)
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
