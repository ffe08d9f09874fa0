"""The model card: what stands in it is true, its code runs, and nobody's words break out of their place."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.cards import blocks, printed, read_blocks
from support.scorer_samples import base_model
from support.serving import serving

from btrm_core import config, run
from btrm_core.data.sample import sample_path
from btrm_core.model import base_licence, model_card
from btrm_core.scoring import Scorer

STATED = "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org/licence\n---\n\n# A base model\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    base = base_model(root / "base", "llama3")
    (base / "README.md").write_text(STATED)
    values: dict[str, Any] = {
        "family": "llama3",
        "model.name": str(base),
        "data.train": (sample_path("train"),),
        "data.eval": (f"held={sample_path('held_out')}",),
        "data.cache_dir": str(root / "cache"),
        "train.max_steps": 2,
        "train.pairs_per_step": 8,
        "output.dir": str(root / "run"),
    }
    directory = run.train(config.read_settings(None, values)).directory
    assert directory is not None
    return directory


@pytest.fixture(scope="module")
def made(trained: Path) -> dict[str, Any]:
    return dict(json.loads((trained / "btrm.json").read_text()))


def tables(card: str) -> list[list[list[str]]]:
    """Cells of each table, rendered by a Markdown library and stripped of code marks."""
    tokens, found = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2]), []
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            found.append([])
        elif token.type == "inline" and before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children or ()))
        if token.type == "tr_open":
            found[-1].append([])
    return found


def front(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n", 2)[1]))


def test_it_says_what_the_run_knows(trained: Path, made: dict[str, Any]) -> None:
    card = (trained / "README.md").read_text()
    assert front(card) == ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    assert front(card)["license"] == "other"
    assert front(card)["license_name"] == "llama3"
    assert "`base` is under the licence `llama3` (<https://example.org/licence>), which binds this model too" in card
    assert str(trained.parent.parent) not in card  # paths of the machine are nobody's business
    recipe, evaluation, others = tables(card)
    assert ["steps", "2"] in recipe
    assert ["pairs per step", "8"] in recipe
    figures = made["evaluation"]
    low, high = figures["accuracy_interval"]
    assert evaluation[1] == ["all", "131", f"{figures['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
    assert [row[0] for row in evaluation[2:]] == [row["name"] for row in figures["subsets"]]
    for row, subset in zip(evaluation[2:], figures["subsets"], strict=True):
        low, high = (float(end) for end in row[3].split(" to "))
        assert 0 <= low < subset["accuracy"] < high <= 1
        assert high - low > (0.25 if subset["pairs"] < 40 else 0.1)  # twenty to thirty pairs say little
    assert ["loss", f"{figures['loss']:.4f}"] in others
    assert "389 training pairs of 389 prompts" in card
    assert set(re.findall(r"^## (.+)$", card, re.MULTILINE)) == {
        *("Data", "Recipe", "Evaluation", "Use", "Limits", "Licence")
    }
    assert model_card(made, trained.name) == card  # nothing else goes into it


def test_its_request_to_vllm_gets_the_reward(trained: Path) -> None:
    scorer = Scorer(str(trained), device="cpu")
    code = read_blocks(trained)["vLLM, a request"]
    with serving(scorer, name=trained.name) as server:  # speaks as vLLM does, which has tests of its own
        reward, names = printed(code.replace("http://127.0.0.1:8000", server.url))
    assert reward == pytest.approx(scorer.rewards([names["chat"]])[0], abs=1e-5)


def test_its_trl_code_trains_with_the_reward(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    config_class = trl.GRPOConfig
    small = {"use_cpu": True, "bf16": False, "max_completion_length": 4, "num_generations": 2, "logging_steps": 1}
    small |= {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2}
    monkeypatch.setattr(trl, "GRPOConfig", lambda output_dir, max_steps: config_class(
        output_dir=str(tmp_path / output_dir), max_steps=max_steps, **small
    ))  # fmt: skip
    policy = tmp_path / "policy"
    base_model(policy, "llama3")
    (policy / "chat_template.jinja").write_text((trained / "chat_template.jinja").read_text())
    names: dict[str, Any] = {}
    with contextlib.chdir(trained.parent):
        exec(read_blocks(trained)["TRL"].replace('"POLICY"', repr(str(policy))), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2
    assert np.isfinite(logged).all()
    (reader,), (tokenizer,) = trainer.reward_funcs, trainer.reward_processing_classes
    chat = [{"role": "user", "content": "Name a planet."}, {"role": "assistant", "content": "Mars"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt")
    assert reader(**ids).logits.item() == pytest.approx(Scorer(str(trained), device="cpu").rewards([chat])[0], abs=1e-5)


HOSTILE = "a|b`c``d\n\n# Heading\n```\n</td><script>alert(1)</script> {front} \x1b[31m ---"


def test_nobodys_words_break_out_of_their_place(made: dict[str, Any]) -> None:
    evaluation = {**made["evaluation"], "subsets": [{**made["evaluation"]["subsets"][0], "name": HOSTILE}]}
    about = {**made["card"], "base_is_local": False, "datasets": ["org/pairs: [x]"], "licence": {"license": "mit"}}
    data = {**made["data"], "sources": [HOSTILE, f"/home/me/{HOSTILE}"], "eval_sources": [HOSTILE]}
    changed = {"evaluation": evaluation, "card": about, "data": data, "base_model": HOSTILE}
    card = model_card({**made, **changed, "family": HOSTILE, "terminal_token": HOSTILE}, 'a"b\n```\n# out')
    assert front(card)["license"] == "mit"
    assert front(card)["datasets"] == about["datasets"]
    assert "base_model" not in front(card)  # the hub would refuse the card
    assert front(model_card({**made, "card": about, "base_model": "org/x"}, "x"))["base_model"] == "org/x"
    html = MarkdownIt("commonmark").enable("table").render(card[card.index("\n---\n\n# ") + 5 :])
    assert "<script>" not in html
    assert "\x1b" not in card
    headings = re.findall(r"<h(\d)>(.*?)</h\d>", html, re.DOTALL)
    assert [text for level, text in headings if level == "2"] == [
        *("Data", "Recipe", "Evaluation", "Use", "Limits", "Licence")
    ]
    assert [level for level, _ in headings].count("1") == 1
    assert html.count("<table>") == 3
    assert len(re.findall(r"<td>", html.split("<table>")[2])) == 2 * 4  # no cell more
    assert "/home/me" not in card
    code = blocks(card)["transformers"]
    compile(code, "card", "exec")


def test_a_licence_is_what_the_base_model_states(tmp_path: Path) -> None:
    def stated(name: str, text: str | None) -> dict[str, str]:
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "README.md").write_text(text)
        return base_licence(str(tmp_path / name))

    assert stated("one", "---\nlicense: apache-2.0\n---\n") == {"license": "apache-2.0"}
    assert stated("list", "---\nlicense: [gemma]\n---\n") == {"license": "gemma"}
    assert stated("none", None) == {}
    assert stated("plain", "# No front matter\n") == {}
    assert stated("broken", "---\nlicense: [\n---\n") == {}
    assert stated("odd", "---\nlicense: 'a | b'\nlicense_link: 'javascript:x'\n---\n") == {}
    assert stated("link", "---\nlicense: mit\nlicense_link: 'javascript:x'\n---\n") == {"license": "mit"}
    assert base_licence("org/of-no-hub") == {}


@pytest.mark.parametrize("softcap", [False, True])
def test_adapters_are_loaded_with_an_attention_that_keeps_the_cap(made: dict[str, Any], softcap: bool) -> None:
    """Their base model's configuration is of others: before 5.21 transformers takes an attention without the cap."""
    apart = {**made, "adapters": {"merged": False}, "card": {**made["card"], "softcap": softcap}}
    code = blocks(model_card(apart, "model"))["transformers and peft"]
    assert ('num_labels=1, attn_implementation="eager").eval()' in code) == softcap
    compile(code, "card", "exec")


def test_a_model_without_evaluation_says_so(made: dict[str, Any]) -> None:
    card = model_card({**made, "evaluation": None}, "model")
    assert "nothing is known of how good this model is" in card
    assert "metrics" not in front(card)


def test_vllm_is_told_of_a_class_that_is_not_named_after_its_language_model(made: dict[str, Any]) -> None:
    def command(architecture: str, causal: str | None) -> list[str]:
        about = {**made["card"], "architecture": architecture, "causal": causal}
        return shlex.split(blocks(model_card({**made, "card": about}, "a model"))["vLLM, the server"])

    assert made["card"]["causal"] == "LlamaForCausalLM"
    plain = ["vllm", "serve", "a model", "--runner", "pooling", "--dtype", "bfloat16"]
    assert command("LlamaForSequenceClassification", "LlamaForCausalLM") == plain
    assert command("LlamaForSequenceClassification", None) == plain
    assert command("Gemma3TextForSequenceClassification", "Gemma3ForCausalLM") == [
        *(*plain, "--convert", "classify", "--hf-overrides", '{"architectures": ["Gemma3ForCausalLM"]}')
    ]
