"""What is saved is read alike by transformers 4.57 and by every version of 5 that is supported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.environments import HANGS
from support.scorer_samples import CONVERSATIONS, FAMILIES, reference, reward_model
from transformers import AutoConfig, AutoTokenizer

from btrm_core.model.load import chat_from_checkpoint
from btrm_core.model.older import write_for_older_readers
from btrm_core.scoring import export

HALVES = [1.0, 2.0, 3.0, 4.0]
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    **{name: ("qwen3", {"rope_parameters": rope}) for name, rope in SCALED.items()},
    "two bases": (
        "gemma3_text",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 12_000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
            },
        },
    ),
    "part": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}},
    ),
    "long": (
        "phi3",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": HALVES,
                "long_factor": HALVES,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "nested": ("gemma3", {"text_config": {"rope_parameters": None, "num_hidden_layers": 2}}),
    "without rotary": ("gpt2", {}),
    "experts": ("qwen3_moe", {"num_experts": 6}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_of_saying_it_say_the_same(name, tmp_path):
    model_type, values = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **values)
    config.save_pretrained(tmp_path)
    write_for_older_readers(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    for old, new in ((config, again), (config.get_text_config(), again.get_text_config())):
        before, after = (dict(getattr(c, "rope_parameters", None) or {}) for c in (old, new))
        if name == "long":
            after.pop("type")  # an older word for rope_type, which is there too
        assert after == before
        assert new.dtype == old.dtype
    written = json.loads((tmp_path / "config.json").read_text())
    text = written.get("text_config", written)
    if name == "llama3":
        assert text["rope_theta"] == 500_000.0
        expected = {key: value for key, value in SCALED["llama3"].items() if key != "rope_theta"}
        assert text["rope_scaling"] == expected
    if name == "two bases":
        assert (text["rope_theta"], text["rope_local_base_freq"]) == (2e6, 12_000.0)
        assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    if name == "long":
        assert set(text["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    if name == "experts":
        assert (text["num_experts"], again.num_experts) == (6, 6)
    if name in ("plain", "nested"):
        assert text["rope_scaling"] is None


@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("nested", [False, True])
def test_an_attention_that_keeps_the_cap_is_written_down(cap: float | None, nested: bool, tmp_path: Path) -> None:
    """A transformers that prefers one without the cap takes the one in the file, unless its user names another."""
    text = {"num_hidden_layers": 2, "attn_logit_softcapping": cap}
    config = AutoConfig.for_model("gemma2", **text)
    if nested:
        config = AutoConfig.for_model("paligemma", text_config={"model_type": "gemma2", **text})
    config.save_pretrained(tmp_path)
    write_for_older_readers(tmp_path)
    expected = None if cap is None else "eager"
    assert json.loads((tmp_path / "config.json").read_text()).get("attn_implementation") == expected
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again._attn_implementation, again.get_text_config()._attn_implementation) == (expected, expected)
    asked = AutoConfig.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert asked._attn_implementation == "flash_attention_2"


def test_the_tokenizer_has_a_class_and_keys_that_both_know(tmp_path):
    directory = reward_model(tmp_path / "model", "gemma")
    written = json.loads((directory / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(written)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert {"<start_of_turn>", "<end_of_turn>", "<pad>"} <= set(tokenizer.all_special_tokens)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")


READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

assert transformers.__version__.startswith("4.57"), transformers.__version__
directories, conversations = json.load(sys.stdin)
out = {}
for name, directory in directories.items():
    options = {"attn_implementation": "eager"} if "gemma2" in name else {}  # as the card says
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in text]
    alone = [model(torch.tensor([i])).logits.item() for i in ids]
    reward = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=len(text))
    found = reward(text, top_k=None, function_to_apply="none", add_special_tokens=False, padding=True)
    out[name] = {"ids": ids, "alone": alone, "piped": [f[0]["score"] for f in found]}
print(json.dumps(out))
"""


@pytest.mark.hub("transformers 4.57")
@pytest.mark.timeout(HANGS)
def test_transformers_4_gives_the_same_ids_and_rewards(tmp_path):
    made = {family: reward_model(tmp_path / family, family) for family in FAMILIES}
    made |= {name: reward_model(tmp_path / name, "qwen3", rope_parameters=rope) for name, rope in SCALED.items()}
    for family in FAMILIES:
        made[f"exported {family}"] = tmp_path / f"exported-{family}"
        export(str(made[family]), str(made[f"exported {family}"]))
    made["exported twice in bf16"] = tmp_path / "again"
    export(str(made["exported llama3"]), str(tmp_path / "half"), dtype="bf16")
    export(str(tmp_path / "half"), str(made["exported twice in bf16"]))
    directories = {name: str(path) for name, path in made.items()}
    environment = {**os.environ, "PYTHONPATH": os.environ["BTRM_TRANSFORMERS_4"]}
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([directories, CONVERSATIONS]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, path in made.items():
        chat = chat_from_checkpoint(Path(path))
        assert found[name]["ids"] == chat.encode(CONVERSATIONS), name
        expected = reference(path, chat, CONVERSATIONS)
        assert found[name]["alone"] == pytest.approx(expected, abs=1e-5), name
        assert found[name]["piped"] == pytest.approx(expected, abs=1e-5), name
        assert max(expected) - min(expected) > 1e-3  # rewards that could be told apart
