"""`btrm train`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from btrm_core import config

FLAGS: dict[str, str] = {
    "family": "family",
    "model": "model.name",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.train",
    "eval_data": "data.eval",
    "output": "output.dir",
    "overwrite": "output.overwrite",
    "max_length": "data.max_length",
    "group_by": "data.group_by",
    "strict": "data.strict",
    "pairs_per_step": "train.pairs_per_step",
    "tokens_per_batch": "train.tokens_per_batch",
    "learning_rate": "train.learning_rate",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "max_hours": "train.max_hours",
    "seed": "train.seed",
    "deepspeed": "distributed.deepspeed",
    "dtype": "model.dtype",
    "attention": "model.attention",
    "kernels": "model.kernels",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_offload": "model.activation_offload",
    "freeze_embeddings": "model.freeze_embeddings",
    "train_last_layers": "model.train_last_layers",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_targets": "lora.targets",
    "merge": "lora.merge",
    "quantize": "model.quantize",
    "optimizer": "train.optimizer",
    "auto_budget": "train.auto_budget",
    "skip_nan": "train.skip_nan",
    "early_stopping": "train.early_stopping",
    "eval_every": "output.eval_every",
    "save_every": "output.save_every",
    "keep_last": "output.keep_last",
    "keep_best": "output.keep_best",
    "resume": "output.resume",
    "force_resume": "output.force_resume",
    "restart_optimizer": "output.restart_optimizer",
    "report_to": "output.report_to",
    "profile": "output.profile",
}
"""Flag of `btrm train` -> setting; what a flag does not say, the configuration file or the family says."""


@click.command()
@click.option("--family", metavar="NAME", help="Model family; `btrm families` lists them. Default: ask them all.")
@click.option("--model", metavar="ID|DIR", help="Base model. Default: a tiny model of the family.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the checkpoint.")
@click.option("--data", metavar="SRC", multiple=True, help="Training pairs; repeat to mix. Default: the sample.")
@click.option("--eval-data", metavar="SRC", multiple=True, help="Evaluation pairs. Default: held out by prompt.")
@click.option("--output", metavar="DIR", help="Where to write. Default: runs/FAMILY-MODEL.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace a finished model.")
@click.option("--max-length", type=int, help="Longest conversation in tokens.")
@click.option("--group-by", metavar="WHAT", help="What is shuffled: prompt (its pairs share a step) or pair.")
@click.option("--strict", is_flag=True, default=None, help="Stop at the first bad row.")
@click.option("--pairs-per-step", type=int, help="Pairs of an optimiser step, over all processes.")
@click.option("--tokens-per-batch", type=int, help="Tokens of a micro-batch on one process (memory only).")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--epochs", type=float, help="Passes over the pairs.")
@click.option("--max-steps", type=int, help="Stop after so many steps.")
@click.option("--max-hours", type=float, help="Stop cleanly after so many hours.")
@click.option("--seed", type=int, help="Seed of head and order.")
@click.option("--deepspeed", metavar="PRESET|FILE", help="zero1, zero2, zero2-offload, zero3, zero3-offload or JSON.")
@click.option("--gpus", metavar="N|all", help="Start one process per GPU.")
@click.option("--processes", type=int, help="Start so many processes (CPU).")
@click.option("--dtype", help="auto, bf16 or fp32.")
@click.option("--attention", help="auto, flash, varlen, flex, sdpa or eager.")
@click.option("--kernels", help="auto, liger or torch.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="Less memory, more compute.")
@click.option("--activation-offload", is_flag=True, default=None, help="Keep activations in CPU memory meanwhile.")
@click.option("--freeze-embeddings", is_flag=True, default=None, help="Do not train the token embeddings.")
@click.option("--train-last-layers", type=int, metavar="N", help="Train only the last N layers, final norm and head.")
@click.option("--lora-rank", type=int, metavar="N", help="Train low-rank adapters instead of all weights.")
@click.option("--lora-alpha", type=float, help="Scale of the adapters. Default: twice the rank.")
@click.option("--lora-dropout", type=float, help="Dropout on the adapters' input.")
@click.option("--lora-targets", metavar="NAME,...", help="Layers to adapt, as q_proj,v_proj. Default: all linear ones.")
@click.option("--merge/--no-merge", default=None, help="Save whole weights, or the adapters alone. Default: merge.")
@click.option("--quantize", metavar="BITS", help="4bit: frozen weights in 4 bits under the adapters (QLoRA).")
@click.option("--optimizer", metavar="NAME", help="adamw, adamw-8bit or adamw-8bit-paged.")
@click.option("--auto-budget", is_flag=True, default=None, help="Halve the token budget when GPU memory runs out.")
@click.option("--skip-nan", is_flag=True, default=None, help="Skip and count steps that are not finite.")
@click.option("--early-stopping", type=int, metavar="N", help="Stop when N evaluations bring no lower loss.")
@click.option("--eval-every", type=int, help="Steps between evaluations.")
@click.option("--save-every", type=int, help="Steps between resumable checkpoints.")
@click.option("--keep-last", type=int, metavar="N", help="Resumable checkpoints to keep.")
@click.option("--keep-best", is_flag=True, default=None, help="Keep the model with the lowest evaluation loss.")
@click.option("--resume", is_flag=False, flag_value="auto", help="Go on from the last checkpoint, or the one named.")
@click.option("--force-resume", is_flag=True, default=None, help="Resume although data or settings differ.")
@click.option("--restart-optimizer", is_flag=True, default=None, help="Resume with a fresh optimizer, at any stage.")
@click.option("--report-to", metavar="TRACKER", help="none, wandb, tensorboard, ...")
@click.option("--profile", is_flag=True, default=None, help="Profile a few steps.")
@click.option("--config", "config_file", metavar="RUN.toml", help="Settings file; flags win over it.")
@click.option("--set", "assignments", metavar="SECTION.KEY=VALUE", multiple=True, help="Any other setting.")
@click.option("--dry-run", is_flag=True, help="Print everything resolved and stop.")
def train(
    gpus: str | None,
    processes: int | None,
    config_file: str | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train a reward model.

    With --family alone it trains a tiny model of that family on the sample that comes with btrm.
    """
    overrides: dict[str, Any] = {FLAGS[k]: v for k, v in flags.items() if v is not None and v != ()}
    overrides.update(config.parse_assignments(assignments))
    run_config = config.read_settings(config_file, overrides)
    if (gpus is not None or processes is not None) and not dry_run:
        from btrm_core.training.processes import launch

        raise SystemExit(launch(sys.argv[1:], gpus, processes))
    from btrm_core import run
    from btrm_core.training.processes import leave

    if dry_run:
        click.echo(run.dry_run(run_config))
        return
    outcome = run.train(run_config)
    leave()
    if outcome.signal is not None:
        raise SystemExit(outcome.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        from btrm_core.training import closing_text

        click.echo(closing_text(outcome))
