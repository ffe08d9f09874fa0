"""The `btrm` command: one function per subcommand, each a translation of flags into a call.

Decides: names of flags, exit codes, what goes to standard output (results) and standard error (all else). torch,
transformers and deepspeed are imported inside the commands that need them, so that `btrm families` and `--help` answer
at once.

Exit codes: 0; 2 for what the user can put right (one line, no traceback); 130 after Ctrl-C; 143 where another
process of the run was told to stop; 1 for a failed check or a bug.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import click

from btrm_core import config as settings
from btrm_core.cli_doctor import doctor
from btrm_core.errors import BtrmError
from btrm_core.families import list_families

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


SPEAK_LATER_SECONDS = 3.0


class Commands(click.Group):
    """Prints errors of the user on one line, and keeps tracebacks for bugs and `--debug`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand and turn its errors into exit codes."""
        try:
            return super().invoke(ctx)
        except BtrmError as error:
            if not _speaks():
                raise SystemExit(error.exit_code) from None
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{_own_line()}btrm: {' '.join(str(error).split())}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("btrm: interrupted", err=True)
            raise SystemExit(130) from None
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception:
            if not _speaks():
                raise SystemExit(1) from None
            traceback.print_exc()
            click.echo("btrm: this is a bug; please report it with the lines above", err=True)
            raise SystemExit(1) from None


def _own_line() -> str:
    """A line break where the main process is showing its progress bar meanwhile."""
    return "\n" if os.environ.get("RANK", "0") != "0" else ""


def _speaks() -> bool:
    """Of several processes that fail, one says why: the first, once they know each other; until then, the main one."""
    failure = sys.modules.get("btrm_core.failure")
    if failure is not None and failure.speaks is not None:
        return bool(failure.speaks)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SPEAK_LATER_SECONDS)  # the launcher ends this process meanwhile, if all fail alike
    return True


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="btrm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # from deepspeed's launcher
def main(debug: bool) -> None:
    """Train, check and use Bradley-Terry reward models."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@main.command()
