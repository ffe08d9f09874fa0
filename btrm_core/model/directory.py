"""The finished model's directory: written whole or not at all, and complete without btrm.

Decides: which files there are, what `btrm.json` says, and that no reader ever sees half a model. A directory is written
beside its place, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btrm_core.chat import ChatFormat
from btrm_core.errors import CheckpointError, first_line
from btrm_core.files import explained, whole_directory
from btrm_core.hub import hub_problem
from btrm_core.model.adapters import save_adapters
from btrm_core.outputs import whole_file

MANIFEST = "btrm.json"
CALIBRATION = "calibration"
"""The key of `btrm.json` that an evaluation writes."""


SHARD_SIZE = "5GB"


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


_NOT_HUB_FILES = ["*/*", "consolidated*"]  # the same weights again, in other forms


def is_finished(directory: Path) -> bool:
    """True if `directory` holds a finished model (`btrm.json` is the last file that is written).

    Args:
        directory: The model directory itself, not the run's output directory above it; it may be missing.
    """
    return (directory / MANIFEST).exists()


def refuse_overwrite(directory: Path, overwrite: bool) -> None:
    """Raise unless `directory` is free, or may be replaced.

    Args:
        directory: Where a model is to be written; missing or empty is free.
        overwrite: Allows replacing a finished model; what btrm did not write is never replaced.

    Raises:
        CheckpointError: a finished model, or something that btrm did not write, is there.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not is_finished(directory):
        raise CheckpointError(f"{directory} exists and is no btrm model; choose another --output or remove it")
    if not overwrite:
        raise CheckpointError(
            f"{directory} already holds a finished model; choose another --output, or replace it with --overwrite"
        )


