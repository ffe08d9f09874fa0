"""What is scored, a prompt with responses, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from btrm_core.chat import ChatFormat, Conversation, EncodedResponses, spare
from btrm_core.data import RowError, RowView, plain, read_messages, shown
from btrm_core.errors import ConfigError, DataError, first_line

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


def as_messages(value: Any, where: str) -> Conversation:
    """Messages in any form that rows of training may have, as those with a role and a text alone.

    Args:
        value: a list of messages, also of numpy; or a text, which is a user's.
        where: what it is called, for the error.

    Raises:
        DataError: it cannot be read as messages; names the place and the value.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    value = plain(value)
    if isinstance(value, list) and all(_is_plain(message) for message in value):
        return value
    try:
        return read_messages(value, where, RowView({}))
    except RowError as error:
        raise DataError(str(error)) from error


def _is_plain(message: Any) -> bool:
    return isinstance(message, dict) and message.keys() == {"role", "content"} and isinstance(message["content"], str)


def plain_groups(groups: Iterable[Any]) -> list[Responses]:
    """Prompts and their responses as lists, also from the arrays of numpy and the columns of pandas.

    Args:
        groups: a prompt (messages in any sequence, or a user's text) and its responses (texts in any sequence) each.

    Raises:
        DataError: one is no such pair, its prompt cannot be read as messages, or its responses are no list.
    """
    made: list[Responses] = []
    for number, group in enumerate(groups, start=1):
        if not isinstance(group, Sequence) or isinstance(group, str) or len(group) != 2:
            raise DataError(f"group {number} is {shown(plain(group))}, expected a prompt and a list of its responses")
        prompt, texts = group[0], plain(group[1])
        if not isinstance(texts, list):
            raise DataError(f"group {number}: the responses are {shown(texts)}, expected a list of texts")
        try:
            made.append((as_messages(prompt, "prompt"), texts))
        except DataError as error:
            raise DataError(f"group {number}: {error}") from error
    return made


def as_responses(conversation: Conversation, index: int) -> Responses:
    """A finished conversation as a prompt with one response.

    Args:
        conversation: Its messages.
        index: Its place among those to score, for the error.

    Raises:
        DataError: it is no list of messages that ends with the assistant's.
    """
    if isinstance(conversation, str | dict):
        raise DataError(
            f"conversation {index + 1} is {shown(conversation)}, expected a list of messages; "
            "one conversation alone stands in a list, too"
        )
    try:
        messages = as_messages(conversation, "messages")
    except DataError as error:
        raise DataError(f"conversation {index + 1}: {error}") from error
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"conversation {index + 1}: expected a list of messages that ends with the assistant's")
    return messages[:-1], [messages[-1]["content"]]


def as_pairs(prompts: Any, chosen: Any, rejected: Any) -> list[Responses]:
    """Prompts with two responses each, from three columns.

    Args:
        prompts: messages each.
        chosen: the first response to each.
        rejected: the second.

    Raises:
        DataError: one is a text and no column, or they are of different lengths.
    """
    columns = {"prompts": prompts, "chosen": chosen, "rejected": rejected}
    if wrong := next((name for name, column in columns.items() if isinstance(column, str)), None):
        raise DataError(f"{wrong} is the text {shown(columns[wrong])}; expected a list, with one for each pair")
    asked, first, second = (list(column) for column in columns.values())
    if not len(asked) == len(first) == len(second):
        raise DataError(f"{len(asked)} prompts, {len(first)} chosen and {len(second)} rejected do not make pairs")
    return [(prompt, [one, other]) for prompt, one, other in zip(asked, first, second, strict=True)]


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


def usable_device(name: str | int | torch.device | None) -> torch.device:
    """The device that a caller means, tried.

    Args:
        name: as torch names it; None takes the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        hint = "leave it out to take what is there"
        raise ConfigError(f"device {name!r} cannot be used: {first_line(error)}; {hint}") from error
