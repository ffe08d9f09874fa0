"""Memory and time of the data path: makes N synthetic pairs, then loads, splits, encodes and reads them all.

    python -m benchmarks.data_memory --pairs 700000
    python -m benchmarks.data_memory --inspect --pairs 70000 700000 --name data-inspect-700k

Prints, after each phase, its seconds and the process's peak resident size up to then. The peak includes pages of
memory-mapped files, which the system takes back when it needs them; `anonymous` is the most that the process itself
held in the phase. `--inspect` measures `btrm data inspect` instead; with `--name` the figures become a result.
The pairs are made before the measurement, in another process. Needs a tokenizer only, which is made in memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import random
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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
    """Collects (name, seconds, CPU seconds, peak resident MB, anonymous MB) and prints each as it ends."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()
        self._begin()

    def _begin(self) -> None:
        self.most = self._kib("RssAnon")
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._kib("RssAnon"))
            time.sleep(0.1)

    @staticmethod
    def _kib(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    def end(self, name: str) -> None:
        """End the phase that began with the end of the one before."""
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu
        peak = self._kib("VmHWM")
        row = {
            "phase": name,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_mb": round(peak / 1024),
            "anonymous_mb": round(self.most / 1024),
        }
        self.rows.append(row)
        print(
            f"{name:<28} {seconds:8.1f} s   {cpu:8.1f} CPU s   peak {peak / 1024:7.0f} MB   "
            f"anonymous {self.most / 1024:7.0f} MB",
            flush=True,
        )
        self._begin()


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


def inspect(file: str, cache: str) -> Phases:
    """Run `btrm data inspect` on the pairs of `file`, reading and looking through them apart."""
    phases = Phases()
    from btrm_core.data import curate, load_pairs

    phases.end("imports")
    data = load_pairs([file], cache_dir=cache)
    phases.end("read and convert")
    found = curate.survey(data, near=False)
    phases.end("look through")
    near = curate.survey(data).near_duplicates
    phases.end("with near-duplicates")
    assert near is not None
    assert near["prompts"] == sum(found.pairs_per_prompt.values())
    return phases


def _inspected(number: int, answers: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/pairs.jsonl"
        maker = multiprocessing.get_context("spawn").Process(target=make_pairs, args=(file, number))
        maker.start()
        maker.join()
        print(f"{number:,} pairs, {Path(file).stat().st_size / 2**20:.0f} MB of JSON Lines")
        answers.put(
            {"pairs": number, "bytes": Path(file).stat().st_size, "phases": inspect(file, f"{folder}/cache").rows}
        )


def inspect_sizes(sizes: list[int], name: str | None, allow_dirty: bool) -> None:
    """Measure each size in a process of its own, and keep the figures if a name is given."""
    from benchmarks import environment, results

    commit = environment.require_clean(allow_dirty) if name else {}
    runs = []
    for number in sizes:
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        process = context.Process(target=_inspected, args=(number, answers))
        process.start()
        runs.append(answers.get())
        process.join()
    grown = [max(phase["anonymous_mb"] for phase in run["phases"]) for run in runs]
    bytes_a_pair = (grown[-1] - grown[0]) * 2**20 / max(1, sizes[-1] - sizes[0])
    print(f"memory grows by {bytes_a_pair:.0f} bytes a pair")
    if name:
        result = {
            "schema": results.SCHEMA,
            "benchmark": "data_inspect",
            "name": name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **commit,
            "command": environment.command_line(),
            "hardware": environment.hardware("cpu"),
            "versions": environment.versions(),
            "load_average": environment.load_average(),
            "runs": runs,
            "bytes_a_pair": round(bytes_a_pair),
        }
        (results.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the data path, or `btrm data inspect`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000])
    parser.add_argument("--inspect", action="store_true", help="measure `btrm data inspect`, every size by itself")
    parser.add_argument("--name", help="with --inspect: write benchmarks/results/NAME.json")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="measure code that is not committed; marks the result"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    args = parser.parse_args()
    if args.inspect:
        inspect_sizes(args.pairs, args.name, args.allow_dirty)
        return
    (number,) = args.pairs
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/pairs.jsonl"
        maker = multiprocessing.get_context("spawn").Process(target=make_pairs, args=(file, number))
        maker.start()
        maker.join()
        print(f"{number:,} pairs, {Path(file).stat().st_size / 2**20:.0f} MB of JSON Lines")
        phases = measure(file, f"{folder}/cache", args.workers, args.max_length)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"largest other process        {children:21.0f} MB")
        if args.json:
            print(json.dumps({"pairs": number, "workers": args.workers, "phases": phases.rows}))


if __name__ == "__main__":
    main()
