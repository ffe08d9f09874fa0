"""How fast `btrm serve` answers many clients, beside scoring the same rows offline and asking one at a time.

Starts a real server on loopback and asks it over HTTP with one conversation a request, as trainers do. Prints one JSON
object: rows per second of the three ways, their ratios, and p50 and p99 of the answers in seconds.

    python benchmarks/serve_load.py MODEL --prompts 16 --responses 16 --clients 64
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
from typing import Any

import httpx
import numpy as np

from btrm_core.scoring import Scorer

WORDS = "river stone market letter winter garden window music engine paper silver mountain answer question".split()


def workload(prompts: int, responses: int, prompt_words: int, response_words: int) -> list[list[dict[str, str]]]:
    """Conversations, those of one prompt after each other, as samplers finish them."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows = []
    for _ in range(prompts):
        asked = {"role": "user", "content": text(prompt_words)}
        rows += [[asked, {"role": "assistant", "content": text(response_words)}] for _ in range(responses)]
    return rows


async def load(url: str, rows: list[list[dict[str, str]]], clients: int) -> tuple[float, list[float], list[float]]:
    """Ask for every row; returns seconds, the answers' times, and the rewards in order."""
    rewards, times = [0.0] * len(rows), [0.0] * len(rows)
    waiting = iter(enumerate(rows))

    async def client(http: httpx.AsyncClient) -> None:
        for place, conversation in waiting:
            body = {"items": [{"messages": conversation}]}
            since = time.perf_counter()
            answer = await http.post("/v1/rewards", json=body)
            times[place] = time.perf_counter() - since
            answer.raise_for_status()
            rewards[place] = answer.json()["rewards"][0][0]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await asyncio.gather(*(http.get("/health") for _ in range(clients)))  # opens the connections
        since = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - since, times, rewards


def start(model: str, arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server that is ready, and its URL."""
    command = [sys.executable, "-m", "btrm_core", "serve", model, "--port", "0", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next((line.split()[-1] for line in server.stderr if " serving " in line), None)
    if url is None:
        raise SystemExit("the server did not start")
    while httpx.get(url + "/ready").status_code != 200:
        time.sleep(0.1)
    return server, url


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    rows = workload(options.prompts, options.responses, options.prompt_words, options.response_words)
    scorer = Scorer(options.model, dtype=options.dtype)
    scorer.rewards(rows[: options.responses])
    since = time.perf_counter()
    expected = scorer.rewards(rows)
    offline = len(rows) / (time.perf_counter() - since)
    server, url = start(options.model, ["--dtype", options.dtype])
    try:
        alone_rows = rows[: max(options.responses, len(rows) // 4)]
        seconds, _, _ = asyncio.run(load(url, alone_rows, 1))
        alone = len(alone_rows) / seconds
        seconds, times, rewards = asyncio.run(load(url, rows, options.clients))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    served = len(rows) / seconds
    return {
        "rows": len(rows),
        "clients": options.clients,
        "responses_per_prompt": options.responses,
        "device": str(scorer.device),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "offline_rows_per_second": round(offline, 2),
        "served_rows_per_second": round(served, 2),
        "one_at_a_time_rows_per_second": round(alone, 2),
        "served_to_offline": round(served / offline, 3),
        "served_to_one_at_a_time": round(served / alone, 2),
        "p50_seconds": round(float(np.percentile(times, 50)), 4),
        "p99_seconds": round(float(np.percentile(times, 99)), 4),
        "largest_difference": float(np.abs(np.array(rewards) - expected).max()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=120)
    parser.add_argument("--response-words", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
