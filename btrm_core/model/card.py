"""What a finished model says about itself: `btrm.json` and the model card."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from btrm_core import families
from btrm_core.chat import ChatFormat
from btrm_core.config import flat
from btrm_core.errors import FamilyError
from btrm_core.families import Family
from btrm_core.files import text_sha256
from btrm_core.settings import RunConfig

CARD = """---
library_name: transformers
pipeline_tag: text-classification
base_model: {base}
tags: [reward-model, bradley-terry, btrm]
---

# Reward model of the {family} family

Trained with btrm {version} on pairs of a chosen and a rejected conversation, with the Bradley-Terry loss
`-log sigmoid(r_chosen - r_rejected)`. It reads a conversation and returns one number, the reward, at the terminal token
`{terminal}`.

| held-out evaluation | |
|---|---|
{figures}

```python
{code}
```

The chat template writes every control token itself, the first one included. Text that went through it is therefore
tokenised with `add_special_tokens=False`: many tokenizers would put a second BOS before it, and the reward would be
another one. The directory is read by transformers 4 (from 4.57) and 5.{attention}

Base model: `{base}`. Longest conversation: {max_length} tokens. All settings, the data's fingerprint and self-test
vectors are in `btrm.json`.
"""


SOFTCAP = """
Attention is soft-capped in this architecture: with transformers 4, load it with `attn_implementation="eager"`, or the
cap is dropped without a word."""


CHAT = """chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
"""


PIPELINE = (
    """from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}")
reward = pipeline("text-classification", model="{name}", tokenizer=tokenizer)
"""
    + CHAT
    + """print(reward([text], top_k=None, function_to_apply="none", add_special_tokens=False)[0][0]["score"])"""
)


ADAPTERS = (
    """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

# adapters: the base model is loaded from where adapter_config.json says
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoPeftModelForSequenceClassification.from_pretrained("{name}", num_labels=1{options}).eval()
"""
    + CHAT
    + """print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())"""
)


FOUR_BITS = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}",
    llm_int8_skip_modules=["score"],
)"""


@dataclass(frozen=True)
class Trained:
    """What a run alone knows of the model that it has trained, as JSON values.

    Attributes:
        data: Report on the data.
        evaluation: Figures on held-out pairs; None if there are none.
        training: Steps, seconds, how it was computed.
        self_test: Conversations as ids, with the rewards that any reader must reproduce.
        dtype: Compute type, such as "bfloat16".
        base_commit: Of the base model, if it came from the hub.
        adapters: How they are saved; None without adapters.
    """

    data: dict[str, Any]
    evaluation: dict[str, Any] | None
    training: dict[str, Any]
    self_test: list[dict[str, Any]]
    dtype: str
    base_commit: str | None
    adapters: dict[str, Any] | None


def run_manifest(config: RunConfig, family: Family, chat: ChatFormat, trained: Trained) -> dict[str, Any]:
    """The content of `btrm.json`: enough to score, to check, and to train again.

    Args:
        config: The run's settings, resolved.
        family: Who answered.
        chat: How conversations became ids.
        trained: What came of it.
    """
    return {
        "btrm_version": metadata.version("btrm"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "family": family.name,
        "origin": family.origin,
        "warnings": [family.warning] if family.warning else [],
        "base_model": config.model.name,
        "base_revision": config.model.revision,
        "template_sha256": chat.template_sha256,
        "terminal_token": chat.terminal_token,
        "terminal_token_id": chat.terminal_id,
        "pad_token": chat.pad.token,
        "pad_token_id": chat.pad_id,
        "answers": chat.answers,
        "max_length": config.data.max_length,
        "dtype": trained.dtype,
        "loss": "bradley-terry",
        "data": trained.data,
        "evaluation": trained.evaluation,
        "training": trained.training,
        "config": {key: list(v) if isinstance(v, tuple) else v for key, v in flat(config).items()},
        "self_test": trained.self_test,
        "base_commit": trained.base_commit,
        "adapters": trained.adapters,
    }


def model_card(made: dict[str, Any], directory: Path, *, softcap: bool = False) -> str:
    """The model card (`README.md`) for a manifest.

    Args:
        made: the content of `btrm.json`.
        directory: where the model will be; its name stands in the code.
        softcap: whether the attention is soft-capped.
    """
    evaluation = made["evaluation"] or {}
    rows = [f"| {key.replace('_', ' ')} | {_short(value)} |" for key, value in evaluation.items() if _is_number(value)]
    if interval := evaluation.get("accuracy_interval"):
        rows.insert(0, f"| accuracy, 95 % interval | {interval[0]:.4f} to {interval[1]:.4f} |")
    base = str(made["base_model"])
    return CARD.format(
        attention=SOFTCAP if softcap else "",
        code=_code(made, directory.name),
        base=Path(base).name if Path(base).exists() else base,
        family=made["family"],
        version=made["btrm_version"],
        terminal=made["terminal_token"],
        figures="\n".join(rows) or "| none | |",
        max_length=made["max_length"],
    )


def _code(made: dict[str, Any], name: str) -> str:
    """How a program without btrm gets a reward."""
    if (made.get("adapters") or {"merged": True})["merged"]:
        return PIPELINE.replace("{name}", name)
    code, options = ADAPTERS.replace("{name}", name), ""
    if made["config"]["model.quantize"] != "none":
        options = FOUR_BITS.replace("{dtype}", made["dtype"])
        code = code.replace("import AutoTokenizer", "import AutoTokenizer, BitsAndBytesConfig")
    return code.replace("{options}", options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def template_difference(manifest: Mapping[str, Any], chat: ChatFormat) -> str | None:
    """Say so if the family that trained a model is installed and now writes its conversations differently.

    None as well if the family is not installed or broken, or if the run brought its own template.

    Args:
        manifest: Content of `btrm.json`.
        chat: The model's own chat format.
    """
    name = manifest.get("family")
    if name is None or manifest.get("answers", {}).get("chat_template") == "run settings":
        return None
    try:
        family = families.load(str(name))
        template = family.chat_template(chat.tokenizer)
    except FamilyError:
        return None
    if text_sha256(template) == chat.template_sha256:
        return None
    return (
        f"the installed family '{name}' ({family.origin}) has another chat template than the one this model was "
        f"trained with ({manifest.get('origin', 'unknown origin')}); the model's own is used"
    )
