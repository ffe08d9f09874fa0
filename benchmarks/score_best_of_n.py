"""Scoring N responses to one prompt: the prompt once for all, against every conversation alone.

    python -m benchmarks.score_best_of_n --name best-of-16 --model DIR

Arms, taking turns in one process: `shared` is btrm's row `[prompt | response 1 | ... | response N]`; `batch` is
transformers with all N conversations as one batch (equal lengths, so nothing is padded); `alone` is transformers, one
conversation after another. Token ids are random: only the time and the equality of the rewards matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, results
from benchmarks.harness import rotated
from benchmarks.workload import Settings

Arm = Callable[[], Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.score_best_of_n", description=__doc__.split("\n")[0])
    out.add_argument("--name", required=True, help="name of the result: benchmarks/results/<name>.json")
    out.add_argument("--model", required=True, help="directory of a model; without a head it gets a random one")
    out.add_argument("--layers", type=int, help="keep the first N layers only")
    out.add_argument("--responses", type=int, default=16)
    out.add_argument("--prompt-tokens", type=int, default=512)
    out.add_argument("--response-tokens", type=int, default=64)
    out.add_argument("--repeats", type=int, default=5)
    out.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    out.add_argument("--attention", default="auto")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", type=Path, default=results.RESULTS)
    out.add_argument("--allow-dirty", action="store_true", help="measure code that is not committed; marks the result")
    out.add_argument("--note", action="append", default=[], help="a sentence to print under the table")
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
    sequences, vocabulary = random_sequences(arguments)
    arms, layers = build_arms(arguments, sequences)
    runs, rewards = measure(arms, arguments.repeats, arguments.device)
    result = summarise(arguments, commit, runs, rewards, layers)
    result["vocabulary"] = vocabulary
    path = results.write(result, arguments.output)
    from benchmarks.table import render

    print(render([result]))
    print(f"written to {path}", file=sys.stderr)
    return 0


def random_sequences(arguments: argparse.Namespace) -> tuple[list[list[int]], int]:
    """N sequences of random ids with a common prompt; the first ids of the responses differ."""
    from transformers import AutoConfig

    size = int(AutoConfig.from_pretrained(arguments.model).get_text_config().vocab_size)
    random = np.random.default_rng(arguments.seed)
    low = min(16, size // 2)  # the first ids are control tokens in most vocabularies
    prompt = random.integers(low, size, arguments.prompt_tokens).tolist()
    tails = random.integers(low, size, (arguments.responses, arguments.response_tokens))
    tails[:, 0] = low + np.arange(arguments.responses) % (size - low)
    return [prompt + tail.tolist() for tail in tails], size


def build_arms(arguments: argparse.Namespace, sequences: list[list[int]]) -> tuple[dict[str, Arm], int]:
    """The three ways to score, as functions that return the rewards; and the number of layers."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from btrm_core.model import RewardModel, choose_for
    from btrm_core.packing import collate, grow, row_multiple

    device, dtype = (
        torch.device(arguments.device),
        getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[arguments.precision]),
    )
    config = AutoConfig.from_pretrained(arguments.model, num_labels=1)
    text = config.get_text_config()
    if arguments.layers:
        text.num_hidden_layers = min(arguments.layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.pad_token_id = 0

    def load() -> Any:
        torch.manual_seed(arguments.seed)
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model, config=config, dtype=dtype)
        torch.nn.init.normal_(model.score.weight, std=(text.hidden_size + 1) ** -0.5)
        return model.to(device).eval()

    plain, ours = load(), load()
    kernel = choose_for(ours, arguments.attention, device.type)
    model = RewardModel(ours, kernel).eval()
    ids = torch.tensor(sequences, device=device)

    def shared() -> Any:
        batch = collate([grow(sequences)], kernel=kernel, multiple_of=row_multiple(kernel, device.type))
        return model(batch.to(device))

    def batch() -> Any:
        return plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0]

    def alone() -> Any:
        lines = [line[None] for line in ids]
        return torch.cat([plain(input_ids=line, use_cache=False).logits[:, 0] for line in lines])

    return {"shared": shared, "batch": batch, "alone": alone}, int(text.num_hidden_layers)


def measure(
    arms: dict[str, Arm], repeats: int, device: str
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, np.ndarray]]:
    """Wall and CPU seconds of each arm per repeat, arms taking turns after one warm-up each; and their rewards."""
    import torch

    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    with torch.inference_mode():
        rewards = {name: arm().double().cpu().numpy() for name, arm in arms.items()}
        for number in range(repeats):
            for name in rotated(list(arms), number):
                wall, cpu = time.perf_counter(), time.process_time()
                arms[name]().cpu()  # copying the rewards waits for the device
                runs[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return runs, rewards


def summarise(
    arguments: argparse.Namespace,
    commit: dict[str, Any],
    runs: dict[str, list[tuple[float, float]]],
    rewards: dict[str, np.ndarray],
    layers: int,
) -> dict[str, Any]:
    """The result of a run."""
    settings = Settings(
        model=arguments.model,
        data=(),
        layers=arguments.layers,
        precision=arguments.precision,
        seed=arguments.seed,
        attention=arguments.attention,
        device=arguments.device,
        threads=arguments.threads,
    )
    result = results.header("score_best_of_n", arguments.name, settings, commit)
    whole = arguments.responses * (arguments.prompt_tokens + arguments.response_tokens)
    once = arguments.prompt_tokens + arguments.responses * arguments.response_tokens
    result.update(
        layers=layers,
        responses=arguments.responses,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        notes=arguments.note,
        largest_difference=float(np.abs(rewards["shared"] - rewards["alone"]).max()),
        load_average=environment.load_average(),
        arms={
            name: {
                "seconds": results.spread([wall for wall, _ in run]),
                "cpu_seconds": results.spread([cpu for _, cpu in run]),
                "tokens_computed": once if name == "shared" else whole,
            }
            for name, run in runs.items()
        },
        comparisons={
            name: {
                key: results.spread([b[i] / a[i] for b, a in zip(run, runs["shared"], strict=True)])
                for i, key in enumerate(("wall", "cpu"))
            }
            for name, run in runs.items()
            if name != "shared"
        },
    )
    return result


if __name__ == "__main__":
    raise SystemExit(main())
