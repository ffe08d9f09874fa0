"""Opens a finished reward model, from a directory or the hub, with transformers alone.

Decides what may be scored with: a checkpoint with a trained head of one output, whole safetensors weights, and a pad
token of its own; or adapters with such a head, whose base model is where they say. Code that comes with a checkpoint is
never run. No family is needed; an installed one is compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from btrm_core.chat import ChatFormat, free_pad, install_pad, settle
from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import CheckpointError, ConfigError, FamilyError, first_line
from btrm_core.families import PadToken
from btrm_core.files import digest
from btrm_core.model import adapters
from btrm_core.model import base as base_module
from btrm_core.model.directory import CALIBRATION, MANIFEST, read_manifest
from btrm_core.model.reward import keep_in_memory
from btrm_core.model.shape import check_ids
from btrm_core.settings import ModelConfig
from btrm_core.weights import check_config, check_files, no_decoder, refuse_other_head

_log = logging.getLogger("btrm")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "score.weight"
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2


def load_chat(directory: Path) -> ChatFormat:
    """Read the tokenizer and the template, after looking at the pad token.

    A model that btrm made must have a pad token of its own. For one of another trainer it is said where other programs
    would read its reward in another place; btrm reads it at the conversation's own last token, whatever the pad token.

    Args:
        directory: a model directory, of btrm or of another trainer.

    Raises:
        CheckpointError: something is missing; or btrm made the model and its pad token is the end-of-sequence token,
            or the configuration names another one than the tokenizer.
    """
    trouble = _pad_trouble(directory)
    own = (directory / MANIFEST).is_file()
    if trouble and own:
        raise CheckpointError(trouble)
    chat = chat_from_checkpoint(directory)
    config = saved_config(directory)
    check_ids(chat, config, str(directory))
    configured = config.get_text_config().pad_token_id
    if own and configured != chat.pad_id:
        raise CheckpointError(
            f"{directory}: pad_token_id in config.json is {configured}, but the tokenizer pads with {chat.pad_id}; "
            "expected the same number, or other programs read rewards that depend on the batch"
        )
    if trouble:
        _log.warning("%s; btrm reads it at the last token of the conversation", trouble.partition("; expected")[0])
    return chat


def _pad_trouble(directory: Path) -> str:
    """What is wrong with the pad token that a tokenizer's configuration names; empty if nothing is."""
    file = directory / "tokenizer_config.json"
    named = _json(file) if file.is_file() else {}
    pad, eos = (_token(named.get(key)) for key in ("pad_token", "eos_token"))
    if pad is None and not (directory / MANIFEST).is_file() and named:
        return f"{directory}: the tokenizer names no pad token, by which other programs find the reward"
    if pad is None or pad != eos:
        return ""
    return (
        f"{directory}: the pad token {pad!r} is the end-of-sequence token, so other programs would read the "
        "reward in another place; expected a pad token of its own in tokenizer_config.json and config.json"
    )


