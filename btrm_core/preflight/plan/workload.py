"""What `btrm plan` is asked about: a model's data, steps and optimizer, and what is assumed of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from btrm_core.errors import ConfigError
from btrm_core.families import RECIPE
from btrm_core.preflight.plan.hardware import ASSUMED_MFU, ASSUMED_MFU_SOURCE
from btrm_core.settings import ModelConfig, TrainConfig

ASSUMED_TOKENS_PER_PAIR = 750.0


@dataclass(frozen=True)
class Workload:
    """What is trained and how it is cut into steps.

    Attributes:
        model: the name that the recommended command gives to `--model`.
        pairs_per_step: pairs per optimizer step, over all GPUs.
        tokens_per_batch: token budget of a row.
        max_length: longest conversation in tokens.
        tokens_per_pair: mean tokens of a pair with its common prefix counted once.
        pairs: pairs of the training data, for the hours.
        epochs: passes over the pairs.
        lora_rank: train adapters of this rank on every linear layer instead of all weights.
        bf16: compute type bf16; False is fp32.
        mfu: model FLOPs utilisation, 0 to 1.
        mfu_source: where that figure comes from.
        quantize: none, or 4bit for frozen weights in 4 bits under the adapters.
        optimizer: adamw, adamw-8bit or adamw-8bit-paged.
    """

    model: str = "MODEL"
    pairs_per_step: int = RECIPE.pairs_per_step or 64
    tokens_per_batch: int = TrainConfig.tokens_per_batch
    max_length: int = RECIPE.max_length or 2048
    tokens_per_pair: float = ASSUMED_TOKENS_PER_PAIR
    pairs: int | None = None
    epochs: float = 1.0
    lora_rank: int | None = None
    bf16: bool = True
    mfu: float = ASSUMED_MFU
    mfu_source: str = ASSUMED_MFU_SOURCE
    quantize: str = ModelConfig.quantize
    optimizer: str = TrainConfig.optimizer

    def __post_init__(self) -> None:
        """Refuse sizes of nothing."""
        for name in ("pairs_per_step", "tokens_per_batch", "max_length", "tokens_per_pair", "epochs"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} {getattr(self, name)}: expected a number above 0; leave it out or raise it"
                )

    @property
    def pair_tokens(self) -> float:
        """Tokens of a pair: as given, but no more than two conversations of the longest length have."""
        return min(self.tokens_per_pair, 2.0 * self.max_length)

    @property
    def row_tokens(self) -> int:
        """Longest row in tokens: the budget, or one pair of two full-length conversations where that is more."""
        return 128 * math.ceil(max(self.tokens_per_batch, 2 * self.max_length) / 128)

    def micro_batches(self, gpus: int) -> int:
        """Micro-batches per step on each GPU.

        Args:
            gpus: number of GPUs.
        """
        return max(1, math.ceil(self.pairs_per_step * self.pair_tokens / (gpus * self.tokens_per_batch)))
