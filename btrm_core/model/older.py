"""What older versions of transformers look for in a model directory and the newest says otherwise, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ROPE_ELSEWHERE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
"""Keys of `rope_parameters` that 4.x keeps beside `rope_scaling`, or writes of itself."""
CHOSEN = "attn_implementation"
"""Key of the attention that a model is loaded with; transformers reads it and never writes it."""
_SESSION = ("is_local", "local_files_only", "backend")
"""Keys that say how the tokenizer was loaded this time, which is nobody else's concern."""


def write_for_older_readers(directory: Path) -> None:
    """Add to `config.json` and `tokenizer_config.json` of a directory what older versions of transformers look for.

    transformers 5 moved the rotary base and its scaling into `rope_parameters`, renamed `torch_dtype`, and gave the
    generic fast tokenizer another name. A 4.x that does not know these takes its defaults without a word, and with a
    rotary base of 10000 every reward is another one. Both ways of saying it stand side by side; they say the same.
    Before 5.21 transformers chose an attention for Gemma 2 that drops the cap on its scores; from 5.4 on it takes the
    one that the configuration names.

    Args:
        directory: A model directory that is still being written; a file that is not there is passed over.
    """
    config, tokenizer = directory / "config.json", directory / "tokenizer_config.json"
    if config.is_file():
        _rewrite(config, _older_config)
    if tokenizer.is_file():
        _rewrite(tokenizer, _older_tokenizer)


def _rewrite(file: Path, change: Any) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(change(values), indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _older_config(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config and of the configs in it, with the names of 4.x beside those of 5.x."""
    made = {
        key: _older_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in values.items()
    }
    inner = [value for value in made.values() if isinstance(value, dict)]
    if made.get("attn_logit_softcapping") is not None or any(CHOSEN in value for value in inner):
        made[CHOSEN] = "eager"
    if "dtype" in made:
        made["torch_dtype"] = made["dtype"]
    for older, name in _renamed(made.get("model_type")).items():
        if "experts" in older and name in made:  # Qwen 3 MoE: a 4.x would take its default number of experts
            made.setdefault(older, made[name])
    parameters = made.get("rope_parameters")
    if not isinstance(parameters, dict):
        return made
    whole = parameters.get("full_attention")
    local = parameters.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        made["rope_local_base_freq"] = local["rope_theta"]
    return {**made, **_rope(whole if isinstance(whole, dict) else parameters)}


def _renamed(model_type: Any) -> dict[str, str]:
    """Other names of settings of a configuration -> the names that this transformers writes them under."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = model_type in CONFIG_MAPPING
    return dict(getattr(CONFIG_MAPPING[model_type], "attribute_map", {})) if known else {}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """One set of rotary parameters as 4.x spells it."""
    made: dict[str, Any] = {
        key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
    }
    kind = parameters.get("rope_type", "default")
    rest = {key: value for key, value in parameters.items() if key not in _ROPE_ELSEWHERE and value is not None}
    if kind == "longrope":  # it takes these three keys and no other
        made |= {"original_max_position_embeddings": rest.get("original_max_position_embeddings")}
        rest = {key: rest[key] for key in ("short_factor", "long_factor") if key in rest}
        made["rope_scaling"] = {"type": kind, **rest}
    else:
        made["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rest}
    return {key: value for key, value in made.items() if value is not None or key == "rope_scaling"}


def _older_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings under names that both versions know."""
    made = {key: value for key, value in values.items() if key not in _SESSION}
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = made.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # 4.x knows a mapping under this name
        made["additional_special_tokens"] = extra
    elif extra is not None:
        made["extra_special_tokens"] = extra
    return made
