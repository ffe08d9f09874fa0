"""Is a model trained by btrm as good as one by TRL's `RewardTrainer`? The same pairs, steps, settings and seeds.

    python -m benchmarks.quality_vs_trl --name quality-vs-trl-hh --model DIR --train hh.jsonl.gz

Both arms of a seed start from one directory (backbone, head, tokenizer and template) and are trained on one file of
pairs; `btrm eval` then judges both saved models on the same held-out pairs, of which no prompt was trained on. Without
`--evaluation` a share of the prompts is held out. Finished runs in `--work-dir` are kept and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, results
from benchmarks.quality_arms import Experiment, btrm_command
from benchmarks.workload import Settings, prepare_model, read_rows, unused_special_id

ARMS = ("btrm", "trl")
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line; every public field of `Experiment` has a flag."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.quality_vs_trl", description=__doc__.split("\n")[0])
    out.add_argument("--name", required=True, help="name of the result: benchmarks/results/<name>.json")
    out.add_argument("--work-dir", type=Path, help="keep data, models and logs here, and go on from what is there")
    out.add_argument("--output", type=Path, default=results.RESULTS)
    out.add_argument("--allow-dirty", action="store_true", help="measure code that is not committed; marks the result")
    out.add_argument("--note", action="append", default=[], help="a sentence to print under the table")
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "int | None": int}
    for item in dataclasses.fields(Experiment):
        if item.metadata.get("internal"):
            continue
        flag = "--" + item.name.replace("_", "-")
        missing = item.default is dataclasses.MISSING
        default = None if missing else item.default
        if str(item.type).startswith("tuple"):
            kind = int if "int" in str(item.type) else str
            out.add_argument(flag, nargs="+", type=kind, required=missing, default=default)
        else:
            out.add_argument(flag, type=kinds[str(item.type)], required=missing, default=default)
    return out


def main(argv: list[str] | None = None) -> int:
    """Prepare, train, judge, write; returns an exit code."""
    arguments = parser().parse_args(argv)
    try:
        commit = environment.require_clean(arguments.allow_dirty)
    except environment.DirtyTreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [item.name for item in dataclasses.fields(Experiment) if not item.metadata.get("internal")]
    values = {name: getattr(arguments, name) for name in chosen}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if reason := Experiment(**values).refusal():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    directory = arguments.work_dir or Path(tempfile.mkdtemp(prefix="btrm-quality-"))
    experiment = Experiment(**values, directory=str(directory.resolve()))
    try:
        facts = prepare(experiment)
        runs = {arm: [] for arm in ARMS}  # type: dict[str, list[dict[str, Any]]]
        for seed in experiment.seeds:
            for arm in ARMS if seed % 2 == 0 else ARMS[::-1]:
                runs[arm].append(train(experiment, arm, seed))
        result = {**header(experiment, arguments.name, commit), "workload": facts, **judge(experiment, runs)}
        result["notes"] = arguments.note
    finally:
        if arguments.work_dir is None:
            shutil.rmtree(directory, ignore_errors=True)
    path = results.write(result, arguments.output)
    from benchmarks.table import render

    print(render([result]))
    say(f"written to {path}")
    return 0


def prepare(experiment: Experiment) -> dict[str, Any]:
    """Write the pairs of both parts and the model of every seed; returns what the result says of them."""
    from transformers import AutoTokenizer

    directory = Path(experiment.directory)
    directory.mkdir(parents=True, exist_ok=True)
    experiment.save()
    tokenizer = AutoTokenizer.from_pretrained(experiment.model)
    train, evaluation = split(experiment, list(read_rows(experiment.train)), list(read_rows(experiment.evaluation)))
    lengths: dict[int, list[int]] = {}

    def fits(row: Row) -> bool:
        ids = [tokenizer.apply_chat_template(row[side], return_dict=False) for side in ("chosen", "rejected")]
        lengths[id(row)] = [len(each) for each in ids]
        return max(lengths[id(row)]) <= experiment.max_length

    parts = {"train": _first(train, fits, experiment.pairs)}
    parts["evaluation"] = _first(evaluation, fits, experiment.evaluation_pairs)
    if len(parts["train"]) < experiment.pairs:
        raise ValueError(
            f"--pairs {experiment.pairs}: only {len(parts['train'])} fit in {experiment.max_length} tokens"
        )
    for name, rows in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [row[side] for rows in parts.values() for row in rows for side in ("chosen", "rejected")]
    pad_id = unused_special_id(tokenizer, [tokenizer.apply_chat_template(text, return_dict=False) for text in texts])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    parameters = {}
    for seed in experiment.seeds:
        settings = Settings(model=experiment.model, data=experiment.train, layers=experiment.layers, seed=seed)
        parameters, config = prepare_model(settings, experiment.start(seed), tokenizer, pad_id)
    tokens = [sum(map(sum, (lengths[id(row)] for row in rows))) for rows in parts.values()]
    return {
        "train_pairs": len(parts["train"]),
        "evaluation_pairs": len(parts["evaluation"]),
        "evaluation_prompts": len({prompt_of(row) for row in parts["evaluation"]}),
        "train_tokens": tokens[0],
        "evaluation_tokens": tokens[1],
        "steps": experiment.steps,
        "layers": config.num_hidden_layers,
        "parameters": parameters,
    }


def split(experiment: Experiment, train: list[Row], evaluation: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows in a seeded order that share no prompt."""
    draw = np.random.default_rng(0)
    if not experiment.evaluation:
        prompts = sorted({prompt_of(row) for row in train})
        held = {prompts[i] for i in draw.permutation(len(prompts))[: round(experiment.held_out * len(prompts))]}
        evaluation = [row for row in train if prompt_of(row) in held]
    else:
        held = {prompt_of(row) for row in evaluation}
    train = [row for row in train if prompt_of(row) not in held]
    return tuple([part[i] for i in draw.permutation(len(part))] for part in (train, evaluation))  # type: ignore[return-value]


