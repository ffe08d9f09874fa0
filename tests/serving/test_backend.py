"""`btrm serve --backend-url`: the requests that reach a vLLM server, and what becomes of its answers.

The stand-in answers in vLLM's own words, taken from vLLM 0.32; vLLM itself is asked in `tests/servers`.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES
from support.serving import serving

from btrm_core.errors import ConfigError
from btrm_core.scoring import Scorer
from btrm_core.serving import Backend

MODEL = {"object": "model", "owned_by": "vllm", "parent": None, "max_model_len": 256, "permission": []}


class Stand:
    """A server in the shape of vLLM.

    Attributes:
        scorer: computes its rewards.
        bodies: what it was asked.
        numbers: makes its list of a reward; a vLLM that applies the head gives one number.
        url: where it listens.
        status: of its answers to requests for rewards.
        longest: conversation that it takes.
        keys: that it was shown.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.bodies: list[dict[str, Any]] = []
        self.numbers: Any = lambda reward: [reward]
        self.url = ""
        self.status = 200
        self.longest = 256
        self.keys: set[str | None] = set()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served-name", **MODEL, "max_model_len": self.longest}]}
        asked = json.loads(body)
        self.bodies.append(asked)
        if self.status != 200:
            return self.status, {"error": {"message": "out of memory"}}
        if path != "/classify" or asked.get("model") != "served-name":
            return 404, {"error": {"message": "The model does not exist.", "type": "NotFoundError", "code": 404}}
        rewards = self.scorer.sequence_rewards(asked["input"], [None] * len(asked["input"])).tolist()
        if asked.get("use_activation", True):
            rewards = [1 / (1 + np.exp(-reward)) for reward in rewards]
        data = [
            {"index": i, "label": "reward", "probs": self.numbers(reward), "num_classes": 1}
            for i, reward in enumerate(rewards)
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 0, "prompt_tokens_details": None}
        return 200, {"id": "classify-1", "object": "list", "model": "served-name", "data": data, "usage": usage}


@pytest.fixture
def stand(scorer: Scorer) -> Iterator[Stand]:
    found = Stand(scorer)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.keys.add(self.headers.get("Authorization"))
            status, content = found.answer(self.path, body)
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = reply

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with contextlib.suppress(KeyboardInterrupt):
            yield found
        server.shutdown()
        thread.join()


def test_trainers_get_the_rewards_and_vllm_gets_ids(stand: Stand, model: Path, scorer: Scorer) -> None:
    backend = Backend(str(model), stand.url)
    assert (backend.kind, backend.name, backend.max_length) == ("vllm", "served-name", 256)
    texts, expected = [scorer.chat.render(c) for c in CONVERSATIONS], scorer.rewards(CONVERSATIONS)
    group = scorer.group_rewards([(PROMPT, RESPONSES)])[0]
    with serving(backend) as front:
        asked = front.client.post
        assert front.client.get("/ready").status_code == 200
        stand.bodies.clear()
        openrlhf = asked("/get_reward", json={"query": texts, "prompts": texts, "labels": texts}).json()
        np.testing.assert_allclose(openrlhf["rewards"], expected, atol=1e-5)
        factory = asked("/v1/score/evaluation", json={"model": "model", "messages": texts}).json()
        np.testing.assert_allclose(factory["scores"], expected, atol=1e-5)
        verl = asked("/v1/embeddings", json={"model": "x", "input": texts[0]}).json()
        assert verl["data"][-1]["embedding"] == [pytest.approx(expected[0], abs=1e-5)]
        slime = asked("/slime", json={"prompt": PROMPT, "response": RESPONSES[0], "label": None}).json()
        assert slime == pytest.approx(group[0], abs=1e-5)
        native = asked("/v1/rewards", json={"items": [{"prompt": PROMPT, "responses": RESPONSES}]}).json()
        np.testing.assert_allclose(native["rewards"][0], group, atol=1e-5)
    ids = scorer.chat.encode(CONVERSATIONS)
    assert sorted(sequence for body in stand.bodies for sequence in body["input"])[0] in ids
    assert all(body["use_activation"] is False for body in stand.bodies)  # or it would be a sigmoid
    assert {key for body in stand.bodies for key in body} == {"model", "input", "use_activation"}


def test_a_server_without_the_head_gives_no_rewards(stand: Stand, model: Path) -> None:
    stand.numbers = lambda reward: [reward, 0.5, 0.25]
    backend = Backend(str(model), stand.url)
    with pytest.raises(ConfigError, match=r"3 numbers a conversation.*does not apply the reward head"):
        backend.self_test()


def test_null_is_no_reward_and_a_refusal_is_an_error(stand: Stand, model: Path) -> None:
    backend = Backend(str(model), stand.url)
    stand.numbers = lambda reward: [None]
    assert np.isnan(backend.sequence_rewards([[1, 2, 3]], [None])).all()
    with pytest.raises(ConfigError, match="404"):
        Backend(str(model), stand.url, name="another").sequence_rewards([[1, 2, 3]], [None])


def test_a_server_that_fails_is_503_once_for_all_that_wait(stand: Stand, model: Path) -> None:
    backend = Backend(str(model), stand.url, token="a-key")
    with serving(backend) as front:
        stand.bodies.clear()
        stand.status = 500
        asked = {"items": [{"text": text} for text in "abcd"]}
        answer = front.client.post("/v1/rewards", json=asked)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "cannot be used" in answer.json()["detail"]
        assert len(stand.bodies) == 1  # no halves of a batch, each with its own wait
        stand.status = 200
        assert front.client.post("/v1/rewards", json=asked).status_code == 200
    assert stand.keys == {"Bearer a-key"}


def test_the_length_is_the_shorter_one_of_model_and_server(stand: Stand, model: Path) -> None:
    stand.longest = 100
    assert Backend(str(model), stand.url).max_length == 100


def test_an_answer_in_another_shape_is_an_error_in_words(stand: Stand, model: Path) -> None:
    backend = Backend(str(model), stand.url, kind="sglang")
    with pytest.raises(ConfigError, match="status 404"):
        backend.sequence_rewards([[1, 2]], [None])
    backend = Backend(str(model), stand.url)
    stand.numbers = lambda reward: ["high"]
    assert np.isnan(backend.sequence_rewards([[1, 2, 3]], [None])).all()
    with pytest.raises(ConfigError, match="cannot be used"):
        Backend(str(model), "127.0.0.1:9")
