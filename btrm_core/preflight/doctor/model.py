"""What `btrm doctor` says of a model: head, first loss, packed rows, and other programs' rewards.

Decides: how much is computed for each check. Runs on one device, without DeepSpeed and without a process group.

Shapes: P pairs, S sequences, H hidden.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btrm_core.chat import ChatFormat, Conversation
from btrm_core.console import unused_gpu
from btrm_core.data import TokenStore
from btrm_core.errors import ConfigError, TrainingError
from btrm_core.families import Family
from btrm_core.hub import has_own_code
from btrm_core.model import RewardModel, Use, check_first_loss, trusted, write_model
from btrm_core.packing import PADDED, Tree, collate, grow, row_form, row_multiple
from btrm_core.preflight import Check
from btrm_core.preflight.doctor.check import refused
from btrm_core.training import some_rewards
from btrm_core.training.processes import Runtime

FIRST_LOSS_PAIRS = 32


LONGEST_PAIRS = 3
DRAWS = 64


HEAD_SCALE = 3.0
"""Factor that the head's standard deviation may be away from 1 / sqrt(hidden + 1)."""


SAVE_PARAMETERS = 250_000_000
"""Up to this size the model is written to disk and read again for the pipeline; larger ones are used as they are."""


PIPELINE_PARAMETERS = 1_000_000_000
"""Up to this size the pipeline is tried without being asked for."""


@dataclass
class Patient:
    """A reward model on its device, and what it is looked at with.

    Attributes:
        model: the reward model.
        head_is_new: whether its head was just drawn and not trained.
        family: who initialises the head; None for a finished model.
        chat: how its conversations become ids.
        pairs: encoded pairs.
        conversations: a chosen and a rejected conversation that fit the model whole.
        layout: how training lays out rows: shared, packed or padded.
        tokens_per_batch: tokens of a row.
        max_length: longest conversation in tokens.
    """

    model: RewardModel
    head_is_new: bool
    family: Family | None
    chat: ChatFormat
    pairs: TokenStore
    conversations: list[Conversation]
    layout: str
    tokens_per_batch: int
    max_length: int

    @property
    def num_parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def alone(device: torch.device, dtype: torch.dtype) -> Runtime:
    """A runtime of this process only, which belongs to no process group and cannot train.

    Args:
        device: of torch.
        dtype: compute type.
    """
    return Runtime(accelerator=None, rank=0, world=1, device=device, dtype=dtype, zero_stage=0)


def model_checks(patient: Patient, full: bool) -> Iterator[Check]:
    """Every check of a model, one at a time: each may take a while.

    Args:
        patient: the model, and what it is looked at with.
        full: also what takes long for a large model.
    """
    patient.model.eval()
    yield head(patient)
    yield packed(patient)
    yield first_loss(patient)
    yield pipeline_parity(patient, full)


def head(patient: Patient) -> Check:
    """The head is finite and has the standard deviation that a head of its size should have.

    Args:
        patient: the model, and what it is looked at with.
    """
    weight_H = patient.model.base_model.score.weight.detach().float().flatten()
    bad = int((~torch.isfinite(weight_H)).sum())
    std, size = float(weight_H.square().mean().sqrt()), len(weight_H)
    figures: dict[str, Any] = {"hidden_size": size, "std": None if bad else std, "new": patient.head_is_new}
    if bad or not std:
        what = f"{bad} of its {size} values are not finite" if bad else f"all of its {size} values are zero"
        advice = "look at the init_head hook" if patient.head_is_new else "the checkpoint is damaged; copy it anew"
        return Check("head", "fail", what, "every reward is the same or none", advice, figures)
    if patient.family is None or not patient.head_is_new:
        return Check("head", "ok", f"as trained: {size} finite values of standard deviation {std:.3g}", figures=figures)
    drawn, usual = float(patient.family.drawn_head(size, DRAWS, seed=1).square().mean().sqrt()), 1 / math.sqrt(size + 1)
    given_by = patient.family.ask("init_head", hidden_size=size).given_by
    figures |= {"expected_std": drawn, "usual_std": usual, "given_by": given_by}
    what = f"{size} finite values of standard deviation {std:.3g}, by {given_by}"
    if abs(std / drawn - 1) > 4 / math.sqrt(2 * size) + 0.05:
        why = f"init_head draws one of {drawn:.3g}, so something has changed the head since"
        return Check("head", "fail", what, why, "report it with this output", figures)
    if not 1 / HEAD_SCALE <= std / usual <= HEAD_SCALE:
        size_of = "large and the first steps undo them" if std > usual else "almost equal and learning starts slowly"
        why = f"the usual one is 1/sqrt(hidden + 1) = {usual:.3g}; first rewards are {size_of}"
        return Check("head", "warn", what, why, "leave out head.init_std, or change the init_head hook", figures)
    return Check("head", "ok", what, figures=figures)