def prompt_of(row: Row) -> str:
    """What pairs of one prompt share."""
    return json.dumps(row["chosen"][:-1])


def _first(rows: Iterable[Row], fits: Callable[[Row], bool], number: int) -> list[Row]:
    """The first `number` rows that fit, in order."""
    found = []
    for row in rows:
        if len(found) == number:
            break
        if fits(row):
            found.append(row)
    return found


def train(experiment: Experiment, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm in a process of its own; returns its seconds. A finished run is not repeated."""
    output = experiment.output(arm, seed)
    kept = output / "seconds.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = btrm_command(experiment, seed)
    if arm == "trl":
        experiment_file = str(Path(experiment.directory) / "experiment.json")
        command = [sys.executable, "-m", "benchmarks.quality_arms", experiment_file, arm, str(seed)]
    say(f"{arm}, seed {seed}: load {environment.load_average()}")
    started = time.monotonic()
    log = Path(experiment.directory) / f"{arm}-{seed}.log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=environment.ROOT,
            env=environment.worker_environment(experiment.threads, "cpu"),
        )
        _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{arm}, seed {seed} ended with code {code}:\n{log.read_text(errors='replace')[-2000:]}")
    wall = time.monotonic() - started
    seconds = {
        "seed": seed,
        "wall": round(wall, 2),
        "cpu": round(usage.ru_utime + usage.ru_stime, 2),
        "training": round(training_seconds(experiment, arm, seed), 2),
        "peak_memory": usage.ru_maxrss * 1024,
        "first_loss": first_loss(experiment, arm, seed),
    }
    kept.write_text(json.dumps(seconds), encoding="utf-8")
    say(f"{arm}, seed {seed}: {seconds}")
    return seconds


def training_seconds(experiment: Experiment, arm: str, seed: int) -> float:
    """Seconds of the training loop alone, as the trainer itself reports them."""
    if arm == "trl":
        return float(json.loads((experiment.output(arm, seed) / "run.json").read_text(encoding="utf-8"))["seconds"])
    manifest = json.loads((experiment.model_of(arm, seed) / "btrm.json").read_text(encoding="utf-8"))
    return float(manifest["training"]["seconds"])


def first_loss(experiment: Experiment, arm: str, seed: int) -> float:
    """Mean loss of the first step; the arms of a seed take other pairs in it."""
    if arm == "trl":
        curve = json.loads((experiment.output(arm, seed) / "run.json").read_text(encoding="utf-8"))["curve"]
        return float(curve[0]["loss"])
    with (experiment.output(arm, seed) / "metrics.jsonl").open(encoding="utf-8") as lines:
        return float(next(line["loss"] for line in map(json.loads, lines) if line["split"] == "train"))


def judge(experiment: Experiment, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rewards of the held-out pairs by every model, and what they say: per seed, and pooled over the seeds.

    Pooled, a pair counts once per seed and all its copies belong to one prompt, so the resampled intervals do not take
    them for independent. McNemar's test would: pooled, only the interval says whether a difference is shown.
    """
    from btrm_core.evaluation import PairRewards, assess, compare
    from btrm_core.scoring import Scorer, source_rewards

    data = str(Path(experiment.directory) / "evaluation.jsonl")
    rewards: dict[str, list[PairRewards]] = {arm: [] for arm in ARMS}
    for number, seed in enumerate(experiment.seeds):
        for arm in ARMS:
            say(f"judging {arm}, seed {seed}")
            found = source_rewards(Scorer(str(experiment.model_of(arm, seed)), dtype="fp32"), data).rewards
            named = dataclasses.replace(found, model=arm, id_P=[f"{seed}:{name}" for name in found.id_P])
            rewards[arm].append(named)
            runs[arm][number] |= figures(assess(named))
    pooled = {arm: PairRewards.joined(parts) for arm, parts in rewards.items()}
    arms = {}
    for arm in ARMS:
        spreads = {key: results.spread([run[key] for run in runs[arm]]) for key in ("wall", "cpu", "training")}
        arms[arm] = {**spreads, **figures(assess(pooled[arm])), "runs": runs[arm]}
    comparisons = {
        "seeds": [comparison(compare(a, b)) for a, b in zip(rewards["btrm"], rewards["trl"], strict=True)],
        "pooled": pooled_comparison(compare(pooled["btrm"], pooled["trl"])),
        "speedup": {
            key: results.spread([b[key] / a[key] for a, b in zip(runs["btrm"], runs["trl"], strict=True)])
            for key in ("wall", "cpu", "training")
        },
    }
    return {"arms": arms, "comparisons": comparisons}


def figures(found: Any) -> dict[str, Any]:
    """What a result keeps of an evaluation."""
    right = found.accuracy
    tokens = next(each for each in found.length if each.unit == "tokens")
    return {
        "accuracy": right.half,
        "wilson": [right.wilson.low, right.wilson.high],
        "bootstrap": None if right.bootstrap is None else [right.bootstrap.low, right.bootstrap.high],
        "ties": right.ties,
        "loss": found.calibration.before.loss,
        "reward_margin": found.rewards.margin.mean,
        "longer_wins": tokens.longer_wins,
    }


def comparison(found: Any) -> dict[str, Any]:
    """What a result keeps of two models on the same pairs."""
    kept = found.to_dict()
    return {**kept["overall"], "agreement": kept["agreement"], "margin_correlation": kept["margin_correlation"]}


def pooled_comparison(found: Any) -> dict[str, Any]:
    """The same for pairs that come once per seed: whether a difference is shown is the interval's to say, not p's."""
    made = {key: value for key, value in comparison(found).items() if key not in ("p_value", "p_corrected", "verdict")}
    interval = made["interval"]
    return {**made, "shown": interval is not None and not interval["low"] <= 0 <= interval["high"]}


def header(experiment: Experiment, name: str, commit: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that says what was run, on what, at which commit."""
    config = dataclasses.asdict(experiment)
    del config["directory"]
    config["model"] = environment.named(experiment.model)
    for key in ("train", "evaluation"):
        config[key] = [environment.named(source) for source in config[key]]
    made = results.header("quality_vs_trl", name, Settings(experiment.model, experiment.train), commit)
    return {**made, "config": config}


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    environment.restart_with(1, "cpu")
    raise SystemExit(main())
