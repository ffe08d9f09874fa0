"""Whether the files of a checkpoint are what they seem, looked at before anything is loaded.

Decides which directories are refused because their weights are no weights (a pointer of Git LFS, half a download, an
index without its files), are packed by somebody else's quantisation, or hold a trained head that nothing would read.
Only headers are read: the look costs milliseconds for a model of any size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from btrm_core.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "score.weight"
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_HEADER = 100_000_000
_OTHER_HEAD = re.compile(
    r"(^|\.)(v_head|value_head|reward_head|rm_head|regression_head|classifier|classification_head|score_head|rw_head)\."
)
_HEAD_FILES = ("value_head.safetensors", "value_head.bin", "v_head.safetensors", "v_head.bin")
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of the files besides weights that a tokenizer or a configuration is read from."""
_AGAIN = "download or copy it anew"


def check_config(config: Any, name: str) -> None:
    """Refuse a checkpoint whose weights are quantised: they cannot be trained, nor scored with as they stand.

    Args:
        config: The checkpoint's transformers configuration.
        name: The checkpoint, for the error.

    Raises:
        CheckpointError: names the method.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not settings:
        return
    given = settings if isinstance(settings, dict) else settings.to_dict()
    method = given.get("quant_method") or next((k for k in ("load_in_4bit", "load_in_8bit") if given.get(k)), "unknown")
    method = str(getattr(method, "value", method))
    raise CheckpointError(
        f"the weights of {name} are quantised ({method}); expected whole weights (bf16, fp16 or fp32): name the model "
        "that it was made from; --quantize 4bit packs one while it is loaded"
    )


def check_files(directory: Path) -> None:
    """Look at every weight file of a directory, and at the index if there is one.

    Args:
        directory: The checkpoint; one without `model.safetensors` and index passes, unless a file that is read is a pointer.

    Raises:
        CheckpointError: one is missing, no weights at all, or cut off; it says which.
    """
    for file in sorted(file for file in directory.iterdir() if file.suffix in _SMALL and file.is_file()):
        with file.open("rb") as stream:
            _refuse_pointer(file, stream.read(len(_POINTER)))
    index = directory / INDEX
    if not index.is_file():
        if (directory / WEIGHTS).exists():
            tensors_of(directory / WEIGHTS)
        return
    for name, tensors in sorted(_shards(index).items()):
        file = directory / name
        if not file.exists():
            raise CheckpointError(f"{directory} lacks {name}, which {INDEX} names; {_AGAIN}")
        lost = sorted(tensors - set(tensors_of(file)))
        if lost:
            raise CheckpointError(f"{file} lacks {lost[0]}, which {INDEX} says it holds; {_AGAIN}")


def tensors_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Args:
        file: Of it, only the header is read.

    Reference: https://github.com/huggingface/safetensors#format

    Raises:
        CheckpointError: the file is a pointer, is cut off, or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
            _refuse_pointer(file, start)
            length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            header = stream.read(min(length, _LONGEST_HEADER, size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if size < 8 or (length > size - 8 and header[:1] in (b"{", b"")):
        raise CheckpointError(f"{file} is cut off after {size:,} bytes; {_AGAIN}")
    try:
        entries = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in entries.values()), default=0)
        shapes = {key: tuple(value["shape"]) for key, value in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: it is no safetensors file; {_AGAIN}") from error
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is cut off: it has {size:,} of {8 + length + end:,} bytes; {_AGAIN}")
    return shapes


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start == _POINTER:
        raise CheckpointError(
            f"{file} is a pointer of Git LFS in place of the file itself; fetch it with `git lfs pull` in {file.parent}"
        )


def _shards(index: Path) -> dict[str, set[str]]:
    """File -> the tensors that the index says it holds."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, set[str]] = {}
        for tensor, name in places.items():
            if Path(name).name != name:
                raise CheckpointError(f"{index} names a file outside its directory ({name!r}); {_AGAIN}")
            found.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is broken: expected JSON with a weight_map of tensors to files; {_AGAIN}"
        ) from error
    if not found:
        raise CheckpointError(f"{index} is broken: its weight_map is empty; {_AGAIN}")
    return found


def other_head(directory: Path) -> str | None:
    """Where a trained head stands under a name that transformers does not read, in words; None if there is none.

    TRL's value head and LLaMA-Factory's file are such; a directory with `score.weight` has its head where it belongs.

    Args:
        directory: The checkpoint; only the index or a header is read.
    """
    names: set[str] = set()
    if (directory / INDEX).is_file():
        names = {tensor for tensors in _shards(directory / INDEX).values() for tensor in tensors}
    elif (directory / WEIGHTS).is_file():
        names = set(tensors_of(directory / WEIGHTS))
    if HEAD in names:
        return None
    for file in _HEAD_FILES:
        if (directory / file).is_file():
            return f"in {file}"
    return head_among(names)


def head_among(names: Iterable[str]) -> str | None:
    """The first of some tensors' names that is a trained head's, in words; None if none is.

    Args:
        names: Of all tensors of a checkpoint, or of those that found no place in the model.
    """
    found = sorted((n for n in names if _OTHER_HEAD.search(n)), key=lambda name: (not name.endswith("weight"), name))
    return f"as {found[0]}" if found else None


def refuse_other_head(directory: Path) -> None:
    """Refuse a trained head under another name, which a random one would take the place of without a word.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: says where the head is and what to do with it.
    """
    if (place := other_head(directory)) is not None:
        raise unread_head(str(directory), place)


def unread_head(name: str, place: str) -> CheckpointError:
    """The error that says where a trained head is and what to do with it.

    Args:
        name: The checkpoint, as the user knows it.
        place: As `other_head` and `head_among` say it.
    """
    return CheckpointError(
        f"{name} holds a trained head {place}, where nothing reads it; expected a linear head of one output "
        f"called {HEAD}: save it under this name in {WEIGHTS} without its bias, which is the same for all rewards, or "
        "remove it to start with a new head"
    )


def weights_digest(name: str, commit: str | None) -> str:
    """What a base model's weights are, wherever they lie: the hub's commit, or XXH3 of a directory's weight files.

    Args:
        name: A directory or a hub id.
        commit: The hub's commit, as transformers knows it once it has loaded the model.
    """
    import xxhash

    directory = Path(name)
    if not directory.is_dir():
        return commit or name
    whole = xxhash.xxh3_128()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                whole.update(block)
    return str(whole.hexdigest())