def loaded(patient: Patient) -> Check:
    """What was loaded, how large it is, and where it computes; a warning if a GPU is there and not used.

    Args:
        patient: the model, and what it is looked at with.
    """
    model = patient.model
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    size = f"{patient.num_parameters / 1e6:,.1f} million parameters"
    what = f"{type(model.base_model).__name__}, {size}, {dtype} on {model.device}"
    idle = unused_gpu()
    return Check("model", "warn", what, *idle) if idle else Check("model", "ok", what)


def packed(patient: Patient) -> Check:
    """Rewards depend on their own sequences alone, in the rows that training takes, or in the next that are exact.

    Args:
        patient: the model, and what it is looked at with.
    """
    model, name = patient.model, "packed = separate"
    asked = "padded" if patient.layout == "padded" else f"{patient.layout} rows, {model.kernel} attention"
    allowed = patient.family.recipe().attention if patient.family is not None else ()
    groups, kernel = patient.pairs.longest(LONGEST_PAIRS), model.kernel
    try:
        trust = trusted(
            model,
            groups,
            Use(
                layout=patient.layout,
                pad_id=patient.chat.pad_id,
                longest=patient.max_length or None,
                training=patient.head_is_new,
                allowed=allowed,
            ),
        )
    except ConfigError as error:
        return refused(name, error, "training would stop", "take another base model")
    figures = {"asked": asked, "kernel": trust.kernel, "one_by_one": trust.one_by_one}
    figures["difference"] = trust.difference if math.isfinite(trust.difference) else None
    if trust.note is None:
        if trust.layout == "padded":
            return Check(name, "skip", f"train.layout is padded: rows are not packed; {trust.proof}", figures=figures)
        return Check(name, "ok", f"{trust.proof}, {trust.kernel} attention", figures=figures)
    slower = "the same rewards, several times slower" if trust.layout == "padded" else "the same rewards"
    if trust.wrong:
        advice = f"try another kernel than {kernel}, such as --attention eager, and report it"
        return Check(name, "fail", trust.note, slower, advice, figures)
    return Check(name, "warn", trust.note, slower, "nothing, or another model", figures)


def first_loss(patient: Patient) -> Check:
    """The loss of an untrained head is near ln 2.

    Args:
        patient: the model, and what it is looked at with.
    """
    model, pairs = patient.model, patient.pairs
    name = "first loss"
    layout = "padded" if model.kernel == PADDED else patient.layout
    form = row_form(layout, model.kernel, model.device.type, patient.chat.pad_id)
    runtime = alone(model.device, next(model.parameters()).dtype)
    size = min(FIRST_LOSS_PAIRS, len(pairs))
    budget = patient.tokens_per_batch
    _, computed = some_rewards(model, pairs, runtime, form, tokens_per_batch=budget, count=size)
    margin_P = computed[:, 0] - computed[:, 1]
    bad = int((~np.isfinite(computed)).any(axis=1).sum())
    if bad:
        return Check(
            name,
            "fail",
            f"{bad} of {size} pairs have a reward that is not finite",
            "the weights or the attention kernel are broken, and training would stop",
            "copy the model anew, or try --attention eager",
            {"pairs": size, "not_finite": bad},
        )
    if not patient.head_is_new:
        loss = float(np.logaddexp(0.0, -margin_P).mean())
        return Check(
            name, "skip", f"the head is trained; its loss on {size} pairs is {loss:.3f}", figures={"loss": loss}
        )
    try:
        first = check_first_loss(computed, [str(index) for index in range(len(computed))])
    except TrainingError as error:
        return refused(name, error, "training would stop", "report it with this output")
    figures = {"pairs": size, "loss": first.loss, "expected": first.expected, "slack": first.slack}
    what = (
        f"{first.loss:.3f} on {size} pairs; an untrained head gives {first.expected:.3f} ± {first.slack:.3f}, near ln 2"
    )
    if first.warning:
        advice = "look at a few pairs with `btrm data inspect`"
        return Check(name, "warn", what, first.warning, advice, figures)
    return Check(name, "ok", what, figures=figures)


