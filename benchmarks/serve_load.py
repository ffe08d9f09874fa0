"""How fast `btrm serve` answers many clients, beside scoring the same rows offline and asking one at a time.

Starts a real server on loopback and asks it over HTTP with one conversation a request, as trainers do. The three ways
take turns, several rounds of each, so that what else the machine does falls on all of them.

The device, the server's HTTP and the load generator are threads of one machine. With OMP_NUM_THREADS=1 a CPU is a
device of one core, and the rest needs a core of its own, as beside a GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.serve_load MODEL --name serve-load
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
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import environment, results
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


def one_round(scorer: Scorer, server: Server, rows: Rows, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Offline, served and one at a time, once each; what each took, and the largest difference of a reward."""
    bodies = [json.dumps({"items": [{"messages": row}]}).encode() for row in rows]
    some = bodies[: max(options.responses, len(bodies) // 8)]
    since, cpu, tokens = time.perf_counter(), time.process_time(), scorer.tokens.computed
    expected = scorer.rewards(rows)
    offline = {
        "rows_per_second": len(rows) / (time.perf_counter() - since),
        "cpu_seconds": time.process_time() - cpu,
        "tokens_computed": scorer.tokens.computed - tokens,
    }
    counters = {"tokens_computed": "btrm_model_tokens_total", "batches": "btrm_compute_seconds_count",
                "device_seconds": "btrm_compute_seconds_sum"}  # fmt: skip
    before = {name: server.counted(metric) for name, metric in counters.items()}
    server_cpu, cpu = server.cpu_seconds(), time.process_time()
    seconds, times, rewards = asyncio.run(load(server.port, bodies, options.clients))
    served = {
        "rows_per_second": len(rows) / seconds,
        "cpu_seconds": server.cpu_seconds() - server_cpu,
        "load_generator_cpu_seconds": time.process_time() - cpu,
        "p50_seconds": float(np.percentile(times, 50)),
        "p99_seconds": float(np.percentile(times, 99)),
        "largest_difference": float(np.abs(np.array(rewards) - expected).max()),
        **{name: server.counted(metric) - before[name] for name, metric in counters.items()},
    }
    server_cpu = server.cpu_seconds()
    seconds, _, _ = asyncio.run(load(server.port, some, 1))
    alone = {"rows_per_second": len(some) / seconds, "cpu_seconds": server.cpu_seconds() - server_cpu}
    return {"offline": offline, "served": served, "one-at-a-time": alone}


def measure(scorer: Scorer, rows: Rows, options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Every round's figures, after one that warms both up."""
    server = Server(options.model, ["--dtype", options.dtype])
    try:
        one_round(scorer, server, rows, options)
        return [one_round(scorer, server, rows, options) for _ in range(options.rounds)]
    finally:
        server.stop()


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The spread of every arm's figures, and of the served rows per second over those of the other arms."""
    arms = {
        name: {key: results.spread([one[name][key] for one in rounds]) for key in first}
        for name, first in rounds[0].items()
    }
    rate = {name: [one[name]["rows_per_second"] for one in rounds] for name in arms}
    over = {
        name: results.spread([served / other for served, other in zip(rate["served"], rate[name], strict=True)])
        for name in ("offline", "one-at-a-time")
    }
    return {"arms": arms, "comparisons": {"served_over": over}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.split("\n")[0])
    out.add_argument("model", help="a finished model directory")
    out.add_argument("--name", required=True, help="name of the result: benchmarks/results/<name>.json")
    out.add_argument("--prompts", type=int, default=32)
    out.add_argument("--responses", type=int, default=16, help="to each prompt")
    out.add_argument("--prompt-words", type=int, default=120)
    out.add_argument("--response-words", type=int, default=20)
    out.add_argument("--clients", type=int, default=64)
    out.add_argument("--rounds", type=int, default=5)
    out.add_argument("--dtype", default="auto")
    out.add_argument("--output", type=Path, default=results.RESULTS)
    out.add_argument("--allow-dirty", action="store_true", help="measure code that is not committed; marks the result")
    out.add_argument("--note", action="append", default=[], help="a sentence to print under the table")
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; returns an exit code."""
    options = parser().parse_args(argv)
    try:
        commit = environment.require_clean(options.allow_dirty)
    except environment.DirtyTreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = workload(options.prompts, options.responses, options.prompt_words, options.response_words)
    scorer = Scorer(options.model, dtype=options.dtype)
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "allow_dirty", "note")}
    settings |= {"threads": int(os.environ.get("OMP_NUM_THREADS", "0")), "device": str(scorer.device)}
    result = results.header("serve_load", options.name, settings, commit)
    layers = scorer.model.base_model.config.get_text_config().num_hidden_layers
    result["workload"] = {
        "rows": len(rows),
        "layers": layers,
        "parameters": sum(p.numel() for p in scorer.model.parameters()),
    }
    result.update(summarise(measure(scorer, rows, options)), notes=options.note, load_average=os.getloadavg()[0])
    results.write(result, options.output)
    from benchmarks.table import render

    print(render([result]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
