"""Data: from what a user names to checked pairs and their stored tokens.

Loads no torch.
"""

from btrm_core.data import curate
from btrm_core.data.cache import cache_root
from btrm_core.data.convert import ROLES, Message, Pair, convert_row
from btrm_core.data.formats import RowError, Ties, WhichPairs, shown
from btrm_core.data.issues import PROMPT_IN_EVALUATION, IssueReport
from btrm_core.data.pairs import PairData, drop_overlap, load_pairs, raw_rows, split_held_out
from btrm_core.data.quality import (
    Finding,
    contradictory_pairs,
    duplicate_pairs,
    duplicate_prompts,
    format_inspection,
    inspect_pairs,
    longer_wins_characters,
)
from btrm_core.data.sample import sample_path
from btrm_core.data.store import TokenStore, encode_pairs, tokenizer_fingerprint

__all__ = [
    "PROMPT_IN_EVALUATION",
    "ROLES",
    "Finding",
    "IssueReport",
    "Message",
    "Pair",
    "PairData",
    "RowError",
    "Ties",
    "TokenStore",
    "WhichPairs",
    "cache_root",
    "contradictory_pairs",
    "convert_row",
    "curate",
    "drop_overlap",
    "duplicate_pairs",
    "duplicate_prompts",
    "encode_pairs",
    "format_inspection",
    "inspect_pairs",
    "load_pairs",
    "longer_wins_characters",
    "raw_rows",
    "sample_path",
    "shown",
    "split_held_out",
    "tokenizer_fingerprint",
]
