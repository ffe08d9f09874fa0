"""One training run of one arm for `quality_vs_trl`: `python -m benchmarks.quality_arms EXPERIMENT.json trl SEED`.

Decides: how each trainer is told the same experiment. btrm is its own command with flags, as a user would type it; TRL
is `RewardTrainer` inside its own `train()` on the same file of texts, which it tokenises and orders itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TRL_BATCH = 8
"""Pairs of TRL's micro-batch; it accumulates the rest of a step."""


@dataclass(frozen=True)
class Experiment:
    """Everything that was chosen; part of the result, and what both arms read."""

    model: str
    train: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    layers: int | None = 6
    train_last_layers: int | None = None
    precision: str = "fp32"
    max_length: int = 256
    pairs: int = 320
    evaluation_pairs: int = 300
    held_out: float = 0.2
    epochs: int = 1
    pairs_per_step: int = 16
    tokens_per_batch: int = 4096
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    directory: str = field(default="", metadata={"internal": True})

    @property
    def steps(self) -> int:
        """Optimiser steps of every run."""
        return self.pairs * self.epochs // self.pairs_per_step

    def refusal(self) -> str | None:
        """Why both arms cannot be trained alike, before the first of them is; None if they can."""
        if self.pairs_per_step < 1 or self.pairs_per_step % TRL_BATCH:
            return f"--pairs-per-step {self.pairs_per_step}: expected a multiple of TRL's micro-batches of {TRL_BATCH}"
        if self.steps < 1:
            return f"--pairs {self.pairs}: expected at least the {self.pairs_per_step} of one step"
        if not (self.evaluation or 0 < self.held_out < 1):
            return f"--held-out {self.held_out:g}: expected a share of the prompts, between 0 and 1"
        return None

    def start(self, seed: int) -> Path:
        """The model directory that both arms of a seed start from, head included."""
        return Path(self.directory) / f"start-{seed}"

    def output(self, arm: str, seed: int) -> Path:
        """Where an arm's run writes."""
        return Path(self.directory) / f"{arm}-{seed}"

    def model_of(self, arm: str, seed: int) -> Path:
        """The trained model of an arm's run."""
        return self.output(arm, seed) / "model"

    def save(self) -> Path:
        """Write the experiment to its directory; returns the file."""
        path = Path(self.directory) / "experiment.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def btrm_command(experiment: Experiment, seed: int) -> list[str]:
    """`btrm train` for one run: the checkpoint's own template, no evaluation while it trains, no pair held out."""
    values: dict[str, Any] = {
        "data.held_out_fraction": 0,
        "train.epochs": experiment.epochs,
        "train.max_steps": experiment.steps,
        "train.warmup_ratio": experiment.warmup_ratio,
        "train.weight_decay": experiment.weight_decay,
        "train.max_grad_norm": experiment.max_grad_norm,
        "train.tokens_per_batch": experiment.tokens_per_batch,
        "data.cache_dir": Path(experiment.directory) / "cache",
    }
    if experiment.train_last_layers:
        values["model.train_last_layers"] = experiment.train_last_layers
    flags = {
        "family": "checkpoint",
        "model": experiment.start(seed),
        "data": Path(experiment.directory) / "train.jsonl",
        "output": experiment.output("btrm", seed),
        "dtype": experiment.precision,
        "max-length": experiment.max_length,
        "pairs-per-step": experiment.pairs_per_step,
        "learning-rate": experiment.learning_rate,
        "seed": seed,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "btrm_core", "train", *words]


def run_trl(experiment: Experiment, seed: int) -> None:
    """Train with TRL's `RewardTrainer` and save as its `save_model` does.

    What is set beyond its defaults is what the experiment fixes, and gradient checkpointing is off, as it is in btrm:
    it costs time and changes no result. TRL saves with its own `save_model`; only the tokenizer is written beside it.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(experiment.start(seed))
    model = AutoModelForSequenceClassification.from_pretrained(experiment.start(seed), dtype=torch.float32)
    freeze(model, experiment.train_last_layers)
    data = load_dataset("json", data_files=str(Path(experiment.directory) / "train.jsonl"), split="train")
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trl_arguments(experiment, seed)),
        train_dataset=data.select_columns(["chosen", "rejected"]),
        processing_class=tokenizer,
    )
    if len(trainer.train_dataset) != experiment.pairs:
        raise ValueError(f"TRL keeps {len(trainer.train_dataset)} pairs of {experiment.pairs}")
    found = trainer.train()
    target = experiment.model_of("trl", seed)
    trainer.save_model(str(target))
    tokenizer.save_pretrained(target)
    log = [line for line in trainer.state.log_history if "loss" in line]
    figures = {"seconds": found.metrics["train_runtime"], "steps": trainer.state.global_step, "curve": log}
    (experiment.output("trl", seed) / "run.json").write_text(json.dumps(figures), encoding="utf-8")


def trl_arguments(experiment: Experiment, seed: int) -> dict[str, Any]:
    """Arguments of `RewardConfig` for one run."""
    return {
        "output_dir": str(experiment.output("trl", seed) / "checkpoints"),
        "per_device_train_batch_size": TRL_BATCH,
        "gradient_accumulation_steps": experiment.pairs_per_step // TRL_BATCH,
        "max_steps": experiment.steps,
        "max_length": experiment.max_length,
        "learning_rate": experiment.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": experiment.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": experiment.weight_decay,
        "max_grad_norm": experiment.max_grad_norm,
        "bf16": experiment.precision == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


def freeze(model: Any, last_layers: int | None) -> None:
    """Leave only the last layers, the final norm and the head trainable, as `model.train_last_layers` does."""
    if last_layers is None:
        return
    backbone = getattr(model, model.base_model_prefix)
    for part in (backbone.get_input_embeddings(), *backbone.layers[: len(backbone.layers) - last_layers]):
        part.requires_grad_(False)


def main(path: str, arm: str, seed: str) -> None:
    """Run TRL's arm; btrm's is a command of its own."""
    if arm != "trl":
        raise SystemExit(f"no arm {arm!r}; expected trl")
    run_trl(Experiment.load(path), int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
