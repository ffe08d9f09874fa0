"""Memory and time of the data path: makes N synthetic pairs, then loads, splits, encodes and reads them all.

    python benchmarks/data_memory.py --pairs 700000

Prints, after each phase, its seconds and the process's peak resident size up to then. The peak includes pages of
memory-mapped files, which the system takes back when it needs them; `anonymous` is what the process itself holds.
The pairs are made before the measurement, in another process. Needs a tokenizer only, which is made in memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

TEXT = "the of and to in is you that it he was for on are as with his they at be this have from or one had by word"
WORDS = TEXT.split()


def make_pairs(path: str, number: int) -> None:
    """Write pairs of about 12 words a message; every tenth has a second turn, every hundredth shares its prompt."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(most // 2, most)))

    with Path(path).open("w") as file:
        for index in range(number):
            prompt = [{"role": "user", "content": f"{index if index % 100 else 0} {words(15)}?"}]
            if index % 10 == 0:
                prompt += [{"role": "assistant", "content": words(15)}, {"role": "user", "content": words(10)}]
            sides = {side: [*prompt, {"role": "assistant", "content": words(15)}] for side in ("chosen", "rejected")}
            file.write(json.dumps(sides) + "\n")


class Phases:
    """Collects (name, seconds, peak resident MB, anonymous MB) and prints each as it ends."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.started = time.perf_counter()

    def end(self, name: str) -> None:
        """End the phase that began with the end of the one before."""
        seconds = time.perf_counter() - self.started
        anonymous = next(
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {
            "phase": name,
            "seconds": round(seconds, 1),
            "peak_mb": round(peak / 1024),
            "anonymous_mb": round(anonymous / 1024),
        }
        self.rows.append(row)
        print(
            f"{name:<28} {seconds:8.1f} s   peak {peak / 1024:7.0f} MB   anonymous {anonymous / 1024:7.0f} MB",
            flush=True,
        )
        self.started = time.perf_counter()


def measure(file: str, cache: str, workers: int, max_length: int) -> Phases:
    """Run every phase on the pairs of `file`."""
    phases = Phases()
    from transformers import LlamaConfig

    from btrm_core import families
    from btrm_core.chat import prepare_chat
    from btrm_core.data import encode_pairs, load_pairs, split_held_out
    from btrm_core.model import toy_tokenizer

    family = families.load("llama3")
    chat = prepare_chat(toy_tokenizer(family.recipe().tiny, [TEXT] * 3), LlamaConfig(), family)
    phases.end("imports and tokenizer")
    data = load_pairs([file], cache_dir=cache)
    phases.end("load (first run)")
    data = load_pairs([file], cache_dir=cache)
    phases.end("load (second run)")
    train, held = split_held_out(data, 0.05)
    phases.end("split")
    parts = [encode_pairs(part, chat, max_length, workers=workers, cache_dir=cache) for part in (train, held)]
    phases.end(f"encode, {workers} worker(s)")
    parts = [encode_pairs(part, chat, max_length, workers=workers, cache_dir=cache) for part in (train, held)]
    phases.end("encode (second run)")
    tokens = sum(int(part.group(index).tokens.sum() >= 0) for part in parts for index in range(len(part)))
    phases.end("read every pair's tokens")
    assert tokens == len(data)
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/pairs.jsonl"
        maker = multiprocessing.get_context("spawn").Process(target=make_pairs, args=(file, args.pairs))
        maker.start()
        maker.join()
        print(f"{args.pairs:,} pairs, {Path(file).stat().st_size / 2**20:.0f} MB of JSON Lines")
        phases = measure(file, f"{folder}/cache", args.workers, args.max_length)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"largest other process        {children:21.0f} MB")
        if args.json:
            print(json.dumps({"pairs": args.pairs, "workers": args.workers, "phases": phases.rows}))


if __name__ == "__main__":
    main()
