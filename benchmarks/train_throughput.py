"""Training speed of btrm, TRL and the seed recipe on the same pairs, model and precision, in one run.

    python -m benchmarks.train_throughput --name hh-6-layers --model DIR --data hh.jsonl.gz --layers 6 --steps 4

See `benchmarks/README.md` for the rules and what each arm is.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import environment, harness, results
from benchmarks.btrm_arms import SAVINGS
from benchmarks.workload import Settings, build

ARMS = ("trl", "seed", "btrm-padded", "btrm-packed", "btrm-shared", "backbone", "backbone-causal")
MORE = tuple(f"btrm-{name}" for name in SAVINGS)


def parser() -> argparse.ArgumentParser:
    """The command line; every `Settings` field has a flag."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__.split("\n")[0])
    out.add_argument("--name", required=True, help="name of the result: benchmarks/results/<name>.json")
    out.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS + MORE)
    out.add_argument(
        "--schedule", choices=("interleaved", "fresh", "whole"), help="default: interleaved on CPU, whole on GPU"
    )
    out.add_argument("--block", type=int, default=1, help="steps an arm runs before the next arm's turn")
    out.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device, for utilisation")
    out.add_argument("--output", type=Path, default=results.RESULTS)
    out.add_argument("--work-dir", type=Path, help="keep the prepared model, pairs and logs here")
    out.add_argument("--allow-dirty", action="store_true", help="measure code that is not committed; marks the result")
    out.add_argument("--commit", help="the commit that this copy without its history is of; you answer for it")
    out.add_argument("--note", action="append", default=[], help="a sentence to print under the table")
    add_settings(out)
    return out


def add_settings(out: argparse.ArgumentParser) -> None:
    """One flag per field of `Settings`, with its default."""
    kinds = {"int": int, "float": float, "str": str, "int | None": int, "str | None": str}
    choices = {"precision": ("fp32", "bf16"), "device": ("cpu", "cuda")}
    for item in dataclasses.fields(Settings):
        flag = "--" + item.name.replace("_", "-")
        if item.type == "bool":
            out.add_argument(flag, action="store_true")
        elif item.name == "data":
            out.add_argument(flag, nargs="+", required=True, help="JSONL(.gz) files of pairs in the standard format")
        else:
            missing = item.default is dataclasses.MISSING
            default = None if missing else item.default
            kind = kinds[str(item.type)]
            out.add_argument(flag, type=kind, required=missing, default=default, choices=choices.get(item.name))


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among the parsed arguments."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(Settings)}
    values["data"] = tuple(values["data"])
    return Settings(**values)


def main(argv: list[str] | None = None) -> int:
    """Prepare, measure, summarise, write; returns an exit code."""
    arguments = parser().parse_args(argv)
    settings = settings_from(arguments)
    try:
        commit = environment.require_clean(arguments.allow_dirty, vouched=arguments.commit)
    except environment.DirtyTreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet()
    directory = arguments.work_dir or Path(tempfile.mkdtemp(prefix="btrm-bench-"))
    try:
        say(f"preparing the workload in {directory}")
        work = build(settings, directory)
        schedule = arguments.schedule or ("whole" if settings.device == "cuda" else "interleaved")
        runs = harness.measure(work, arguments.arms, schedule=schedule, block=arguments.block, say=say)
    finally:
        if arguments.work_dir is None:
            shutil.rmtree(directory, ignore_errors=True)
    if environment.require_clean(arguments.allow_dirty, vouched=arguments.commit) != commit:
        print("error: the working tree changed while it was measured; nothing is written", file=sys.stderr)
        return 2
    result = results.header("train_throughput", arguments.name, settings, commit)
    peak = results.device_peak(result["hardware"], arguments.peak_tflops)
    notes = [*arguments.note, *(f"{arm} ended early: {run.failed}" for arm, run in runs.items() if run.failed)]
    done = {arm: run for arm, run in runs.items() if not run.failed}
    result.update(results.summarise(work, done, peak), schedule=schedule, block=arguments.block, notes=notes)
    path = results.write(result, arguments.output)
    from benchmarks.table import render

    print(render([result]))
    say(f"written to {path}")
    return 0


def quiet() -> None:
    """Loading reports and progress bars of transformers say nothing about a measurement."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
