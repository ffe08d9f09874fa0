"""btrm's own routes: rewards of conversations, comparisons, and what the model is."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

from btrm_core.data import RowView, text_of
from btrm_core.serving.limits import COMPARED, Refused, too_many
from btrm_core.serving.preparing import Prepared, Preparer
from btrm_core.serving.service import Answered, Service

router = APIRouter(tags=["btrm"])


async def service_of(request: Request) -> Service:
    """The service that a request's application stands for.

    Args:
        request: of an application that `create_app` made.
    """
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(service_of)]


Content = Annotated[str, BeforeValidator(lambda content: text_of(content, "content", RowView({})))]
"""Text, or parts of type text as OpenAI's clients send them, joined as rows of training are."""


class Turn(BaseModel):
    """A message of a conversation."""

    role: str = Field(description="system, user or assistant")
    content: Content


class Asked(BaseModel):
    """What btrm's own clients send: an unknown field is a slip, which would change the answer without a word."""

    model_config = ConfigDict(extra="forbid")


class Item(Asked):
    """One of: `messages` that end with the assistant's; a `prompt` with `responses`; `input_ids`; rendered `text`."""

    messages: list[Turn] | None = None
    prompt: str | list[Turn] | None = None
    responses: list[str] | None = None
    input_ids: list[StrictInt] | None = None
    text: str | None = Field(default=None, description="a whole conversation as the model's chat template writes it")

    @model_validator(mode="after")
    def _one_kind(self) -> Item:
        ways = [self.messages, self.prompt, self.input_ids, self.text]
        if sum(way is not None for way in ways) != 1 or (self.prompt is None) != (self.responses is None):
            raise ValueError("expected one of: messages, prompt with responses, input_ids, text")
        if self.responses == []:
            raise ValueError("expected at least one response")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "assistant"):
            raise ValueError("expected messages that end with the assistant's")
        return self

    @property
    def count(self) -> int:
        """Conversations in it."""
        return len(self.responses) if self.responses is not None else 1

    def prepare(self, preparer: Preparer, truncate: bool | None, which: str) -> Prepared:
        """Make its ids.

        Args:
            preparer: of the model that is served.
            truncate: whether to cut what is too long; None is the server's own setting.
            which: its place in the request, for refusals.
        """
        if self.messages is not None:
            *prompt, last = _plain(self.messages)
            return preparer.responses(prompt, [last["content"]], truncate, which)
        if self.prompt is not None:
            asked = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else _plain(self.prompt)
            return preparer.responses(asked, self.responses or [], truncate, which)
        if self.text is not None:
            return preparer.text(self.text, truncate, which)
        return preparer.ids(self.input_ids or [], truncate, which)


class RewardsRequest(Asked):
    """Conversations to score."""

    items: list[Item] = Field(min_length=1)
    normalize: bool = Field(False, description="also in standard deviations of the model's reference set")
    truncate: bool | None = Field(None, description="cut the beginning of what is too long; default: as the server")
    return_tokens: bool = Field(False, description="also the tokens that were read")


class Read(BaseModel):
    """The tokens of one conversation."""

    ids: list[int]
    tokens: list[str]
    reward_at: int = Field(description="place of the token where the reward was read")


class Usage(BaseModel):
    """Tokens of all conversations, each counted by itself."""

    total_tokens: int


class ModelInfo(BaseModel):
    """Which model answered."""

    id: str
    sha: str
    template_sha256: str


class RewardsResponse(BaseModel):
    """One list per item, one entry per response in it."""

    rewards: list[list[float | None]]
    normalized: list[list[float | None]] | None = None
    errors: list[list[str | None]]
    tokens: list[list[int | None]]
    truncated: list[bool]
    read: list[list[Read | None]] | None = None
    usage: Usage
    model: ModelInfo


class CompareRequest(Asked):
    """Two or more responses to a prompt, at most 512: everyone is compared with everyone."""

    prompt: str | list[Turn]
    responses: list[str] = Field(min_length=2)
    truncate: bool | None = None


class CompareResponse(BaseModel):
    """How the responses compare.

    `probability[i][j]` is the probability that response i is better than response j.
    """

    rewards: list[float]
    probability: list[list[float]]
    best: int
    temperature: float
    truncated: bool
    model: ModelInfo


