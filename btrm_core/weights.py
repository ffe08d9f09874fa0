"""Whether the files of a checkpoint are what they seem, looked at before anything is loaded.

Decides which directories are refused because their weights are no weights (a pointer of Git LFS, half a download, an
index without its files), are packed by somebody else's quantisation, or hold a trained head that nothing would read.
Only headers are read for that: the look costs milliseconds for a model of any size. What the values alone show (NaN),
or what a model has no place for, `check_loaded` looks at once they are there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
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
_LIKE_A_HEAD = re.compile(r"(^|\.)((reward|value|regression|critic|rm|rw|score)(_\w+)?)\.")
_TOKENIZER = re.compile(r"tokenizer\.json|vocab\.(json|txt)|tekken\.json|.*\.(model|tiktoken)(\.v\d+)?")
_READ = re.compile(r"(\w+\.)?score\.weight")
"""transformers reads the head also where the prefix of the backbone stands before it."""
_IN_A_LAYER = re.compile(r"\.\d+\.(?!weight$|bias$)")
_WHOLE = ("F64", "F32", "F16", "BF16")
_HEAD_FILE = re.compile(
    r"((v|value|reward|rm|rw|score|regression|critic|classifi\w+)(_?head|_layer)?|head)\.(safetensors|bin|pt|pth)"
)
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of the files besides weights that a tokenizer or a configuration is read from."""
_AGAIN = "download or copy it anew"


def check_config(config: Any, name: str) -> None:
    """Refuse a checkpoint whose weights are quantised, or whose pad token has no embedding: neither can be used as is.

    Args:
        config: The checkpoint's transformers configuration.
        name: The checkpoint, for the error.

    Raises:
        CheckpointError: names the method, or the pad token.
    """
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise CheckpointError(
            f"pad_token_id in config.json of {name} is {pad}, and there are embeddings for {rows:,} tokens; expected a "
            "smaller number, or null: the pad token is chosen anew"
        )
    settings = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not settings:
        return
    given = settings if isinstance(settings, dict) else settings.to_dict()
    method = given.get("quant_method") or next((k for k in ("load_in_4bit", "load_in_8bit") if given.get(k)), "unknown")
    method = str(getattr(method, "value", method))
    raise quantised(name, method)


def quantised(name: str, how: str) -> CheckpointError:
    """The error that says that weights are packed.

    Args:
        name: The checkpoint, as the user knows it.
        how: The method, or what shows it.
    """
    return CheckpointError(
        f"the weights of {name} are quantised ({how}); expected whole weights (bf16, fp16 or fp32): name the model "
        "that it was made from; --quantize 4bit packs one while it is loaded"
    )


def check_files(directory: Path) -> None:
    """Look at every weight file of a directory, and at the index if there is one.

    Args:
        directory: The checkpoint; one without `model.safetensors` and index passes, unless a file that is
            read is a pointer.

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
        CheckpointError: the file is a pointer, is cut off, is no safetensors file, or holds packed weights.
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
        packed = {key: value["dtype"] for key, value in entries.items() if value["dtype"] not in _WHOLE}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: it is no safetensors file; {_AGAIN}") from error
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is cut off: it has {size:,} of {8 + length + end:,} bytes; {_AGAIN}")
    for key, dtype in packed.items():
        if key.endswith(".weight"):  # buffers may be whole numbers
            raise quantised(str(file.parent), f"{key} is {dtype}")
    return shapes


def check_loaded(hf: Any, info: Mapping[str, Any], name: str) -> tuple[bool, str | None]:
    """Look at a loaded model: nothing is missing but the head, no trained head is lost, and all of it is finite.

    Args:
        hf: The model, with its linear head; weights that ZeRO-3 has spread over processes are not looked at.
        info: The loading info of transformers.
        name: The checkpoint, for the errors.

    Returns:
        Whether the head is new, and what of the checkpoint is not used, in one line, or None.

    Raises:
        CheckpointError: says what is missing, where the trained head is, or which weight is not finite.
    """
    mismatched = {entry[0]: tuple(entry[1]) for entry in info.get("mismatched_keys", ())}
    missing = {*info["missing_keys"], *mismatched}
    if missing - {HEAD}:
        some = ", ".join(sorted(missing - {HEAD})[:3])
        raise CheckpointError(f"the weights of {name} are incomplete: {some} missing; expected a whole base model")
    left_out = sorted(key for key in info["unexpected_keys"] if not key.startswith(("lm_head.", "embed_out.")))
    if HEAD in missing and (place := head_among(dict.fromkeys(left_out, ()))) is not None:
        raise unread_head(name, place)
    outputs, width = mismatched.get(HEAD, (0, 0))
    if outputs == 1:
        raise CheckpointError(
            f"the head of {name} ({HEAD}) takes {width:,} values, and its backbone gives {hf.score.in_features:,}; "
            "expected a head of the same model, or none to start with a new one"
        )
    _refuse_not_finite(hf, name)
    notes = [f"the base model's head of {outputs} outputs is replaced by a new one"] if outputs else []
    if left_out:
        notes.append(
            f"{type(hf).__name__} has no place for {len(left_out):,} weights of the base model, which are left out: "
            f"{', '.join(left_out[:2])}{', ...' if len(left_out) > 2 else ''}"
        )
    return HEAD in missing, "; ".join(notes) or None


def _refuse_not_finite(hf: Any, name: str) -> None:
    import torch

    for key, weight in hf.named_parameters():
        if weight.is_floating_point() and weight.numel():
            lowest, highest = torch.aminmax(weight.detach())  # NaN if any value is
            if not torch.isfinite(lowest) or not torch.isfinite(highest):
                raise CheckpointError(f"the weights of {name} are damaged: {key} is not finite everywhere; {_AGAIN}")


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start == _POINTER:
        raise CheckpointError(
            f"{file} is a pointer of Git LFS in place of the file itself; fetch it with `git lfs pull` in {file.parent}"
        )


def _shards(index: Path) -> dict[str, set[str]]:
    """File -> the tensors that the index says it holds."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        if not isinstance(content["metadata"], dict):  # transformers asks for it
            raise TypeError
        found: dict[str, set[str]] = {}
        for tensor, name in places.items():
            if Path(name).name != name:
                raise CheckpointError(f"{index} names a file outside its directory ({name!r}); {_AGAIN}")
            found.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is broken: expected JSON with metadata and a weight_map of tensors to files; {_AGAIN}"
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
    files = [WEIGHTS] if (directory / WEIGHTS).is_file() else []
    if (directory / INDEX).is_file():
        files = list(_shards(directory / INDEX))
    shapes = {key: shape for file in files for key, shape in tensors_of(directory / file).items()}
    if HEAD in shapes:
        return None
    for path in sorted(directory.iterdir()):
        if _HEAD_FILE.fullmatch(path.name):
            return f"in {path.name}"
    return head_among(shapes)


