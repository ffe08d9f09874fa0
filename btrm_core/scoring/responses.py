"""What is scored, a prompt with responses, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from btrm_core.chat import ChatFormat, Conversation, EncodedResponses, spare
from btrm_core.data import plain
from btrm_core.errors import DataError

Responses = tuple[Conversation, Sequence[str]]
"""A prompt (a list of messages) and the assistant's responses to it."""


Encoded = tuple[EncodedResponses, tuple[str | None, ...]]


@dataclass(frozen=True)
class Rewards:
    """What became of one prompt and its responses.

    Attributes:
        rewards: one per response, None where `errors` says why there is none.
        errors: one per response, None where there is a reward.
        truncated: whether the prompt was cut to keep the conversations within the maximum length.
    """

    rewards: tuple[float | None, ...]
    errors: tuple[str | None, ...]
    truncated: bool


def plain_responses(prompt: Any, responses: Any) -> Responses:
    """A prompt and its responses as lists, also from the arrays of numpy and the columns of pandas.

    Args:
        prompt: messages in any sequence.
        responses: texts in any sequence; other things in it become text.
    """
    if not isinstance(prompt, list):
        prompt = plain(prompt)
    return prompt, responses if isinstance(responses, list) else [str(response) for response in responses]


def as_responses(conversation: Conversation, index: int) -> Responses:
    """A finished conversation as a prompt with one response.

    Args:
        conversation: Its messages.
        index: Its place among those to score, for the error.

    Raises:
        DataError: it does not end with the assistant's message.
    """
    conversation = conversation if isinstance(conversation, list) else plain(conversation)
    if not conversation or conversation[-1].get("role") != "assistant":
        raise DataError(f"conversation {index + 1}: expected a list of messages that ends with the assistant's")
    return conversation[:-1], [conversation[-1]["content"]]


def encoded_responses(chat: ChatFormat, groups: Sequence[Responses], max_length: int) -> list[Encoded]:
    """Return ids and one error or None per response; the ids are those of the responses without error, in order.

    Args:
        chat: the model's.
        groups: prompt and responses each.
        max_length: tokens of the longest conversation.
    """
    encoded: list[Encoded] = []
    for (prompt, responses), result in zip(groups, chat.encode_groups(groups, max_length), strict=True):
        errors: tuple[str | None, ...] = (result.error,) * len(responses)
        if result.error and len(responses) > 1:
            result, errors = spare(chat, prompt, responses, max_length)
        encoded.append((result, errors))
    return encoded


def begin_alike(groups: Sequence[Responses], encoded: Sequence[Encoded]) -> list[Hashable]:
    """One key per sequence of encoded groups, equal where prompts are equal and cut alike.

    Args:
        groups: prompt and responses each.
        encoded: what `encoded_responses` made of them.
    """
    return [
        (*(tuple(message.items()) for message in prompt), result.dropped_turns, result.cut_characters)
        for (prompt, _), (result, _) in zip(groups, encoded, strict=True)
        for _ in result.sequences
    ]


def rewards_of(encoded: Encoded, values: Iterator[float]) -> Rewards:
    """Put rewards in the places of the responses without error; `values` goes on where this group ends.

    Args:
        encoded: a group's ids and one error or None per response.
        values: rewards of the sequences without error, of this group and those after it.

    Returns:
        None and a reason in the place of every response without a finite reward.
    """
    result, errors = encoded
    rewards: list[float | None] = []
    reasons = list(errors)
    for place, error in enumerate(errors):
        reward = next(values) if error is None else None
        if reward is not None and not math.isfinite(reward):
            reward, reasons[place] = None, f"the model's reward is {reward}, not a finite number"
        rewards.append(reward)
    return Rewards(tuple(rewards), tuple(reasons), bool(result.dropped_turns or result.cut_characters))


def reward_array(rewards: Sequence[float | None]) -> np.ndarray:
    """Return rewards as float32 [S], NaN where there is none.

    Args:
        rewards: S of them.
    """
    return np.array(rewards, dtype=np.float32)


def length_limit(config: Any, tokenizer: Any) -> int:
    """The longest conversation of a model whose `btrm.json` says none: what its positions and tokenizer allow.

    Args:
        config: of the model.
        tokenizer: its own.
    """
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length)
    return min((int(limit) for limit in limits if limit), default=1 << 30)
