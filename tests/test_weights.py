"""Checkpoints as they arrive: half downloaded, pointers in place of files, packed by others, with a head elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.scorer_samples import base_model, change_json, reward_model
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from btrm_core.cli import main
from btrm_core.data.sample import sample_path
from btrm_core.errors import CheckpointError
from btrm_core.model import check_head
from btrm_core.model.base import base_config, load_base, load_tokenizer
from btrm_core.settings import ModelConfig
from btrm_core.weights import check_config, check_files, head_among, other_head, tensors_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", "llama3")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(base: Path) -> Path:
    """The same model in two files with an index."""
    weights = load_file(base / FILE)
    names = sorted(weights)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: weights[n] for n in names if places[n] == shard}, base / shard, {"format": "pt"})
    (base / FILE).unlink()
    (base / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        base_config(ModelConfig(name=str(directory)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_files_pass(base: Path, sharded: Path) -> None:
    check_files(sharded)
    assert other_head(sharded) is None
    assert base_config(ModelConfig(name=str(sharded))).model_type == "llama"


def test_shapes_are_read_from_the_header(base: Path) -> None:
    assert tensors_of(base / FILE) == {name: tuple(w.shape) for name, w in load_file(base / FILE).items()}


@pytest.mark.parametrize("name", [FILE, "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_a_pointer_is_no_file(name: str, base: Path) -> None:
    (base / name).write_text(POINTER)
    assert refusal(base) == (
        f"{base / name} is a pointer of Git LFS in place of the file itself; fetch it with `git lfs pull` in {base}"
    )


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.001, 0.5, 0.999999])
def test_half_a_download_is_refused_wherever_it_ends(part: float, base: Path) -> None:
    content = (base / FILE).read_bytes()
    (base / FILE).write_bytes(content[: int(part * len(content))])
    assert refusal(base).startswith(f"{base / FILE} is cut off")


@pytest.mark.parametrize("content", [b"\0" * 5000, b"PK\x03\x04" + b"x" * 5000, b"\x10\0\0\0\0\0\0\0[1, 2, 3]       "])
def test_what_is_no_safetensors_file_is_damaged(content: bytes, base: Path) -> None:
    (base / FILE).write_bytes(content)
    assert refusal(base) == f"{base / FILE} is damaged: it is no safetensors file; download or copy it anew"


def test_an_index_and_its_files_must_agree(sharded: Path) -> None:
    index, second = sharded / f"{FILE}.index.json", sharded / "model-00002-of-00002.safetensors"
    good, content = index.read_text(), second.read_bytes()
    second.unlink()
    assert refusal(sharded) == f"{sharded} lacks {second.name}, which {index.name} names; download or copy it anew"
    save_file({"other": torch.zeros(1)}, second)
    assert refusal(sharded).startswith(f"{second} lacks ")
    second.write_bytes(content[:-10])
    assert refusal(sharded).startswith(f"{second} is cut off: it has {len(content) - 10:,} of {len(content):,} bytes")
    second.write_bytes(content)
    no_metadata = json.dumps({"weight_map": json.loads(good)["weight_map"]})
    for broken in (no_metadata, "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', good[: len(good) // 2]):
        index.write_text(broken)
        assert refusal(sharded).startswith(f"{index} is broken: ")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../elsewhere.safetensors"}}))
    assert "names a file outside its directory ('../../elsewhere.safetensors')" in refusal(sharded)


QUANTISED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "load_in_8bit": {"load_in_8bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_weights_that_others_quantised_are_refused(method: str, base: Path) -> None:
    change_json(base / "config.json", quantization_config=QUANTISED[method])
    assert refusal(base).startswith(f"the weights of {base} are quantised ({method}); expected whole weights")


def test_a_pad_token_without_an_embedding_is_told(base: Path) -> None:
    change_json(base / "config.json", pad_token_id=99_999)
    assert refusal(base).startswith(f"pad_token_id in config.json of {base} is 99999, and there are embeddings for ")


def test_also_inside_a_text_config() -> None:
    config = AutoConfig.for_model("gemma3")
    config.text_config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(CheckpointError, match=r"someone/model are quantised \(awq\)"):
        check_config(config, "someone/model")


@pytest.mark.parametrize(
    "name",
    [
        *("v_head.summary.weight", "value_head.weight", "model.v_head.0.weight", "classifier.weight", "rm_head.weight"),
        *("regression_layer.weight", "rm_score.weight", "reward.weight", "score.0.weight"),
    ],
)
def test_a_trained_head_under_another_name_is_never_replaced_in_silence(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(base / FILE)
    save_file({**weights, name: torch.ones(1, 32)}, base / FILE, {"format": "pt"})
    assert refusal(base).startswith(f"{base} holds a trained head as {name}, where nothing reads it; ")
    with monkeypatch.context() as patch:  # a model of the hub, whose files are not looked at before
        patch.setattr("btrm_core.weights.refuse_other_head", lambda directory: None)
        with pytest.raises(CheckpointError, match=f"holds a trained head as {re.escape(name)}, where nothing reads it"):
            load_base(ModelConfig(name=str(base)), torch.float32)
    save_file({**weights, name: torch.ones(1, 32), "score.weight": torch.ones(1, 32)}, base / FILE, {"format": "pt"})
    assert other_head(base) is None


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("headed", [True, False])
def test_an_encoder_is_told_that_it_is_one(kind: str, headed: bool, tmp_path: Path) -> None:
    """Its head has another name because it is of another kind, so to rename it would not do."""
    config = AutoConfig.for_model(kind, **SMALL, vocab_size=60, pad_token_id=0, num_labels=1)
    config.bos_token_id = config.eos_token_id = config.cls_token_id = config.sep_token_id = None
    model = (AutoModelForSequenceClassification if headed else AutoModelForMaskedLM).from_config(config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        check_head(tmp_path / "model")
    said = str(caught.value)
    assert re.search(
        r"/model is a \w+ForSequenceClassification, no decoder with a head called score: its rewards", said
    )
    assert said.endswith("name a decoder, or ask this model with transformers' text-classification pipeline")
    if headed:
        assert refusal(tmp_path / "model") == said


COMMANDS = {
    "train": ("train", "--family", "llama3", "--model", "MODEL", "--output", "OUT"),
    "dry run": ("train", "--family", "llama3", "--model", "MODEL", "--output", "OUT", "--dry-run"),
    "plan": ("plan", "--model", "MODEL", "--gpu-memory", "80"),
    "score": ("score", "MODEL", "ROWS", "-o", "OUT"),
    "eval": ("eval", "MODEL", "--data", "ROWS"),
    "serve": ("serve", "MODEL", "--port", "0"),
    "export": ("export", "MODEL", "OUT"),
    "doctor": ("doctor", "MODEL", "--family", "llama3"),
    "verify": ("verify", "MODEL"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so_in_one_line(command: str, base: Path, tmp_path: Path) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file({**load_file(base / FILE), **head}, base / FILE, {"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "chosen": "yes", "rejected": "no", "response": "a"}\n')
    places = {"MODEL": str(base), "ROWS": str(rows), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(main, [places.get(word, word) for word in COMMANDS[command]])
    lines = [line for line in done.output.splitlines() if "holds a trained head" in line]
    assert lines, done.output
    assert all("trained head as v_head.summary.weight" in line for line in lines)
    assert all("called score.weight: save it under this name" in line for line in lines)
    assert "Traceback" not in done.output
    if command == "verify":  # it goes on with its other checks, and says at the end what failed
        assert done.exit_code == 1
    else:
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.output


@pytest.mark.parametrize("name", ["head_of_my_own.weight", "lm_head_reward.weight", "critic_model.out.weight"])
def test_a_matrix_of_one_output_outside_the_layers_is_a_head(name: str, base: Path) -> None:
    weights = load_file(base / FILE)
    save_file({**weights, name: torch.ones(1, 32)}, base / FILE, {"format": "pt"})
    assert refusal(base).startswith(f"{base} holds a trained head as {name}, where nothing reads it; ")


def test_what_is_left_out_of_a_checkpoint_is_named(base: Path) -> None:
    weights = load_file(base / FILE)
    mlp = [key for key in weights if "layers.0.mlp" in key]
    extra = {key.replace("layers.0.", "layers.7."): weights[key].clone() for key in mlp}
    save_file({**weights, **extra}, base / FILE, {"format": "pt"})
    note = str(load_base(ModelConfig(name=str(base)), torch.float32).note)
    assert note.startswith("LlamaForSequenceClassification has no place for 3 weights of the base model, which are")


def test_what_is_no_head_passes() -> None:
    gates = {"model.layers.0.mlp.shared_expert_gate.weight": (1, 32), "model.layers.0.attn.value_proj.weight": (32, 32)}
    others = {"model.layers.61.shared_head.head.weight": (128, 32), "lm_head.weight": (128, 32), "lm_head.bias": (128,)}
    others["model.score.weight"] = (1, 32)  # which transformers reads as the head
    assert head_among({**gates, **others, "model.norm.weight": (32,)}) is None


def test_a_head_of_several_outputs_is_replaced_with_a_word_and_one_of_another_model_never(base: Path) -> None:
    weights = load_file(base / FILE)
    save_file({**weights, "score.weight": torch.ones(3, 32)}, base / FILE, {"format": "pt"})
    loaded = load_base(ModelConfig(name=str(base)), torch.float32)
    assert loaded.head_is_new
    assert loaded.note == "the base model's head of 3 outputs is replaced by a new one"
    save_file({**weights, "score.weight": torch.ones(1, 16)}, base / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(score.weight\) takes 16 values, and its backbone gives 32; expected"):
        load_base(ModelConfig(name=str(base)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_weights_that_are_no_floating_numbers_are_packed_whatever_the_config_says(
    dtype: torch.dtype, base: Path
) -> None:
    weights = load_file(base / FILE)
    name = next(key for key in weights if "mlp" in key)
    save_file({**weights, name: weights[name].to(dtype)}, base / FILE, {"format": "pt"})
    assert refusal(base).startswith(f"the weights of {base} are quantised ({name} is ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_they_are_trained(value: float, base: Path) -> None:
    weights = load_file(base / FILE)
    name = next(key for key in weights if "embed" in key)
    weights[name][-1, -1] = value  # of a token that may come late in the data, or in the evaluation only
    save_file(weights, base / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"are damaged: {re.escape(name)} is not finite everywhere; download"):
        load_base(ModelConfig(name=str(base)), torch.float32)


@pytest.mark.parametrize("content", ["null", "[]", "3", '"llama"', "{", "\ufeff{}", '{"model_type": 3}'])
def test_a_configuration_that_is_none_is_told_in_one_line(content: str, base: Path) -> None:
    (base / "config.json").write_text(content)
    assert refusal(base).startswith(f"cannot read the configuration of the base model {base}: ")


def test_a_directory_without_a_tokenizer_says_so(base: Path) -> None:
    for file in base.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; expected tokenizer\.json \(or tokenizer\.model\)"):
        load_tokenizer(ModelConfig(name=str(base)))


def test_code_of_a_checkpoint_is_run_on_demand_only(base: Path) -> None:
    own = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForSequenceClassification": "modeling_my.My"}
    change_json(base / "config.json", model_type="my_own", auto_map=own)
    (base / "configuration_my.py").write_text("raise SystemExit(7)")
    assert "comes with code of its own; expected one that transformers knows: read that code, then" in refusal(base)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "reward_head.pt", "score.safetensors"])
def test_nor_one_in_a_file_of_its_own(name: str, base: Path) -> None:
    (base / name).write_bytes(b"x")
    assert f"holds a trained head in {name}, where nothing reads it" in refusal(base)


@pytest.mark.parametrize("fault", ["cut", "packed"])
def test_every_command_says_it_in_one_line(fault: str, tmp_path: Path) -> None:
    model = reward_model(tmp_path / "model")
    if fault == "cut":
        (model / FILE).write_bytes((model / FILE).read_bytes()[:-1])
    else:
        change_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    pairs = sample_path("held_out")
    said = set()
    for command in (
        ["train", "--family", "llama3", "--model", str(model), "--data", pairs, "--output", str(tmp_path / "run")],
        ["doctor", "--family", "llama3", "--model", str(model), "--data", pairs],
        ["plan", "--model", str(model)],
        ["score", str(model), pairs, "-o", str(tmp_path / "scored.jsonl")],
        ["eval", str(model), "--data", pairs],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2, (command, done.output)
        (line,) = done.stderr.splitlines()
        said.add(line)
    assert len(said) == 1
    assert not (tmp_path / "run").exists()
