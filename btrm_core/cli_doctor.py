"""`btrm doctor` on the command line: flags, colours and the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from typing import Any, TextIO

import click

from btrm_core import config as settings
from btrm_core.errors import ConfigError
from btrm_core.settings import RunConfig

FLAGS: dict[str, str] = {
    "family": "family",
    "model": "model.name",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.train",
    "eval_data": "data.eval",
    "max_length": "data.max_length",
    "dtype": "model.dtype",
    "attention": "model.attention",
}
"""Flag of `btrm doctor` -> setting."""


@click.command()
@click.argument("subject", metavar="[MODEL]", required=False)
@click.option("--family", metavar="NAME", help="Model family; `btrm families` lists them. Default: ask them all.")
@click.option("--model", metavar="ID|DIR", help="Base model, or a finished model. Default: a tiny model of the family.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the checkpoint.")
@click.option("--data", metavar="SRC", multiple=True, help="Training pairs; repeat to mix. Default: the sample.")
@click.option("--eval-data", metavar="SRC", multiple=True, help="Evaluation pairs.")
@click.option("--max-length", type=int, help="Longest conversation in tokens.")
@click.option("--dtype", help="auto, bf16 or fp32.")
@click.option("--attention", help="auto, flash, varlen, flex, sdpa or eager.")
@click.option("--config", "config_file", metavar="RUN.toml", help="Settings file; flags win over it.")
@click.option("--set", "assignments", metavar="SECTION.KEY=VALUE", multiple=True, help="Any other setting.")
@click.option("--pairs", type=click.IntRange(min=0), default=3, show_default=True, help="Pairs to show.")
@click.option("--no-model", is_flag=True, help="Look at tokenizer and data alone; load no weights.")
@click.option("--full", is_flag=True, help="Also what takes long for a model of more than a billion parameters.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    subject: str | None,
    config_file: str | None,
    assignments: tuple[str, ...],
    pairs: int,
    no_model: bool,
    full: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Show how a few pairs are encoded, and check everything a run depends on before it starts.

    Takes the flags of `btrm train`; MODEL may also be a finished model's directory. Exit code 1 if a check fails.
    """
    if subject is not None and flags["model"] not in (None, subject):
        raise ConfigError(f"two models are named, {subject} and --model {flags['model']}; give one")
    flags["model"] = subject or flags["model"]
    overrides: dict[str, Any] = {FLAGS[k]: v for k, v in flags.items() if v is not None and v != ()}
    overrides.update(settings.parse_assignments(assignments))
    config = settings.load_config(config_file, overrides)

    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print what they like
        failed = _diagnose(config, pairs, with_model=not no_model, full=full, as_json=as_json, to=results)
    if failed:
        raise SystemExit(1)


def _diagnose(config: RunConfig, pairs: int, *, with_model: bool, full: bool, as_json: bool, to: TextIO) -> bool:
    """Write everything to `to`, each verdict when it is there; returns whether a check failed."""
    import torch
    from transformers.utils import logging

    from btrm_core import doctor_view
    from btrm_core.doctor import checks, examine

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would look for one aloud
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong is said in a verdict
    width = shutil.get_terminal_size().columns if to.isatty() else None
    case = examine(config, pairs)
    found = []
    if not as_json:
        _echo(doctor_view.opening(case, width or 100), to)
    for check in checks(case, with_model=with_model, full=full):
        found.append(check)
        if not as_json:
            _echo(doctor_view.verdict_line(check, width), to)
    if as_json:
        _echo(json.dumps(doctor_view.as_json(case, found), indent=2, ensure_ascii=False), to)
    else:
        _echo(doctor_view.closing(found), to)
    return doctor_view.worst(found) == "fail"


def _echo(text: str, to: TextIO) -> None:
    """Print at once; colours only on a terminal, and never under NO_COLOR (no-color.org)."""
    click.echo(text, file=to, color=False if os.environ.get("NO_COLOR") else None)
    to.flush()
