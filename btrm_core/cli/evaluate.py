"""`btrm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from btrm_core.errors import ConfigError

if TYPE_CHECKING:
    from btrm_core.scoring import Kept, ModelResult


@click.command("eval")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--data", metavar="SRC", multiple=True, help="Pairs to evaluate on; repeat for several.")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("--against", metavar="MODEL|FILE", multiple=True, help="Compare with this model, or these kept rewards.")
@click.option("--scores", metavar="FILE", multiple=True, help="Evaluate rewards kept with --output; no model is read.")
@click.option("--suite", "suites", metavar="NAME[=SRC]", multiple=True, help="rewardbench, rewardbench2, rm-bench, ...")
@click.option("--best-of-n", metavar="SRC", multiple=True, help="Rows with prompt, responses and gold values.")
@click.option("--probes", is_flag=True, help="Edit the answers and see whether the rewards stay.")
@click.option("-o", "--output", metavar="FILE", help="Keep the reward of every pair (.jsonl, .jsonl.gz, .parquet).")
@click.option("--save-calibration", is_flag=True, help="Keep temperature, mean and spread in the model's btrm.json.")
@click.option("--report", "report_dir", metavar="DIR", help="Write report.html, report.json and pictures.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(models: tuple[str, ...], **flags: Any) -> None:
    """How good reward models are on preference pairs, with intervals; which of two is better.

    A MODEL is a directory of btrm, or any decoder's sequence-classification model with one label, on disk or on the
    hub. Suites are read from the hub where they are published, or from SRC in the same form. An interrupted evaluation
    goes on where it was when the same command is given again.
    """
    from btrm_core.evaluation import report_text, require_matplotlib, to_json, write_report, write_scores

    _check(models, flags)
    if flags["report_dir"]:
        require_matplotlib()  # before the hours, not after them
    from btrm_core.scoring import Kept, notes, report_of, write_suites

    kept = Kept()
    results, against = _results(models, flags, kept)

    everything = [*results, *against]
    if flags["output"]:
        write_scores([source.rewards for result in everything for source in result.sources], flags["output"])
    report = report_of(results, against)
    if flags["as_json"]:
        click.echo(to_json(report))
    else:
        click.echo(report_text(report))
        for note in notes(everything):
            click.echo(f"\n{note}")
    if flags["report_dir"]:
        page = write_report(report, flags["report_dir"])
        for path in (page, *write_suites(everything, flags["report_dir"])):
            click.echo(f"written: {path}", err=True)
    if flags["save_calibration"]:
        _save_calibration(models, results)
    kept.finish()


def _check(models: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Refuse what cannot give a result, before a model is read."""
    asked = any(flags[name] for name in ("data", "suites", "best_of_n"))
    if not models and not flags["scores"]:
        raise ConfigError("nothing to evaluate; name a MODEL, or rewards that were kept with --scores FILE")
    if not models and (flags["suites"] or flags["best_of_n"] or (flags["data"] and not flags["against"])):
        raise ConfigError("--data, --suite and --best-of-n ask a model, --scores has its answers; name a MODEL as well")
    if models and not asked:
        raise ConfigError("nothing to evaluate on; give pairs with --data SRC, a --suite NAME or --best-of-n SRC")
    if flags["probes"] and not flags["data"]:
        raise ConfigError("--probes edits the answers of pairs; give some with --data SRC")
    if flags["against"] and not flags["data"] and not flags["scores"]:
        raise ConfigError("--against compares on pairs; give some with --data SRC")
    if flags["save_calibration"] and not (models and flags["data"]):
        raise ConfigError("--save-calibration measures a MODEL on pairs; name it, and give some with --data SRC")
    if flags["save_calibration"] and (far := [model for model in models if not Path(model).expanduser().is_dir()]):
        raise ConfigError(f"--save-calibration writes into a model's directory; {far[0]} is none on this machine")
    if flags["output"] and not flags["data"] and not flags["scores"]:
        raise ConfigError("--output keeps the rewards of pairs; give some with --data SRC")
    if flags["output"]:
        _check_output(flags)


def _check_output(flags: dict[str, Any]) -> None:
    """Refuse a file that is not in one of the formats, or that is read."""
    output = flags["output"]
    if not output.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ConfigError(f"--output {output}: expected a name that ends in .jsonl, .jsonl.gz or .parquet")
    suites = [name.partition("=")[2] for name in flags["suites"]]
    read = [*flags["data"], *flags["against"], *flags["scores"], *flags["best_of_n"], *suites]
    for name in read:
        if Path(name).is_file() and Path(output).exists() and Path(name).samefile(output):
            raise ConfigError(f"--output {output} would replace {name}, which is read; name another file")


def _save_calibration(models: tuple[str, ...], results: list[ModelResult]) -> None:
    """Write what was measured of every model into its directory."""
    from btrm_core.model import find_model, write_calibration
    from btrm_core.scoring import calibration_values

    for model, result in zip(models, results, strict=False):  # results of --scores follow
        values = calibration_values(result)
        write_calibration(find_model(model), values)
        temperature = "none fits" if values["temperature"] is None else f"{values['temperature']:.3g}"
        click.echo(
            f"{result.model}/btrm.json: calibration saved (temperature {temperature}, rewards {values['mean']:.3g} ± "
            f"{values['std']:.3g} on {values['pairs']:,} pairs)",
            err=True,
        )


def _results(models: tuple[str, ...], flags: dict[str, Any], kept: Kept) -> tuple[list[ModelResult], list[ModelResult]]:
    """What is found of the models, and of those they stand against."""
    from btrm_core.data import parse_naming
    from btrm_core.evaluation import read_scores
    from btrm_core.scoring import Request, Scorer, from_scores, judge

    naming = parse_naming(flags["names"])
    request = Request(flags["data"], flags["suites"], flags["best_of_n"], flags["probes"], naming)
    options = {name: flags[name] for name in ("dtype", "attention", "tokens_per_batch")}

    def found(model: str) -> list[ModelResult]:
        if Path(model).is_file():
            return from_scores(read_scores(model))
        if not flags["data"]:
            raise ConfigError(f"--against {model} is a model, which needs the pairs: give them with --data SRC")
        return [judge(Scorer(model, **options), Request(flags["data"], naming=naming), kept)]

    results = [judge(Scorer(model, **options), request, kept) for model in models]
    for file in flags["scores"]:
        results += from_scores(read_scores(file))
    return results, [result for model in flags["against"] for result in found(model)]
