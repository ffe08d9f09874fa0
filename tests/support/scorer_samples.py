"""Small finished reward models that the scoring tests share, made without training, and the reference for rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from btrm_core import families
from btrm_core.chat.format import ChatFormat, Conversation, prepare_chat
from btrm_core.families.hookspecs import TinyShape
from btrm_core.model.attention import uses_softcap
from btrm_core.model.base import base_config, init_head, load_base, load_tokenizer, set_reward_config
from btrm_core.model.directory import write_model
from btrm_core.model.toy import SHAPE, build_toy
from btrm_core.settings import ModelConfig

FAMILIES = ("gemma", "gemma2", "gemma3", "llama3", "mistral", "qwen3")
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}

PROMPT: Conversation = [
    {"role": "user", "content": "Is tea hot?"},
    {"role": "assistant", "content": "Often, yes."},
    {"role": "user", "content": "And what is the capital of France?"},
]
RESPONSES = ["Paris.", "I am not going to tell you that.", "Paris is the capital, and Lyon is another city.", "Paris!"]


def say(text: str, answer: str) -> Conversation:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [
    say("What is 2 + 2?", "4"),
    [*PROMPT, {"role": "assistant", "content": RESPONSES[0]}],
    say("Name a planet, please. " * 8, "Mars is a planet."),
    [*PROMPT, {"role": "assistant", "content": RESPONSES[2]}],
    [{"role": "system", "content": "Answer in one word."}, *say("Is ice cold?", "Yes")],
]


def base_model(directory: Path, family: str, **shape: Any) -> Path:
    """A tiny causal language model whose tokenizer, like real ones, puts a BOS before any text of its own accord."""
    tiny = _tiny(family)
    build_toy(tiny, directory, **{**SMALL, **shape})
    _enlarge(directory, {**SMALL, **shape}["hidden_size"])
    file = directory / "tokenizer.json"
    backend, bos = Tokenizer.from_file(str(file)), tiny.special_tokens.get("bos_token")
    if bos is None:  # neither do those real ones
        return directory
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.save(str(file))
    return directory


def real_tokenizer_base(directory: Path, family: str, tokenizer: Path) -> Path:
    """A tiny causal language model over the vocabulary of a real tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny, real = _tiny(family), AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(tiny.model_type, vocab_size=len(real), **{**SHAPE, **SMALL, **tiny.config})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    real.save_pretrained(directory)
    _enlarge(directory, SMALL["hidden_size"])
    return directory


def _tiny(family: str) -> TinyShape:
    tiny = families.load(family).recipe().tiny
    assert tiny is not None
    return tiny


def _enlarge(directory: Path, width: int) -> None:
    """Make the weights large enough for every token to matter to a reward, at any width as much."""
    factor = 12 * (SMALL["hidden_size"] / width) ** 0.5
    weights = load_file(directory / "model.safetensors")
    large = {name: factor * weight if weight.dim() == 2 else weight for name, weight in weights.items()}
    save_file(large, directory / "model.safetensors", {"format": "pt"})


def reward_model(directory: Path, family: str = "llama3", *, max_length: int = 256, **shape: Any) -> Path:
    """A finished model directory."""
    base = base_model(directory.with_name(directory.name + "-base"), family, **shape)
    return finished(base, directory, family, max_length)


def finished(base: Path, directory: Path, family: str, max_length: int = 256) -> Path:
    """A finished model directory made of a base model and a new head."""
    settings, plugin = ModelConfig(name=str(base)), families.load(family)
    chat = prepare_chat(load_tokenizer(settings), base_config(settings), plugin)
    hf = load_base(settings, torch.float32).hf.eval()
    if uses_softcap(hf.config):  # before 5.21 transformers chooses an attention that drops the cap
        hf.set_attn_implementation("eager")
    set_reward_config(hf, chat.pad_id)
    init_head(hf, plugin.init_head(hf.config.hidden_size), seed=0)
    made = {
        "family": family,
        "origin": plugin.origin,
        "template_sha256": chat.template_sha256,
        "terminal_token": chat.terminal_token,
        "max_length": max_length,
        "answers": chat.answers,
        "self_test": [{"input_ids": ids, "reward": own_reward(hf, ids)} for ids in chat.encode(CONVERSATIONS[:4])],
    }
    write_model(directory, hf, hf.state_dict(), chat, made, "# A model")
    return directory


@torch.no_grad()
def own_reward(hf: Any, ids: Sequence[int]) -> float:
    """The reward that transformers itself gives one sequence, unpadded."""
    return float(hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, 0])


def reference(directory: Path, chat: ChatFormat, conversations: Sequence[Conversation]) -> list[float]:
    """Rewards of conversations, each alone, by transformers alone with eager attention."""
    from transformers import AutoModelForSequenceClassification

    hf = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return [own_reward(hf, ids) for ids in chat.encode(conversations)]


def change_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        content[key] = value
        if value is None:
            del content[key]
    file.write_text(json.dumps(content))
