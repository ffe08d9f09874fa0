"""btrm: an exact, packed, prefix-shared Bradley-Terry reward-model trainer whose model families are plugins.

What the author of a family imports is here (`hookimpl`, `PadToken`, `Recipe`, `TinyShape`); the contract of each hook
is its docstring in `btrm_core.hookspecs`. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from btrm_core.hookspecs import PadToken, Recipe, TinyShape, hookimpl

__all__ = ["PadToken", "Recipe", "TinyShape", "__version__", "hookimpl"]


def __getattr__(name: str) -> str:
    # Reading a distribution's metadata costs a few milliseconds that most imports do not need.
    if name == "__version__":
        from importlib.metadata import version

        return version("btrm")
    raise AttributeError(f"module 'btrm_core' has no attribute {name!r}")
