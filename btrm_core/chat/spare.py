"""A prompt with several responses of which some cannot be encoded: the others are."""

from __future__ import annotations

from collections.abc import Sequence

from btrm_core.chat.format import ChatFormat, Conversation, EncodedResponses


def spare(
    chat: ChatFormat, prompt: Conversation, responses: Sequence[str], max_length: int | None
) -> tuple[EncodedResponses, tuple[str | None, ...]]:
    """Encode the responses of a failed group that do not fail: a bad one must not cost the others.

    Args:
        chat: how conversations become ids.
        prompt: the messages before the response; may be empty.
        responses: texts of the assistant.
        max_length: longest conversation in tokens; None is the checkpoint's own maximum.

    Returns:
        The ids of the good ones, in their order, and an error or None for every response.
    """
    errors = tuple(chat.encode_group(prompt, [response], max_length).error for response in responses)
    good = [response for response, error in zip(responses, errors, strict=True) if error is None]
    result = chat.encode_group(prompt, good or responses, max_length)
    return result, tuple(error or result.error for error in errors)
