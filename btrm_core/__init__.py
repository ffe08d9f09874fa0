"""btrm: an exact, packed, prefix-shared Bradley-Terry reward-model trainer whose model families are plugins.

What the author of a family imports is here (`hookimpl`, `PadToken`, `Recipe`, `TinyShape`, `require_tokens`,
`rope_theta`), and what a script imports (`train`, `RunConfig`, `Scorer`,
`AsyncClient`, `trl_reward_func`). The contract of each hook is its docstring in
`btrm_core.families.hookspecs`. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from btrm_core.families.hookspecs import PadToken, Recipe, TinyShape, hookimpl, require_tokens, rope_theta

if TYPE_CHECKING:
    from btrm_core.run import train
    from btrm_core.scoring import AsyncClient, Scorer, trl_reward_func
    from btrm_core.settings import RunConfig

    __version__: str

__all__ = [
    "AsyncClient",
    "PadToken",
    "Recipe",
    "RunConfig",
    "Scorer",
    "TinyShape",
    "__version__",
    "hookimpl",
    "require_tokens",
    "rope_theta",
    "train",
    "trl_reward_func",
]

_LATER = {
    "AsyncClient": "btrm_core.scoring",
    "RunConfig": "btrm_core.settings",
    "Scorer": "btrm_core.scoring",
    "train": "btrm_core.run",
    "trl_reward_func": "btrm_core.scoring",
}
"""Names that need torch, or are no concern of a family: loaded when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    # Reading a distribution's metadata costs a few milliseconds that most imports do not need.
    if name == "__version__":
        from importlib.metadata import version

        return version("btrm")
    raise AttributeError(f"module 'btrm_core' has no attribute {name!r}")
