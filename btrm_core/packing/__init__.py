"""Packing: how trees of tokens become rows, and rows the steps of every rank.

NumPy throughout; tensors are made at the very end. Loads no torch until a row becomes a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from btrm_core.packing.batch import Batch
from btrm_core.packing.bundles import Bundle, bundles, divided, packed_rows, padded_rows
from btrm_core.packing.cuts import KEYS_PER_TOKEN, room, split
from btrm_core.packing.forest import Forest, PairPlaces
from btrm_core.packing.forms import PADDED, RowForm, collate, row_form, row_multiple
from btrm_core.packing.rows import pack_row, pad_rows
from btrm_core.packing.steps import GROUP_BY, EpochPlan, StepBudget, plan_epoch
from btrm_core.packing.trees import Tree, alone, common, grow, part

if TYPE_CHECKING:
    from btrm_core.packing.visibility import Visibility

__all__ = [
    "GROUP_BY",
    "KEYS_PER_TOKEN",
    "PADDED",
    "Batch",
    "Bundle",
    "EpochPlan",
    "Forest",
    "PairPlaces",
    "RowForm",
    "StepBudget",
    "Tree",
    "Visibility",
    "alone",
    "bundles",
    "collate",
    "common",
    "divided",
    "grow",
    "pack_row",
    "packed_rows",
    "pad_rows",
    "padded_rows",
    "part",
    "plan_epoch",
    "room",
    "row_form",
    "row_multiple",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "Visibility":  # the one part that is made of tensors
        from btrm_core.packing.visibility import Visibility

        return Visibility
    raise AttributeError(f"module 'btrm_core.packing' has no attribute {name!r}")
