"""The sample of preference pairs that comes with btrm."""

from __future__ import annotations

from importlib import resources


def sample_path(part: str) -> str:
    """Path of the bundled pairs: `train` or `held_out` (prompt-disjoint).

    Args:
        part: `train` or `held_out`; not checked.
    """
    return str(resources.files("btrm_core") / "data" / "sample" / f"{part}.jsonl")
