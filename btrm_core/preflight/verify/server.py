"""Whether a server gives the rewards of the model it has loaded: btrm, vLLM or SGLang, by ids, by text, by messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from btrm_core.errors import ConfigError, first_line
from btrm_core.model import tolerance
from btrm_core.preflight import Check
from btrm_core.scoring import Scorer

PROBE = [{"role": "user", "content": "Name the largest planet."}]
ANSWER = "Jupiter is the largest planet of the solar system."
WRONG = "a trainer that asks this server is given other rewards than those of the model"


class Server:
    """A server that is asked for rewards in its own shape.

    Args:
        url: where it listens.

    Raises:
        ConfigError: it cannot be reached.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=self.url, timeout=120, headers=headers)
        about = self._asked("GET", "/v1/models")
        try:
            self.model, owner = str(about["data"][0]["id"]), str(about["data"][0].get("owned_by"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.url}/v1/models names no model; expected btrm, vLLM or SGLang") from error
        self.kind = owner if owner in ("btrm", "sglang") else "vllm"

    def _asked(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._client.request(method, path, json=body)
            if not response.is_success:
                raise ValueError(f"status {response.status_code}, {response.text[:300]}")
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(f"{self.url}{path}: {first_line(error)}") from error

    def of(self, inputs: Sequence[Any], **options: Any) -> list[list[float]]:
        """What the server answers to texts or lists of ids, one list of numbers each.

        Args:
            inputs: texts or lists of ids, all of one kind.
            **options: more keys of the request; SGLang is sent none.

        Returns:
            Numbers of each input in order: its reward alone if the server applies the head.

        Raises:
            ConfigError: the server cannot be reached, or refuses.
        """
        if self.kind == "sglang":
            key = "text" if isinstance(inputs[0], str) else "input_ids"
            return [entry["embedding"] for entry in self._asked("POST", "/classify", {key: list(inputs)})]
        body = {"model": self.model, "input": list(inputs), **options}
        return [entry["probs"] for entry in self._asked("POST", "/classify", body)["data"]]

    def of_messages(self, messages: Sequence[dict[str, str]]) -> list[float]:
        """What the server answers to a conversation that it writes with its own template.

        Args:
            messages: the conversation, its last message the response; not for SGLang, which takes none.

        Returns:
            Its reward alone if the server applies the head.

        Raises:
            ConfigError: the server cannot be reached, or refuses.
        """
        found: list[float] = self._asked("POST", "/classify", {"model": self.model, "messages": list(messages)})[
            "data"
        ][0]["probs"]
        return found


def verify_url(url: str, scorer: Scorer, token: str | None = None) -> list[Check]:
    """Check a running server against a model.

    Args:
        url: where it listens.
        scorer: the model that it should have loaded.
        token: its bearer token.
    """
    try:
        server = Server(url, token)
    except ConfigError as error:
        return [
            Check("server", "fail", str(error), "it was not asked", "start the server, or give its --url and --token")
        ]
    vectors = scorer.manifest.get("self_test") or [{"input_ids": scorer.chat.encode([_probe()])[0]}]
    ids = [list(vector["input_ids"]) for vector in vectors]
    rewards = scorer.sequence_rewards(ids, [None] * len(ids)).tolist()
    allowed = tolerance(scorer.manifest, torch.bfloat16)
    checks = [_judged(f"{server.kind} by ids", lambda: server.of(ids), rewards, allowed)]
    texts, theirs = [], []
    for sequence, reward in zip(ids, rewards, strict=True):
        text = scorer.chat.tokenizer.decode(sequence, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if scorer.chat.encoder.encode([text])[0] == sequence:
            texts.append(text)
            theirs.append(reward)
    if texts:
        named = f"{server.kind} by text"
        checks.append(_judged(named, lambda: server.of(texts, add_special_tokens=False), theirs, allowed))
        doubled = scorer.sequence_rewards([[s[0], *s] for s in ids], [None] * len(ids)).tolist()
        if checks[-1].verdict == "fail" and checks[0].verdict == "ok" and scorer.chat.bos_id is not None:
            checks[-1] = _bos(named, server.of(texts, add_special_tokens=False), doubled, allowed, checks[-1])
    if server.kind != "sglang":
        expected = scorer.rewards([_probe()]).tolist()
        checks.append(_judged(f"{server.kind} by messages", lambda: [server.of_messages(_probe())], expected, allowed))
    return checks


def _probe() -> list[dict[str, str]]:
    return [*PROBE, {"role": "assistant", "content": ANSWER}]


def _judged(name: str, ask: Any, rewards: Sequence[float], allowed: float) -> Check:
    try:
        found = [list(numbers) for numbers in ask()]
    except (ConfigError, KeyError, TypeError) as error:
        return Check(name, "fail", f"no answer: {first_line(error)}", WRONG, "start the server with this model")
    if len(found) != len(rewards) or any(len(numbers) != 1 for numbers in found):
        size = len(found[0]) if found else 0
        what = f"{size} numbers a conversation; expected one, the reward"
        return Check(name, "fail", what, "the server ignores the reward head", "use vLLM, or btrm serve")
    values = [float(n) if isinstance(n, int | float) else math.nan for (n,) in found]
    off = _largest(values, rewards)
    figures = {"largest_difference": off, "tolerance": allowed}
    if off <= allowed:
        return Check(name, "ok", f"rewards differ by up to {off:.2g}; allowed is {allowed:.2g}", figures=figures)
    if _largest(values, [0.5 + 0.5 * math.tanh(reward / 2) for reward in rewards]) <= 0.02:
        return Check(
            name,
            "fail",
            "the server puts rewards through a sigmoid",
            WRONG,
            'set "problem_type": "regression" in config.json, or ask with "use_activation": false',
            figures,
        )
    what = f"rewards differ by up to {off:.2g}; allowed is {allowed:.2g}"
    return Check(name, "fail", what, WRONG, "start the server with this model, in the type it was saved in", figures)


def _bos(name: str, found: Sequence[Sequence[float]], doubled: Sequence[float], allowed: float, else_: Check) -> Check:
    """Say so if the difference is that of a second BOS."""
    if len(found) > len(doubled) or _largest([n[0] for n in found], doubled[: len(found)]) > allowed:
        return else_
    return Check(
        name,
        "fail",
        "the server puts a second BOS before the text",
        WRONG,
        "send ids or messages, or text without its first token",
        else_.figures,
    )


def _largest(values: Sequence[float], rewards: Sequence[float]) -> float:
    differences = [abs(value - reward) for value, reward in zip(values, rewards, strict=False)]
    return max((math.inf if math.isnan(d) else d for d in differences), default=math.inf)
