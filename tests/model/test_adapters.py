"""Adapters from training to use: the same rewards live, saved apart, saved merged, and read by peft alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.trajectories import metrics, prepare, run_card, train

from btrm_core.cli import main
from btrm_core.config import read_settings
from btrm_core.errors import BtrmError, CheckpointError, ConfigError
from btrm_core.model import load
from btrm_core.scoring import export
from btrm_core.scoring.scorer import Scorer
from btrm_core.training import loop
from btrm_core.training.session import Outcome
from btrm_core.training.summary import closing_text

EXACT = 1e-5
LORA: dict[str, Any] = {"lora__rank": 4, "train__learning_rate": 2e-2, "train__max_steps": 5, "data__max_length": 512}
APART: dict[str, Any] = {**LORA, "lora__merge": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def apart(root: Path) -> Outcome:
    """A run that saved adapters and head alone."""
    return train(root, root / "apart", **APART)


@pytest.fixture(scope="module")
def merged(root: Path) -> Outcome:
    return train(root, root / "merged", **LORA)


@pytest.fixture
def copied(root: Path, apart: Outcome, tmp_path: Path) -> tuple[Path, Path]:
    """Adapters and their base model, to be damaged."""
    base, model = tmp_path / "base", tmp_path / "model"
    shutil.copytree(root / "base", base)
    shutil.copytree(apart.directory, model)
    change_json(model / "adapter_config.json", base_model_name_or_path=str(base))
    return base, model


def manifest(outcome: Outcome) -> dict[str, Any]:
    assert outcome.directory is not None
    return dict(json.loads((outcome.directory / "btrm.json").read_text()))


def held_out(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "held_out.jsonl").read_text().splitlines()]


def live_rewards(outcome: Outcome) -> list[float]:
    """What the live model gave the held-out pairs at the end of training, packed, adapters apart."""
    return [example[side][0] for example in outcome.examples for side in ("chosen", "rejected")]


def scored(root: Path, directory: Path, dtype: str = "auto") -> np.ndarray:
    scorer = Scorer(str(directory), dtype=dtype, device="cpu")
    return scorer.rewards([row[side] for row in held_out(root) for side in ("chosen", "rejected")])


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_directory_holds_adapters_and_no_base_weights(apart: Outcome) -> None:
    assert apart.directory is not None
    names = {path.name for path in apart.directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "btrm.json"} <= names
    assert "model.safetensors" not in names
    weights = load_file(apart.directory / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[1] or name for name in weights} == {".lora_", "base_model.model.score.weight"}
    assert manifest(apart)["adapters"] == {"merged": False}


def test_merged_and_apart_give_the_live_rewards(root: Path, apart: Outcome, merged: Outcome) -> None:
    live = live_rewards(apart)
    assert np.std(live) > 0.1  # the adapters do something
    for outcome in (apart, merged):
        assert outcome.directory is not None
        np.testing.assert_allclose(scored(root, outcome.directory.parent), live, atol=EXACT, rtol=0)
        assert Scorer(str(outcome.directory), device="cpu").self_test() <= EXACT
    how = manifest(merged)["adapters"]
    assert (how["merged"], how["conversations"]) == (True, 4)
    assert 0 <= how["largest_reward_change"] <= EXACT


def test_peft_alone_gives_the_live_rewards(root: Path, apart: Outcome) -> None:
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1)
    for model in (
        AutoPeftModelForSequenceClassification.from_pretrained(apart.directory, num_labels=1),
        PeftModel.from_pretrained(base, apart.directory),
    ):
        for vector in manifest(apart)["self_test"]:
            with torch.no_grad():
                reward = model.eval()(input_ids=torch.tensor([vector["input_ids"]])).logits.item()
            assert reward == pytest.approx(vector["reward"], abs=EXACT)


def test_the_code_of_the_model_card(apart: Outcome) -> None:
    assert apart.directory is not None
    printed, chat = run_card(apart.directory)
    assert printed == pytest.approx(Scorer(str(apart.directory), device="cpu").rewards([chat])[0], abs=EXACT)


def test_score_eval_and_doctor_take_adapters(root: Path, apart: Outcome, tmp_path: Path) -> None:
    conversations = [row[side] for row in held_out(root) for side in ("chosen", "rejected")]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    said = closing_text(apart)
    assert f"needs the base model {root / 'base'} unchanged, and peft" in said
    command = said.splitlines()[-1].removeprefix("next: btrm ").replace("INPUT.jsonl", str(source)).split()
    result = CliRunner().invoke(main, [str(target) if word == "OUTPUT.jsonl" else word for word in command])
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["reward"] for line in target.read_text().splitlines()]
    np.testing.assert_allclose(found, live_rewards(apart), atol=EXACT, rtol=0)

    data = ["--data", str(root / "held_out.jsonl")]
    result = CliRunner().invoke(main, ["eval", str(apart.directory), *data, "--json"])
    assert result.exit_code == 0, result.output
    assert apart.evaluation is not None
    assert json.loads(result.stdout)["evaluations"][0]["accuracy"]["half"] == apart.evaluation["accuracy"]

    result = CliRunner().invoke(main, ["doctor", str(apart.directory), *data, "--json"])
    checks = {entry["name"]: entry["verdict"] for entry in json.loads(result.stdout)["checks"]}
    names = ("self-test", "head", "packed = separate", "pipeline parity")
    assert [checks[name] for name in names] == ["ok"] * 4, result.stdout


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_merging_in_bf16_loses_something_that_is_measured(root: Path, stage: str) -> None:
    # few tokens: CPUs without units for bf16 take many times as long
    values = {**LORA, "model__dtype": "bf16", "distributed__deepspeed": stage, "data__max_length": 128}
    outcome = train(root, root / f"bf16 {stage}", **values)
    change = manifest(outcome)["adapters"]["largest_reward_change"]
    assert 1e-4 < change < 0.1
    assert f"adapters merged, rounded to bfloat16: rewards of 4 conversations change by at most {change:.1e}" in (
        closing_text(outcome)
    )
    # the vectors are what a reader gets, and not what the live model gave
    assert Scorer(str(outcome.directory), dtype="bf16", device="cpu").self_test() < change / 100
    kept = train(root, root / f"bf16 {stage} apart", **values, lora__merge=False)
    pairs = zip(manifest(outcome)["self_test"], manifest(kept)["self_test"], strict=True)
    assert max(abs(a["reward"] - b["reward"]) for a, b in pairs) == pytest.approx(change, rel=1e-3)
    assert Scorer(str(kept.directory), dtype="bf16", device="cpu").self_test() < change / 100
    # read in fp32 the rewards differ by the rounding of training, which is no other base model
    in_fp32 = Scorer(str(kept.directory), dtype="fp32", device="cpu")
    assert in_fp32.self_test() > load.TOLERANCE * max(abs(v["reward"]) for v in in_fp32.manifest["self_test"])


def test_adapters_trained_under_zero3_are_saved_whole(root: Path, apart: Outcome) -> None:
    outcome = train(root, root / "zero3", **APART, distributed__deepspeed="zero3")
    np.testing.assert_allclose(scored(root, outcome.directory), live_rewards(apart), atol=EXACT, rtol=0)


def test_the_row_of_a_new_pad_token_is_saved(root: Path) -> None:
    outcome = train(root, root / "new token", **APART, tokenizer__pad_token="[NEW]")
    assert outcome.directory is not None
    scorer = Scorer(str(outcome.directory), device="cpu")
    weight = scorer.model.base_model.get_input_embeddings().weight
    before = load_file(root / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(weight) == len(before) + 1 == scorer.chat.pad_id + 1
    torch.testing.assert_close(weight[:-1], before)
    torch.testing.assert_close(weight[-1], before.mean(0))
    np.testing.assert_allclose(scored(root, outcome.directory), live_rewards(outcome), atol=EXACT, rtol=0)
    from peft import AutoPeftModelForSequenceClassification

    alone = AutoPeftModelForSequenceClassification.from_pretrained(outcome.directory, num_labels=1)
    torch.testing.assert_close(alone.get_input_embeddings().weight[-1], before.mean(0))


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Scorer(str(model), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_base_model_that_was_moved(copied: tuple[Path, Path]) -> None:
    base, model = copied
    base.rename(base.with_name("elsewhere"))
    assert refusal(model) == (
        f"{model} holds adapters, and their base model cannot be loaded: the base model {base} is neither a directory "
        "nor a hub id of the form owner/name. adapter_config.json says where it is (base_model_name_or_path, revision)"
    )


def test_a_base_model_that_has_changed(copied: tuple[Path, Path]) -> None:
    base, model = copied
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.2
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = refusal(model)
    assert said.startswith(
        f"{model} holds adapters, and with {base} the rewards in btrm.json come out otherwise, by up "
    )
    assert said.endswith("; expected the base model they were trained on")


def test_adapters_that_are_incomplete_or_of_another_shape(copied: tuple[Path, Path]) -> None:
    _, model = copied
    file = model / "adapter_model.safetensors"
    weights = load_file(file)
    lost = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({name: w for name, w in weights.items() if name != lost}, file, {"format": "pt"})
    assert refusal(model) == f"the weights of {model} are incomplete: {lost} missing; copy the directory anew"
    save_file({**weights, lost: torch.zeros(3, 3)}, file, {"format": "pt"})
    assert refusal(model).startswith(f"the adapters in {model} do not fit ")
    save_file({name: w for name, w in weights.items() if "score" not in name}, file, {"format": "pt"})
    assert refusal(model).startswith(f"{model} holds no reward head (score.weight is missing from its weights)")
    file.unlink()
    assert refusal(model) == f"{model} has no weights in safetensors form; expected adapter_model.safetensors"


def test_the_revision_of_a_base_model_of_the_hub_is_pinned(root: Path, apart: Outcome, tmp_path: Path) -> None:
    """Loaded from a hub cache, the base model's commit is recorded, and another commit is not taken for it."""
    from btrm_core.model.adapters import add_adapters, save_adapters
    from btrm_core.model.base import load_base
    from btrm_core.settings import LoraConfig, ModelConfig

    hf = load_base(ModelConfig(name=str(root / "base")), torch.float32).hf
    hf.config._commit_hash, hf.name_or_path = "c" * 40, "someone/base"  # as transformers notes them
    wrapped = add_adapters(hf, LoraConfig(rank=2), seed=0)
    save_adapters(wrapped, tmp_path, wrapped.state_dict(), whole_embedding=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("someone/base", "c" * 40)

    assert apart.directory is not None
    model = shutil.copytree(apart.directory, tmp_path / "model")
    change_json(model / "adapter_config.json", base_model_name_or_path="someone/base", revision="c" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        said = refusal(model)
    assert said.startswith(f"{model} holds adapters, and their base model cannot be loaded: ")
    assert "someone/base" in said


def test_adapters_are_no_base_model(apart: Outcome) -> None:
    from btrm_core.model.base import load_base
    from btrm_core.settings import ModelConfig

    with pytest.raises(CheckpointError) as caught:
        load_base(ModelConfig(name=str(apart.directory)), torch.float32)
    assert str(caught.value) == (
        f"{apart.directory} holds adapters, which are no base model; expected whole weights: merge them (those of btrm "
        "with `btrm export --merge-adapter`), or name the base model of adapter_config.json; beside merged weights "
        "remove that file"
    )


def test_nor_beside_whole_weights_or_without_a_configuration(apart: Outcome, tmp_path: Path) -> None:
    """transformers would put them onto the weights beside them, and the reward model would be no peft model."""
    from btrm_core.model.base import base_config, load_base
    from btrm_core.settings import ModelConfig

    both = shutil.copytree(apart.directory, tmp_path / "both")
    (both / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"both holds adapters, .*; beside merged weights remove that file"):
        load_base(ModelConfig(name=str(both)), torch.float32)
    (both / "config.json").unlink()
    with pytest.raises(CheckpointError, match="both holds adapters, which are no base model"):
        base_config(ModelConfig(name=str(both)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lora.alpha": 8},
            "lora.alpha is set, but there are no adapters; give --lora-rank N too, or leave it out",
        ),
        (
            {"lora.merge": "false"},
            "lora.merge is set, but there are no adapters; give --lora-rank N too, or leave it out",
        ),
        (
            {"model.quantize": "4bit"},
            "--quantize 4bit needs --lora-rank N: weights of 4 bits cannot be trained, only adapters beside them",
        ),
        ({"lora.rank": 4, "lora.dropout": 1}, "lora.dropout = 1.0: expected below 1"),
        (
            {"lora.rank": 4, "model.train_last_layers": 1},
            "--train-last-layers and --lora-rank contradict each other: adapters are trained in every layer and "
            "nothing else is; leave one out, or choose layers with --lora-targets",
        ),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(None, values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("embed_tokens", "is a Embedding"),
        ("q_prj", "is no layer"),
        ("score", "is the head, always trained"),
        ("", "is no layer"),
    ],
)
def test_targets_must_be_linear_layers(root: Path, target: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(root, root / "wrong", **LORA, lora__targets=("v_proj", target))
    hint = " Did you mean 'q_proj'?" if target == "q_prj" else ""
    assert str(caught.value) == (
        f"lora.targets: '{target}' {what}; expected all-linear or some of down_proj, gate_proj, k_proj, o_proj, "
        f"q_proj, up_proj, v_proj.{hint}"
    )


def test_no_targets_at_all_are_refused(root: Path) -> None:
    """As `targets = []` in a file of settings says."""
    with pytest.raises(ConfigError, match=r"^lora\.targets: '' is no layer; expected all-linear or some of down_proj"):
        train(root, root / "wrong", **LORA, lora__targets=())


def test_only_the_targets_are_adapted(root: Path) -> None:
    outcome = train(root, root / "targets", **APART, lora__targets=("q_proj", "v_proj"))
    assert outcome.directory is not None
    names = load_file(outcome.directory / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj", "model"}


def test_flags_reach_their_settings(root: Path) -> None:
    words = ["train", "--family", "llama3", "--dry-run", "--output", str(root / "dry")]
    words += "--lora-rank 8 --lora-alpha 32 --lora-dropout 0.1 --no-merge --freeze-embeddings --keep-last 5".split()
    words += "--lora-targets q_proj,v_proj,o_proj --skip-nan --early-stopping 3".split()
    words += "--activation-offload --optimizer adamw-8bit --quantize 4bit".split()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    shown = result.stdout.partition("# deepspeed")[0]
    for line in (
        "rank = 8", "alpha = 32.0", "dropout = 0.1", "merge = false", "freeze_embeddings = true", "keep_last = 5",
        "skip_nan = true", "early_stopping = 3", "activation_offload = true", 'optimizer = "adamw-8bit"',
        'quantize = "4bit"',
    ):  # fmt: skip
        assert f"\n{line}\n" in shown, line
    assert re.search(r'targets = \[\s*"q_proj",\s*"v_proj",\s*"o_proj",\s*\]', shown)
    result = CliRunner().invoke(main, ["train", "--family", "llama3", "--train-last-layers", "1", "--lora-rank", "2"])
    assert result.exit_code == 2
    assert issubclass(ConfigError, BtrmError)
    assert "btrm: --train-last-layers and --lora-rank contradict each other" in result.stderr


def test_exported_adapters_are_a_whole_model_with_the_same_rewards(root: Path, apart: Outcome, tmp_path: Path) -> None:
    assert apart.directory is not None
    with pytest.raises(CheckpointError, match="--merge-adapter"):
        export(str(apart.directory), str(tmp_path / "whole"))
    export(str(apart.directory), str(tmp_path / "whole"), merge=True)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    np.testing.assert_allclose(scored(root, tmp_path / "whole"), scored(root, apart.directory), atol=EXACT)
    assert Scorer(str(tmp_path / "whole"), device="cpu").self_test() < EXACT


def test_a_base_model_that_is_written_anew_does_not_change_a_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights would be the mapped file itself, in which a copy in place is seen at once."""
    base = Path(shutil.copytree(root / "base", tmp_path / "base"))
    file, step = base / "model.safetensors", loop.train_step
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def written_meanwhile(*given: Any, **more: Any) -> Any:
        with file.open("r+b") as stream:
            stream.write(whole[:header] + bytes(len(whole) - header))
        return step(*given, **more)

    for frozen in ({"lora__rank": 4}, {"model__train_last_layers": 1}, {}):
        values = {**frozen, "train__max_steps": 3, "data__max_length": 512, "model__name": str(base)}
        expected = losses(train(root, tmp_path / f"alone {frozen}", **values))
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", written_meanwhile)
            assert losses(train(root, tmp_path / f"run {frozen}", **values)) == expected, frozen
        file.write_bytes(whole)


def losses(outcome: Outcome) -> list[float]:
    assert outcome.directory is not None
    return [row["loss"] for row in metrics(outcome.directory.parent)]
