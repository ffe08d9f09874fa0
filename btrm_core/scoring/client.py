"""Rewards for a trainer's program: from a model directory in this process, or from a `btrm serve` somewhere else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import httpx

from btrm_core.chat import Conversation
from btrm_core.errors import BtrmError, ConfigError, DataError, first_line
from btrm_core.model import reward_scale
from btrm_core.scoring.responses import Responses, as_responses, plain_groups
from btrm_core.scoring.scorer import Scorer

TRIES, LONGEST_WAIT = 16, 30.0
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which asking again may help; 429 is that of proxies."""
Answer = tuple[list[float | None], list[str | None]]
"""Rewards of the responses to a prompt, and why one is missing."""


class TooLarge(BtrmError):
    """A request over a limit of the server's, of which a part may be below it."""


class AsyncClient:
    """Asks a `btrm serve` for rewards, and again while its queue is full.

    Args:
        url: where it listens, such as http://127.0.0.1:8080.
        token: its bearer token.
        timeout: seconds for one answer.
        tries: how often to ask before giving up.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 180.0, tries: int = TRIES) -> None:
        headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the server's URL is {url!r}; expected one such as http://127.0.0.1:8080")
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
            conversations: each a list of messages that ends with the response; they go in one request, or in as many
                as the server's limits make of it.
            normalize: return standard deviations from the mean of the model's reference set.

        Raises:
            DataError: one cannot be scored.
            BtrmError: the server cannot be reached, or refuses.
        """
        groups = [as_responses(conversation, index) for index, conversation in enumerate(conversations)]
        return [row[0] for row in await self._rewards(groups, normalize)]

    async def group_rewards(self, groups: Sequence[Responses], *, normalize: bool = False) -> list[list[float]]:
        """Return the rewards of N responses to each prompt.

        Args:
            groups: prompts as messages, each with the texts of its responses.
            normalize: return standard deviations from the mean of the model's reference set.

        Raises:
            DataError: a response cannot be scored.
            BtrmError: the server cannot be reached, or refuses.
        """
        return await self._rewards(plain_groups(groups), normalize)

    async def _rewards(self, groups: Sequence[Responses], normalize: bool) -> list[list[float]]:
        answers = await self.answers(groups, normalize=normalize)
        for number, (_, errors) in enumerate(answers):
            if error := next((error for error in errors if error), None):
                raise DataError(f"item {number + 1} of {len(answers)}: {error}")
        return [[reward for reward in rewards if reward is not None] for rewards, _ in answers]

    async def answers(self, groups: Sequence[Responses], *, normalize: bool = False) -> list[Answer]:
        """Return what the server says of each group: its rewards, None where an error says why.

        Args:
            groups: prompts as messages, each with the texts of its responses.
            normalize: return standard deviations from the mean of the model's reference set.

        Raises:
            BtrmError: the server cannot be reached, refuses, or is no `btrm serve`.
        """
        if not groups:
            return []
        items = [{"prompt": prompt, "responses": list(responses)} for prompt, responses in groups]
        try:
            found = await self._post("/v1/rewards", {"items": items, "normalize": normalize})
            return list(zip(found["normalized" if normalize else "rewards"], found["errors"], strict=True))
        except TooLarge:
            if len(groups) > 1:
                parts = groups[: len(groups) // 2], groups[len(groups) // 2 :]
                return [answer for part in parts for answer in await self.answers(part, normalize=normalize)]
            (prompt, responses), middle = groups[0], len(groups[0][1]) // 2
            if not middle:
                raise
            halves = [(prompt, responses[:middle]), (prompt, responses[middle:])]
            one, other = await self.answers(halves, normalize=normalize)
            return [(one[0] + other[0], one[1] + other[1])]
        except (KeyError, TypeError, ValueError) as error:
            raise BtrmError(
                f"{self._client.base_url} does not answer as `btrm serve` does: {first_line(error)}"
            ) from error

    async def _post(self, path: str, body: Any) -> Any:
        problem, sent = "", json.dumps(body).encode("ascii")  # also broken Unicode, which costs its own reward alone
        for attempt in range(self._tries):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                response = await self._client.post(path, content=sent, headers={"Content-Type": "application/json"})
            except httpx.HTTPError as error:
                problem = first_line(error)
                continue
            if response.is_success:
                return response.json()
            problem = f"status {response.status_code}, {response.text[:300]}"
            if response.status_code == 413 or '"too_large"' in problem:
                raise TooLarge(f"{self._client.base_url}{path} gives no rewards: {problem}")
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

        async def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
            async with AsyncClient(model, **options) as client:
                answers = await client.answers(_groups(prompts, completions), normalize=normalize)
                return [rewards[0] for rewards, _ in answers]

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
