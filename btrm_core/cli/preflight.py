"""`btrm doctor` and `btrm plan`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from btrm_core.cli.flags import HELP, flags, read, with_file
from btrm_core.console import LongWork, dumps, quiet_libraries
from btrm_core.errors import ConfigError
from btrm_core.settings import RunConfig

if TYPE_CHECKING:
    from btrm_core.preflight import Check


@click.command(context_settings=HELP)
@click.argument("subject", metavar="[MODEL]", required=False)
@flags(
    "family",
    "force_family",
    "model.name",
    "model.revision",
    "model.trust_remote_code",
    "data.train",
    "data.eval",
    "data.map",
    "data.max_length",
    "model.dtype",
    "model.attention",
    model="Base model, or a finished model. Default: a tiny model of the family.",
    eval_data="Evaluation pairs.",
)
@with_file
@click.option("--pairs", type=click.IntRange(min=0), default=3, show_default=True, help="Pairs to show.")
@click.option("--no-model", is_flag=True, help="Look at tokenizer and data alone; load no weights.")
@click.option("--full", is_flag=True, help="Also what takes long for a model of more than a billion parameters.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(subject: str | None, pairs: int, no_model: bool, full: bool, as_json: bool, **given: Any) -> None:
    """Show how a few pairs are encoded, and check everything a run depends on before it starts.

    Takes the flags of `btrm train`; MODEL may also be a finished model's directory. Exit code 1 if a check fails.
    """
    if subject is not None and given["model"] not in (None, subject):
        raise ConfigError(f"two models are named, {subject} and --model {given['model']}; give one")
    config = read({**given, "model": subject or given["model"]})

    results = sys.stdout
    with quiet_libraries(stdout=sys.stderr):
        failed = _diagnose(config, pairs, with_model=not no_model, full=full, as_json=as_json, to=results)
    if failed:
        raise SystemExit(1)


def _diagnose(config: RunConfig, pairs: int, *, with_model: bool, full: bool, as_json: bool, to: TextIO) -> bool:
    """Write everything to `to`, each verdict when it is there; returns whether a check failed."""
    import torch

    from btrm_core.preflight.doctor import as_json as case_as_json
    from btrm_core.preflight.doctor import checks, closing, examine, opening, verdict_line, worst

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would look for one aloud
    width = shutil.get_terminal_size().columns if to.isatty() else None
    with LongWork("looking at the data"):
        case = examine(config, pairs)
    found = []
    if not as_json:
        _echo(opening(case, width or 100), to)
    waiting = checks(case, with_model=with_model, full=full)
    while (check := _next(waiting)) is not None:
        found.append(check)
        if not as_json:
            _echo(verdict_line(check, width), to)
    if as_json:
        _echo(dumps(case_as_json(case, found)), to)
    else:
        _echo(closing(found), to)
    return worst(found) == "fail"


def _next(waiting: Iterator[Check]) -> Check | None:
    with LongWork("checking"):
        return next(waiting, None)


def _echo(text: str, to: TextIO) -> None:
    """Print at once; colours only on a terminal that has them, and never under NO_COLOR (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    click.echo(text, file=to, color=False if plain else None)
    to.flush()


@click.command("plan")
@click.option("--model", metavar="ID|DIR", required=True, help="Model; its config.json is enough, no weights are read.")
@click.option("--gpus", type=int, default=1, show_default=True, help="Number of GPUs.")
@click.option("--gpu", metavar="NAME", help="GPU by name (h100, h200, a100, ...), for memory and speed.")
@click.option("--gpu-memory", type=float, metavar="GB", help="Memory of one GPU.")
@click.option("--deepspeed", metavar="PRESET|FILE", help="Only this one. Default: all presets.")
@click.option("--sequence-parallel", type=int, metavar="N", help="GPUs that share the tokens of each row.")
@click.option("--max-length", type=int)
@click.option("--tokens-per-batch", type=int)
@click.option("--pairs-per-step", type=int)
@click.option("--data", metavar="SRC", multiple=True, help="Training pairs: how many, how long, how much they share.")
@click.option("--pairs", type=int, help="Pairs of the training data, for the hours.")
@click.option("--tokens-per-pair", type=float, help="Mean tokens of a pair, its common prefix counted once.")
@click.option("--epochs", type=float, default=1.0, show_default=True)
@click.option("--lora-rank", type=int)
@click.option("--quantize", metavar="BITS", default="none", help="4bit: frozen weights in 4 bits under the adapters.")
@click.option("--optimizer", metavar="NAME", default="adamw", help="adamw, adamw-8bit or adamw-8bit-paged.")
@click.option(
    "--gradient-checkpointing",
    "kept",
    flag_value="inputs",
    help="Compute activations again. Default: no more than it takes.",
)
@click.option("--selective-checkpointing", "kept", flag_value="products", help="All but the products of matrices.")
@click.option("--no-gradient-checkpointing", "kept", flag_value="all")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(
    model: str,
    gpus: int,
    gpu: str | None,
    gpu_memory: float | None,
    data: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Memory per GPU, communication and time of a run, for every ZeRO preset; recommends a command."""
    from btrm_core.data import load_pairs, sharing
    from btrm_core.preflight.plan import Workload, estimate, format_estimate, read_hardware, to_dict

    given = {name: value for name, value in options.items() if value is not None}
    preset, kept = given.pop("deepspeed", None), given.pop("kept", None)
    given["model"] = model
    work = Workload.of_data(sharing(load_pairs(data)), **given) if data else Workload(**given)
    made = estimate(model, work, read_hardware(gpus, gpu, gpu_memory), preset, kept)
    click.echo(dumps(to_dict(made)) if as_json else format_estimate(made))
