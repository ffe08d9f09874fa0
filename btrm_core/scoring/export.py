"""`btrm export`: a finished model in another type, whole instead of adapters, checked for who is to read it.

Decides: which readers would score a model wrongly, and refuses them. What is written is what `btrm train` writes, so
transformers 4.57 reads it like 5; its self-test vectors carry the rewards of what was written.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btrm_core.chat import ChatFormat
from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import CheckpointError, ConfigError, did_you_mean
from btrm_core.hub import upload
from btrm_core.model import (
    RewardModel,
    add_embedding_row,
    as_merged,
    check_head,
    find_model,
    is_adapters,
    load_chat,
    load_weights,
    merged_weights,
    model_card,
    plain_model,
    read_manifest,
    refuse_overwrite,
    saved_config,
    set_reward_config,
    sha256_of,
    tolerance,
    write_model,
)
from btrm_core.packing import PADDED, alone, collate
from btrm_core.scoring.scorer import ANSWERS, DTYPES, PROBE

TARGETS = ("transformers", "vllm", "sglang", "tei")
SGLANG_HEADS = frozenset(f"{name}ForSequenceClassification" for name in ("Llama", "Gemma2", "Qwen2", "Qwen3"))
"""Architectures whose reward head SGLang 0.5 applies; for all others it answers with a hidden state."""
ALIKE = 0.25
"""The largest change of a reward, relative where it exceeds 1, that a change of type may bring."""


def export(
    model: str, out: str, *, dtype: str | None = None, merge: bool = False, target: str | None = None,
    overwrite: bool = False,
) -> str:  # fmt: skip
    """Write a model anew and say what was written.

    Args:
        model: a model directory, a run's output directory, or a hub id.
        out: where to write.
        dtype: bf16 or fp32; None keeps the type. The head is computed in fp32 in any case.
        merge: make whole weights of adapters.
        target: who is to read it: transformers, vllm, sglang or tei.
        overwrite: replace a finished model.

    Raises:
        CheckpointError: the model is not whole, or the target would score it wrongly.
        ConfigError: a setting is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown; expected bf16 or fp32.{did_you_mean(dtype, DTYPES)}")
    directory, place = find_model(model), Path(out)
    if place.resolve() == directory.resolve():
        raise ConfigError(f"{out} is the model itself; choose another place")
    check_head(directory)
    refuse(directory, target)
    refuse_overwrite(place, overwrite)
    if is_adapters(directory) and not merge:
        raise CheckpointError(
            f"{directory} holds adapters, which only peft reads; make them whole with --merge-adapter"
        )
    with LongWork(f"writing {place}"), quiet_libraries():
        return _write(directory, place, dtype)


def _write(directory: Path, place: Path, dtype: str | None) -> str:
    """Load a model, make its adapters whole, and write it; returns what was written."""
    chat, made = load_chat(directory), read_manifest(directory)
    card, own = _card(directory, made)
    hf = load_weights(directory, DTYPES[dtype] if dtype is not None else "auto", torch.device("cpu"))
    if foreign := not made and not is_adapters(directory):
        made = _as_our_own(hf, chat)
    vectors = made.get("self_test", [])
    if is_adapters(directory):
        with as_merged(hf):
            rewards = _rewards(hf, vectors, chat.pad_id)
        weights, hf = merged_weights(hf, hf.state_dict()), plain_model(hf)
        made["adapters"] = {**(made.get("adapters") or {}), "merged": True}
    else:
        rewards, weights = _rewards(hf, vectors, chat.pad_id), hf.state_dict()
    change = _largest_change(vectors, rewards)
    allowed = max(tolerance(made, torch.bfloat16), ALIKE) if dtype else tolerance(made, hf.dtype)
    if not change <= allowed:
        raise CheckpointError(
            f"{directory} gives other rewards than its btrm.json says, by up to {change:.2g}; run `btrm verify` on it"
        )
    made["dtype"] = str(hf.dtype).removeprefix("torch.")
    hf.config.dtype = hf.dtype
    made["self_test"] = [{**v, "reward": reward} for v, reward in zip(vectors, rewards, strict=True)]
    write_model(place, hf, weights, chat, made, model_card(made, place.name) if own else card)
    if foreign:
        return f"written: {place} ({made['dtype']}); pad token, problem type and a self-test were added"
    return f"written: {place} ({made['dtype']}); rewards of the self-test changed by up to {change:.2g}"