def write_model(
    directory: Path, hf: Any, state_dict: Mapping[str, Any], chat: ChatFormat, manifest: Mapping[str, Any], card: str
) -> None:
    """Write a model directory atomically: weights, configuration, tokenizer, template, model card, `btrm.json`.

    Args:
        directory: Its final place; an older finished model there is replaced at the end.
        hf: The transformers model whose configuration and class are saved; of a peft model, the adapters.
        state_dict: Whole weights by the names transformers gives them.
        chat: Tokenizer and template.
        manifest: Content of `btrm.json`.
        card: Content of `README.md`.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing half-written is left.
    """
    try:
        with whole_directory(directory) as staging:
            if hasattr(hf, "get_base_model"):
                save_adapters(hf, staging, state_dict, whole_embedding=chat.num_new_tokens > 0)
            else:
                hf.save_pretrained(staging, state_dict=dict(state_dict), max_shard_size=SHARD_SIZE)
            _save_tokenizer(chat, manifest.get("max_length"), staging)
            write_for_older_readers(staging)
            (staging / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
            (staging / "README.md").write_text(card, encoding="utf-8")
            files = {file.name: sha256_of(file) for file in sorted(staging.iterdir()) if file.name != "README.md"}
            text = json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False)
            (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except Exception as error:
        raise explained(error, directory) from error


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content; `btrm.json` holds those of all files that rewards depend on.

    Args:
        file: Read in pieces, so it may be larger than the memory.

    Returns:
        64 hexadecimal digits.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save_tokenizer(chat: ChatFormat, max_length: int | None, directory: Path) -> None:
    """Save the tokenizer with the sides it is used with, which `save_pretrained` alone forgets."""
    tokenizer = chat.tokenizer
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    tokenizer.init_kwargs.update(sides)
    if max_length:
        tokenizer.model_max_length = max_length
        tokenizer.init_kwargs["model_max_length"] = max_length
    tokenizer.save_pretrained(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of `btrm.json`, or an empty mapping if the directory has none (another trainer's model).

    Args:
        directory: A model directory.

    Raises:
        CheckpointError: the file is not valid JSON.
    """
    path = directory / MANIFEST
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the model directory is damaged") from error
    return dict(value)


def calibration_of(manifest: Mapping[str, Any]) -> tuple[float | None, float | None, float]:
    """What an evaluation measured of a model's rewards, as `write_calibration` keeps it.

    Args:
        manifest: Content of `btrm.json`.

    Returns:
        Mean and standard deviation of the rewards of a reference set, both None where one is missing or makes no sense;
        and the temperature by which a difference of rewards is divided before the sigmoid, 1 if nobody fitted one.
    """
    found = manifest.get(CALIBRATION)
    known = found if isinstance(found, dict) else {}
    mean, std, temperature = (_number(known.get(key)) for key in ("mean", "std", "temperature"))
    if mean is None or std is None or std <= 0:
        mean = std = None
    return mean, std, temperature if temperature is not None and temperature > 0 else 1.0


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def reward_scale(manifest: Mapping[str, Any], directory: Path) -> tuple[float, float]:
    """Mean and standard deviation of the rewards of the set that a model was calibrated on.

    Args:
        manifest: Content of `btrm.json`.
        directory: Where it is from, for the error.

    Raises:
        CheckpointError: nobody measured them.
    """
    mean, std, _ = calibration_of(manifest)
    if mean is None or std is None:
        raise CheckpointError(
            f"{directory}/{MANIFEST} holds no mean and standard deviation (calibration); measure them with "
            f"`btrm eval {directory} --data SRC --save-calibration`, or leave normalize out"
        )
    return mean, std


def write_calibration(directory: Path, values: Mapping[str, Any]) -> None:
    """Put what an evaluation measured into `btrm.json`, whole or not at all; the weights are never touched.

    Args:
        directory: A model directory that btrm wrote.
        values: `temperature`, `mean` and `std`, and what they were measured on, as JSON values.

    Raises:
        CheckpointError: there is no `btrm.json`, or it cannot be written.
    """
    manifest = read_manifest(directory)
    if not manifest:
        raise CheckpointError(
            f"{directory} holds no {MANIFEST}, in which a calibration is kept; expected a model written by `btrm train`"
        )
    text = json.dumps({**manifest, CALIBRATION: dict(values)}, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        with whole_file(str(directory / MANIFEST)) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise explained(error, directory) from error


def model_directory(path: str) -> Path:
    """The model directory a user means: the path itself, or `model/` in a run's output directory.

    Args:
        path: What the user typed; a directory counts as a model if it holds `config.json`.

    Raises:
        CheckpointError: neither is there.
    """
    base = Path(path)
    for candidate in (base, base / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if base.is_dir():
        raise CheckpointError(f"{path} holds no model: neither {path}/config.json nor {path}/model/config.json exists")
    raise CheckpointError(f"there is no model directory {path}")


def find_model(name: str) -> Path:
    """Return the model directory that a user means: a path, a run's output directory, or a hub id (downloaded).

    Args:
        name: What exists on this machine is taken as a path first; only then may it be a hub id, OWNER/NAME.

    Returns:
        A directory on this machine, of a hub model the snapshot in the hub's cache.

    Raises:
        CheckpointError: there is no such directory, and no such model on the hub or in its cache.
    """
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        return model_directory(name)
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES)
        return model_directory(found)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises types of several libraries
        raise CheckpointError(
            hub_problem(error, name)
            or f"there is no model directory {name}, and the Hugging Face hub does not give it: {first_line(error)}"
        ) from error


_ROPE_ELSEWHERE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
"""Keys of `rope_parameters` that 4.x keeps beside `rope_scaling`, or writes of itself."""
_SESSION = ("is_local", "local_files_only", "backend")
"""Keys that say how the tokenizer was loaded this time, which is nobody else's concern."""


def write_for_older_readers(directory: Path) -> None:
    """Add to `config.json` and `tokenizer_config.json` of a directory what transformers 4.x looks for.

    transformers 5 moved the rotary base and its scaling into `rope_parameters`, renamed `torch_dtype`, and gave the
    generic fast tokenizer another name. A 4.x that does not know these takes its defaults without a word, and with a
    rotary base of 10000 every reward is another one. Both ways of saying it stand side by side; they say the same.

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
