"""What a server refuses, and that what it accepted is answered whatever happens around it."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from support import processes
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES
from support.serving import Held, Running, serving, until

from btrm_core.cli import main
from btrm_core.errors import ConfigError
from btrm_core.scoring import Scorer
from btrm_core.serving import Limits, bound
from btrm_core.serving.limits import COMPARED

ITEM = {"messages": CONVERSATIONS[0]}


def queued(server: Running) -> float:
    return server.service.metrics.registry.get_sample_value("btrm_queue_tokens") or 0.0


def test_sizes_over_a_limit_are_refused_and_say_it(scorer: Scorer) -> None:
    limits = Limits(items=3, queue_tokens=150, body_bytes=3000)
    with serving(scorer, limits) as server:
        post = server.client.post
        many = post("/v1/rewards", json={"items": [ITEM] * 4})
        assert (many.status_code, "limit of 3" in many.text) == (422, True)
        responses = post("/v1/rewards", json={"items": [{"prompt": "x", "responses": ["a"] * 4}]})
        assert responses.status_code == 422
        tokens = post("/v1/rewards", json={"items": [{"prompt": PROMPT, "responses": RESPONSES[:3]}]})
        assert (tokens.status_code, "limit of 150" in tokens.text) == (422, True)
        announced = post("/v1/rewards", content=b" " * 3001)
        assert (announced.status_code, "3000 bytes" in announced.text) == (413, True)
        chunked = post("/v1/rewards", content=iter([b" " * 2000] * 3))
        assert chunked.status_code == 413
        assert post("/v1/rewards", json={"items": [ITEM]}).status_code == 200


def test_a_client_that_sends_before_it_reads_gets_its_refusal(scorer: Scorer) -> None:
    """As most do: a connection closed with bytes unread is reset, and the answer is lost with it."""
    with serving(scorer, Limits(body_bytes=3000)) as server:
        for number in range(200):  # the body has to arrive between the look at the head and the end
            with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as client:
                head = "POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                client.sendall(f"{head}Content-Length: 4000\r\n\r\n".encode())
                time.sleep(number * 2e-5)
                client.sendall(b" " * 4000)
                answer = b""
                while part := client.recv(65536):
                    answer += part
            assert answer.startswith(b"HTTP/1.1 413"), answer
            assert b"3000 bytes" in answer


def test_no_more_responses_are_compared_than_an_answer_of_their_square_may_hold(scorer: Scorer) -> None:
    body = {"prompt": "x", "responses": ["a"] * (COMPARED + 1)}
    with serving(scorer, Limits(items=10 * COMPARED)) as server:
        answer = server.client.post("/v1/compare", json=body)
        assert server.client.get("/v1/models").json()["data"][0]["limits"]["compared"] == COMPARED
    assert answer.status_code == 422
    said = "513 responses to be compared with each other are more than the limit of 512; send fewer at a time"
    assert answer.json()["error"]["message"] == said


def test_a_full_queue_is_503_with_retry_after(held: Held) -> None:
    length = len(held.chat.encode(CONVERSATIONS[:1])[0])
    with serving(held, Limits(queue_tokens=length)) as server:
        held.free.clear()
        threads = [
            threading.Thread(target=lambda: httpx.post(server.url + "/v1/rewards", json={"items": [ITEM]}, timeout=60))
            for _ in range(2)
        ]
        for number, thread in enumerate(threads):
            thread.start()
            until(held.busy.is_set if not number else lambda: queued(server) > 0)
        answer = server.client.post("/v1/rewards", json={"items": [ITEM]})
        held.free.set()
        for thread in threads:
            thread.join(20)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert 'btrm_refused_total{reason="queue_full"} 1.0' in server.client.get("/metrics").text


def test_a_deadline_is_504_and_frees_the_room_in_the_queue(held: Held) -> None:
    with serving(held, Limits(deadline_seconds=0.5)) as server:
        held.free.clear()
        busy = threading.Thread(target=lambda: httpx.post(server.url + "/v1/rewards", json={"items": [ITEM]}))
        busy.start()
        until(held.busy.is_set)
        answer = server.client.post("/v1/rewards", json={"items": [ITEM]})
        assert answer.status_code == 504
        assert queued(server) == 0
        held.free.set()
        busy.join(20)
        assert server.client.post("/v1/rewards", json={"items": [ITEM]}).status_code == 200


def test_a_client_that_leaves_takes_its_work_out_of_the_queue(held: Held, scorer: Scorer) -> None:
    with serving(held) as server:
        held.free.clear()
        busy = threading.Thread(target=lambda: httpx.post(server.url + "/v1/rewards", json={"items": [ITEM]}))
        busy.start()
        until(held.busy.is_set)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/rewards", json={"items": [{"messages": CONVERSATIONS[2]}]}, timeout=0.5)
        until(lambda: queued(server) == 0)
        held.free.set()
        busy.join(20)
        until(lambda: 'code="499"' in server.client.get("/metrics").text)
        assert scorer.chat.encode(CONVERSATIONS[2:3])[0] not in held.computed


def test_a_slow_body_is_408(scorer: Scorer) -> None:
    with serving(scorer, Limits(body_seconds=0.5)) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in connection.recv(4096)
        assert server.client.get("/health").status_code == 200


def test_a_token_is_asked_for_everywhere_but_where_no_reward_is(scorer: Scorer) -> None:
    with serving(scorer, Limits(token="a-secret")) as server:
        get, post = server.client.get, server.client.post
        for wrong in (None, "Bearer", "Bearer a-secre", "Basic a-secret", "Bearer é"):
            headers = {} if wrong is None else {"Authorization": wrong.encode("latin-1")}
            for path in ("/get_reward", "/v1/rewards", "/classify"):
                answer = post(path, json={"query": "x"}, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert get("/metrics", headers=headers).status_code == 401
        for path in ("/health", "/ready", "/", "/page/page.js"):
            assert get(path).status_code == 200
        good = post("/get_reward", json={"query": "x"}, headers={"Authorization": "Bearer a-secret"})
        assert good.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"items": NaN}',
        b'{"items": [{"text": "\\ud800"}]}',
        b'{"query": ["\\udc00"]}',
        b'{"\\ud800": 1}',
        b'{"items": [{"input_ids": [1e400]}]}',
        b"[" * 200_000,
        b'{"items":' * 3000 + b"1" + b"}" * 3000,
    ],
)
def test_malformed_bodies_are_refused_without_a_traceback(
    server: Running, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/v1/rewards", "/v1/compare", "/get_reward", "/classify", "/pooling", "/v1/embeddings", "/slime"):
        answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (path, answer.text)
        assert answer.json()["error"]["message"]
    assert "Traceback" not in caplog.text


def test_bodies_that_wait_are_bounded_in_bytes(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btrm_core.serving.limits.HELD_BYTES", 1000)
    body = {"query": "x", "labels": ["y" * 600]}
    with serving(held, Limits(body_bytes=900)) as server:
        held.free.clear()
        held.busy.clear()
        found: list[httpx.Response] = []
        waits = threading.Thread(target=lambda: found.append(httpx.post(server.url + "/get_reward", json=body)))
        waits.start()
        until(held.busy.is_set)
        refused = server.client.post("/get_reward", json=body)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        held.free.set()
        waits.join(20)
        assert found[0].status_code == 200
        assert server.client.post("/get_reward", json=body).status_code == 200  # the room is free again


@pytest.mark.parametrize(
    ("headers", "body", "status", "says"),
    [
        ({"Content-Type": "text/plain"}, b'{"query": "x"}', 415, "Content-Type: application/json"),
        ({}, b'{"query": "x"}', 415, "Content-Type: application/json"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b'{"query": "x"}'), 415, "without Content-Encoding"),
        ({"Content-Type": "application/json"}, b'{"query": "x"} {}', 400, "not JSON: Extra data"),
        ({"Content-Type": "application/json"}, b'{"query": "\xff"}', 400, "not JSON: 'utf-8' codec"),
        ({"Content-Type": "application/json"}, b'{"query": 5}', 422, "body.query: expected a text or a list of texts"),
        ({"Content-Type": "application/json; charset=utf-8"}, b'{"query": "x"}', 200, "rewards"),
    ],
)
def test_a_body_that_cannot_be_read_says_how_to_send_it(
    server: Running, headers: dict[str, str], body: bytes, status: int, says: str
) -> None:
    answer = server.client.post("/get_reward", content=body, headers=headers)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text


def test_a_load_balancer_may_ask_for_heads_alone(server: Running) -> None:
    for path in ("/health", "/ready"):
        answer = server.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_an_address_is_had_before_the_model_is_opened() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another"):
            bound("127.0.0.1", port)
        for arguments, says in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "99999"], "0<=x<=65535"),
            (["--drain-seconds", "nan"], "--drain-seconds is nan; expected a number from 0"),
            (["--backend", "vllm"], "give --backend-url as well"),
            (["--token", "one\ntwo"], "the bearer token is empty or not ASCII"),
        ):
            found = CliRunner().invoke(main, ["serve", "no/model/there", *arguments])
            assert (found.exit_code, says in found.output) == (2, True), found.output


def test_no_text_of_a_client_is_logged(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    secret = "swordfish"
    with caplog.at_level(0), serving(held) as server:
        held.fails_on = held.chat.encode([[{"role": "user", "content": secret}, *CONVERSATIONS[0][1:]]])[0]
        conversation = [{"role": "user", "content": secret}, *CONVERSATIONS[0][1:]]
        post = server.client.post
        assert post("/v1/rewards", json={"items": [{"messages": conversation}]}).status_code == 500
        assert post("/get_reward", json={"query": secret}).status_code == 200
        assert post("/classify", json={"input": {secret: 1}}).status_code == 422
        assert post("/v1/rewards", json={"items": [{"prompt": secret * 100, "responses": ["x"]}]}).status_code == 422
    assert "failed" in caplog.text
    assert not [r for r in caplog.records if r.name.startswith(("btrm", "uvicorn")) and secret in r.getMessage()]


@pytest.fixture
def process(model: Path) -> Iterator[Any]:
    """`btrm serve` as a process of its own; gives its URL."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        found = subprocess.Popen(
            [sys.executable, "-m", "btrm_core", "serve", str(model), "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        started.append(found)
        assert found.stderr is not None
        for line in found.stderr:
            if "serving" in line:
                return found, line.split()[-1]
        raise AssertionError("the server did not start")

    yield start
    for one in started:
        if one.poll() is None:
            one.kill()
        one.wait(20)


@pytest.fixture
def forked(model: Path, tmp_path: Path) -> Iterator[Any]:
    """The same in a fork of a process that has imported everything."""
    started: list[ForkServerProcess] = []
    log = tmp_path / "log"

    def address() -> str:
        found = re.search(r"serving.* (\S+)\n", log.read_text() if log.exists() else "")
        return found[1] if found else ""

    def start(*arguments: str) -> tuple[ForkServerProcess, str]:
        command = ("serve", str(model), "--port", "0", *arguments)
        started.extend(processes.start(processes.command, *command, log=log))
        processes.until(lambda: bool(address()), started)
        return started[0], address()

    yield start
    processes.wait(started, timeout=0)


def test_sigterm_drains_what_was_accepted(forked: Any, scorer: Scorer) -> None:
    server, url = forked("--drain-seconds", "20", "--tokens-per-batch", "64")
    until(lambda: ready(url), 60)
    items = [{"messages": conversation} for conversation in CONVERSATIONS] * 60
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(url + "/v1/rewards", json={"items": items}, timeout=60))
    )
    thread.start()
    until(lambda: queue_of(url) > 0, 30)
    server.terminate()
    until(lambda: not takes_connections(url))
    thread.join(60)
    assert answers[0].status_code == 200
    expected = np.tile(scorer.rewards(CONVERSATIONS), 60)
    np.testing.assert_allclose([row[0] for row in answers[0].json()["rewards"]], expected, atol=1e-5)
    assert processes.wait([server], timeout=30) == [0]