def pipeline_parity(patient: Patient, full: bool) -> Check:
    """The text-classification pipeline of transformers gives two conversations the rewards that btrm gives them.

    Args:
        patient: the model, and what it is looked at with.
        full: also what takes long for a large model.
    """
    name, size = "pipeline parity", patient.num_parameters
    if size > PIPELINE_PARAMETERS and not full:
        return Check(name, "skip", f"{size / 1e9:.1f} billion parameters; --full tries it all the same")
    model, chat = patient.model, patient.chat
    ours_S = _rewards(model, grow(chat.encode(patient.conversations)), chat.pad_id)
    if size <= SAVE_PARAMETERS and model.hf is model.base_model:  # adapters are not saved as one model
        with tempfile.TemporaryDirectory(prefix="btrm-doctor-") as folder:
            theirs_S, how = _saved(patient, Path(folder) / "model"), "of the saved and reloaded model"
    else:
        kernel = model.kernel
        model.use_kernel(PADDED)
        theirs_S, how = _classify(model.base_model, chat.tokenizer, patient), "of the model in memory"
        model.use_kernel(kernel)
    half = next(model.parameters()).dtype.itemsize == 2
    tolerance = (1e-1 if half else 1e-4) * max(1.0, float(np.abs(ours_S).max()))
    difference = float(np.abs(ours_S - theirs_S).max())
    figures = {"ours": ours_S.tolist(), "pipeline": theirs_S.tolist(), "tolerance": tolerance}
    call = "pipeline(..., top_k=None, function_to_apply='none', add_special_tokens=False)"
    if difference <= tolerance:
        return Check(name, "ok", f"rewards {how} differ by {difference:.1e}; call {call}", figures=figures)
    shown = " and ".join(f"{theirs:.4f} instead of {ours:.4f}" for theirs, ours in zip(theirs_S, ours_S, strict=True))
    return Check(
        name,
        "fail",
        f"rewards {how} differ from btrm's: {shown}",
        "programs that use transformers would score otherwise than the model was trained",
        "look at what is lost in saving: the tokenizer's settings, pad_token_id, the template",
        figures,
    )


@torch.no_grad()
def _rewards(model: RewardModel, tree: Tree, pad_id: int) -> np.ndarray:
    """Rewards [S] of a tree as training computes them."""
    multiple_of = row_multiple(model.kernel, model.device.type)
    batch = collate([tree], kernel=model.kernel, multiple_of=multiple_of, pad_id=pad_id)
    rewards: np.ndarray = model(batch.to(model.device)).float().cpu().numpy()
    return rewards


def _saved(patient: Patient, directory: Path) -> np.ndarray:
    """Rewards of the pipeline from a directory written as `btrm train` writes it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    hf = patient.model.base_model
    made = {"template_sha256": patient.chat.template_sha256, "max_length": patient.max_length}
    write_model(directory, hf, hf.state_dict(), patient.chat, made, "# written by btrm doctor\n")
    own_code = has_own_code(hf.config)  # which the user has allowed
    loaded = AutoModelForSequenceClassification.from_pretrained(directory, dtype=hf.dtype, trust_remote_code=own_code)
    loaded = loaded.to(hf.device)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=own_code)
    return _classify(loaded.eval(), tokenizer, patient)


def _classify(hf: Any, tokenizer: Any, patient: Patient) -> np.ndarray:
    """Rewards [S] of transformers' pipeline on rendered conversations, both in one batch."""
    from transformers import pipeline

    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in patient.conversations]
    classify = pipeline("text-classification", model=hf, tokenizer=tokenizer, device=patient.model.device)
    # the rendered text holds its BOS already; by default most tokenizers put another one before it
    found = classify(texts, top_k=None, function_to_apply="none", add_special_tokens=False, batch_size=len(texts))
    return np.array([labels[0]["score"] for labels in found], dtype=np.float32)
