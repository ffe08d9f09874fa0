"""Model: the reward model (backbone, head, attention) and the directory it is kept in."""

from btrm_core.model.adapters import as_merged, merged_weights, plain_model
from btrm_core.model.attention import KERNELS, choose_kernel, uses_softcap
from btrm_core.model.base import (
    base_config,
    build_model,
    expected_kernel,
    gathered,
    load_tokenizer,
)
from btrm_core.model.card import Trained, base_licence, model_card, run_manifest, template_difference
from btrm_core.model.directory import find_model, is_finished, read_manifest, refuse_overwrite, sha256_of, write_model
from btrm_core.model.leakage import Trust, Use, positions_problem, trusted
from btrm_core.model.load import (
    chat_from_checkpoint,
    check_head,
    identity,
    is_adapters,
    load_chat,
    load_weights,
    saved_config,
    tolerance,
)
from btrm_core.model.parallel.check import check_heads, divide_rows
from btrm_core.model.parallel.share import RowShare, divisors, kv_copies
from btrm_core.model.quantized import OPTIMIZERS, optimizer, require
from btrm_core.model.reward import RewardModel, choose_for, parameter_groups
from btrm_core.model.selfcheck import FirstLoss, check_first_loss
from btrm_core.model.shape import (
    GPUS,
    Parameters,
    Shape,
    causal_entries,
    check_ids,
    device_name,
    flops_per_token,
    mfu_per_token_rate,
    peak_flops,
    read_shape,
    training_flops,
)
from btrm_core.model.toy import build_toy, toy_model, toy_tokenizer

__all__ = [
    "GPUS",
    "KERNELS",
    "OPTIMIZERS",
    "FirstLoss",
    "Parameters",
    "RewardModel",
    "RowShare",
    "Shape",
    "Trained",
    "Trust",
    "Use",
    "as_merged",
    "base_config",
    "base_licence",
    "build_model",
    "build_toy",
    "causal_entries",
    "chat_from_checkpoint",
    "check_first_loss",
    "check_head",
    "check_heads",
    "check_ids",
    "choose_for",
    "choose_kernel",
    "device_name",
    "divide_rows",
    "divisors",
    "expected_kernel",
    "find_model",
    "flops_per_token",
    "gathered",
    "identity",
    "is_adapters",
    "is_finished",
    "kv_copies",
    "load_chat",
    "load_tokenizer",
    "load_weights",
    "merged_weights",
    "mfu_per_token_rate",
    "model_card",
    "optimizer",
    "parameter_groups",
    "peak_flops",
    "plain_model",
    "positions_problem",
    "read_manifest",
    "read_shape",
    "refuse_overwrite",
    "require",
    "run_manifest",
    "saved_config",
    "sha256_of",
    "template_difference",
    "tolerance",
    "toy_model",
    "toy_tokenizer",
    "training_flops",
    "trusted",
    "uses_softcap",
    "write_model",
]
