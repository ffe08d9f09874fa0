"""Which form the rows of a micro-batch have: shared, packed or padded, as `train.layout` and the kernel want it.

Decides what lengths are rounded up to, and that a kernel gets the rows it computes. How they are laid out is `rows`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from btrm_core.packing.batch import Batch
from btrm_core.packing.rows import pack_row, pad_rows
from btrm_core.packing.trees import BLOCK, Tree

PADDED = "padded"
"""The kernel name of padded batches through the model's own attention: the fallback."""


@dataclass(frozen=True)
class RowForm:
    """How the pairs of a micro-batch are laid out: shared or packed rows for a kernel, or padded lines.

    Attributes:
        layout: "shared", "packed" or "padded".
        kernel: one of `KERNELS`, or `PADDED` for padded lines.
        multiple_of: what lengths are rounded up to, in tokens.
        pad_id: id of the tokens that fill up.
    """

    layout: str
    kernel: str
    multiple_of: int
    pad_id: int


def row_form(layout: str, kernel: str, device_type: str, pad_id: int) -> RowForm:
    """The form of a layout for a model's kernel on a device.

    Args:
        layout: "shared", "packed" or "padded".
        kernel: the kernel that the model computes packed rows with; padded lines have none.
        device_type: "cuda", "cpu", ...
        pad_id: id of the tokens that fill up.
    """
    kernel = PADDED if layout == "padded" else kernel
    return RowForm(layout, kernel, row_multiple(kernel, device_type), pad_id)


def row_multiple(kernel: str, device_type: str) -> int:
    """What row lengths are rounded up to: 128 where kernels or allocators profit, else 1.

    FlexAttention must have multiples of 128 (other lengths gave NaN gradients with both a block mask
    and a score function); on a GPU few distinct lengths keep memory from fragmenting.

    Args:
        kernel: one of `KERNELS`, or `PADDED`.
        device_type: "cuda", "cpu", ...
    """
    return BLOCK if kernel == "flex" or (device_type == "cuda" and kernel != PADDED) else 1


def collate(
    trees: Sequence[Tree],
    *,
    kernel: str,
    share_prefix: bool = True,
    multiple_of: int = 1,
    pad_id: int = 0,
) -> Batch:
    """Build one micro-batch for a kernel; pure, for loader workers.

    Args:
        trees: the micro-batch's trees, possibly none.
        kernel: one of `KERNELS` for a packed row, `PADDED` for padded lines.
        share_prefix: compute shared beginnings once (packed rows only).
        multiple_of: round lengths up to this (see `row_multiple`).
        pad_id: id of the tokens that fill up.

    Returns:
        The batch, on the host.
    """
    if kernel == PADDED:
        return pad_rows(trees, pad_id=pad_id, multiple_of=multiple_of).batch()
    return pack_row(trees, share_prefix=share_prefix, multiple_of=multiple_of, pad_id=pad_id).batch()
