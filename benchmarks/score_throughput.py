"""Scoring speed on preference data: btrm's trees over the whole input, against padded batches, in one run.

    python -m benchmarks.score_throughput --name score-alpacaeval --model DIR --data alpacaeval.jsonl.gz --layers 6

Arms, taking turns in one process on the same weights and token ids: `btrm` is what `Scorer` computes for a window of
the input, the conversations of a prompt as one tree; `btrm-pairs` is btrm with each pair by itself, so that the two
sides of a pair share their prompt and nothing else is shared; `sorted` is transformers on batches of conversations
sorted by length, padded to the longest, the usual way to score quickly; `in-order` is the same in the order of the
file; `trl` is TRL's `RewardTrainer.evaluate` over the pairs. All give the same rewards; the largest difference is
recorded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, results
from benchmarks.score_best_of_n import Arm, measure
from benchmarks.train_throughput import add_settings, quiet, say, settings_from
from benchmarks.workload import Workload, build

ARMS = ("btrm", "btrm-pairs", "sorted", "in-order", "trl")


def parser() -> argparse.ArgumentParser:
    """The command line; `--pairs-per-step` times `--steps` pairs are scored, whole prompts of them."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.score_throughput", description=__doc__.split("\n")[0])
    out.add_argument("--name", required=True, help="name of the result: benchmarks/results/<name>.json")
    out.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    out.add_argument("--output", type=Path, default=results.RESULTS)
    out.add_argument("--allow-dirty", action="store_true", help="measure code that is not committed; marks the result")
    out.add_argument("--note", action="append", default=[], help="a sentence to print under the table")
    add_settings(out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, compare the rewards, write; returns an exit code."""
    arguments = parser().parse_args(argv)
    environment.restart_with(arguments.threads, arguments.device)
    try:
        commit = environment.require_clean(arguments.allow_dirty)
    except environment.DirtyTreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet()
    settings = settings_from(arguments)
    with tempfile.TemporaryDirectory(prefix="btrm-bench-") as folder:
        work = build(settings, Path(folder))
        arms, tokens = build_arms(work, arguments.arms)
        runs, rewards = measure(arms, settings.passes, settings.device)
    result = results.header("score_throughput", arguments.name, settings, commit)
    result.update(summarise(work, runs, rewards, tokens), notes=arguments.note)
    path = results.write(result, arguments.output)
    from benchmarks.table import render

    print(render([result]))
    say(f"written to {path}")
    return 0


def build_arms(work: Workload, names: Sequence[str]) -> tuple[dict[str, Arm], dict[str, int]]:
    """The arms as functions that return the rewards [2 x pairs], sides in turn; and the tokens each computes."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.settings.precision]
    device = torch.device(work.settings.device)
    plain = AutoModelForSequenceClassification.from_pretrained(work.model_dir, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(work.model_dir)
    sequences = [ids for pair in work.pairs for ids in pair]
    size, order = 2 * work.settings.micro_batch, np.argsort([-len(ids) for ids in sequences], kind="stable")
    batches = {
        "sorted": [order[i : i + size] for i in range(0, len(order), size)],
        "in-order": [np.arange(i, min(i + size, len(sequences))) for i in range(0, len(sequences), size)],
    }

    def padded(name: str) -> Any:
        rewards = torch.zeros(len(sequences), device=device)
        for places in batches[name]:
            lines = [{"input_ids": sequences[i].tolist()} for i in places]
            batch = tokenizer.pad(lines, padding=True, return_tensors="pt").to(device)
            rewards[torch.as_tensor(places, device=device)] = plain(**batch, use_cache=False).logits[:, 0].float()
        return rewards

    made: dict[str, Callable[[], tuple[Arm, int]]] = {
        "btrm": lambda: _btrm(work, plain, work.prompts),
        "btrm-pairs": lambda: _btrm(work, plain, [1] * len(work.pairs)),
        "trl": lambda: _trl(work, plain, tokenizer),
        **{
            name: lambda name=name: (
                lambda: padded(name),
                sum(len(places) * max(len(sequences[i]) for i in places) for places in batches[name]),
            )
            for name in batches
        },
    }
    found = {name: made[name]() for name in names}
    return {name: arm for name, (arm, _) in found.items()}, {name: tokens for name, (_, tokens) in found.items()}


def _btrm(work: Workload, plain: Any, counts: Sequence[int]) -> tuple[Arm, int]:
    """Rows of trees as `Scorer` lays them out, each of so many pairs; the rewards come in the order of the input."""
    import torch

    from btrm_core.model import RewardModel, choose_for
    from btrm_core.packing import bundles, collate, packed_rows, row_multiple

    device = work.settings.device
    model = RewardModel(plain, choose_for(plain, work.settings.attention, device)).eval()
    sequences = [ids.tolist() for pair in work.pairs for ids in pair]
    together = [number for number, count in enumerate(counts) for _ in range(2 * count)]
    multiple = row_multiple(model.kernel, device)

    def arm() -> Any:
        rewards = torch.zeros(len(sequences), device=device)
        budget = work.settings.tokens_per_batch
        for row in packed_rows(bundles(sequences, together, budget), budget):
            trees = [bundle.tree for bundle in row]
            batch = collate(trees, kernel=model.kernel, multiple_of=multiple, pad_id=work.pad_id)
            places = [member for bundle in row for member in bundle.members]
            rewards[torch.as_tensor(places, device=device)] = model(batch.to(device)).float()
        return rewards

    return arm, sum(len(bundle.tree.tokens) for bundle in bundles(sequences, together, work.settings.tokens_per_batch))


def _trl(work: Workload, plain: Any, tokenizer: Any) -> tuple[Arm, int]:
    """TRL's evaluation loop; its rewards are read from what `predict` returns."""
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    columns = {
        name: [pair[side].tolist() for pair in work.pairs] for side, name in enumerate(("chosen_ids", "rejected_ids"))
    }
    data = Dataset.from_dict(columns)
    trainer = RewardTrainer(
        model=plain,
        args=RewardConfig(
            output_dir=str(work.directory / "peer"),
            per_device_eval_batch_size=work.settings.micro_batch,
            max_length=work.settings.max_length,
            bf16=work.settings.precision == "bf16",
            use_cpu=work.settings.device == "cpu",
            report_to="none",
            disable_tqdm=True,
            seed=work.settings.seed,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    counts = work.facts["measured"]["padded"]

    def arm() -> Any:
        with torch.no_grad():
            margins = np.asarray(trainer.predict(trainer.eval_dataset).predictions)
        return torch.as_tensor(margins)

    return arm, counts


def summarise(
    work: Workload,
    runs: dict[str, list[tuple[float, float]]],
    rewards: dict[str, np.ndarray],
    tokens: dict[str, int],
) -> dict[str, Any]:
    """The figures of every arm, and how many times faster btrm is, pass by pass."""
    sequences = 2 * len(work.pairs)
    whole = {name: found for name, found in rewards.items() if found.shape == (sequences,)}
    first = next(iter(whole.values()))
    return {
        "workload": work.facts,
        "load_average": environment.load_average(),
        "largest_difference": float(max(np.abs(found - first).max() for found in whole.values())),
        "arms": {
            name: {
                "seconds": results.spread([wall for wall, _ in run]),
                "cpu_seconds": results.spread([cpu for _, cpu in run]),
                "conversations_per_second": results.spread([sequences / wall for wall, _ in run]),
                "tokens_computed": tokens[name],
                "computed_per_trie_token": tokens[name] / work.facts["measured"]["trie"],
            }
            for name, run in runs.items()
        },
        "comparisons": {
            name: {
                key: results.spread([b[i] / a[i] for b, a in zip(run, runs["btrm"], strict=True)])
                for i, key in enumerate(("wall", "cpu"))
            }
            for name, run in runs.items()
            if name != "btrm" and "btrm" in runs
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
