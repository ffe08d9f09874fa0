"""Each client's own request, reading and retrying, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import aiohttp
import httpx
import numpy as np
import pytest
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES
from support.serving import Held, Running, serving, until

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits


@pytest.fixture(scope="module")
def texts(scorer: Scorer) -> list[str]:
    return [scorer.chat.render(conversation) for conversation in CONVERSATIONS]


@pytest.fixture(scope="module")
def expected(scorer: Scorer) -> np.ndarray:
    return scorer.rewards(CONVERSATIONS)


def bos_taken_out(scorer: Scorer, text: str) -> str:
    bos = scorer.chat.tokenizer.bos_token
    assert text.startswith(bos)
    return text[len(bos) :]


async def openrlhf(url: str, query: str, prompt: str, pause: float = 1.0) -> Any:
    """One sample a call, 180 s, five tries a second apart whatever the status, then no reward."""
    payload = {"query": [query], "prompts": [prompt], "labels": ["a label"]}
    for _ in range(5):
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session,
                session.post(url + "/get_reward", json=payload) as response,
            ):
                response.raise_for_status()
                found = await response.json()
                return found.get("rewards"), found.get("scores"), found.get("extra_logs") or {}
        except aiohttp.ClientError:
            await asyncio.sleep(pause)
    return None


def test_openrlhf(server: Running, texts: list[str], expected: np.ndarray) -> None:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(openrlhf(server.url, text, text[:20]) for text in texts))

    for (rewards, scores, logs), reward in zip(asyncio.run(all_at_once()), expected, strict=True):
        assert len(rewards) == 1
        np.testing.assert_allclose([rewards[0], scores[0]], reward, atol=1e-5)
        assert logs == {}


def test_a_full_queue_makes_openrlhf_wait_and_loses_nothing(held: Held, texts: list[str], expected: np.ndarray) -> None:
    longest = max(len(held.chat.encoder.encode([text])[0]) for text in texts)
    with serving(held, Limits(queue_tokens=longest)) as server:
        held.free.clear()
        statuses: list[int] = []
        held.busy.clear()
        first = threading.Thread(target=lambda: server.client.post("/get_reward", json={"query": texts[0]}))
        first.start()
        until(held.busy.is_set)

        async def several() -> list[Any]:
            tasks = [asyncio.create_task(openrlhf(server.url, text, "", pause=0.4)) for text in texts]
            while not statuses:
                await asyncio.sleep(0.05)
                metrics = await asyncio.to_thread(lambda: httpx.get(server.url + "/metrics").text)
                statuses.extend(503 for line in metrics.splitlines() if 'code="503"' in line)
                assert 'code="429"' not in metrics
            held.free.set()
            return await asyncio.gather(*tasks)

        found = asyncio.run(several())
        first.join(20)
    np.testing.assert_allclose([rewards[0] for rewards, _, _ in found], expected, atol=1e-5)


async def verl(url: str, path: str, body: dict[str, Any], statuses: list[int]) -> Any:
    """Sixteen tries, waits that double up to 30 s, and any 4xx is final."""
    async with httpx.AsyncClient(timeout=None) as client:
        for attempt in range(16):
            response = await client.post(url + path, json=body)
            statuses.append(response.status_code)
            if response.status_code < 400:
                return response.json()
            assert not 400 <= response.status_code < 500, "verl gives the run up"
            await asyncio.sleep(min(0.2 * 2**attempt, 30))
    raise AssertionError("no reward")


def test_verl_over_vllm(server: Running, scorer: Scorer, texts: list[str], expected: np.ndarray) -> None:
    for text, reward in zip(texts, expected, strict=True):
        body = {"model": "anything", "input": bos_taken_out(scorer, text), "use_activation": False}
        found = asyncio.run(verl(server.url, "/classify", body, []))
        assert found["data"][-1]["probs"][-1] == pytest.approx(reward, abs=1e-5)


def test_verl_over_sglang(server: Running, scorer: Scorer, texts: list[str], expected: np.ndarray) -> None:
    body = {"model": "anything", "input": bos_taken_out(scorer, texts[0])}
    found = asyncio.run(verl(server.url, "/v1/embeddings", body, []))
    assert found["data"][-1]["embedding"] == [pytest.approx(expected[0], abs=1e-5)]


def test_verl_waits_for_a_queue_that_is_full(held: Held, texts: list[str], expected: np.ndarray) -> None:
    statuses: list[int] = []
    with serving(held, Limits(queue_tokens=100)) as server:
        held.free.clear()
        held.busy.clear()
        threads = [
            threading.Thread(target=lambda: httpx.post(server.url + "/classify", json={"input": texts[1]}, timeout=60))
            for _ in range(2)
        ]
        threads[0].start()
        until(held.busy.is_set)
        threads[1].start()
        until(lambda: server.service.metrics.registry.get_sample_value("btrm_queue_tokens") > 0)
        threading.Timer(0.5, held.free.set).start()
        found = asyncio.run(verl(server.url, "/classify", {"input": texts[1]}, statuses))
        for thread in threads:
            thread.join(20)
    assert statuses[0] == 503
    assert found["data"][-1]["probs"] == [pytest.approx(expected[1], abs=1e-5)]


def test_vllm_classify_and_pooling(server: Running, scorer: Scorer, texts: list[str], expected: np.ndarray) -> None:
    ids = scorer.chat.encode(CONVERSATIONS)
    bodies: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"input": texts}, expected),
        ({"input": ids}, expected),
        ({"input": ids[2]}, expected[2:3]),
        ({"input": texts[3], "add_special_tokens": True}, expected[3:4]),
        ({"messages": CONVERSATIONS[1]}, expected[1:2]),
        ({"input": [scorer.chat.bos_id, *ids[0]]}, expected[:1]),
    ]
    for body, rewards in bodies:
        classified = server.client.post("/classify", json={"model": "tiny", **body}).json()
        assert classified["object"] == "list"
        np.testing.assert_allclose([entry["probs"] for entry in classified["data"]], rewards[:, None], atol=1e-5)
        assert [entry["index"] for entry in classified["data"]] == list(range(len(rewards)))
        assert all(entry["num_classes"] == 1 for entry in classified["data"])
        pooled = server.client.post("/pooling", json={"model": "tiny", **body}).json()
        np.testing.assert_allclose([entry["data"] for entry in pooled["data"]], rewards[:, None], atol=1e-5)
        assert pooled["usage"]["prompt_tokens"] == classified["usage"]["total_tokens"] > 0


def test_vllm_truncation_is_asked_for(server: Running, texts: list[str]) -> None:
    long = "word " * 400
    assert server.client.post("/classify", json={"input": long}).status_code == 422
    cut = server.client.post("/classify", json={"input": long, "truncate_prompt_tokens": -1}).json()
    assert cut["usage"]["prompt_tokens"] == 256
    shorter = server.client.post("/classify", json={"input": texts[0], "truncate_prompt_tokens": 8}).json()
    assert shorter["usage"]["prompt_tokens"] == 8
    assert server.client.post("/classify", json={"input": long, "truncate_prompt_tokens": 9999}).status_code == 422


def test_sglang_classify(server: Running, scorer: Scorer, texts: list[str], expected: np.ndarray) -> None:
    ids = scorer.chat.encode(CONVERSATIONS)
    for body in ({"text": texts}, {"input_ids": ids}):
        found = server.client.post("/classify", json=body).json()
        np.testing.assert_allclose([entry["embedding"] for entry in found], expected[:, None], atol=1e-5)
    for body in ({"text": texts[0]}, {"input_ids": ids[0]}):
        found = server.client.post("/classify", json=body).json()
        assert found["embedding"] == [pytest.approx(expected[0], abs=1e-5)]
        assert found["meta_info"]["prompt_tokens"] == len(ids[0])


def test_llama_factory(server: Running, texts: list[str], expected: np.ndarray) -> None:
    headers, payload = {"Content-Type": "application/json"}, {"model": "model", "messages": texts}
    response = httpx.post(server.url + "/v1/score/evaluation", json=payload, headers=headers)
    np.testing.assert_allclose(json.loads(response.text)["scores"], expected, atol=1e-5)


async def slime(url: str, prompt: Any, response: str) -> Any:
    """Ten tries over one session of 64 connections; the whole JSON value is the reward."""
    connector, timeout = aiohttp.TCPConnector(limit=64), aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for attempt in range(10):
            try:
                payload = {"prompt": prompt, "response": response, "label": None}
                async with session.post(url + "/slime", json=payload) as answer:
                    answer.raise_for_status()
                    return await answer.json()
            except aiohttp.ClientError:
                await asyncio.sleep(min(0.2 * 2**attempt, 30))
    raise AssertionError("no reward")


def test_slime(server: Running, scorer: Scorer) -> None:
    expected = scorer.group_rewards([(PROMPT, RESPONSES[:1])])[0][0]
    rendered = scorer.chat.render(PROMPT, add_generation_prompt=True)
    for prompt in (PROMPT, rendered):
        reward = asyncio.run(slime(server.url, prompt, RESPONSES[0]))
        assert isinstance(reward, float)
        assert reward == pytest.approx(expected, abs=1e-5)
    plain = asyncio.run(slime(server.url, "What is 2 + 2?", "4"))
    assert plain == pytest.approx(scorer.rewards(CONVERSATIONS[:1])[0], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward", {"query": []}),
        ("/classify", {}),
        ("/classify", {"input": []}),
        ("/classify", {"input": [True, False]}),
        ("/classify", {"input": "x", "truncate_prompt_tokens": True}),
        ("/classify", {"input": [[1, 2], "x"]}),
        ("/classify", {"input_ids": ["1", "2"]}),
        ("/classify", {"messages": CONVERSATIONS[0], "add_generation_prompt": True}),
        ("/pooling", {"messages": CONVERSATIONS[0], "chat_template": "{{ messages[0].content }}"}),
        ("/classify", {"input": "x", "messages": []}),
        ("/classify", {"messages": [{"role": "user", "content": "x"}]}),
        ("/pooling", {"input": [[]]}),
        ("/v1/embeddings", {"input": [-5]}),
        ("/v1/score/evaluation", {"messages": []}),
        ("/slime", {"prompt": "x"}),
    ],
)
def test_what_no_trainer_should_send_is_422(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"]


def test_many_clients_are_batched_while_the_device_is_busy(held: Held, texts: list[str], expected: np.ndarray) -> None:
    with serving(held) as server:
        held.free.clear()
        held.busy.clear()
        held.batches.clear()

        lengths = [len(ids) for ids in held.chat.encode(CONVERSATIONS)]

        def waiting() -> bool:
            tokens = server.service.metrics.registry.get_sample_value("btrm_queue_tokens")
            return tokens == 8 * sum(lengths) - lengths[0]

        async def all_at_once() -> list[Any]:
            first = asyncio.create_task(openrlhf(server.url, texts[0], ""))
            await asyncio.to_thread(until, held.busy.is_set)
            tasks = [asyncio.create_task(openrlhf(server.url, texts[n % 5], "")) for n in range(1, 40)]
            await asyncio.to_thread(until, waiting)
            held.free.set()
            return await asyncio.gather(first, *tasks)

        found = asyncio.run(all_at_once())
    np.testing.assert_allclose([rewards[0] for rewards, _, _ in found], np.tile(expected, 8), atol=1e-5)
    assert held.batches == [1, 39]
