"""A finished model as one ONNX file: padded ids and their mask in, rewards out, kept only if the rewards are equal.

Decides: the form (fp32, right padding, the reward at the last token of the mask), and what is compared before the file
is put in its place: the self-test, alone and together, and a conversation about as long as all of it.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import CheckpointError, ConfigError, first_line
from btrm_core.files import explained
from btrm_core.model import load_weights, tolerance
from btrm_core.scoring.scorer import Scorer

FILE = "model.onnx"
WITH_WEIGHTS = 1_500_000_000
"""Bytes of weights up to which they stand in the file itself, which holds at most 2 GB; above, in one beside it."""
INSTALL = "--onnx needs onnx, onnxscript and onnxruntime; install them with `pip install 'btrm[onnx]'`"


def need_onnx() -> None:
    """Refuse early where a library is missing.

    Raises:
        ConfigError: says which to install.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(INSTALL) from error


class _Rewards(torch.nn.Module):
    """The rewards [B] of right-padded ids [B, L], with an fp32 head."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        backbone = self.hf.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        last = attention_mask.sum(1) - 1
        hidden = backbone.last_hidden_state[torch.arange(last.shape[0]), last]
        rewards: torch.Tensor = self.hf.score(hidden.float()).squeeze(-1)
        return rewards


def write_onnx(directory: Path) -> str:
    """Put `model.onnx` into a model directory: `input_ids` and `attention_mask` (int64, [B, L]) in, `rewards` [B] out.

    Args:
        directory: a whole model with a self-test.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: the model cannot be expressed, or ONNX Runtime gives other rewards; nothing is written.
    """
    scorer = Scorer(str(directory), dtype="fp32", attention="auto", device="cpu")
    known = [list(vector["input_ids"]) for vector in scorer.manifest.get("self_test", ())]
    if not known:
        raise CheckpointError(f"{directory}/btrm.json holds no self-test vectors to compare the ONNX file with")
    known.append([i for ids in known for i in ids][: scorer.max_length])
    expected = scorer.sequence_rewards(known, range(len(known)))
    hf = load_weights(directory, torch.float32, torch.device("cpu"))
    try:
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=directory) as place:
            made = Path(place) / FILE
            with LongWork(f"writing {directory / FILE}"), quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _export(hf, _padded(known[-2:], scorer.chat.pad_id), scorer.max_length, made)
                found = _run(made, known, scorer.chat.pad_id)
            off, allowed = float(np.abs(found - expected).max()), tolerance(scorer.manifest, torch.float32)
            if not off <= allowed:
                raise CheckpointError(f"ONNX Runtime's rewards are off by {off:.2g}; rounding explains {allowed:.2g}")
            for file in sorted(Path(place).iterdir(), reverse=True):  # the weights first
                file.replace(directory / file.name)
    except OSError as error:
        raise explained(error, directory) from error
    return f"written: {directory / FILE} (float32); its rewards differ by up to {off:.2g}"


def _padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _export(hf: Any, example: tuple[torch.Tensor, torch.Tensor], longest: int, file: Path) -> None:
    batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=longest)
    size = sum(parameter.numel() * parameter.element_size() for parameter in hf.parameters())
    try:
        torch.onnx.export(
            _Rewards(hf).eval(),
            example,
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["rewards"],
            dynamic_shapes=({0: batch, 1: length},) * 2,
            external_data=size > WITH_WEIGHTS,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # of torch, of onnxscript, of the model's own code
        raise CheckpointError(f"{type(hf).__name__} cannot be written as ONNX: {first_line(error)}") from error


def _run(file: Path, sequences: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """Rewards of ONNX Runtime, [2, S]: of each sequence alone, and of all in one batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def rewards(some: Sequence[Sequence[int]]) -> Any:
        ids, mask = _padded(some, pad_id)
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return np.stack([np.concatenate([rewards([one]) for one in sequences]), rewards(sequences)])
