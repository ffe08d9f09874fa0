"""A vLLM or SGLang server as the device: btrm makes the ids and speaks the trainers' shapes, the other one computes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import httpx
import numpy as np
import torch

from btrm_core.chat import ChatFormat
from btrm_core.errors import CheckpointError, ConfigError, first_line
from btrm_core.files import digest
from btrm_core.model import find_model, load_chat, read_manifest
from btrm_core.serving.limits import Unavailable

KINDS = ("vllm", "sglang")
TIMEOUT = 120.0


class Backend:
    """What a `Scorer` is for local weights, for a server that has loaded them.

    Args:
        model: the model directory; its tokenizer, template and self-test vectors are read, its weights are not.
        url: where the server listens, such as http://127.0.0.1:8000.
        kind: vllm, sglang, or None to ask the server.
        tokens_per_batch: tokens of one request.
        name: the model's name at the server; None asks.
        token: its API key.

    Raises:
        CheckpointError: the directory is not whole.
        ConfigError: the server cannot be reached or is none of the two.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        kind: str | None = None,
        tokens_per_batch: int = 8192,
        name: str | None = None,
        token: str | None = None,
    ) -> None:
        if kind not in (None, *KINDS):
            raise ConfigError(f"the backend's kind is '{kind}'; expected {' or '.join(KINDS)}")
        directory = find_model(model)
        self.url = url.rstrip("/")
        self.tokens_per_batch = tokens_per_batch
        self.dtype = torch.bfloat16  # neither says; the looser tolerance
        self.chat: ChatFormat = load_chat(directory)
        self.manifest: dict[str, Any] = read_manifest(directory)
        headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        self._client = httpx.Client(timeout=TIMEOUT, limits=httpx.Limits(max_connections=64), headers=headers)
        served = self._ask_models()
        self.kind = kind or ("sglang" if served.get("owned_by") == "sglang" else "vllm")
        self.name = name or str(served["id"])
        self.max_length = min(self.chat.max_length or 1 << 30, int(served.get("max_model_len") or 1 << 30))
        self.computed_tokens = 0
        self.identity = digest(self.url, self.name, self.chat.template_sha256)

    def _ask_models(self) -> dict[str, Any]:
        found = self._json("GET", "/v1/models")
        try:
            return dict(found["data"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{self.url}/v1/models names no model; expected a vLLM or SGLang server") from error

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._client.request(method, self.url + path, json=body)
            if response.is_client_error:
                raise ValueError(f"status {response.status_code}, {response.text[:300]}")
            response.raise_for_status()
            return response.json()
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError) as error:
            raise ConfigError(f"the server at {self.url}{path} cannot be used: {first_line(error)}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the server at {self.url}{path} cannot be used: {first_line(error)}") from error

    def sequence_rewards(self, sequences: Sequence[Sequence[int]], together: Sequence[Hashable]) -> np.ndarray:
        """Return the rewards [S] of finished id sequences, float32; the server shares beginnings by itself.

        Args:
            sequences: ids with the terminal token at their end.
            together: not needed here; the server finds equal beginnings.

        Returns:
            NaN where the server gives null.

        Raises:
            ConfigError: the server refuses, or its answer is no reward.
            Unavailable: it cannot be reached, or fails.
        """
        ids = [list(sequence) for sequence in sequences]
        self.computed_tokens += sum(map(len, ids))  # as far as is known here
        body = {"model": self.name, "input": ids, "use_activation": False}
        answer = self._json("POST", "/classify", body if self.kind == "vllm" else {"input_ids": ids})
        try:
            found = [e["probs"] for e in answer["data"]] if self.kind == "vllm" else [e["embedding"] for e in answer]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the answer of {self.url}/classify is not that of {self.kind}") from error
        if len(found) != len(ids) or any(not isinstance(numbers, list) or len(numbers) != 1 for numbers in found):
            size = len(found[0]) if found and isinstance(found[0], list) else 0
            raise ConfigError(
                f"the server at {self.url} answers with {size} numbers a conversation, not with one; it does not "
                "apply the reward head of this model"
            )
        rewards = [numbers[0] for numbers in found]
        return np.array([r if isinstance(r, int | float) else math.nan for r in rewards], dtype=np.float32)

    def self_test(self) -> float:
        """Ask for the vectors of `btrm.json`; returns the largest difference to the rewards in it.

        Raises:
            CheckpointError: the model has none.
        """
        vectors = self.manifest.get("self_test")
        if not vectors:
            raise CheckpointError("btrm.json holds no self-test vectors to compare with")
        rewards_S = self.sequence_rewards([vector["input_ids"] for vector in vectors], [None] * len(vectors))
        return float(np.abs(rewards_S - np.array([vector["reward"] for vector in vectors])).max())
