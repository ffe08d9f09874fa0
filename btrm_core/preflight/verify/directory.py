"""`btrm verify`: whether a model directory, and a server that has loaded it, give the rewards that training wrote down.

Decides: what a whole model directory is, and which difference of a reward rounding explains: 1e-4 in fp32 and 0.05
where anything is bf16, relative where rewards exceed 1. Servers are `server`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import BtrmError, one_line
from btrm_core.model import (
    check_head,
    find_model,
    is_adapters,
    load_chat,
    read_manifest,
    saved_config,
    sha256_of,
    template_difference,
    tolerance,
    uses_softcap,
)
from btrm_core.preflight import Check
from btrm_core.scoring import Scorer

WRONG = "rewards differ from those of training, without any error"


def verify(model: str) -> tuple[list[Check], Scorer | None]:
    """Check a model directory.

    Args:
        model: a model directory, a run's output directory, or a hub id.

    Returns:
        One verdict per check, and the model in fp32 if it could be opened.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = find_model(model)
    checks = [
        _tried("reward head", lambda: _head(directory)),
        _tried("tokenizer, template and pad token", lambda: _chat(directory)),
        _tried("problem type", lambda: _problem_type(directory)),
        _tried("type of the weights", lambda: _dtype(directory)),
        _tried("files as they were written", lambda: _files(directory)),
    ]
    scorer: Scorer | None = None
    for dtype in ("fp32", "bf16"):
        found: list[Scorer] = []
        checks.append(_tried(f"self-test in {dtype}", lambda d=dtype, f=found: _self_test(model, d, f)))  # type: ignore[misc]
        if dtype == "fp32" and found:
            scorer = found[0]
    checks.append(_tried("transformers pipeline", lambda: _pipeline(directory)))
    return checks, scorer


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        with LongWork(f"checking {name}"):
            return check()
    except BtrmError as error:
        return Check(name, "fail", one_line(error), WRONG, "put the original files back, or copy the model anew")
    except Exception as error:  # transformers and safetensors raise many types
        return Check(name, "fail", one_line(error), WRONG, "copy the model anew")


def _head(directory: Path) -> Check:
    check_head(directory)
    return Check("reward head", "ok", "score.weight is among the weights, for one label")


def _chat(directory: Path) -> Check:
    name = "tokenizer, template and pad token"
    chat, manifest = load_chat(directory), read_manifest(directory)
    for vector in manifest.get("self_test", ()):
        ids = list(vector["input_ids"])
        text = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = chat.encoder.encode([text])[0]
        opened = chat.bos_id is None or ids.count(chat.bos_id) >= 1
        if ids[-1] != chat.terminal_id or not opened or max(ids) >= len(chat.tokenizer):
            what = "the ids of the self-test do not begin and end with this tokenizer's control tokens"
            return Check(name, "fail", what, WRONG, "put the tokenizer back that the model was trained with")
        if again != ids and "\ufffd" not in text:
            what = f"text of the self-test comes out as {len(again)} other ids than the {len(ids)} of training"
            return Check(name, "fail", what, WRONG, "put the tokenizer back that the model was trained with")
    longest, saved = manifest.get("max_length"), chat.tokenizer.model_max_length
    if longest is not None and longest != saved:
        what = f"btrm.json says a max_length of {longest}, tokenizer_config.json one of {saved}"
        return Check(
            name, "fail", what, "longer conversations are cut elsewhere than in training", "copy the model anew"
        )
    if difference := template_difference(manifest, chat):
        return Check(name, "warn", difference, "btrm uses the model's own template", "nothing, if that was meant")
    what = f"the template is that of training, pad {chat.pad.token!r} is none that ends anything"
    return Check(name, "ok", what)


def _problem_type(directory: Path) -> Check:
    name, found = "problem type", saved_config(directory).problem_type
    if found == "regression":
        return Check(name, "ok", "regression: transformers and vLLM return the reward itself")
    return Check(
        name,
        "fail",
        f"problem_type in config.json is {found!r}; expected 'regression'",
        "transformers' pipeline and vLLM put the reward through a sigmoid",
        'set "problem_type": "regression" in config.json',
    )


