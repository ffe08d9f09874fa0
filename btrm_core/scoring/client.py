"""Rewards for a trainer's program: from a model directory in this process, or from a `btrm serve` somewhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import httpx

from btrm_core.chat import Conversation
from btrm_core.errors import BtrmError, DataError, first_line
from btrm_core.model import reward_scale
from btrm_core.scoring.responses import Responses
from btrm_core.scoring.scorer import Scorer

TRIES, LONGEST_WAIT = 16, 30.0
AGAIN = frozenset({408, 500, 502, 503, 504})
"""Statuses after which asking again may help."""


class AsyncClient:
    """Asks a `btrm serve` for rewards, and again while its queue is full.

    Args:
        url: where it listens, such as http://127.0.0.1:8080.
        token: its bearer token.
        timeout: seconds for one answer.
        tries: how often to ask before giving up.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 180.0, tries: int = TRIES) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._tries = tries

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def rewards(self, conversations: Sequence[Conversation], *, normalize: bool = False) -> list[float]:
        """Return the rewards of finished conversations.

        Args:
            conversations: each a list of messages that ends with the response; all go in one request.
            normalize: return standard deviations from the mean of the model's reference set.

        Raises:
            DataError: one cannot be scored.
            BtrmError: the server cannot be reached, or refuses.
        """
        items = [{"messages": list(conversation)} for conversation in conversations]
        return [row[0] for row in await self._rewards(items, normalize)]

    async def group_rewards(self, groups: Sequence[Responses], *, normalize: bool = False) -> list[list[float]]:
        """Return the rewards of N responses to each prompt.

        Args:
            groups: prompts as messages, each with the texts of its responses; all go in one request.
            normalize: return standard deviations from the mean of the model's reference set.

        Raises:
            DataError: a response cannot be scored.
            BtrmError: the server cannot be reached, or refuses.
        """
        return await self._rewards([{"prompt": list(p), "responses": list(r)} for p, r in groups], normalize)

    async def _rewards(self, items: list[dict[str, Any]], normalize: bool) -> list[list[float]]:
        if not items:
            return []
        found = await self._post("/v1/rewards", {"items": items, "normalize": normalize})
        for number, errors in enumerate(found["errors"]):
            if error := next((error for error in errors if error), None):
                raise DataError(f"item {number + 1} of {len(items)}: {error}")
        rewards: list[list[float]] = found["normalized" if normalize else "rewards"]
        return rewards

    async def _post(self, path: str, body: Any) -> Any:
        problem = ""
        for attempt in range(self._tries):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                response = await self._client.post(path, json=body)
            except httpx.HTTPError as error:
                problem = first_line(error)
                continue
            if response.is_success:
                return response.json()
            problem = f"status {response.status_code}, {response.text[:300]}"
            if response.status_code not in AGAIN:
                break
        raise BtrmError(f"{self._client.base_url}{path} gives no rewards: {problem}")


def trl_reward_func(model: str, *, normalize: bool = False, **options: Any) -> Callable[..., Any]:
    """Return a function for `reward_funcs` of TRL's GRPOTrainer and RLOOTrainer.

    Prompts may be lists of messages or plain text, completions likewise; whatever cannot be scored gets None, which TRL
    leaves out.

    Args:
        model: a model directory, which is loaded here, or the URL of a `btrm serve`.
        normalize: rewards in standard deviations of the model's reference set.
        options: of `Scorer`, or of `AsyncClient`.

    Raises:
        CheckpointError: normalised rewards are asked for, and the model directory holds no calibration.
    """
    if model.startswith(("http://", "https://")):

        async def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
            async with AsyncClient(model, **options) as client:
                groups = _groups(prompts, completions)
                return [row[0] for row in await client.group_rewards(groups, normalize=normalize)]

        reward.__name__ = "btrm_reward"
        return reward
    scorer = Scorer(model, **options)
    mean, std = reward_scale(scorer.manifest, scorer.directory) if normalize else (0.0, 1.0)

    def local(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        found = [one.rewards[0] for one in scorer.score(_groups(prompts, completions))]
        return [None if reward is None else (reward - mean) / std for reward in found]

    local.__name__ = "btrm_reward"
    return local


def _groups(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Responses]:
    """Prompts and completions as TRL passes them, conversational or plain."""
    groups: list[Responses] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(completion, str):
            groups.append((asked, [completion]))
        else:
            *before, last = completion
            groups.append(([*asked, *before], [last["content"]]))
    return groups