def test_what_is_not_drained_in_time_is_503_without_a_traceback(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    with serving(held, drain=1) as server:
        held.free.clear()
        held.busy.clear()
        found: list[httpx.Response] = []
        ask = lambda: found.append(httpx.post(server.url + "/get_reward", json={"query": "x"}, timeout=30))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(held.busy.is_set)
        server.stop()
        for thread in threads:
            thread.join(30)
        held.free.set()
    assert [(answer.status_code, answer.headers["Retry-After"]) for answer in found] == [(503, "5")] * 3
    assert {answer.json()["error"]["type"] for answer in found} == {"stopping"}
    assert "Traceback" not in caplog.text


def ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready").status_code == 200
    except httpx.HTTPError:
        return False


def takes_connections(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def queue_of(url: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("btrm_queue_tokens "))


SOAK_SECONDS = float(os.environ.get("BTRM_SOAK_SECONDS", "6"))


def resident(pid: int) -> int:
    """Resident memory in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
@pytest.mark.timeout(int(SOAK_SECONDS) + 240)
def test_soak_nothing_is_lost_and_nothing_grows(process: Any, scorer: Scorer) -> None:
    """Clients that leave and bodies that are too large, broken or half, beside honest ones.

    BTRM_SOAK_SECONDS=3600 makes it an hour, after which slow leaks show too; `-s` shows the memory.
    """
    server, url = process("--queue-tokens", "20000", "--max-body", "200000")
    port = int(url.rpartition(":")[2])
    until(lambda: ready(url), 60)
    expected = scorer.rewards(CONVERSATIONS)
    wrong: list[str] = []
    given = [0] * 4
    end = time.monotonic() + SOAK_SECONDS
    memory: list[int] = []

    def honest(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < end:
                n = draw.randrange(len(CONVERSATIONS))
                answer = client.post("/v1/rewards", json={"items": [{"messages": CONVERSATIONS[n]}] * 3})
                if answer.status_code == 503:
                    continue
                if answer.status_code != 200:
                    wrong.append(answer.text)
                elif not np.allclose(answer.json()["rewards"], expected[n], atol=1e-5):
                    wrong.append(f"{answer.json()['rewards']} for {expected[n]}")
                given[seed] += 1

    def rude(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            body = json.dumps({"items": [{"messages": CONVERSATIONS[2]}] * 20}).encode()
            kind = draw.choice(["leave", "large", "malformed", "half"])
            body = {"large": b"x" * 300_000, "malformed": b"{" + body, "half": body[: len(body) // 2]}.get(kind, body)
            head = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            length = 2 * len(body) if kind == "half" else len(body)
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(head % length + body)
                    time.sleep(draw.random() * 0.1)
            except OSError:
                pass  # the server may close first

    threads = [threading.Thread(target=honest, args=(n,)) for n in range(4)]
    threads += [threading.Thread(target=rude, args=(n,)) for n in range(4, 7)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(SOAK_SECONDS / 30)
        memory.append(resident(server.pid))
    for thread in threads:
        thread.join(60)
    middle, after = np.median(memory[10:20]), np.median(memory[20:])
    print(f"{sum(given)} answers; resident {middle / 1024:.1f} MiB in the middle third, {after / 1024:.1f} in the last")
    assert not wrong
    assert min(given) > 5
    until(lambda: queue_of(url) == 0)
    assert httpx.post(url + "/get_reward", json={"query": "x"}).status_code == 200
    assert 'code="500"' not in httpx.get(url + "/metrics").text
    allowed = 20_000 if SOAK_SECONDS < 300 else 5_000  # what starts for the first time takes a while to settle
    assert after < middle + allowed, f"resident KiB every thirtieth of the time: {memory}"
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=40)
    assert server.returncode == 0
    assert "Traceback" not in errors
