"""Chat: what the ids of a conversation are.

Template, tokenizer and maximum length together decide them; nothing else in btrm turns text into ids.
"""

from btrm_core.chat.format import ChatFormat, Conversation, EncodedResponses, prepare_chat, settle
from btrm_core.chat.spare import spare
from btrm_core.chat.templates import ONE, SYSTEM, TWO, begins_once, opens_turns
from btrm_core.chat.tokenizers import (
    Encoder,
    fast_backend,
    free_pad,
    install_pad,
    self_contained,
    tokenizer_fingerprint,
)

__all__ = [
    "ONE",
    "SYSTEM",
    "TWO",
    "ChatFormat",
    "Conversation",
    "EncodedResponses",
    "Encoder",
    "begins_once",
    "fast_backend",
    "free_pad",
    "install_pad",
    "opens_turns",
    "prepare_chat",
    "self_contained",
    "settle",
    "spare",
    "tokenizer_fingerprint",
]
