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
from btrm_core.errors import CheckpointError
from btrm_core.model import read_manifest
from btrm_core.preflight.verify import verify, verify_url
from btrm_core.preflight.verify.server import Server
from btrm_core.scoring import Scorer
from btrm_core.serving import Limits


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


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ({"self_test": [{}]}, r"self_test\[0\] is no list of ids with a reward"),
        ({"self_test": [{"input_ids": [], "reward": 1.0}]}, r"self_test\[0\]"),
        ({"self_test": [{"input_ids": [1], "reward": 1.0}, {"input_ids": [1], "reward": "1"}]}, r"self_test\[1\]"),
        ({"self_test": {"input_ids": [1]}}, r"self_test\[0\]"),
        ({"files": ["config.json"]}, "files is no table of hashes"),
        ({"max_length": "256"}, "max_length is '256', expected a number of tokens"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_a_manifest_that_no_reader_could_use(tmp_path: Path, damaged: dict[str, Any], says: str) -> None:
    (tmp_path / "btrm.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match=rf"btrm.json is not as btrm writes it: {says}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[1]", '"x"', "null", "", "{"])
def test_a_manifest_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "btrm.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"btrm.json is not (as btrm writes it: it holds no object|valid JSON)"):
        read_manifest(tmp_path)


def test_a_manifest_that_lost_its_proof_or_another_length(copy: Path) -> None:
    change_json(copy / "btrm.json", max_length=64, self_test=[], config={"model.name": "base"})
    found = failed(copy)
    assert "max_length of 64, tokenizer_config.json one of 256" in found["tokenizer, template and pad token"]
    assert found["self-test in fp32"] == "btrm.json lost its self-test vectors"


@pytest.mark.parametrize("numbers", [None, [], ["high"], [None], [-2000.0], 5])
def test_answers_that_are_no_rewards_are_verdicts(whole: Path, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(str(whole), device="cpu")
    monkeypatch.setattr(Server, "_asked", lambda self, method, path, body=None: {
        "data": [{"id": "x", "probs": numbers} for _ in (body or {}).get("input", [0])]
    })  # fmt: skip
    monkeypatch.setattr(scorer, "sequence_rewards", lambda ids, _: np.full(len(ids), -1000.0))
    assert {check.verdict for check in verify_url("http://127.0.0.1:9", scorer)} == {"fail"}


def test_a_server_that_is_not_there_takes_no_other_verdict_with_it(whole: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(whole), "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert result.output.count("ok ") >= 8
    assert "http://127.0.0.1:9/v1/models" in result.output


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


def test_a_refusal_of_the_server_is_shown_in_its_own_words(whole: Path) -> None:
    scorer = Scorer(str(whole), device="cpu")
    with serving(scorer, Limits(max_length=5, token="a-secret")) as server:
        (found,) = verify_url(server.url, scorer)
        assert "status 401" in found.what
        assert "Authorization: Bearer TOKEN" in found.what
        checks = verify_url(server.url, scorer, "a-secret")
    assert all(check.verdict == "fail" and "the limit is 5" in check.what for check in checks)


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
