from __future__ import annotations

import json
import math
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.scorer_samples import change_json, reward_model
from support.serving import Held, serving

from btrm_core.cli import main
from btrm_core.preflight.verify import verify, verify_url
from btrm_core.scoring import Scorer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("verify") / "model", "llama3")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def failed(directory: Path) -> dict[str, str]:
    checks, _ = verify(str(directory))
    return {check.name: check.what for check in checks if check.verdict == "fail"}


def without_hashes(directory: Path) -> None:
    """So that a test sees the check that knows the reason, not only that a file changed."""
    change_json(directory / "btrm.json", files=None)


def test_a_whole_model_passes_every_check(whole: Path) -> None:
    checks, scorer = verify(str(whole))
    assert {check.verdict for check in checks} == {"ok"}, checks
    assert len(checks) == 8
    assert scorer is not None


def test_a_missing_head(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "no reward head" in failed(copy)["reward head"]


def test_a_changed_template(copy: Path) -> None:
    file = copy / "chat_template.jinja"
    file.write_text(file.read_text().replace("message", "message ", 1))
    assert "template_sha256" in failed(copy)["tokenizer, template and pad token"]


def test_a_pad_token_that_ends_the_sequence(copy: Path) -> None:
    eos = json.loads((copy / "tokenizer_config.json").read_text())["eos_token"]
    change_json(copy / "tokenizer_config.json", pad_token=eos)
    assert "end-of-sequence" in failed(copy)["tokenizer, template and pad token"]


def test_a_problem_type_that_brings_the_sigmoid(copy: Path) -> None:
    without_hashes(copy)
    change_json(copy / "config.json", problem_type=None)
    found = failed(copy)
    assert "expected 'regression'" in found["problem type"]
    assert "transformers pipeline" in found


def test_a_lost_rope(copy: Path) -> None:
    without_hashes(copy)
    config = json.loads((copy / "config.json").read_text())
    change_json(copy / "config.json", rope_parameters={**config["rope_parameters"], "rope_theta": 3.0}, rope_theta=3.0)
    assert "self-test in fp32" in failed(copy)


def test_a_wrong_tokenizer(copy: Path) -> None:
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[: len(merges) // 2]
    file.write_text(json.dumps(content))
    without_hashes(copy)
    assert "other ids" in failed(copy)["tokenizer, template and pad token"]


def test_one_flipped_byte_in_the_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert "model.safetensors" in failed(copy)["files as they were written"]


def test_a_type_that_is_not_the_weights(copy: Path) -> None:
    without_hashes(copy)
    change_json(copy / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    assert "most weights are float32" in failed(copy)["type of the weights"]


class Sigmoid(Held):
    def sequence_rewards(self, sequences: Sequence[Sequence[int]], together: Sequence[Hashable]) -> np.ndarray:
        return 1 / (1 + np.exp(-super().sequence_rewards(sequences, together)))


def test_a_server_that_has_loaded_the_model(whole: Path) -> None:
    scorer = Scorer(str(whole), device="cpu")
    with serving(scorer) as server:
        checks = verify_url(server.url, scorer)
        assert {check.verdict for check in checks} == {"ok"}
        assert [check.name for check in checks] == ["btrm by ids", "btrm by text", "btrm by messages"]
        result = CliRunner().invoke(main, ["verify", str(whole), "--url", server.url])
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") == 11


def test_a_server_that_applies_a_sigmoid(whole: Path) -> None:
    scorer = Scorer(str(whole), device="cpu")

    class Quiet(Sigmoid):
        def self_test(self) -> float:
            return 0.0

    with serving(Quiet(scorer)) as server:
        checks = verify_url(server.url, scorer)
    assert all("sigmoid" in check.what for check in checks)


def test_a_server_that_doubles_the_bos(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btrm_core.serving.preparing import Prepared, Preparer

    plain = Preparer.text

    def doubled(self: Preparer, *args: Any, **kwargs: Any) -> Prepared:
        prepared = plain(self, *args, **kwargs)
        return Prepared([[self.chat.bos_id, *ids] for ids in prepared.sequences], prepared.errors)

    scorer = Scorer(str(whole), device="cpu")
    monkeypatch.setattr(Preparer, "text", doubled)
    with serving(scorer) as server:
        checks = {check.name: check for check in verify_url(server.url, scorer)}
    assert checks["btrm by ids"].verdict == "ok"
    assert math.isfinite(checks["btrm by text"].figures["largest_difference"])
    assert "second BOS" in checks["btrm by text"].what


def test_a_mismatch_is_exit_code_1(copy: Path) -> None:
    change_json(copy / "btrm.json", files={"config.json": "0" * 64})
    result = CliRunner().invoke(main, ["verify", str(copy)])
    assert result.exit_code == 1
    assert "changed since they were written: config.json" in result.output
