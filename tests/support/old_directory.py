"""A model directory as the first version of btrm wrote it, made from one of today's.

Compared key by key with a directory that the first version wrote: what it did not write is taken away, and what has
another name now has its old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NEW = ("files", "warnings")
NEW_IN_CONFIG = ("rope_theta", "torch_dtype", "attn_implementation")
NEW_SETTINGS = (
    "force_family",
    "data.group_by",
    "data.map",
    "data.own_prompts",
    "model.dropout",
    "output.best_by",
    "output.wait_for_room",
    "train.max_total_hours",
)
NEW_FIGURES = ("accuracy_interval", "brier", "ece", "longer_wins_tokens")


def as_the_first_version_wrote(directory: Path) -> None:
    """Rewrite a model directory's JSON files in place.

    Args:
        directory: a finished model; its weights and its tokenizer's own file stay as they are.
    """
    _edit(directory / "btrm.json", _manifest)
    _edit(directory / "config.json", lambda config: [config.pop(name, None) for name in NEW_IN_CONFIG])
    _edit(directory / "tokenizer_config.json", _tokenizer)


def _edit(path: Path, change: Any) -> None:
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _manifest(manifest: dict[str, Any]) -> None:
    for name in NEW:
        del manifest[name]
    for name in NEW_SETTINGS:
        del manifest["config"][name]
    manifest["evaluation"]["longer_wins"] = manifest["evaluation"]["longer_wins_tokens"]
    for name in NEW_FIGURES:
        del manifest["evaluation"][name]
    for part in manifest["evaluation"].get("subsets", []):
        del part["loss"]
    del manifest["data"]["rows"]["train"]["used"], manifest["training"]["finished"]
    for report in manifest["data"]["encoding"].values():
        report["shared_tokens"] = 0
        del report["groups"], report["pair_tokens"]


def _tokenizer(config: dict[str, Any]) -> None:
    config["backend"], config["tokenizer_class"] = "tokenizers", "TokenizersBackend"
    config["extra_special_tokens"] = config.pop("additional_special_tokens", [])
