"""Leakage: whether a reward depends on nothing but its own sequence, tested exactly; and what follows if it does not.

Made for every way of laying out sequences alike: packed rows, padded lines, one sequence at a time.
"""

from btrm_core.model.leakage.exact import Leak, examine
from btrm_core.model.leakage.positions import (
    check_max_length,
    frequencies_kept,
    position_limit,
    positions_depend_on_batch,
    positions_problem,
    text_modules,
    towers,
)
from btrm_core.model.leakage.structure import architectures, require_head_class, token_mixers, without_dropout
from btrm_core.model.leakage.trust import Trust, Use, trusted

__all__ = [
    "Leak",
    "Trust",
    "Use",
    "architectures",
    "check_max_length",
    "examine",
    "frequencies_kept",
    "position_limit",
    "positions_depend_on_batch",
    "positions_problem",
    "require_head_class",
    "text_modules",
    "token_mixers",
    "towers",
    "trusted",
    "without_dropout",
]
