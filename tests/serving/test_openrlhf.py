"""OpenRLHF's own client, from its wheel, asks a server of btrm.

The wheel is not installed, which would bring its versions of torch and vLLM; BTRM_OPENRLHF names a folder into which
`pip download --no-deps openrlhf` and `unzip` have put it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from support.scorer_samples import CONVERSATIONS
from support.serving import Held, Running, serving, until

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits

pytestmark = pytest.mark.hub("OpenRLHF")


def found(name: str) -> Path:
    (file,) = Path(os.environ["BTRM_OPENRLHF"]).rglob(f"openrlhf/{name}")
    return file


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its module that asks for rewards; of its package only the logger is not its own."""
    logs = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", logs)
    spec = importlib.util.spec_from_file_location("openrlhf_agent", found("utils/agent.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(agent: ModuleType, urls: list[str], queries: list[list[str]]) -> list[Any]:
    """All rollouts at once, each asking for its queries as the executor of single turns does."""
    executor = agent.SingleTurnAgentExecutor([url + "/get_reward" for url in urls])

    async def all_at_once() -> list[Any]:
        calls = [executor._fetch_rewards_via_http(texts, texts, ["a label"] * len(texts)) for texts in queries]
        return await asyncio.gather(*calls)

    return [info["rewards"] for infos in asyncio.run(all_at_once()) for info in infos]


def test_its_client_gets_the_rewards(agent: ModuleType, server: Running, scorer: Scorer) -> None:
    texts, expected = [scorer.chat.render(c) for c in CONVERSATIONS], scorer.rewards(CONVERSATIONS)
    rewards = ask(agent, [server.url], [[text] for text in texts])
    np.testing.assert_allclose(rewards, expected[:, None], atol=1e-5)
    shards = ask(agent, [server.url, server.url], [texts[:4]])
    np.testing.assert_allclose(np.concatenate(shards), expected[:4], atol=1e-5)


def test_it_waits_for_a_queue_that_is_full(agent: ModuleType, held: Held) -> None:
    text = held.chat.render(CONVERSATIONS[0])
    with serving(held, Limits(queue_tokens=len(held.chat.encoder.encode([text])[0]))) as server:
        held.free.clear()
        held.busy.clear()
        first = threading.Thread(target=lambda: server.client.post("/get_reward", json={"query": text}))
        first.start()
        until(held.busy.is_set)
        refused: list[int] = []

        def free_it() -> None:
            until(lambda: 'code="503"' in httpx.get(server.url + "/metrics").text)
            refused.append(503)
            held.free.set()

        watch = threading.Thread(target=free_it)
        watch.start()
        rewards = ask(agent, [server.url], [[text]] * 3)
        watch.join(20)
        first.join(20)
    assert refused
    np.testing.assert_allclose(rewards, [[held.rewards(CONVERSATIONS[:1])[0]]] * 3, atol=1e-5)


def test_its_command_has_the_option_of_the_card() -> None:
    assert '"--reward.remote_url"' in found("cli/train_ppo_ray.py").read_text(encoding="utf-8")
