"""Savings: what makes a step faster or smaller and changes nothing but rounding: fused kernels, recomputation."""

from btrm_core.model.savings.fused import use_kernels
from btrm_core.model.savings.recompute import NOT_RECOMPUTED, recompute_activations

__all__ = ["NOT_RECOMPUTED", "recompute_activations", "use_kernels"]