def _as_our_own(hf: Any, chat: ChatFormat) -> dict[str, Any]:
    """Give a model of another trainer what every model of btrm has, so that it is read alike everywhere.

    Returns:
        Its `btrm.json`: the template, where the reward is read, and rewards to check it by.
    """
    pad = chat.tokenizer.pad_token_id
    if len(chat.tokenizer) > hf.get_input_embeddings().num_embeddings:
        add_embedding_row(hf, len(chat.tokenizer), [pad])
    set_reward_config(hf, pad)
    vectors = [{"input_ids": [int(i) for i in ids]} for ids in chat.encode_group(PROBE, ANSWERS).sequences]
    rewards = _rewards(hf, vectors, pad)
    return {
        "template_sha256": chat.template_sha256,
        "terminal_token": chat.terminal_token,
        "self_test": [{**vector, "reward": reward} for vector, reward in zip(vectors, rewards, strict=True)],
    }


def refuse(directory: Path, target: str | None) -> None:
    """Refuse a reader that would score a model wrongly without saying so.

    Args:
        directory: the model; only its configuration is read.
        target: one of `TARGETS`; None refuses nothing.

    Raises:
        CheckpointError: says why.
        ConfigError: the target is unknown.
    """
    if target is None:
        return
    if target not in TARGETS:
        raise ConfigError(
            f"target '{target}' is unknown; expected {', '.join(TARGETS)}.{did_you_mean(target, TARGETS)}"
        )
    architecture = next(iter(saved_config(directory).architectures or ()), "an unnamed architecture")
    if target == "sglang" and architecture not in SGLANG_HEADS:
        raise CheckpointError(
            f"SGLang ignores the reward head of {architecture} and answers with a coordinate of the last hidden state; "
            "serve it with vLLM or `btrm serve`"
        )
    if target == "tei":
        raise CheckpointError(
            f"text-embeddings-inference does not apply the reward head of {architecture} on a causal model; serve it "
            "with vLLM or `btrm serve`"
        )


def push(model: str, hub_id: str, *, private: bool = False) -> str:
    """Upload a finished model to the Hugging Face Hub in one commit, and say where it is.

    The code of the model card then names the hub id, unless somebody has changed the card.

    Args:
        model: a model directory, or a run's output directory.
        hub_id: OWNER/NAME, or NAME of the token's owner.
        private: make the repository private if there is none; a public one is refused.

    Raises:
        CheckpointError: the model is not whole, or the hub does not take it; says how to try again.
    """
    directory = find_model(model)
    check_head(directory)
    made = read_manifest(directory)
    if "files" not in made:
        raise CheckpointError(f"{directory} has no btrm.json with hashes of its files; write it with `btrm export`")
    files = [directory / name for name in made["files"]]
    changed = [file.name for file in files if not file.is_file() or sha256_of(file) != made["files"][file.name]]
    if changed:
        raise CheckpointError(
            f"{directory} is not as it was written ({', '.join(changed)}); look with `btrm verify`, or write it anew "
            "with `btrm export`"
        )
    card, own = _card(directory, made)
    try:
        shown = model_card(made, hub_id) if own else card
        return f"uploaded: {upload(directory, hub_id, private=private, card=shown)}"
    except ConfigError as error:
        words = ["btrm", "export", str(directory), "--push-to", hub_id, *(["--private"] if private else [])]
        raise CheckpointError(
            f"the model is whole in {directory}, but was not uploaded to {hub_id}: {error}; then: {shlex.join(words)}"
        ) from error


def _card(directory: Path, made: dict[str, Any]) -> tuple[str, bool]:
    """A model's card, and whether it is still the one that btrm wrote, which may be written anew."""
    file = directory / "README.md"
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    names = (directory.name, (made.get("config") or {}).get("output.push_to"))
    return card, "card" in made and card in [model_card(made, name) for name in names if name]


@torch.inference_mode()
def _rewards(hf: Any, vectors: list[dict[str, Any]], pad_id: int) -> list[float]:
    """The rewards of self-test vectors, each alone, with an fp32 head."""
    model = RewardModel(hf, PADDED).eval()
    rewards = []
    for vector in vectors:
        batch = collate(
            [alone(np.array(vector["input_ids"], dtype=np.int32))], kernel=PADDED, multiple_of=1, pad_id=pad_id
        )
        rewards.append(float(model(batch)[0]))
    return rewards


def _largest_change(vectors: list[dict[str, Any]], rewards: list[float]) -> float:
    return max(
        (
            abs(reward - vector["reward"]) / max(1.0, abs(vector["reward"]))
            for vector, reward in zip(vectors, rewards, strict=True)
        ),
        default=0.0,
    )
