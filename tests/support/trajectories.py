"""Whole runs of one tiny model in fp32: every run gives its losses, its rewards at the end and its weights.

Importing this imports all that a run needs, so that a process forked from one that has is ready at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets.packaged_modules  # noqa: F401
import numpy as np
import pandas as pd  # noqa: F401
import peft  # noqa: F401
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

from btrm_core import families, run
from btrm_core.config import read_settings
from btrm_core.data.sample import sample_path
from btrm_core.model.toy import build_toy
from btrm_core.training.processes import runtime
from btrm_core.training.session import Outcome
from support.cards import printed, read_blocks

runtime.quiet()

STEPS = 10
PAIRS = 8
SHAPE = {"hidden_size": 32, "intermediate_size": 48}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    micro_batches: list[int]
    rewards: list[float]
    """Of the three held-out pairs, from the live model at the end."""
    directory: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "model.safetensors")


def prepare(root: Path, rows: int = 64, layers: int = 1) -> Path:
    """A base model, training pairs and three held-out pairs under `root`."""
    tiny = families.load("llama3").recipe().tiny
    assert tiny is not None
    build_toy(tiny, root / "base", **SHAPE, num_hidden_layers=layers)
    for part, count in (("train", rows), ("held_out", 3)):
        lines = Path(sample_path(part)).read_text(encoding="utf-8").splitlines()[:count]
        (root / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def branching_rows() -> list[dict[str, Any]]:
    """Twelve questions with follow-ups: all pairs of three answers after the first turn, or after the second."""
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over a lazy dog and answers every question well".split()

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(least, most)))

    found = []
    for number in range(12):
        first = [{"role": "user", "content": f"question {number}: {text(8, 20)}"}]
        turns = [first] + [
            [*first, {"role": "assistant", "content": text(4, 9)}, {"role": "user", "content": text(3, 6)}]
            for _ in range(number % 2)
        ]
        for prompt in turns:
            answers = [text(2, 12) for _ in range(3)]
            pairs = [(0, 1), (0, 2), (1, 2), (0, 1)]
            found += [
                {"prompt": prompt, "chosen": answers[a], "rejected": answers[b], "weight": float(1 + n)}
                for n, (a, b) in enumerate(pairs)
            ]
    return [found[i] for i in rng.permutation(len(found))]


def settings(root: Path, output: Path, **values: Any) -> dict[str, Any]:
    """The settings of a run, to be changed by `values` ("section__key").

    All runs have one cache, $BTRM_CACHE: how rows of this model may be laid out is found out once.
    """
    return {
        "family": "llama3",
        "model.name": str(root / "base"),
        "data.train": (str(root / "train.jsonl"),),
        "data.eval": (str(root / "held_out.jsonl"),),
        "data.max_length": 128,
        "data.workers": 1,
        "train.max_steps": STEPS,
        "train.epochs": 3.0,
        "train.pairs_per_step": PAIRS,
        "train.tokens_per_batch": 300,
        "train.learning_rate": 3e-3,
        "output.eval_every": 1000,
        "output.dir": str(output),
        **{key.replace("__", "."): value for key, value in values.items()},
    }


def flags(root: Path, output: Path, **values: Any) -> list[str]:
    """The same settings for the command line."""
    given = settings(root, output, **values)
    return [f"--set={k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in given.items()]


def train(root: Path, output: Path, **values: Any) -> Outcome:
    """Run `btrm train` in this process."""
    return run.train(read_settings(None, settings(root, output, **values)))


def trajectory(root: Path, output: Path, **values: Any) -> Trajectory:
    """Run `btrm train` in this process and read what it did."""
    return read(train(root, output, **values), output)


def read(outcome: Outcome, output: Path) -> Trajectory:
    """What a finished run did; its metrics must have every step once."""
    assert outcome.directory is not None
    rows = metrics(output)
    assert [row["step"] for row in rows] == list(range(1, outcome.progress.step + 1))
    rewards = [example[side][0] for example in outcome.examples for side in ("chosen", "rejected")]
    return Trajectory(
        [row["loss"] for row in rows],
        [row["grad_norm"] for row in rows],
        [row["micro_batches"] for row in rows],
        rewards,
        outcome.directory,
    )


def metrics(output: Path, split: str = "train") -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` so far; a line that is being written is left out."""
    file = output / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if row["split"] == split]


def run_card(directory: Path) -> tuple[float, list[dict[str, str]]]:
    """Run the code of a saved model's card beside it: the reward that it prints, and of which conversation."""
    found = read_blocks(directory)
    with contextlib.chdir(directory.parent):  # it is named as it is called
        reward, names = printed(found.get("transformers") or found["transformers and peft"])
    return reward, names["chat"]


def distance(left: Trajectory, right: Trajectory) -> float:
    """Largest difference of any loss or final reward."""
    assert len(left.losses) == len(right.losses)
    pairs = zip([*left.losses, *left.rewards], [*right.losses, *right.rewards], strict=True)
    return max(abs(a - b) for a, b in pairs)


def run_many(root: str, output: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Several runs one after another in this process group; the main process leaves `NAME.json` for each."""
    for name, values in runs.items():
        place = Path(output) / name
        outcome = train(Path(root), place, **values)
        if torch.distributed.get_rank() == 0:
            found = dataclasses.asdict(read(outcome, place))
            (Path(output) / f"{name}.json").write_text(json.dumps(found, default=str))
    runtime.leave()


def stored(output: Path, name: str) -> Trajectory:
    """What `run_many` left of a run."""
    found = json.loads((output / f"{name}.json").read_text())
    return Trajectory(**{**found, "directory": Path(found["directory"])})


def heads(directories: Sequence[Path]) -> np.ndarray:
    """The saved heads, one line each."""
    return np.stack([load_file(d / "model.safetensors")["score.weight"].numpy()[0] for d in directories])