def saved_config(directory: Path) -> Any:
    """The transformers configuration.

    Args:
        directory: a model directory; only `config.json` is read.

    Raises:
        CheckpointError: transformers cannot read it without running code of the checkpoint's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError: depends on what is wrong with the file
        why = "its own code would have to run" if "trust_remote_code" in str(error) else first_line(error)
        raise CheckpointError(f"{directory}: the configuration cannot be read: {why}") from error
    if not is_adapters(directory):  # theirs says how their base model is packed
        check_config(config, str(directory))
    return config


def check_head(directory: Path) -> None:
    """Refuse a directory whose weights hold no reward head of one output, before any weight is read.

    Args:
        directory: a model directory, of whole weights or of adapters.

    Raises:
        CheckpointError: says what is missing.
    """
    check_files(directory)
    if not is_adapters(directory):
        refuse_other_head(directory)
    if (adapters.PREFIX if is_adapters(directory) else "") + HEAD not in weight_names(directory):
        raise no_decoder(directory) or CheckpointError(
            f"{directory} holds no reward head ({HEAD} is missing from its weights); expected a model trained by "
            f"`btrm train`, such as one made with --model {directory}"
        )
    if (labels := saved_config(directory).num_labels) != 1:
        raise CheckpointError(f"{directory} is a classifier of {labels} labels; expected a reward model, with one")


def is_adapters(directory: Path) -> bool:
    """True if a model directory holds adapters and a head, without the base model's weights.

    Args:
        directory: a model directory; it may be missing.
    """
    return (directory / adapters.SETTINGS).is_file()


def weight_names(directory: Path) -> set[str]:
    """The names of all tensors in the safetensors files.

    Args:
        directory: a model directory; of its weights, only the index or a header is read.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    from safetensors import SafetensorError, safe_open

    if (directory / INDEX).is_file():
        return set(_json(directory / INDEX).get("weight_map", {}))
    path = directory / (adapters.WEIGHTS if is_adapters(directory) else WEIGHTS)
    if not path.is_file():
        expected = path.name if is_adapters(directory) else f"{WEIGHTS} or {INDEX}"
        raise CheckpointError(f"{directory} has no weights in safetensors form; expected {expected}")
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def load_weights(directory: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    """Load the sequence-classification model onto a device, in evaluation mode; no weight may be missing.

    Adapters stay beside the weights of their base model, as they were trained.

    Args:
        directory: a model directory that `check_head` lets through.
        dtype: a torch type, or "auto" for the one the weights are saved in.
        device: where it computes.

    Raises:
        CheckpointError: transformers has no such model, or weights are missing, damaged or of another shape; or the
            base model of adapters is not where they say.
        ConfigError: the device has not enough memory, or a library is missing.
    """
    hf = _with_adapters(directory, dtype) if is_adapters(directory) else _whole(directory, dtype)
    try:
        return keep_in_memory(hf.requires_grad_(False).eval().to(device), device)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(f"{directory} does not fit into the memory of {device}; try --dtype bf16") from error


def _whole(directory: Path, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        with LongWork(f"loading {directory}"), quiet_libraries():
            hf, info = AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many types
        raise CheckpointError(f"{directory} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"the weights of {directory} are incomplete: {some} missing; copy the directory anew")
    if not isinstance(getattr(hf, "score", None), nn.Linear):
        raise CheckpointError(f"{directory}: {type(hf).__name__} has no linear head called `score`, which btrm reads")
    return hf


def _with_adapters(directory: Path, dtype: torch.dtype | str) -> Any:
    """The base model, set up and packed as it was for training, wrapped with adapters and head."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ConfigError(f"{directory} holds adapters, which need peft; {adapters.INSTALL}") from error
    described, made, config = (
        _json(directory / adapters.SETTINGS),
        read_manifest(directory),
        saved_config(directory),
    )
    type_ = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    base = ModelConfig(
        name=described.get("base_model_name_or_path"),
        revision=described.get("revision"),
        quantize=made.get("config", {}).get("model.quantize", "none"),
    )
    with LongWork(f"loading {directory}"), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hf = base_module.load_base(base, type_).hf
        except (CheckpointError, ConfigError) as error:
            raise type(error)(
                f"{directory} holds adapters, and their base model cannot be loaded: {error}. "
                f"{adapters.SETTINGS} says where it is (base_model_name_or_path, revision)"
            ) from error
        text = config.get_text_config()
        base_module.set_reward_config(hf, text.pad_token_id)
        if text.vocab_size > hf.get_input_embeddings().num_embeddings:
            hf.resize_token_embeddings(text.vocab_size, mean_resizing=False)
        try:
            wrapped = PeftModel.from_pretrained(hf, directory, torch_device="cpu")
        except Exception as error:  # peft and safetensors raise many types
            raise CheckpointError(f"the adapters in {directory} do not fit {base.name}: {first_line(error)}") from error
    if missing := sorted(
        set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)) - weight_names(directory)
    ):
        raise CheckpointError(
            f"the weights of {directory} are incomplete: {missing[0]} missing; copy the directory anew"
        )
    for parameter in wrapped.parameters():
        if parameter.is_floating_point():  # peft keeps adapters in fp32, training does not
            parameter.data = parameter.data.to(type_)
    return wrapped


def identity(directory: Path, chat: ChatFormat, hf: Any, dtype: torch.dtype) -> str:
    """A SHA-256 that changes when the rewards may: configuration, template, training run, head, compute type.

    Args:
        directory: the model directory; of whole weights the file of weights itself is not read, only the head below.
        chat: its chat format.
        hf: its loaded model, for the head.
        dtype: what it computes in.
    """
    files = [directory / name for name in ("config.json", "tokenizer.json", adapters.SETTINGS, adapters.WEIGHTS)]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files]
    made = {key: value for key, value in read_manifest(directory).items() if key != CALIBRATION}
    head = hf.score.weight.detach().float().cpu().numpy().tobytes()
    return digest(contents, made, chat.template_sha256, chat.max_length, hashlib.sha256(head).hexdigest(), str(dtype))


def tolerance(manifest: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The largest difference of a self-test reward that rounding explains, for a model that computes in `dtype`.

    It is larger where the reward was or is computed in half precision, and relative where rewards exceed 1.

    Args:
        manifest: content of `btrm.json`, with the type and the self-test of training.
        dtype: what the model computes in now.
    """
    half = manifest.get("dtype") == "bfloat16" or dtype.itemsize == 2
    rewards = [abs(float(vector["reward"])) for vector in manifest.get("self_test", ())]
    return max(1.0, *rewards, 0.0) * (HALF_TOLERANCE if half else TOLERANCE)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str | None:
    """A token as `tokenizer_config.json` writes it: text, or an object with the text in it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def chat_from_checkpoint(directory: str | Path) -> ChatFormat:
    """Read from a trained model's directory how its conversations become ids; needs no family.

    Args:
        directory: holds the tokenizer's files, `chat_template.jinja` and, if btrm wrote it, `btrm.json`, whose
            `template_sha256`, `terminal_token` and `max_length` are honoured.

    Raises:
        CheckpointError: something is missing, or is not what the model was trained with.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"{directory} holds no tokenizer, expected a model directory written by `btrm train`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError, and whatever the parsers raise
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded ({first_line(error)})") from error
    file = directory / "chat_template.jinja"
    template = file.read_bytes().decode("utf-8") if file.is_file() else tokenizer.chat_template
    if not isinstance(template, str):
        raise CheckpointError(f"{directory} has no chat template, expected the text in {file.name}; put it there")
    own = (directory / MANIFEST).is_file()
    if own and tokenizer.pad_token is None:
        raise CheckpointError(
            f"{directory}: the tokenizer names no pad token, expected pad_token in tokenizer_config.json"
        )
    # Nothing reads a pad token's hidden state: for a model of another trainer any free token will do.
    pad = PadToken(tokenizer.pad_token, reason="the checkpoint's own") if own else free_pad(tokenizer, template)
    try:
        install_pad(tokenizer, pad, "checkpoint")
        answers = dict.fromkeys(("setup_tokenizer", "pad_token", "chat_template"), "checkpoint")
        trained = "family" in read_manifest(directory)  # an export of another trainer's model has none
        chat = settle(tokenizer, template, pad, 0, answers, any_end=not trained)
    except FamilyError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if pad.new:  # the model has no embedding for it
        chat = replace(chat, pad_id=chat.terminal_id)
    return _honour_manifest(chat, directory / "btrm.json")


def _honour_manifest(chat: ChatFormat, file: Path) -> ChatFormat:
    """Compare a format with what `btrm.json` says about the training, and take over the maximum length."""
    if not file.is_file():
        return chat
    manifest = read_manifest(file.parent)
    trained = {"template_sha256": chat.template_sha256, "terminal_token": chat.terminal_token}
    for key, found in trained.items():
        if manifest.get(key, found) != found:
            raise CheckpointError(
                f"{file.parent}: {key} is {found!r}, but the model was trained with {manifest[key]!r} ({file.name}); "
                "put the original tokenizer and chat template back"
            )
    return replace(chat, max_length=manifest.get("max_length"))