def _dtype(directory: Path) -> Check:
    name, configured = "type of the weights", saved_config(directory).dtype
    said = read_manifest(directory).get("dtype")
    types = _weight_types(directory)
    main = max(types, key=lambda key: types[key]) if types else None
    told = str(configured).removeprefix("torch.")
    if main is not None and configured is not None and main != told:
        what = f"config.json says {told}, most weights are {main}"
        return Check(name, "fail", what, "readers load them in another type", f'set "dtype": "{main}" in config.json')
    if said is not None and main is not None and said != main and not is_adapters(directory):
        what = f"btrm.json says {said}, most weights are {main}"
        return Check(name, "warn", what, "the self-test was computed in another type", "export it with --dtype")
    return Check(name, "ok", f"{told}, as config.json says")


_TYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}


def _weight_types(directory: Path) -> dict[str, int]:
    """Elements of the weights by their type, read from the heads of the safetensors files."""
    types: dict[str, int] = {}
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for tensor, about in head.items():
            if tensor != "__metadata__" and about["dtype"] in _TYPES:
                size = int(np.prod(about["shape"], dtype=np.int64))
                types[_TYPES[about["dtype"]]] = types.get(_TYPES[about["dtype"]], 0) + size
    return types


def _files(directory: Path) -> Check:
    name, written = "files as they were written", read_manifest(directory).get("files")
    if not written:
        return Check(name, "skip", "btrm.json holds no hashes of the files; they cannot be compared")
    changed = [file for file, sha in written.items() if not (directory / file).is_file()]
    if changed:
        return Check(name, "fail", f"missing: {', '.join(changed)}", WRONG, "copy the model anew")
    changed = [file for file, sha in written.items() if sha256_of(directory / file) != sha]
    if changed:
        what = f"changed since they were written: {', '.join(changed)}"
        return Check(name, "fail", what, WRONG, "copy the model anew, or export it if the change was meant")
    return Check(name, "ok", f"all {len(written)} files have the hashes in btrm.json")


def _self_test(model: str, dtype: str, opened: list[Scorer]) -> Check:
    scorer = Scorer(model, dtype=dtype)
    opened.append(scorer)
    name = f"self-test in {dtype}"
    if not scorer.manifest.get("self_test"):
        if "config" in scorer.manifest:  # every training writes some
            return Check(
                name, "fail", "btrm.json lost its self-test vectors", "nothing proves the rewards", "copy it anew"
            )
        return Check(name, "skip", "btrm.json holds no self-test vectors")
    off, allowed = scorer.self_test(), tolerance(scorer.manifest, scorer.dtype)
    return compared(name, off, allowed)


def compared(name: str, off: float, allowed: float) -> Check:
    """A verdict on the largest difference of rewards; NaN is no agreement.

    Args:
        name: of the check.
        off: the largest difference, in units of reward.
        allowed: the largest that rounding explains, likewise.
    """
    figures = {"largest_difference": off, "tolerance": allowed}
    what = f"rewards differ by up to {off:.2g}; rounding explains {allowed:.2g}"
    if off <= allowed:
        return Check(name, "ok", what, figures=figures)
    return Check(name, "fail", what, WRONG, "put the original weights, configuration and tokenizer back", figures)


def _pipeline(directory: Path) -> Check:
    import transformers
    from transformers import AutoTokenizer, pipeline

    name = "transformers pipeline"
    vectors = read_manifest(directory).get("self_test", ())
    if not vectors or is_adapters(directory):
        return Check(name, "skip", "no self-test vectors" if not vectors else "adapters are no whole model")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    with quiet_libraries():
        pipe = pipeline("text-classification", model=str(directory), tokenizer=tokenizer, dtype=torch.float32)
    differences = []
    for vector in vectors:
        ids = list(vector["input_ids"])
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            score: Any = pipe([text], top_k=None, add_special_tokens=False)[0][0]["score"]
            differences.append(abs(score - vector["reward"]))
    if not differences:
        return Check(name, "skip", "no self-test vector can be written as text")
    found = compared(name, max(differences), tolerance(read_manifest(directory), torch.float32))
    config: Any = pipe.model.config
    if found.verdict == "fail" and uses_softcap(config) and config._attn_implementation != "eager":
        why = f"this transformers ({transformers.__version__}) drops the cap on its attention's scores"
        return replace(
            found, why=why, what_to_do="write it anew with `btrm export`: config.json then says how to load it"
        )
    return found
