"""Data: from what a user names to checked pairs and their stored tokens.

Loads no torch.
"""

from btrm_core.data import curate
from btrm_core.data.convert import ROLES, Message, Pair, conversations_of, convert_row
from btrm_core.data.curate.held_out import drop_overlap, split_held_out
from btrm_core.data.formats import Ties, WhichPairs
from btrm_core.data.inputs.spec import parse_spec
from btrm_core.data.inputs.streams import PACKED, data_path, opened
from btrm_core.data.inputs.tables import parquet_file_rows, parquet_length
from btrm_core.data.issues import PROMPT_IN_EVALUATION, IssueReport, RowIssue, is_content
from btrm_core.data.pairs import PairData, load_evaluation, load_pairs, pairs_from_rows, raw_rows
from btrm_core.data.quality import (
    Finding,
    Sharing,
    contradictory_pairs,
    duplicate_pairs,
    duplicate_prompts,
    format_inspection,
    inspect_pairs,
    longer_wins_characters,
    sharing,
)
from btrm_core.data.readers import parse_json_line
from btrm_core.data.sample import sample_path
from btrm_core.data.shapes.messages import messages as read_messages
from btrm_core.data.shapes.messages import text_of
from btrm_core.data.shapes.named import FORMATS
from btrm_core.data.shapes.naming import Naming, parse_naming
from btrm_core.data.shapes.values import RowError, json_value, plain, shown
from btrm_core.data.shapes.view import RowView
from btrm_core.data.store import TokenStore, encode_pairs

__all__ = [
    "FORMATS",
    "PACKED",
    "PROMPT_IN_EVALUATION",
    "ROLES",
    "Finding",
    "IssueReport",
    "Message",
    "Naming",
    "Pair",
    "PairData",
    "RowError",
    "RowIssue",
    "RowView",
    "Sharing",
    "Ties",
    "TokenStore",
    "WhichPairs",
    "contradictory_pairs",
    "conversations_of",
    "convert_row",
    "curate",
    "data_path",
    "drop_overlap",
    "duplicate_pairs",
    "duplicate_prompts",
    "encode_pairs",
    "format_inspection",
    "inspect_pairs",
    "is_content",
    "json_value",
    "load_evaluation",
    "load_pairs",
    "longer_wins_characters",
    "opened",
    "pairs_from_rows",
    "parquet_file_rows",
    "parquet_length",
    "parse_json_line",
    "parse_naming",
    "parse_spec",
    "plain",
    "raw_rows",
    "read_messages",
    "sample_path",
    "sharing",
    "shown",
    "split_held_out",
    "text_of",
]
