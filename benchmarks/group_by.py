"""Does it matter whether the pairs of a prompt share a step?

`python -m benchmarks.group_by --model DIR --data SRC --name NAME -- [flags of btrm train]` trains the same model on the
same pairs with `--group-by prompt` and with `--group-by pair`: equal pairs, steps, learning rate and length, several
seeds. All are evaluated on prompts that none was trained on. Every run is a `btrm train` and a `btrm eval` of its own,
as a user would type them; differences are taken over the pairs of all seeds, with intervals by prompt. InstructGPT
(arXiv:2203.02155, 3.5) trained all pairs of a prompt in one step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.results import RESULTS, SCHEMA, spread
from btrm_core.evaluation import PairRewards, assess, compare, read_scores
from btrm_core.evaluation.statistics import bootstrap_mean, clusters

ARMS = ("prompt", "pair")


def main() -> None:
    """Train, evaluate, compare, and write `results/NAME.json`."""
    options = _options()
    commit = environment.require_clean(options.allow_dirty)
    with tempfile.TemporaryDirectory(prefix="group-by-") as folder:
        runs = _runs(options, Path(folder))
    result = {
        "schema": SCHEMA,
        "benchmark": "group_by",
        "name": options.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit,
        "command": environment.command_line(),
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions(),
        "config": {
            "model": environment.named(options.model),
            "data": environment.named(options.data),
            "held_out": options.held_out,
            "train": options.train,
            "seeds": options.seeds,
        },
        "arms": {arm: _arm(runs[arm]) for arm in ARMS},
        "comparison": _compared(runs),
        "notes": options.note,
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"arms": result["arms"], "comparison": result["comparison"]}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--allow-dirty", action="store_true")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="after --: what every `btrm train` is given as well")
    options = parser.parse_args()
    options.train = [word for word in options.train if word != "--"]
    return options


def _runs(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs, the arms in turn, so that what else the machine does meets both alike."""
    pairs = folder / "pairs.jsonl"
    _btrm("data", "convert", options.data, "-o", str(pairs), "--split-by-prompt", str(options.held_out))
    held_out = folder / "pairs.held_out.jsonl"
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            output = folder / f"{arm}-{seed}"
            words = ["--model", options.model, "--data", str(pairs), "--eval-data", str(held_out), *options.train]
            words += ["--group-by", arm, "--seed", str(seed), "--output", str(output)]
            seconds, cpu = _btrm("train", *words)
            scores = folder / f"{arm}-{seed}.jsonl"
            _btrm("eval", str(output / "model"), "--data", str(held_out), "-o", str(scores))
            runs[arm].append({"seed": seed, "seconds": seconds, "cpu": cpu, "scores": scores, **_curve(output)})
            print(f"{arm}, seed {seed}: {seconds:.0f} s, {cpu:.0f} CPU s", file=sys.stderr, flush=True)
            runs[arm][-1]["rewards"] = read_scores(scores)
    return runs


def _btrm(*words: str) -> tuple[float, float]:
    """Run a command; its wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, "-m", "btrm_core", *words], check=True, env=environ, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def _curve(output: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    return {
        "steps": steps[-1]["step"],
        "loss": [[line["step"], line["loss"]] for line in steps],
        "evaluations": [[line["step"], line["loss"], line["accuracy"]] for line in lines if line["split"] == "eval"],
        "tokens": sum(line["tokens_per_second"] * line["seconds"] for line in steps),
    }


def _arm(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": [assess(_only(run["rewards"])).accuracy.half for run in runs],
        "loss": [_loss(_only(run["rewards"])) for run in runs],
        "seconds": spread([run["seconds"] for run in runs]),
        "cpu_seconds": spread([run["cpu"] for run in runs]),
        "tokens_computed": statistics.mean(run["tokens"] for run in runs),
        "runs": [{key: run[key] for key in ("seed", "steps", "loss", "evaluations")} for run in runs],
    }


def _only(rewards: list[PairRewards]) -> PairRewards:
    return PairRewards.joined(rewards)


def _loss(rewards: PairRewards) -> float:
    return float(np.logaddexp(0.0, -rewards.margin_P).mean())


def _compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`prompt` minus `pair` over all seeds together: accuracy and its interval, loss and its interval by prompt."""
    joined = {arm: PairRewards.joined([_only(run["rewards"]) for run in runs[arm]]) for arm in ARMS}
    overall = compare(joined["prompt"], joined["pair"]).to_dict()["overall"]
    # no p-value: the pairs of several seeds are the same pairs
    out = {
        key: overall[key] for key in ("pairs", "first", "second", "difference", "interval", "only_first", "only_second")
    }
    loss_P = [np.logaddexp(0.0, -joined[arm].margin_P) for arm in ARMS]
    interval = bootstrap_mean(loss_P[0] - loss_P[1], clusters(joined["prompt"].prompt_P, len(joined["prompt"])))
    out["loss_difference"] = float((loss_P[0] - loss_P[1]).mean())
    out["loss_interval"] = None if interval is None else [interval.low, interval.high]
    return out


if __name__ == "__main__":
    main()
