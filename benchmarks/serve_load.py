"""How fast `btrm serve` answers many clients, beside scoring the same rows offline and asking one at a time.

Starts a real server on loopback and asks it over HTTP with one conversation a request, as trainers do. The three ways
take turns, several rounds of each, so that what else the machine does falls on all of them. Prints one JSON object:
medians over the rounds with their smallest and largest, in rows per second and in CPU seconds, and p50 and p99 of the
answers.

The device, the server's HTTP and the load generator are threads of one machine. With OMP_NUM_THREADS=1 a CPU is a
device of one core, and the rest needs a core of its own, as beside a GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.serve_load MODEL --name NAME --prompts 32 --responses 16 --clients 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from btrm_core.scoring import Scorer

WORDS = "river stone market letter winter garden window music engine paper silver mountain answer question".split()
Rows = list[list[dict[str, str]]]


def workload(prompts: int, responses: int, prompt_words: int, response_words: int) -> Rows:
    """Conversations, those of one prompt after each other, as samplers finish them."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows = []
    for _ in range(prompts):
        asked = {"role": "user", "content": text(prompt_words)}
        rows += [[asked, {"role": "assistant", "content": text(response_words)}] for _ in range(responses)]
    return rows


async def load(port: int, bodies: list[bytes], clients: int) -> tuple[float, list[float], list[float]]:
    """Ask for every row over connections that stay open; returns seconds, the answers' times, and the rewards."""
    rewards, times = [0.0] * len(bodies), [0.0] * len(bodies)
    waiting = iter(enumerate(bodies))
    head = (
        "POST /v1/rewards HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for place, body in waiting:
            since = time.perf_counter()
            writer.write((head % len(body)).encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
            content = await reader.readexactly(length)
            times[place] = time.perf_counter() - since
            if b" 200 " not in answer[:16]:
                raise SystemExit(f"the server answered {content!r}")
            rewards[place] = json.loads(content)["rewards"][0][0]

    open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    since = time.perf_counter()
    await asyncio.gather(*(client(*connection) for connection in open_ones))
    seconds = time.perf_counter() - since
    for _, writer in open_ones:
        writer.close()
    return seconds, times, rewards


class Server:
    """A server that is ready."""

    def __init__(self, model: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "btrm_core", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        url = next((line.split()[-1] for line in self.process.stderr if " serving " in line), None)
        if url is None:
            raise SystemExit("the server did not start")
        self.url, self.port = url, int(url.rpartition(":")[2])
        while httpx.get(self.url + "/ready").status_code != 200:
            time.sleep(0.1)

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def counted(self, name: str) -> float:
        """A counter of /metrics."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    def stop(self) -> None:
        """Let it drain."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@dataclass
class Figures:
    """What the rounds gave, a list for each name."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Note the figures of a round."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, smallest and largest of each."""
        return {
            name: {"median": _rounded(np.median(v)), "min": _rounded(min(v)), "max": _rounded(max(v))}
            for name, v in self.values.items()
        }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def one_round(scorer: Scorer, server: Server, rows: Rows, options: argparse.Namespace, figures: Figures) -> float:
    """Offline, served and one at a time, once each; returns the largest difference of a reward."""
    bodies = [json.dumps({"items": [{"messages": row}]}).encode() for row in rows]
    some = bodies[: max(options.responses, len(bodies) // 8)]
    since, cpu, tokens = time.perf_counter(), time.process_time(), scorer.tokens.computed
    expected = scorer.rewards(rows)
    offline = time.perf_counter() - since
    figures.add(
        offline_rows_per_second=len(rows) / offline,
        offline_cpu_seconds=time.process_time() - cpu,
        offline_model_tokens=scorer.tokens.computed - tokens,
    )
    names = {"served_model_tokens": "btrm_model_tokens_total", "served_batches": "btrm_compute_seconds_count",
             "served_device_seconds": "btrm_compute_seconds_sum"}  # fmt: skip
    counted = {name: server.counted(metric) for name, metric in names.items()}
    server_cpu, cpu = server.cpu_seconds(), time.process_time()
    seconds, times, rewards = asyncio.run(load(server.port, bodies, options.clients))
    client_cpu, server_cpu = time.process_time() - cpu, server.cpu_seconds() - server_cpu
    served = len(rows) / seconds
    figures.add(**{name: server.counted(metric) - counted[name] for name, metric in names.items()})
    alone_seconds, _, _ = asyncio.run(load(server.port, some, 1))
    alone = len(some) / alone_seconds
    figures.add(
        served_rows_per_second=served,
        served_cpu_seconds=server_cpu,
        load_generator_cpu_seconds=client_cpu,
        one_at_a_time_rows_per_second=alone,
        served_to_offline=served * offline / len(rows),
        served_to_one_at_a_time=served / alone,
        p50_seconds=float(np.percentile(times, 50)),
        p99_seconds=float(np.percentile(times, 99)),
    )
    return float(np.abs(np.array(rewards) - expected).max())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    rows = workload(options.prompts, options.responses, options.prompt_words, options.response_words)
    scorer = Scorer(options.model, dtype=options.dtype)
    server, figures, off = Server(options.model, ["--dtype", options.dtype]), Figures(), 0.0
    try:
        one_round(scorer, server, rows, options, Figures())  # warms both up
        for _ in range(options.rounds):
            off = max(off, one_round(scorer, server, rows, options, figures))
    finally:
        server.stop()
    return {
        "benchmark": "serve_load",
        "model": Path(options.model).name,
        "rows": len(rows),
        "clients": options.clients,
        "responses_per_prompt": options.responses,
        "rounds": options.rounds,
        "device": str(scorer.device),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "parameters": sum(p.numel() for p in scorer.model.parameters()),
        **figures.summary(),
        "largest_difference": off,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=120)
    parser.add_argument("--response-words", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--name", help="write the figures to benchmarks/results/NAME.json too")
    options = parser.parse_args()
    text = json.dumps(measure(options), indent=2)
    if options.name:
        (Path(__file__).parent / "results" / f"{options.name}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
