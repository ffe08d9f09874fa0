from __future__ import annotations

import asyncio
import http.server
import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES, change_json, reward_model, say
from support.serving import Held, serving, until

import btrm_core
from btrm_core.errors import BtrmError, CheckpointError, ConfigError
from btrm_core.scoring import AsyncClient, Scorer, trl_reward_func
from btrm_core.serving import Backend, Limits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("client") / "model", "llama3")


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer(str(model), device="cpu")


def test_the_client_gets_the_rewards_of_the_scorer(scorer: Scorer) -> None:
    async def ask(url: str) -> tuple[list[float], list[list[float]]]:
        async with AsyncClient(url) as client:
            return await client.rewards(CONVERSATIONS), await client.group_rewards([(PROMPT, RESPONSES)])

    with serving(scorer) as server:
        rewards, groups = asyncio.run(ask(server.url))
    np.testing.assert_allclose(rewards, scorer.rewards(CONVERSATIONS), atol=1e-5)
    np.testing.assert_allclose(groups[0], scorer.group_rewards([(PROMPT, RESPONSES)])[0], atol=1e-5)


def test_the_client_waits_for_a_full_queue_and_gives_up_on_a_refusal(scorer: Scorer) -> None:
    held = Held(scorer)

    async def many(url: str) -> list[list[float]]:
        async with AsyncClient(url) as client:
            tasks = [asyncio.create_task(client.rewards(CONVERSATIONS[:1])) for _ in range(6)]
            await asyncio.to_thread(until, lambda: 'reason="queue_full"' in server.client.get("/metrics").text)
            held.free.set()
            return await asyncio.gather(*tasks)

    async def refused(url: str) -> None:
        async with AsyncClient(url, tries=2) as client:
            await client.rewards([[*CONVERSATIONS[0][:1], {"role": "assistant", "content": "x " * 500}]])

    length = len(scorer.chat.encode(CONVERSATIONS[:1])[0])
    with serving(held, Limits(queue_tokens=length)) as server:
        held.free.clear()
        assert np.ptp(asyncio.run(many(server.url))) < 1e-6
        with pytest.raises(BtrmError, match="status 422"):
            asyncio.run(refused(server.url))
    with pytest.raises(BtrmError, match="gives no rewards"):
        asyncio.run(refused(server.url))


def test_what_is_over_a_limit_is_sent_in_parts(scorer: Scorer) -> None:
    async def ask(url: str) -> list[list[float]]:
        async with AsyncClient(url, tries=1) as client:
            return await client.group_rewards([(PROMPT, RESPONSES), ("Is ice cold?", ["Yes"]), (PROMPT, ["\u00e9"])])

    async def one(url: str) -> None:
        async with AsyncClient(url, tries=1) as client:
            await client.group_rewards([(PROMPT, ["x " * 200])])

    expected = scorer.group_rewards([(PROMPT, RESPONSES), ("Is ice cold?", ["Yes"]), (PROMPT, ["\u00e9"])])
    for limits in (Limits(items=2), Limits(queue_tokens=100), Limits(body_bytes=400)):
        with serving(scorer, limits) as server:
            for found, rewards in zip(asyncio.run(ask(server.url)), expected, strict=True):
                np.testing.assert_allclose(found, rewards, atol=1e-5)
            with pytest.raises(BtrmError, match="gives no rewards: status 4"):
                asyncio.run(one(server.url))


def test_a_url_that_is_none_and_a_server_that_is_another_are_said_at_once() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: Any) -> None:
            return

    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.rewards(CONVERSATIONS[:1])

    with pytest.raises(ConfigError, match=r"the server's URL is 'localhost:8080'; expected one such as http://"):
        asyncio.run(ask("localhost:8080"))
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(BtrmError, match="does not answer as `btrm serve` does"):
            asyncio.run(ask(f"http://127.0.0.1:{server.server_address[1]}"))
        thread.join()


def test_a_server_in_front_of_a_server_gives_the_same_rewards(model: Path, scorer: Scorer) -> None:
    with serving(scorer) as behind:
        for kind in ("vllm", "sglang"):
            backend = Backend(str(model), behind.url, kind=kind)
            with serving(backend) as front:
                body = {"items": [{"prompt": PROMPT, "responses": RESPONSES}]}
                found = front.client.post("/v1/rewards", json=body).json()
            np.testing.assert_allclose(found["rewards"][0], scorer.group_rewards([(PROMPT, RESPONSES)])[0], atol=1e-5)
    with pytest.raises(BtrmError, match="cannot be used"):
        Backend(str(model), behind.url)


def test_trl_calls_it_as_it_calls_reward_functions(model: Path, scorer: Scorer) -> None:
    prompts = [PROMPT, CONVERSATIONS[0][:1]]
    completions = [[{"role": "assistant", "content": RESPONSES[0]}], [{"role": "assistant", "content": "4"}]]
    expected = [scorer.group_rewards([(PROMPT, RESPONSES[:1])])[0][0], scorer.rewards(CONVERSATIONS[:1])[0]]
    columns: dict[str, Any] = {"completion_ids": [[1], [2]], "trainer_state": None}
    local = btrm_core.trl_reward_func(str(model), device="cpu")
    np.testing.assert_allclose(local(prompts=prompts, completions=completions, **columns), expected, atol=1e-5)
    plain = local(prompts=["What is 2 + 2?", "x"], completions=["4", "\ud800"])
    assert plain[0] == pytest.approx(expected[1], abs=1e-5)
    assert plain[1] is None
    with serving(scorer) as server:
        remote = trl_reward_func(server.url)
        assert inspect.iscoroutinefunction(remote)
        found = asyncio.run(remote(prompts=prompts, completions=completions, **columns))
        spoiled = asyncio.run(remote(prompts=["What is 2 + 2?", "x"], completions=["4", "\ud800"]))
        assert spoiled == [pytest.approx(expected[1], abs=1e-5), None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rewards_are_normalized_only_when_asked_and_measured(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="calibration"):
        trl_reward_func(str(model), normalize=True, device="cpu")
    change_json(model / "btrm.json", calibration={"mean": 1.0, "std": 2.0})
    try:
        scaled = trl_reward_func(str(model), normalize=True, device="cpu")
        raw = trl_reward_func(str(model), device="cpu")
        one, other = (f(prompts=["Hi"], completions=["Hello"])[0] for f in (scaled, raw))
    finally:
        change_json(model / "btrm.json", calibration=None)
    assert one == pytest.approx((other - 1.0) / 2.0, abs=1e-6)
    assert other == pytest.approx(scorer.rewards([say("Hi", "Hello")])[0], abs=1e-5)


def test_trl_trains_with_it(model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = model.with_name("model-base")
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(base)
    policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=trl_reward_func(str(model), device="cpu"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": CONVERSATIONS[0][:1]}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry["rewards/btrm_reward/mean"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2
    assert np.isfinite(logged).all()
