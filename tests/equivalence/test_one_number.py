"""One number: the reward of a conversation is the same wherever it is computed.

A model of each family is trained for a few steps; the rewards that the live model gave at the end are compared with the
`Scorer`, with `btrm score`, and with the pipeline of transformers on the rendered text, also by the code of the model
card. One prompt is longer than the sliding windows, and the tokenizers put a BOS before any text, as real ones do, so
that a window on the wrong positions or a second BOS would show.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from packaging.version import Version
from support.old_directory import as_the_first_version_wrote
from support.scorer_samples import CONVERSATIONS, FAMILIES, base_model, finished, real_tokenizer_base
from support.trajectories import run_card
from transformers import AutoConfig

from btrm_core import config, run
from btrm_core.chat.format import Conversation
from btrm_core.cli import main
from btrm_core.data.sample import sample_path
from btrm_core.scoring import export
from btrm_core.scoring.scorer import Scorer

EXACT = 1e-5
STORY = "The ferry left the harbour at noon and came back late in the evening with tired passengers. "


@dataclass(frozen=True)
class Trained:
    directory: Path
    conversations: list[Conversation]
    rewards: list[float]
    """What the live model gave them at the end of training."""


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    held_out = [json.loads(line) for line in Path(sample_path("held_out")).read_text().splitlines()[:2]]
    for side in ("chosen", "rejected"):
        held_out[1][side][0]["content"] = STORY * 8 + held_out[1][side][0]["content"]
    eval_data = root / "held_out.jsonl"
    eval_data.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    values: dict[str, Any] = {
        "family": request.param,
        "model.name": str(base_model(root / "base", request.param)),
        "data.train": (sample_path("train"),),
        "data.eval": (str(eval_data),),
        "data.cache_dir": str(root / "cache"),
        "data.max_length": 512,
        "train.max_steps": 4,
        "train.pairs_per_step": 8,
        "train.learning_rate": 0.02,
        "train.warmup_ratio": 0.0,
        "output.dir": str(root / "run"),
    }
    outcome = run.train(config.read_settings(None, values))
    assert outcome.directory is not None
    vectors = json.loads((outcome.directory / "btrm.json").read_text())["self_test"]
    conversations = [row[side] for row in held_out for side in ("chosen", "rejected")]
    assert [v["input_ids"] for v in vectors] == Scorer(str(outcome.directory), device="cpu").chat.encode(conversations)
    assert max(len(v["input_ids"]) for v in vectors) > 128  # the widest window of the toys
    rewards = [v["reward"] for v in vectors]
    assert np.std(rewards) > 1e-3
    return Trained(outcome.directory, conversations, rewards)


def test_scorer(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(str(trained.directory.parent), device="cpu")
    assert not [record for record in caplog.records if record.name == "btrm"]  # same template, packed rows
    assert scorer.model.kernel != "padded"
    assert scorer.self_test() <= EXACT
    np.testing.assert_allclose(scorer.rewards(trained.conversations), trained.rewards, atol=EXACT, rtol=0)


def test_a_directory_of_the_first_manifest(trained: Trained, tmp_path: Path) -> None:
    """What was saved before files had hashes, figures had intervals and 4.x had its own names scores the same."""
    old = tmp_path / "model"
    shutil.copytree(trained.directory, old)
    as_the_first_version_wrote(old)
    assert Scorer(str(old), device="cpu").self_test() <= EXACT
    np.testing.assert_allclose(
        Scorer(str(old), device="cpu").rewards(trained.conversations), trained.rewards, atol=EXACT
    )
    verified, found = verdicts(old)
    assert found.pop("files as they were written") == "skip"
    config = AutoConfig.from_pretrained(old)
    drops_cap = Version(transformers.__version__) < Version("5.21")  # unless config.json has a word about it
    if drops_cap and getattr(config, "attn_logit_softcapping", None):
        assert found.pop("transformers pipeline") == "fail"
        assert "drops the cap on its attention's scores" in verified
    assert set(found.values()) == {"ok"}, verified
    export(str(old), str(tmp_path / "anew"))
    verified, found = verdicts(tmp_path / "anew")
    assert set(found.values()) == {"ok"}, verified


def verdicts(directory: Path) -> tuple[str, dict[str, str]]:
    """What `btrm verify` says of a directory, and the verdicts in it."""
    said = CliRunner().invoke(main, ["verify", str(directory), "--json"]).stdout
    return said, {check["name"]: check["verdict"] for check in json.loads(said)}


def test_score_command(trained: Trained, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(conversation) + "\n" for conversation in trained.conversations))
    result = CliRunner().invoke(main, ["score", str(trained.directory), str(source), "-o", str(target)])
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["reward"] for line in target.read_text().splitlines()]
    np.testing.assert_allclose(found, trained.rewards, atol=EXACT, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_transformers_pipeline(trained: Trained, batch_size: int) -> None:
    from transformers import pipeline

    reward = pipeline("text-classification", model=str(trained.directory), device="cpu")
    texts = [reward.tokenizer.apply_chat_template(chat, tokenize=False) for chat in trained.conversations]
    options: dict[str, Any] = {"top_k": None, "function_to_apply": "none", "batch_size": batch_size}
    found = [labels[0]["score"] for labels in reward(texts, **options, add_special_tokens=False)]
    np.testing.assert_allclose(found, trained.rewards, atol=EXACT, rtol=0)
    raw = [labels[0]["score"] for labels in reward(texts, top_k=None, add_special_tokens=False)]
    np.testing.assert_allclose(raw, trained.rewards, atol=EXACT, rtol=0)  # no sigmoid even if nothing is said
    doubled = [labels[0]["score"] for labels in reward(texts, **options)]
    off = np.abs(np.subtract(doubled, trained.rewards)).max()
    has_bos = reward.tokenizer.bos_token is not None
    assert off > 10 * EXACT if has_bos else off < EXACT  # a second BOS


def test_the_code_of_the_model_card(trained: Trained) -> None:
    reward, chat = run_card(trained.directory)
    assert reward == pytest.approx(Scorer(str(trained.directory), device="cpu").rewards([chat])[0], abs=EXACT)


@pytest.mark.hub
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma", "gemma"),
        ("gemma2", "gemma"),
        ("llama3", "llama3"),
        ("llama3", "llama3-first"),
        ("llama3", "llama3.1"),
        ("mistral", "mistral-v1"),
        ("mistral", "mistral-v3"),
    ],
)
def test_pipeline_with_real_tokenizers(family: str, name: str, real_tokenizers: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    base = real_tokenizer_base(tmp_path / "base", family, real_tokenizers / name)
    model = str(finished(base, tmp_path / "model", family))
    scorer = Scorer(model, device="cpu")
    reward = pipeline("text-classification", model=model, device="cpu")
    chats = [
        *CONVERSATIONS,
        [{"role": "user", "content": "  Grüße, 你好!\n"}, {"role": "assistant", "content": " 🙂 "}],
    ]
    texts = [reward.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    found = reward(texts, top_k=None, function_to_apply="none", add_special_tokens=False)
    expected = scorer.rewards(chats)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose([labels[0]["score"] for labels in found], expected, atol=EXACT, rtol=0)
