from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES, say
from support.serving import Held, Running, serving

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits, native

LONG = [{"role": "user", "content": "Tell me about tea. " * 60}]


def test_rewards_are_those_of_the_scorer_in_every_way_of_asking(server: Running, scorer: Scorer) -> None:
    items = [{"messages": conversation} for conversation in CONVERSATIONS]
    items.append({"prompt": PROMPT, "responses": RESPONSES})
    items.append({"prompt": "Is ice cold?", "responses": ["Yes"]})
    items.append({"input_ids": scorer.chat.encode(CONVERSATIONS[:1])[0]})
    items.append({"text": scorer.chat.render(CONVERSATIONS[1])})
    answer = server.client.post("/v1/rewards", json={"items": items}).json()
    expected = scorer.rewards(CONVERSATIONS)
    np.testing.assert_allclose([row[0] for row in answer["rewards"][:5]], expected, atol=1e-5)
    np.testing.assert_allclose(answer["rewards"][5], scorer.group_rewards([(PROMPT, RESPONSES)])[0], atol=1e-5)
    np.testing.assert_allclose(answer["rewards"][6], scorer.rewards([say("Is ice cold?", "Yes")]), atol=1e-5)
    np.testing.assert_allclose(answer["rewards"][7:], expected[:2, None], atol=1e-5)
    lengths = [len(ids) for ids in scorer.chat.encode(CONVERSATIONS)]
    assert [row[0] for row in answer["tokens"][:5]] == lengths
    assert answer["usage"]["total_tokens"] == sum(sum(row) for row in answer["tokens"])
    assert answer["normalized"] is None
    assert answer["read"] is None
    assert answer["truncated"] == [False] * len(items)
    assert answer["model"]["template_sha256"] == scorer.chat.template_sha256


def test_the_tokens_that_were_read_and_the_place_of_the_reward(server: Running, scorer: Scorer) -> None:
    item = {"prompt": "Hi", "responses": ["Hello", "No"]}
    (read,) = server.client.post("/v1/rewards", json={"items": [item], "return_tokens": True}).json()["read"]
    for one, answer in zip(read, ("Hello", "No"), strict=True):
        assert one["ids"] == scorer.chat.encode([say("Hi", answer)])[0]
        assert one["tokens"][one["reward_at"]] == scorer.chat.terminal_token
        assert len(one["tokens"]) == len(one["ids"])


def test_tokens_are_read_apart_from_where_requests_are_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    own = native._read
    monkeypatch.setattr(native, "_read", lambda *a: threads.append(threading.current_thread().name) or own(*a))
    body = {"items": [{"messages": CONVERSATIONS[0]}] * 2, "return_tokens": True}
    assert server.client.post("/v1/rewards", json=body).status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["btrm-tokens"] * 2


