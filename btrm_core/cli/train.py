"""`btrm train`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from btrm_core.cli.flags import HELP, flags, read, with_file

COMMON = (
    "family",
    "force_family",
    "model.name",
    "model.revision",
    "model.trust_remote_code",
    "data.train",
    "data.eval",
    "data.map",
    "output.dir",
    "output.overwrite",
    "data.max_length",
    "data.group_by",
    "data.strict",
    "train.pairs_per_step",
    "train.tokens_per_batch",
    "train.learning_rate",
    "train.epochs",
    "train.max_steps",
    "train.max_hours",
    "train.seed",
    "distributed.deepspeed",
    "distributed.sequence_parallel",
)
"""What most runs have to do with: first in the help. The others follow by section."""


@click.command(context_settings=HELP)
@flags(*COMMON)
@click.option("--gpus", metavar="N|all", help="Start one process per GPU.")
@click.option("--processes", type=int, help="Start so many processes (CPU).")
@flags("model", "lora", "model.quantize", "train", "output", but=COMMON)
@with_file
@click.option("--dry-run", is_flag=True, help="Print everything resolved and stop.")
def train(gpus: str | None, processes: int | None, dry_run: bool, **given: Any) -> None:
    """Train a reward model.

    With --family alone it trains a tiny model of that family on the sample that comes with btrm.
    """
    config = read(given)
    if (gpus is not None or processes is not None) and not dry_run:
        from btrm_core.training.processes import check_shares, count_of, launch

        check_shares(config, count_of(gpus, processes))
        raise SystemExit(launch(sys.argv[1:], gpus, processes))
    from btrm_core import run
    from btrm_core.training.processes import count_of, leave

    if dry_run:
        click.echo(run.dry_run(config, count_of(gpus, processes)))
        return
    outcome = run.train(config)
    leave()
    if outcome.signal is not None:
        raise SystemExit(outcome.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        from btrm_core.console import show
        from btrm_core.training import closing_text, write_training_report

        show(closing_text(outcome))
        if told := write_training_report(outcome):
            show(told)
        if config.output.push_to is not None and outcome.directory is not None:
            from btrm_core.scoring import push

            show(push(str(outcome.directory), config.output.push_to, private=config.output.private))