@router.post("/v1/rewards", response_model_exclude_none=False)
async def rewards(asked: RewardsRequest, request: Request, service: Serving) -> RewardsResponse:
    """Rewards of conversations, of responses to prompts, of ids or of rendered text."""
    if asked.normalize:
        service.calibration.normalized(0.0)  # refuse before any work
    answers = await service.rewards(
        request,
        sum(item.count for item in asked.items),
        lambda preparer: [
            item.prepare(preparer, asked.truncate, f"item {number}") for number, item in enumerate(asked.items)
        ],
    )
    normalized = None
    if asked.normalize:
        scale = service.calibration.normalized
        normalized = [[None if reward is None else scale(reward) for reward in a.rewards] for a in answers]
    read = None
    if asked.return_tokens:
        read = await service.apart(lambda: [_placed(a, _read(service, a.prepared)) for a in answers])
    return RewardsResponse(
        rewards=[answer.rewards for answer in answers],
        normalized=normalized,
        errors=[answer.errors for answer in answers],
        tokens=[_placed(answer, [len(ids) for ids in answer.prepared.sequences]) for answer in answers],
        truncated=[answer.prepared.truncated for answer in answers],
        read=read,
        usage=Usage(total_tokens=sum(len(ids) for a in answers for ids in a.prepared.sequences)),
        model=_info(service),
    )


@router.post("/v1/compare")
async def compare(asked: CompareRequest, request: Request, service: Serving) -> CompareResponse:
    """The probability that one response to a prompt is better than another."""
    if len(asked.responses) > COMPARED:
        raise too_many("responses to be compared with each other", len(asked.responses), COMPARED)
    item = Item(prompt=asked.prompt, responses=asked.responses)
    (answer,) = await service.rewards(
        request, item.count, lambda preparer: [item.prepare(preparer, asked.truncate, "a conversation")]
    )
    found = finite(answer)
    probability = service.calibration.probability
    return CompareResponse(
        rewards=found,
        probability=[[probability(one - other) for other in found] for one in found],
        best=max(range(len(found)), key=found.__getitem__),
        temperature=service.calibration.temperature,
        truncated=answer.prepared.truncated,
        model=_info(service),
    )


@router.get("/v1/models")
async def models(service: Serving) -> dict[str, Any]:
    """The one model that is served, in the shape of OpenAI's list, with what btrm knows of it."""
    chat, calibration = service.chat, service.calibration
    about = {
        "max_model_len": service.max_length,
        "sha": service.engine.identity,
        "template_sha256": chat.template_sha256,
        "terminal_token": chat.terminal_token,
        "family": service.manifest.get("family"),
        "dtype": str(service.engine.dtype).removeprefix("torch."),
        "normalizes": calibration.mean is not None,
        "temperature": calibration.temperature,
        "limits": {"items": service.limits.items, "queue_tokens": service.limits.queue_tokens, "compared": COMPARED},
    }
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "btrm", **about}
    return {"object": "list", "data": [card]}


def finite(answer: Answered) -> list[float]:
    """The rewards of an answer whose shape has no room for errors.

    Args:
        answer: to one item.

    Raises:
        Refused: 422 for a conversation that cannot be encoded, 500 for a reward that is not finite.
    """
    rewards = [reward for reward in answer.rewards if reward is not None]
    if len(rewards) < len(answer.rewards):
        reason = next(error for error in answer.errors if error)
        encoded = any(error is None for error in answer.prepared.errors) and reason not in answer.prepared.errors
        raise Refused(500 if encoded else 422, "not_finite" if encoded else "bad_conversation", reason)
    return rewards


def _plain(messages: list[Turn]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _info(service: Service) -> ModelInfo:
    return ModelInfo(id=service.name, sha=service.engine.identity, template_sha256=service.chat.template_sha256)


def _placed(answer: Answered, values: list[Any]) -> list[Any]:
    """Values of the sequences in the places of the responses that have one."""
    rest = iter(values)
    return [next(rest) if error is None else None for error in answer.prepared.errors]


def _read(service: Service, prepared: Prepared) -> list[Read]:
    decode = service.chat.tokenizer.decode
    texts = {i: str(decode([i])) for i in {i for ids in prepared.sequences for i in ids}}
    return [Read(ids=ids, tokens=[texts[i] for i in ids], reward_at=len(ids) - 1) for ids in prepared.sequences]
