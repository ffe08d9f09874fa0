"""Trees of messages, as OpenAssistant publishes them: a prompt whose replies have ranks and replies of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def branches(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row for every message of a tree that has two ranked answers or more; None for any other row.

    Args:
        row: a row as read; the tree stands under `prompt`, or is the row itself.

    Returns:
        Rows of a prompt, its responses and their ranks, the best first; empty for a tree without such a message.

    >>> reply = {"role": "assistant", "text": "a", "rank": 0, "replies": []}
    >>> branches({"prompt": {"role": "prompter", "text": "q", "replies": [reply, {**reply, "rank": 1}]}})[0]["ranks"]
    [0, 1]
    """
    root = row.get("prompt") if isinstance(row.get("prompt"), dict) else row
    if not isinstance(root, Mapping) or not isinstance(root.get("replies"), list) or "text" not in root:
        return None
    return list(_below(root))


def _below(root: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    waiting: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = [(root, [])]
    while waiting:  # a tree may be deeper than Python's own calls
        node, before = waiting.pop()
        said = [*before, {"role": node.get("role"), "content": node.get("text")}]
        replies = node.get("replies")
        following = [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
        ranked = [reply for reply in following if reply.get("role") == "assistant" and reply.get("rank") is not None]
        if len(ranked) > 1:
            ranked.sort(key=lambda reply: str(reply["rank"]).zfill(9))
            responses, ranks = ([reply.get(key) for reply in ranked] for key in ("text", "rank"))
            yield {"id": node.get("message_id"), "prompt": said, "responses": responses, "ranks": ranks}
        waiting += [(reply, said) for reply in reversed(following)]