def head_among(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of some tensors that is a trained head, in words; None if none is.

    Known by its name, or as a matrix of one output that is in no layer.

    Args:
        shapes: By name, of all tensors of a checkpoint, or of those that found no place in the model; () if unknown.
    """
    found = [name for name in shapes if _OTHER_HEAD.search(name)]
    for name, shape in shapes.items():
        one_output = len(shape) == 2 and shape[0] == 1 < shape[1] and name.endswith(".weight")
        if (one_output or _LIKE_A_HEAD.search(name)) and not _IN_A_LAYER.search(name) and not _READ.fullmatch(name):
            found.append(name)
    return f"as {min(found, key=lambda name: (not name.endswith('weight'), name))}" if found else None


def refuse_other_head(directory: Path) -> None:
    """Refuse a trained head under another name, which a random one would take the place of without a word.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: says where the head is and what to do with it.
    """
    if (place := other_head(directory)) is not None:
        raise no_decoder(directory) or unread_head(str(directory), place)


def no_decoder(directory: Path) -> CheckpointError | None:
    """The error for an encoder or the like, which no renaming of its head turns into what is read here; else None.

    Args:
        directory: The checkpoint.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            hf = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(directory))
    except Exception:  # transformers raises what its parsers raise: whoever loads the model says so
        return None
    if hasattr(hf, "score"):
        return None
    return CheckpointError(
        f"{directory} is a {type(hf).__name__}, no decoder with a head called score: its rewards are read in another "
        "way (an encoder's at the first token), and btrm reads them at the last token; name a decoder, or ask this "
        "model with transformers' text-classification pipeline"
    )


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


def no_tokenizer(directory: Path) -> str | None:
    """That a directory has no file of a tokenizer, in words; None if there is one, or no such directory.

    Args:
        directory: The checkpoint.
    """
    if not directory.is_dir() or any(_TOKENIZER.fullmatch(file.name) for file in directory.iterdir()):
        return None
    return f"{directory} holds no tokenizer; expected tokenizer.json (or tokenizer.model): copy it there from its model"


DIGESTED = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash")
"""Keys of a `config.json` that say where it came from, or what is said otherwise: the type a run computes in."""


def weights_digest(name: str, commit: str | None) -> str:
    """What a base model is, wherever it lies: the hub's commit, or XXH3 of a directory's weights and configuration.

    Args:
        name: A directory or a hub id.
        commit: The hub's commit, as transformers knows it once it has loaded the model.
    """
    import xxhash

    directory = Path(name)
    if not directory.is_dir():
        return commit or name
    whole = xxhash.xxh3_128()
    with contextlib.suppress(OSError, ValueError):  # it has none: whoever needs it says so
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        said = {key: value for key, value in described.items() if key not in NO_PART_OF_A_MODEL}
        whole.update(json.dumps(said, sort_keys=True).encode())
    for path in sorted(path for pattern in DIGESTED for path in directory.glob(pattern)):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                whole.update(block)
    return str(whole.hexdigest())
