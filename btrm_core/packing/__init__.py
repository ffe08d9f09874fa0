"""Packing: how trees of tokens become rows, and rows the steps of every rank.

NumPy throughout; tensors are made at the very end. Loads no torch until a row becomes a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from btrm_core.packing.bundles import Bundle, bundles, divided, packed_rows, padded_rows
from btrm_core.packing.groups import Lengths
from btrm_core.packing.rows import PADDED, Batch, RowForm, collate, pack_row, pad_rows, row_form, row_multiple
from btrm_core.packing.steps import EpochPlan, make_plan, plan
from btrm_core.packing.trees import Tree, alone, common, grow, part, room, split

if TYPE_CHECKING:
    from btrm_core.packing.visibility import Visibility

__all__ = [
    "PADDED",
    "Batch",
    "Bundle",
    "EpochPlan",
    "Lengths",
    "RowForm",
    "Tree",
    "Visibility",
    "alone",
    "bundles",
    "collate",
    "common",
    "divided",
    "grow",
    "make_plan",
    "pack_row",
    "packed_rows",
    "pad_rows",
    "padded_rows",
    "part",
    "plan",
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
