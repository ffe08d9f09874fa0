"""What a run looks at before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from btrm_core import config as config_module
from btrm_core.data.sample import sample_path
from btrm_core.errors import ConfigError, DataError
from btrm_core.families.discovery import load
from btrm_core.model.toy import build_toy
from btrm_core.run import train
from btrm_core.settings import RunConfig
from btrm_core.training.prepare import choose, load_data, output_directory

CUT = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' ~ "
    "m['content'][:200] ~ '<|eot_id|>' }}{%- endfor %}"
)


def test_a_template_that_cuts_messages_is_counted_and_strict_stops(tmp_path: Path) -> None:
    (tmp_path / "cut.jinja").write_text(CUT)
    rows = [
        {"prompt": f"What is {n}?", "chosen": "It is. " * 40 * (n % 2) + "Yes.", "rejected": "No."} for n in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data.train": (str(tmp_path / "pairs.jsonl"),),
        "data.held_out_fraction": 0.0,
        "data.cache_dir": str(tmp_path / "cache"),
        "tokenizer.chat_template": str(tmp_path / "cut.jinja"),
    }
    job = choose(config_module.apply(RunConfig(family="llama3"), values))
    config, chat = job.config, job.chat
    data = load_data(config, chat)
    said = "in 4 the chat template drops or changes the text of a message of the assistant (such as pairs.jsonl:2)"
    assert data.lines == [f"train data: {said}"]
    assert len(data.train) == 8
    strict = config_module.apply(config, {"data.strict": True})
    with pytest.raises(DataError) as caught:
        load_data(strict, chat)
    assert str(caught.value) == f"train data: {said}; expected every message as the data has it (--strict)"


@pytest.mark.parametrize("side", ["train", "eval"])
def test_the_side_of_which_no_pair_is_left_is_named(tmp_path: Path, side: str) -> None:
    values: dict[str, Any] = {"data.cache_dir": str(tmp_path / "cache"), "data.max_length": 100}
    for name in ("train", "eval"):
        answer = "yes " * (100 if name == side else 1)
        row = {"prompt": f"For {name}?", "chosen": answer, "rejected": f"no {answer}"}
        (tmp_path / name).with_suffix(".jsonl").write_text(json.dumps(row) + "\n")
        values[f"data.{name}"] = (str(tmp_path / f"{name}.jsonl"),)
    job = choose(config_module.apply(RunConfig(family="llama3"), values))
    with pytest.raises(DataError, match=f"^{side} data: no pairs are left after encoding 1: most are dropped for "):
        load_data(job.config, job.chat)


def test_evaluation_pairs_that_are_all_ties_are_refused_before_training(tmp_path: Path) -> None:
    row = {"prompt": "For eval?", "chosen": "yes", "rejected": "no", "probability": 0.5}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    values = {"data.train": (sample_path("train"),), "data.eval": (str(tmp_path / "eval.jsonl"),)}
    values["data.cache_dir"] = str(tmp_path / "cache")
    job = choose(config_module.apply(RunConfig(family="llama3"), values))
    with pytest.raises(DataError, match=r"^every evaluation pair is a tie \(probability 0\.5\); expected pairs"):
        load_data(job.config, job.chat)


def test_a_home_that_the_shell_has_left_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --output=~/x, and in a TOML file; otherwise the run would make a directory of the name ~."""
    monkeypatch.setenv("HOME", "/home/ada")
    config = config_module.read_settings(None, {"output.dir": "~/x"})
    assert output_directory(config, load("llama3")) == Path("/home/ada/x")


def test_forcing_needs_a_family_that_is_named() -> None:
    values = {"force_family": True, "model.name": "anything"}
    with pytest.raises(ConfigError) as caught:
        choose(config_module.apply(RunConfig(), values))
    assert str(caught.value) == "--force-family forces the family that is named: give --family NAME too"


def test_conversations_beyond_the_positions_of_a_rotary_model_are_trained_on_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_toy(load("llama3").recipe().tiny, tmp_path / "base", hidden_size=32, max_position_embeddings=32)
    values = {"model.name": str(tmp_path / "base"), "data.train": (sample_path("train"),), "train.max_steps": 1}
    train(config_module.apply(RunConfig(family="llama3"), {**values, "output.dir": str(tmp_path / "run")}))
    said = capsys.readouterr().err
    assert (
        "conversations may have 4,096 tokens, and the base model (llama) knows 32 positions: what is beyond them it "
        "has never seen; keep to them with --max-length 32"
    ) in said
