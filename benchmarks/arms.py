"""The peers: TRL's `RewardTrainer` with its own collator and loop, and the seed recipe on `transformers.Trainer`.

Both run unchanged inside their own `train()`; a callback stops them at the gate between optimiser steps. What is set,
and why: pairs come in the given order (their samplers would shuffle; the order given is already random), no pair is
dropped for its length, and learning rate, schedule, clipping, AdamW and precision are those of every other arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.gate import Gate
from benchmarks.workload import Workload


class AtTheGate(TrainerCallback):  # type: ignore[misc]
    """Holds a `Trainer` between steps and passes its logged loss on."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Wait for the first run of steps."""
        control.should_training_stop = not self.gate.open()
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """One optimiser step is over."""
        control.should_training_stop = not self.gate.step_done()
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """The first step is logged alone; later logs are means over several steps and are not comparable."""
        if logs and "loss" in logs and state.global_step == 1:
            self.gate.note_loss(1, float(logs["loss"]))


def run_trl(work: Workload, gate: Gate, steps: range) -> None:
    """TRL's RewardTrainer: its collator pads all chosen and rejected of a micro-batch to the longest."""
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=load_model(work, gate),
        args=RewardConfig(
            **common_arguments(work, steps, work.settings.micro_batch), max_length=work.settings.max_length
        ),
        train_dataset=_rows(work, steps, ("chosen_ids", "rejected_ids")),
        processing_class=AutoTokenizer.from_pretrained(work.model_dir),
        callbacks=[AtTheGate(gate)],
    )
    trainer.train()


def run_seed(work: Workload, gate: Gate, steps: range) -> None:
    """The recipe btrm grew from: one pair per micro-batch, padded by the tokenizer, chosen and rejected interleaved.

    Rewritten for transformers 5 after RLHFlow's bradley-terry-rm/llama3_8B_rm.py. Its micro-batch of one pair and its
    tokenizer's own padding side are kept; its `paged_adamw_32bit` and bf16 weights give way to the common AdamW and
    precision.
    """
    tokenizer = AutoTokenizer.from_pretrained(work.model_dir)
    arguments = common_arguments(work, steps, micro_batch=1)
    trainer = SeedTrainer(
        model=load_model(work, gate),
        args=TrainingArguments(**arguments, remove_unused_columns=False, label_names=[]),
        train_dataset=_rows(work, steps, ("input_ids_j", "input_ids_k")),
        data_collator=SeedCollator(tokenizer),
        callbacks=[AtTheGate(gate)],
    )
    trainer.train()


@dataclass
class SeedCollator:
    """Pads chosen (j) and rejected (k) of each pair, side by side, to the longest of the batch."""

    tokenizer: Any

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows j, k, j, k, ... with their attention mask."""
        merged = [
            {"input_ids": feature[key], "attention_mask": [1] * len(feature[key])}
            for feature in features
            for key in ("input_ids_j", "input_ids_k")
        ]
        batch = self.tokenizer.pad(merged, padding=True, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "return_loss": True}


class SeedTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` with the Bradley-Terry loss over interleaved rows."""

    loss_is_scaled_for_ga = False  # a mean per micro-batch, as the seed's transformers averaged it

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of -log sigmoid(r_j - r_k)."""
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        j = torch.arange(0, rewards.size(0), 2)
        chosen, rejected = rewards[j], rewards[j + 1]
        loss = -nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, {"rewards_j": chosen, "rewards_k": rejected}) if return_outputs else loss


def load_model(work: Workload, gate: Gate) -> Any:
    """The common starting weights in fp32, every token that enters the model counted."""
    model = AutoModelForSequenceClassification.from_pretrained(work.model_dir, dtype=torch.float32)

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        gate.tokens += ids.numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


def common_arguments(work: Workload, steps: range, micro_batch: int) -> dict[str, Any]:
    """Training arguments that are equal for both peers."""
    settings = work.settings
    accumulation, rest = divmod(settings.pairs_per_step, micro_batch)
    if rest:
        raise ValueError(f"{settings.pairs_per_step} pairs per step are no multiple of micro-batches of {micro_batch}")
    return {
        "output_dir": str(work.directory / "peer"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": len(steps),
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": settings.precision == "bf16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_first_step": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings.device == "cpu",
        "seed": settings.seed,
    }


def _rows(work: Workload, steps: range, names: tuple[str, str]) -> Dataset:
    """The pairs of the given steps in order, as token ids under the trainer's column names."""
    ids = [pair_id for step in steps for pair_id in work.steps[step]]
    columns = {name: [work.pairs[i][side].tolist() for i in ids] for side, name in enumerate(names)}
    return Dataset.from_dict(columns)


PEERS: dict[str, Callable[[Workload, Gate, range], None]] = {"trl": run_trl, "seed": run_seed}
