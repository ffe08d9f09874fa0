"""The finished model's directory: written whole or not at all, and complete without btrm.

Decides: which files there are, what `btrm.json` says, and that no reader ever sees half a model. A directory is written
beside its place, flushed to disk and renamed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btrm_core.adapters import save_adapters
from btrm_core.chat import ChatFormat
from btrm_core.errors import CheckpointError

MANIFEST = "btrm.json"
SHARD_SIZE = "5GB"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's fcntl.h: paths as the process sees them, and both change places."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = (*(f"(os error {number})" for number in FULL), "No space left", "enforce fail at inline_container.cc")


def is_finished(directory: Path) -> bool:
    """True if `directory` holds a finished model (`btrm.json` is the last file that is written)."""
    return (directory / MANIFEST).exists()


def refuse_overwrite(directory: Path, overwrite: bool) -> None:
    """Raise unless `directory` is free, or may be replaced.

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


def save_model(
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
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        staging.chmod(0o755)
        if hasattr(hf, "get_base_model"):
            save_adapters(hf, staging, state_dict, whole_embedding=chat.num_new_tokens > 0)
        else:
            hf.save_pretrained(staging, state_dict=dict(state_dict), max_shard_size=SHARD_SIZE)
        _save_tokenizer(chat, manifest.get("max_length"), staging)
        (staging / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")
        publish(staging, directory)
    except Exception as error:
        raise explained(error, directory) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_tokenizer(chat: ChatFormat, max_length: int | None, directory: Path) -> None:
    """Save the tokenizer with the sides it is used with, which `save_pretrained` alone forgets."""
    tokenizer = chat.tokenizer
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    tokenizer.init_kwargs.update(sides)
    if max_length:
        tokenizer.model_max_length = max_length
        tokenizer.init_kwargs["model_max_length"] = max_length
    tokenizer.save_pretrained(directory)


def publish(staging: Path, target: Path) -> None:
    """Flush a finished directory to disk and rename it to its place, in exchange for what is there if that can be."""
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # safetensors leaves its files readable by their owner alone
            _fsync(path)
    _fsync(staging)
    if target.exists():
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
        if exchange(staging, target):
            staging.rename(aside / target.name)
        else:
            target.rename(aside / target.name)
            staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        staging.rename(target)
    _fsync(target.parent)


def exchange(left: Path, right: Path) -> bool:
    """Let two directories change places in one step, so that neither is ever missing; False where that cannot be done.

    Python has no function for it, Linux has `renameat2`; some file systems (NFS) do not.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    here = AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right)
    return int(renameat2(*here, RENAME_EXCHANGE)) == 0


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of `btrm.json`, or an empty mapping if the directory has none (another trainer's model).

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


def model_directory(path: str) -> Path:
    """The model directory a user means: the path itself, or `model/` in a run's output directory.

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


def explained(error: Exception, directory: Path) -> Exception:
    """Disk errors as one line; anything else as it is."""
    if disk_is_full(error):
        return CheckpointError(f"the disk is full while saving {directory}; nothing was left behind. Free some space")
    if isinstance(error, OSError) or "os error" in str(error):
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        return CheckpointError(f"cannot write {directory}: {reason}; nothing was left behind")
    return error


def disk_is_full(error: Exception) -> bool:
    """True if there is no more room, or no more is allowed; safetensors and torch say so in words of their own."""
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXTS)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