@click.option("--family", metavar="NAME", help="Model family; `btrm families` lists them. Default: ask them all.")
@click.option("--model", metavar="ID|DIR", help="Base model. Default: a tiny model of the family.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the checkpoint.")
@click.option("--data", metavar="SRC", multiple=True, help="Training pairs; repeat to mix. Default: the sample.")
@click.option("--eval-data", metavar="SRC", multiple=True, help="Evaluation pairs. Default: held out by prompt.")
@click.option("--output", metavar="DIR", help="Where to write. Default: runs/FAMILY-MODEL.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace a finished model.")
@click.option("--max-length", type=int, help="Longest conversation in tokens.")
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
    overrides.update(settings.parse_assignments(assignments))
    run_config = settings.load_config(config_file, overrides)
    if (gpus is not None or processes is not None) and not dry_run:
        from btrm_core.launch import launch

        raise SystemExit(launch(sys.argv[1:], gpus, processes))
    from btrm_core import distributed, run

    if dry_run:
        click.echo(run.dry_run(run_config))
        return
    outcome = run.train(run_config)
    distributed.leave()
    if outcome.signal is not None:
        raise SystemExit(outcome.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        from btrm_core.summary import closing_text

        click.echo(closing_text(outcome))


@main.command()
@click.argument("name", required=False)
@click.option("--model", metavar="ID|DIR", help="Show the answers for this model.")
@click.option("--check", is_flag=True, help="Run the conformance checks on family NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show why a family is broken, with its traceback.")
def families(name: str | None, model: str | None, check: bool, as_json: bool, debug: bool) -> None:
    """List the installed families, show what one answers, or check that it keeps the contract."""
    from btrm_core import family_view

    if name is None:
        entries = list_families()
        click.echo(_dumps([vars(e) for e in entries]) if as_json else family_view.format_families(entries))
        for line in family_view.tracebacks(entries) if debug else ():
            click.echo(line, err=True)
    elif check:
        _check_family(name, model, as_json)
    else:
        described = family_view.describe(name, model)
        click.echo(_dumps(described) if as_json else family_view.format_description(described))


def _check_family(name: str, model: str | None, as_json: bool) -> None:
    from btrm_core.testing import format_checks, run_checks

    results = run_checks(name, model)
    click.echo(_dumps([vars(result) for result in results]) if as_json else format_checks(results))
    if any(result.status == "fail" for result in results):
        raise SystemExit(1)


@main.command()
@click.argument("model")
@click.argument("source", metavar="INPUT.jsonl")
@click.option("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="Where to write, one line per input line.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto")
@click.option("--overwrite", is_flag=True, help="Replace a finished output file.")
def score(
    model: str, source: str, output: str, tokens_per_batch: int, dtype: str, attention: str, overwrite: bool
) -> None:
    """Give every conversation, pair or list of responses in a JSONL file its rewards.

    Keeps the order, shows progress, and goes on where an interrupted call stopped.
    """
    from btrm_core.scorer import Scorer
    from btrm_core.scoring import score_file

    scorer = Scorer(model, dtype=dtype, attention=attention, tokens_per_batch=tokens_per_batch)
    click.echo(score_file(scorer, source, output, overwrite=overwrite), err=True)


@main.command("eval")
@click.argument("model")
@click.option("--data", metavar="SRC", multiple=True, required=True, help="Pairs to evaluate on; repeat for several.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(model: str, data: tuple[str, ...], tokens_per_batch: int, dtype: str, as_json: bool) -> None:
    """Accuracy of a model on preference pairs, with its standard error and the length baseline."""
    from btrm_core.scorer import Scorer
    from btrm_core.scoring import evaluate_sources, format_evaluation

    scorer = Scorer(model, dtype=dtype, tokens_per_batch=tokens_per_batch)
    result = evaluate_sources(scorer, data)
    click.echo(_dumps(result) if as_json else format_evaluation(result))


@main.command("plan")
@click.option("--model", metavar="ID|DIR", required=True, help="Model; its config.json is enough, no weights are read.")
@click.option("--gpus", type=int, default=1, show_default=True, help="Number of GPUs.")
@click.option("--gpu", metavar="NAME", help="GPU by name (h100, h200, a100, ...), for memory and speed.")
@click.option("--gpu-memory", type=float, metavar="GB", help="Memory of one GPU.")
@click.option("--deepspeed", metavar="PRESET|FILE", help="Only this one. Default: all presets.")
@click.option("--max-length", type=int)
@click.option("--tokens-per-batch", type=int)
@click.option("--pairs-per-step", type=int)
@click.option("--pairs", type=int, help="Pairs of the training data, for the hours.")
@click.option("--tokens-per-pair", type=float, help="Mean tokens of a pair, its common prefix counted once.")
@click.option("--epochs", type=float, default=1.0, show_default=True)
@click.option("--lora-rank", type=int)
@click.option("--quantize", metavar="BITS", default="none", help="4bit: frozen weights in 4 bits under the adapters.")
@click.option("--optimizer", metavar="NAME", default="adamw", help="adamw, adamw-8bit or adamw-8bit-paged.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(
    model: str, gpus: int, gpu: str | None, gpu_memory: float | None, as_json: bool, **options: Any
) -> None:
    """Memory per GPU, communication and time of a run, for every ZeRO preset; recommends a command."""
    from btrm_core.estimate import estimate, format_estimate, to_dict
    from btrm_core.hardware import read_hardware

    given = {name: value for name, value in options.items() if value is not None}
    made = estimate(model, model=model, hardware=read_hardware(gpus, gpu, gpu_memory), **given)
    click.echo(_dumps(to_dict(made)) if as_json else format_estimate(made))


@main.command("new-family")
@click.argument("name")
@click.option("--directory", metavar="DIR", help="Where to write the package. Default: btrm-NAME.")
def new_family_command(name: str, directory: str | None) -> None:
    """Write a family package that can be installed, tested and published."""
    from btrm_core.new_family import new_family

    written = new_family(name, directory)
    click.echo(f"written: {written}; next: pip install -e {written} && pytest {written}")


main.add_command(doctor)


@main.group()
def data() -> None:
    """Look at preference data."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(sources: tuple[str, ...], as_json: bool) -> None:
    """Count pairs, bad rows with their reasons, duplicates, contradictions and the length baseline."""
    from btrm_core.data import load_pairs
    from btrm_core.inspection import format_inspection, inspect_pairs

    result = inspect_pairs(load_pairs(sources))
    click.echo(_dumps(result) if as_json else format_inspection(result))


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
