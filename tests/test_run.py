"""A whole run in miniature: what it writes, what it measures, and that its parts agree."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from btrm_core.config import read_settings
from btrm_core.errors import CheckpointError, TrainingError
from btrm_core.run import train
from btrm_core.training.schedule import Progress
from btrm_core.training.session import Outcome
from btrm_core.training.summary import closing_text

TRAIN_KEYS = {
    "split", "step", "time", "loss", "accuracy", "ties", "reward_margin", "reward_margin_std", "chosen_mean",
    "chosen_std", "rejected_mean", "rejected_std",
    "pairs", "grad_norm", "learning_rate", "epoch", "seconds", "tokens_per_second",
    "useful_tokens_per_second", "pairs_per_second", "padding_percent", "shared_percent", "rank_imbalance",
    "micro_batches", "peak_memory_gib",
}  # fmt: skip
EVAL_KEYS = {"accuracy_standard_error", "accuracy_interval", "brier", "ece", "longer_wins_tokens", "subsets"}


def run(output: Path, **values):
    settings = {
        "family": "llama3",
        "output.dir": str(output),
        "train.max_steps": 4,
        "train.pairs_per_step": 10,
        "output.eval_every": 100,
    }
    return train(read_settings(None, {**settings, **values}))


def lines(output: Path, split: str):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "with a space"
    return run(output), output


def test_metrics_have_stable_names_and_exact_pairs(finished):
    _, output = finished
    rows = lines(output, "train")
    assert [set(row) for row in rows] == [TRAIN_KEYS] * 4
    assert [row["pairs"] for row in rows] == [10] * 4
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert abs(rows[0]["loss"] - math.log(2)) < 0.2
    assert 0 < rows[0]["shared_percent"] < 100
    assert set(lines(output, "eval")[-1]) - EVAL_KEYS < TRAIN_KEYS


def test_the_directory_is_an_ordinary_transformers_model(finished):
    outcome, _ = finished
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForSequenceClassification.from_pretrained(outcome.directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(outcome.directory)
    assert (config.num_labels, config.problem_type, config.id2label) == (1, "regression", {0: "reward"})
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    assert not list(outcome.directory.glob("*.bin"))


def test_the_manifest_says_what_was_done(finished):
    outcome, _ = finished
    made = json.loads((outcome.directory / "btrm.json").read_text())
    assert made["family"] == "llama3"
    assert made["terminal_token"] == "<|eot_id|>"
    assert made["evaluation"]["accuracy"] == outcome.evaluation["accuracy"]
    assert made["data"]["encoding"]["train"]["given"] == 389
    assert len(made["self_test"]) == 4
    assert all(math.isfinite(vector["reward"]) for vector in made["self_test"])


def test_the_self_test_vectors_hold_for_transformers_alone(finished):
    outcome, _ = finished
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(outcome.directory).eval()
    for vector in json.loads((outcome.directory / "btrm.json").read_text())["self_test"]:
        with torch.no_grad():
            reward = model(input_ids=torch.tensor([vector["input_ids"]])).logits.item()
        assert reward == pytest.approx(vector["reward"], abs=1e-5)


def test_equal_seeds_give_equal_weights_and_others_do_not(finished, tmp_path):
    outcome, _ = finished
    same = load_file(run(tmp_path / "same").directory / "model.safetensors")
    other = load_file(run(tmp_path / "other", **{"train.seed": 1}).directory / "model.safetensors")
    first = load_file(outcome.directory / "model.safetensors")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_what_another_trainer_left_of_accelerate_does_not_matter(finished, tmp_path):
    Accelerator(cpu=True)  # as TRL's trainers make one: within a process group it would wrap models for DDP
    assert run(tmp_path / "run").progress.step == finished[0].progress.step


def test_a_finished_model_is_not_overwritten_unless_asked(finished):
    outcome, output = finished
    with pytest.raises(CheckpointError, match="already holds a finished model; choose another --output"):
        run(output)
    before = (outcome.directory / "btrm.json").read_text()
    run(output, **{"output.overwrite": "true", "train.max_steps": 1})
    assert (outcome.directory / "btrm.json").read_text() != before
    assert not list(output.glob(".model*"))


def test_checkpoints_of_an_earlier_run_are_neither_mixed_in_nor_lost(tmp_path):
    run(tmp_path, **{"output.save_every": 2})
    kept = sorted(path.name for path in (tmp_path / "resume").glob("step-*"))
    assert kept == ["step-00000002"]
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"holds checkpoints of an earlier run \(the last: step-00000002\)"):
        run(tmp_path)
    run(tmp_path, **{"output.overwrite": "true", "output.save_every": 3})
    assert sorted(path.name for path in (tmp_path / "resume").glob("step-*")) == ["step-00000003"]


def test_a_trained_model_is_a_base_model_that_keeps_its_head(finished, tmp_path):
    outcome, _ = finished
    again = run(
        tmp_path / "again",
        **{"model.name": str(outcome.directory), "data.train": str(sample("train")), "train.learning_rate": 1e-12},
    )
    before, after = (load_file(o.directory / "model.safetensors")["score.weight"] for o in (outcome, again))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_held_out_by_construction(tmp_path):
    outcome = run(tmp_path / "split", **{"data.train": str(sample("train")), "data.held_out_fraction": 0.2})
    made = json.loads((outcome.directory / "btrm.json").read_text())
    encoding = made["data"]["encoding"]
    assert encoding["train"]["given"] + encoding["eval"]["given"] == 389
    assert 50 < encoding["eval"]["given"] < 110


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "mistral", "qwen3"])
def test_every_family_trains(family, tmp_path):
    outcome = run(tmp_path, family=family, **{"train.max_steps": 2})
    assert math.isfinite(outcome.evaluation["loss"])


def test_a_model_that_cannot_be_packed_is_trained_on_padded_batches(tmp_path, capsys):
    """Dropout in attention cannot be packed exactly: the self-check says so and the run goes on."""
    base = tmp_path / "base"
    from btrm_core.families.discovery import load
    from btrm_core.model.toy import build_toy

    build_toy(load("llama3").recipe().tiny, base, hidden_size=32, num_hidden_layers=1, attention_dropout=0.1)
    values = {"model.name": str(base), "data.train": str(sample("train")), "train.max_steps": 1}
    packed = run(tmp_path / "packed", **values)
    assert json.loads((packed.directory / "btrm.json").read_text())["training"]["layout"] == "shared"
    said = capsys.readouterr().err
    assert "dropout and noise of the base model's config are left out (attention_dropout=0.1)" in said
    outcome = run(tmp_path / "run", **values, **{"model.dropout": True})
    made = json.loads((outcome.directory / "btrm.json").read_text())
    assert made["training"]["layout"] == "padded"
    assert "packed rows cannot be used for this model (" in capsys.readouterr().err


def test_pairs_longer_than_the_budget_get_rows_of_their_own(tmp_path, capsys):
    outcome = run(tmp_path, **{"train.tokens_per_batch": 90, "train.max_steps": 1})
    assert math.isfinite(outcome.evaluation["loss"])
    assert "pairs are longer than --tokens-per-batch 90: each gets a row of its own" in capsys.readouterr().err


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(tmp_path, skip):
    values = {"train.learning_rate": 1e30, "train.warmup_ratio": 0.0, "train.max_grad_norm": 1e30, "train.max_steps": 3}
    if not skip:
        with pytest.raises(TrainingError, match=r"step \d: (rewards of these pairs are not finite: |all rewards are)"):
            run(tmp_path, **values)
        assert not (tmp_path / "model").exists()
        return
    outcome = run(tmp_path, **values, **{"train.skip_nan": "true"})
    assert outcome.progress.skipped_steps


def sample(part: str) -> Path:
    from btrm_core.data.sample import sample_path

    return Path(sample_path(part))


def test_what_a_run_shows_of_the_data_is_one_short_line_without_control_characters():
    text = "one\ntwo\x1b[31m three " * 40
    example = {"prompt": text, "chosen": (1.25, text), "rejected": (-2.0, "short")}
    lines = closing_text(Outcome(None, None, Progress(), examples=(example,))).splitlines()
    shown = [line for line in lines if "two" in line]
    assert [len(line) for line in shown] == [2 + 96, 4 + 7 + 2 + 8 + 2 + 96]
    assert all(line.endswith("…") and line.isprintable() for line in shown)
    assert "     -2.000  rejected  short" in lines


def test_the_next_command_can_be_copied():
    lines = closing_text(Outcome(Path("my runs/model"), None, Progress())).splitlines()
    assert lines[-1] == "next: btrm score 'my runs/model' INPUT.jsonl -o OUTPUT.jsonl"
