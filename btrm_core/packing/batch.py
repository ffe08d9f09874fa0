"""What the reward model is called with, and how it comes to a device.

Shape letters as in `rows`. Loads torch for types alone: it only moves tensors that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from btrm_core.packing.visibility import Visibility


@dataclass
class Batch:
    """What the reward model is called with: one packed row, or padded lines, as tensors.

    Attributes:
        input_ids: [B, T] int64; B is 1 for a packed row.
        position_ids: [B, T] int64.
        attention_mask: [B, T] int64 for padded lines, None for a packed row.
        visibility: who sees whom in a packed row (`visibility.Visibility`), None for padded lines.
        reward_index: [S] int64, offsets into the flattened B*T tokens, trees in order.
        group_sizes: K of every tree; they sum to S.
        computed: tokens computed, padding included.
        useful: tokens of all sequences, each counted by itself.
        shared: tokens of `useful` that are not computed again.
        lengths: tokens of each padded line, known without asking the device; empty for a packed row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    visibility: Visibility | None
    reward_index: torch.Tensor
    group_sizes: tuple[int, ...]
    computed: int
    useful: int
    shared: int
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on a device.

        Args:
            device: where the tensors shall lie.
            non_blocking: do not wait for copies from pinned memory.
        """
        return self._moved(lambda data: data.to(device, non_blocking=non_blocking))

    def sent_to(self, device: torch.device) -> Batch:
        """Return the batch on a device, through page-locked memory where the host would wait for a GPU otherwise.

        Args:
            device: where the tensors shall lie.
        """
        batch = self.pin_memory() if device.type == "cuda" else self
        return batch.to(device, non_blocking=True)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (a `DataLoader` with `pin_memory` calls this)."""
        return self._moved(lambda data: data.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> Batch:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            visibility=None if self.visibility is None else move(self.visibility),
            reward_index=move(self.reward_index),
        )
