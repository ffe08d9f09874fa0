"""What `btrm plan` assumes is trained: how much, in which steps, and how much of it is computed once only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from btrm_core.data import Sharing
from btrm_core.errors import ConfigError
from btrm_core.families import RECIPE
from btrm_core.packing import KEYS_PER_TOKEN
from btrm_core.preflight.plan.hardware import ASSUMED_MFU, ASSUMED_MFU_SOURCE
from btrm_core.settings import DistributedConfig, ModelConfig, TrainConfig

ASSUMED_TOKENS_PER_PAIR = 750.0


KV_COPIES = 1.6
"""Keys per token of a row, where nothing is known of the data: attention gathers a shared beginning for every
conversation that goes on from it. On HH, 392 tokens of a pair's conversations are 243 tokens of rows."""


CHARACTERS_PER_TOKEN = 4.0
"""Of English text; what a template adds is not counted."""


@dataclass(frozen=True)
class Workload:
    """What is trained and how it is cut into steps.

    Attributes:
        model: the name that the recommended command gives to `--model`.
        pairs_per_step: pairs per optimizer step, over all GPUs.
        tokens_per_batch: token budget of a GPU.
        max_length: longest conversation in tokens.
        tokens_per_pair: mean tokens of a pair with its common prefix counted once.
        pairs: pairs of the training data, for the hours.
        keys_per_token: keys that attention gathers per token of a row.
        shared: share of the tokens of separate passes that rows do not compute again, 0 to 1; None: not known.
        epochs: passes over the pairs.
        lora_rank: train adapters of this rank on every linear layer instead of all weights.
        bf16: compute type bf16; False is fp32.
        mfu: model FLOPs utilisation, 0 to 1.
        mfu_source: where that figure comes from.
        quantize: none, or 4bit for frozen weights in 4 bits under the adapters.
        optimizer: adamw, adamw-8bit or adamw-8bit-paged.
        sequence_parallel: how many GPUs share the tokens of each row.
    """

    model: str = "MODEL"
    pairs_per_step: int = RECIPE.pairs_per_step or 64
    tokens_per_batch: int = TrainConfig.tokens_per_batch
    max_length: int = RECIPE.max_length or 2048
    tokens_per_pair: float = ASSUMED_TOKENS_PER_PAIR
    pairs: int | None = None
    keys_per_token: float = KV_COPIES
    shared: float | None = None
    epochs: float = 1.0
    lora_rank: int | None = None
    bf16: bool = True
    mfu: float = ASSUMED_MFU
    mfu_source: str = ASSUMED_MFU_SOURCE
    quantize: str = ModelConfig.quantize
    optimizer: str = TrainConfig.optimizer
    sequence_parallel: int = DistributedConfig.sequence_parallel

    def __post_init__(self) -> None:
        """Refuse sizes of nothing."""
        sizes = ("pairs_per_step", "tokens_per_batch", "max_length", "tokens_per_pair", "epochs", "pairs", "lora_rank")
        for name in (*sizes, "sequence_parallel"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {value}: expected a number above 0; leave it out or raise it")

    @classmethod
    def of_data(cls, shared: Sharing, **given: Any) -> Workload:
        """A workload on data whose texts were measured.

        Args:
            shared: what was measured.
            **given: fields that are known; they win.
        """
        characters = max(shared.once, 1)
        found = {
            "pairs": shared.pairs,
            "tokens_per_pair": max(1.0, characters / max(shared.pairs, 1) / CHARACTERS_PER_TOKEN),
            "keys_per_token": min(max(1.0, shared.keys / characters), float(KEYS_PER_TOKEN)),
            "shared": shared.saved,
        }
        return cls(**{**found, **given})

    @property
    def pair_tokens(self) -> float:
        """Tokens of a pair: as given, but no more than two conversations of the longest length have."""
        return min(self.tokens_per_pair, 2.0 * self.max_length)

    @property
    def row_tokens(self) -> int:
        """Longest row in tokens: the budget, or one pair of two full-length conversations where that is more.

        GPUs that share a row have one budget together.
        """
        return 128 * math.ceil(max(self.tokens_per_batch * self.sequence_parallel, 2 * self.max_length) / 128)

    def micro_batches(self, gpus: int) -> int:
        """Micro-batches per step on each GPU.

        Args:
            gpus: number of GPUs.
        """
        return max(1, math.ceil(self.pairs_per_step * self.pair_tokens / (gpus * self.tokens_per_batch)))