def test_a_conversation_that_cannot_be_scored_costs_only_itself(server: Running) -> None:
    items = [
        {"messages": [*say("Hi", "Hello"), {"role": "user", "content": "x"}, *say("y", "z")]},
        {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": say("Hi", "\ud800")},
        {"prompt": "Hi", "responses": ["fine", "\udfff"]},
    ]
    body = {"items": items}
    import json

    answer = server.client.post("/v1/rewards", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code == 200:
        found = answer.json()
        assert "Unicode" in found["errors"][2][0]
        assert found["rewards"][3][0] is not None
        assert found["rewards"][3][1] is None


def test_too_long_is_refused_with_the_limit_or_cut_when_asked(server: Running, scorer: Scorer) -> None:
    body = {"items": [{"prompt": LONG, "responses": RESPONSES[:2]}]}
    refused = server.client.post("/v1/rewards", json=body)
    assert refused.status_code == 422
    assert "256" in refused.json()["error"]["message"]
    answer = server.client.post("/v1/rewards", json={**body, "truncate": True}).json()
    assert answer["truncated"] == [True]
    np.testing.assert_allclose(answer["rewards"][0], scorer.group_rewards([(LONG, RESPONSES[:2])])[0], atol=1e-5)
    ids = scorer.chat.encode([[*LONG, {"role": "assistant", "content": "Yes"}]])[0]
    cut = server.client.post("/v1/rewards", json={"items": [{"input_ids": ids}], "truncate": True}).json()
    kept = [ids[0], *ids[len(ids) - 255 :]]
    assert cut["tokens"] == [[256]]
    np.testing.assert_allclose(cut["rewards"][0], scorer.sequence_rewards([kept], [0]), atol=1e-5)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({}, "expected one of"),
        ({"prompt": "x"}, "expected one of"),
        ({"prompt": "x", "responses": []}, "at least one response"),
        ({"messages": [{"role": "user", "content": "x"}]}, "assistant"),
        ({"messages": []}, "assistant"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [True, False]}, "input_ids.0: Input should be a valid integer"),
        ({"input_ids": ["1", "2"]}, "input_ids.0: Input should be a valid integer"),
        ({"text": "x", "truncat": True}, "truncat: Extra inputs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is of type 'image_url', expected text"),
        ({"input_ids": [5, -1]}, "holds -1"),
        ({"input_ids": [1 << 70]}, "holds"),
        ({"text": "x", "input_ids": [1]}, "expected one of"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_line(server: Running, item: dict, says: str) -> None:
    answer = server.client.post("/v1/rewards", json={"items": [item]})
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert says in message
    assert "\n" not in message
    assert answer.json()["detail"] == message


def test_content_may_stand_in_parts(server: Running, scorer: Scorer) -> None:
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CONVERSATIONS[1]]
    found = server.client.post("/v1/rewards", json={"items": [{"messages": parts}]}).json()
    assert found["rewards"][0][0] == pytest.approx(scorer.rewards(CONVERSATIONS[1:2])[0], abs=1e-5)


def test_normalized_rewards_and_probabilities_use_the_calibration_of_btrm_json(scorer: Scorer) -> None:
    class Calibrated(Held):
        manifest = {**scorer.manifest, "calibration": {"mean": 0.5, "std": 2.0, "temperature": 4.0}}  # noqa: RUF012

    body = {"items": [{"prompt": PROMPT, "responses": RESPONSES}], "normalize": True}
    with serving(Calibrated(scorer)) as server:
        answer = server.client.post("/v1/rewards", json=body).json()
        raw = np.array(answer["rewards"][0])
        np.testing.assert_allclose(raw, scorer.group_rewards([(PROMPT, RESPONSES)])[0], atol=1e-5)
        np.testing.assert_allclose(answer["normalized"][0], (raw - 0.5) / 2, atol=1e-12)
        compared = server.client.post("/v1/compare", json={"prompt": PROMPT, "responses": RESPONSES}).json()
    probability = np.array(compared["probability"])
    np.testing.assert_allclose(probability[0, 1], 1 / (1 + math.exp((raw[1] - raw[0]) / 4)), atol=1e-6)
    np.testing.assert_allclose(probability + probability.T, 1.0, atol=1e-12)
    assert compared["best"] == int(raw.argmax())


def test_normalized_rewards_are_refused_where_nobody_measured_the_scale(server: Running) -> None:
    answer = server.client.post("/v1/rewards", json={"items": [{"text": "x"}], "normalize": True})
    assert answer.status_code == 422
    assert "calibration" in answer.json()["error"]["message"]


def test_a_reward_that_is_not_finite_is_an_error_of_its_item_alone(held: Held) -> None:
    with serving(held) as server:
        held.nan_at = 1
        body = {"items": [{"prompt": PROMPT, "responses": RESPONSES}]}
        answer = server.client.post("/v1/rewards", json=body)
        assert "NaN" not in answer.text.replace("is nan", "")
        found = answer.json()
        assert found["rewards"][0][1] is None
        assert "not a finite number" in found["errors"][0][1]
        assert sum(reward is not None for reward in found["rewards"][0]) == 3
        trainer = server.client.post("/get_reward", json={"query": ["a", "b"], "prompts": [], "labels": []})
        assert trainer.status_code == 500
        assert "btrm_rewards_not_finite_total 2.0" in server.client.get("/metrics").text


def test_a_computation_that_fails_costs_only_its_own_request(held: Held, scorer: Scorer) -> None:
    bad = scorer.chat.encode(CONVERSATIONS[:1])[0]
    with serving(held) as server:
        held.fails_on = bad
        items = [{"input_ids": bad}]
        assert server.client.post("/v1/rewards", json={"items": items}).status_code == 500
        good = server.client.post("/v1/rewards", json={"items": [{"messages": CONVERSATIONS[1]}]})
        assert good.status_code == 200


def test_models_health_ready_docs_and_metrics(server: Running, scorer: Scorer) -> None:
    (about,) = server.client.get("/v1/models").json()["data"]
    assert about["id"] == "tiny"
    assert about["max_model_len"] == scorer.max_length
    assert server.client.get("/health").json() == {"status": "alive"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    assert "/v1/rewards" in server.client.get("/docs").text
    assert "/get_reward" in server.client.get("/openapi.json").json()["paths"]
    assert "btrm_ready 1.0" in server.client.get("/metrics").text


def test_a_server_whose_self_test_fails_gives_no_rewards(scorer: Scorer) -> None:
    vectors = [{**vector, "reward": vector["reward"] + 0.5} for vector in scorer.manifest["self_test"]]

    class Changed(Held):
        manifest = {**scorer.manifest, "self_test": vectors}  # noqa: RUF012

        def self_test(self) -> float:
            return 0.5

    with serving(Changed(scorer)) as server:
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ready").status_code == 503
        assert "off by 0.5" in server.client.get("/ready").json()["reason"]
        answer = server.client.post("/get_reward", json={"query": ["x"]})
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers


def test_limits_are_checked_when_they_are_made() -> None:
    from btrm_core.errors import ConfigError

    with pytest.raises(ConfigError, match="queue_tokens is 0"):
        Limits(queue_tokens=0)
    with pytest.raises(ConfigError, match="bearer token"):
        Limits(token="")
