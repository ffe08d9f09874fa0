"""The names under which published data keeps answers, prompts and scores: one table each, the first that is there wins.

Decides: which columns are understood without `--map`. What they mean is said in `formats.py` and `preference.py`.
"""

from __future__ import annotations

import itertools

PROMPT = (
    *(
        "orig_instruction",
        "prompt",
        "instruction",
        "question",
        "query",
        "context",
        "conversations",
        "conversation",
        "messages",
        "input",
    ),
    *("trajectory", "contents", "dialogue", "problem", "post", "user_prompt", "history", "info"),
)
"""Where the prompt may stand; `history` if it is text, `info` if it holds a post."""
SYSTEM = ("system", "system_prompt", "system_message", "sys_prompt", "systemPrompt", "custom_system_prompt")
PAIR = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("chosen_conversation", "rejected_conversation"),
    ("chosen_completion", "rejected_completion"),
    ("chosen_answer", "rejected_answer"),
    ("chosen_text", "rejected_text"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better_response", "worse_response"),
    ("winning_response", "losing_response"),
    ("response_w", "response_l"),
    ("response_j", "response_k"),
)
"""A preferred answer and another."""
LISTS = ("responses", "completions", "answers", "generations", "candidates")
SINGLE = ("response", "completion", "answer", "output")
WHOLE = ("messages", "conversations", "conversation")
TEXT = ("response", "text", "content", "answer", "completion", "output")
"""Where an answer that is an object keeps its text."""
SCORES = (
    *("overall_score", "score", "rating", "fine-grained_score", "helpfulness", "pm_score", "reward", "reward_score"),
    "rm_score",
)
_STEMS = ("response", "answer", "completion", "output", "conversation", "conv", "generation", "candidate", "summary")
VERSUS = dict(
    [
        (f"{stem}{between}{first}", f"{stem}{between}{second}")
        for (first, second), between, stem in itertools.product(
            (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2")), ("_", ""), ("human_ref", "orig_response", *_STEMS)
        )
    ]
)
"""Two answers, and elsewhere in the row which is the better one: `response_a` and `response_b`, `output_1` and ..."""
ANSWERS = frozenset(itertools.chain(*PAIR, *VERSUS.items(), LISTS, SINGLE, ["summaries"]))
"""Every key that says what the answers are."""
