"""vLLM itself, started as the model card says, gives the rewards of btrm: by ids, by text, by messages.

Slow (a minute or more a family), and vLLM has an environment of its own, which BTRM_VLLM names: `make test-vllm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.cards import printed, read_blocks
from support.scorer_samples import CONVERSATIONS, FAMILIES, PROMPT, RESPONSES, base_model
from support.serving import serving

from btrm_core import config, run
from btrm_core.cli import main
from btrm_core.data.sample import sample_path
from btrm_core.model import tolerance
from btrm_core.preflight.verify import verify_url
from btrm_core.scoring import Scorer
from btrm_core.serving import Backend

pytestmark = [pytest.mark.hub("vLLM"), pytest.mark.slow, pytest.mark.timeout(1800)]
STARTS = 900
"""Seconds for a server to start; no measure of speed."""


@dataclass(frozen=True)
class Served:
    """A model directory, what btrm computes with it, and a vLLM server that has loaded it."""

    model: Path
    scorer: Scorer
    url: str

    @property
    def allowed(self) -> float:
        return tolerance(self.scorer.manifest, torch.bfloat16)

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(self.url + path, json={"model": self.name, **body}, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def name(self) -> str:
        return str(httpx.get(self.url + "/v1/models", timeout=60).json()["data"][0]["id"])


def trained(root: Path, family: str) -> Path:
    """A tiny model of a family after a few steps, with heads of a size that vLLM's attention has."""
    base = base_model(root / "base", family, hidden_size=128, intermediate_size=128, head_dim=32)
    values: dict[str, Any] = {
        "family": family,
        "model.name": str(base),
        "data.train": (sample_path("train"),),
        "data.eval": (sample_path("held_out"),),
        "data.cache_dir": str(root / "cache"),
        "data.max_length": 512,
        "train.max_steps": 4,
        "train.pairs_per_step": 8,
        "train.learning_rate": 0.01,
        "train.warmup_ratio": 0.0,
        "output.dir": str(root / "run"),
    }
    directory = run.train(config.read_settings(None, values)).directory
    assert directory is not None
    return directory


@contextlib.contextmanager
def vllm(model: Path, log: Path) -> Iterator[str]:
    """Run the command of the card in the directory of the model; yields the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, *words = shlex.split(read_blocks(model)["vLLM, the server"])
    assert program == "vllm"
    program = str(Path(os.environ["BTRM_VLLM"]).resolve() / "bin" / program)
    # not for the answers: less memory, a faster start, no outside requests
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [program, *words, "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=model.parent, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS
            while not _answers(url):
                assert process.poll() is None, log.read_text(errors="replace")[-4000:]
                assert time.monotonic() < end, "vLLM did not start in time"
                time.sleep(1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url + "/health", timeout=5).status_code == 200
    return False


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp(request.param)
    model = trained(root, request.param)
    with vllm(model, root / "vllm.log") as url:
        yield Served(model, Scorer(str(model), device="cpu"), url)


def test_rewards_by_messages_text_and_ids(served: Served) -> None:
    expected, ids = served.scorer.rewards(CONVERSATIONS), served.scorer.chat.encode(CONVERSATIONS)
    assert np.ptp(expected) > 3 * served.allowed  # rewards that could be told apart
    texts = [served.scorer.chat.render(conversation) for conversation in CONVERSATIONS]
    for path, key in (("/classify", "probs"), ("/pooling", "data")):
        by_messages = [served.post(path, messages=conversation)["data"][0][key] for conversation in CONVERSATIONS]
        by_text = [entry[key] for entry in served.post(path, input=texts, add_special_tokens=False)["data"]]
        by_ids = [entry[key] for entry in served.post(path, input=ids)["data"]]
        for found in (by_messages, by_text, by_ids):
            np.testing.assert_allclose(found, expected[:, None], atol=served.allowed, rtol=0)
        np.testing.assert_allclose(by_messages, by_ids, atol=served.allowed / 5, rtol=0)  # the very same tokens
    found = served.post("/classify", messages=CONVERSATIONS[1])
    assert found["usage"]["prompt_tokens"] == len(ids[1])


def test_the_request_of_the_card(served: Served) -> None:
    code = read_blocks(served.model)["vLLM, a request"]
    assert "http://127.0.0.1:8000" in code
    reward, names = printed(code.replace("http://127.0.0.1:8000", served.url))
    assert reward == pytest.approx(served.scorer.rewards([names["chat"]])[0], abs=served.allowed)


def test_verify_tells_the_model_from_another(served: Served, tmp_path: Path) -> None:
    checks = verify_url(served.url, served.scorer)
    assert [check.name for check in checks] == ["vllm by ids", "vllm by text", "vllm by messages"]
    assert {check.verdict for check in checks} == {"ok"}, checks
    other = shutil.copytree(served.model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["score.weight"] *= -1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(main, ["verify", str(other), "--url", served.url])
    assert result.exit_code == 1
    assert "vllm by messages" in result.output


def test_btrm_in_front_of_it_speaks_to_trainers(served: Served) -> None:
    backend = Backend(str(served.model), served.url)
    assert backend.kind == "vllm"
    assert backend.self_test() <= served.allowed
    expected = served.scorer.group_rewards([(PROMPT, RESPONSES)])[0]
    full = [[*PROMPT, {"role": "assistant", "content": response}] for response in RESPONSES]
    with serving(backend) as front:
        assert front.client.get("/ready").status_code == 200
        query = [served.scorer.chat.render(conversation) for conversation in full]
        openrlhf = front.client.post("/get_reward", json={"query": query, "prompts": query, "labels": query}).json()
        native = front.client.post("/v1/rewards", json={"items": [{"prompt": PROMPT, "responses": RESPONSES}]}).json()
    np.testing.assert_allclose(openrlhf["rewards"], expected, atol=served.allowed, rtol=0)
    np.testing.assert_allclose(native["rewards"][0], expected, atol=served.allowed, rtol=0)


def test_the_manifest_says_which_program_the_card_is_for(served: Served) -> None:
    architecture = json.loads((served.model / "btrm.json").read_text())["card"]["architecture"]
    assert json.loads((served.model / "config.json").read_text())["architectures"] == [architecture]
