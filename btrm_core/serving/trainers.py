"""The routes of other servers, so that trainers that know those need no glue.

OpenRLHF's `/get_reward`; vLLM's `/classify` and `/pooling`; SGLang's `/classify` and `/v1/embeddings`; LLaMA-Factory's
`/v1/score/evaluation`; slime's `--rm-url`, which reads a bare number. Rewards are raw in all of them.

Decides: `/classify` is vLLM's where the body has `input` or `messages`, SGLang's where it has `text` or `input_ids`.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from btrm_core.serving.limits import Refused
from btrm_core.serving.native import Serving, Turn, finite
from btrm_core.serving.preparing import Prepared, Preparer
from btrm_core.serving.service import Answered, Service

router = APIRouter(tags=["trainers"])

Ids = list[StrictInt] | list[list[StrictInt]]
Texts = str | list[str] | Ids


class GetReward(BaseModel):
    """What OpenRLHF sends: conversations as the policy's chat template writes them."""

    query: str | list[str]
    prompts: str | list[Any] | None = Field(None, description="beginnings that queries share, for speed alone")
    labels: Any = None


CHANGING = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "tools")
"""Fields by which vLLM writes messages otherwise than the model was trained on."""


class Pooling(BaseModel):
    """What clients of vLLM send; fields that would change nothing are accepted."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Texts | None = None
    messages: list[Turn] | None = None
    truncate_prompt_tokens: StrictInt | None = Field(
        None, description="keep so many tokens at the end; -1: the model's"
    )


class Classify(Pooling):
    """vLLM's request, or SGLang's with `text` or `input_ids`."""

    text: str | list[str] | None = None
    input_ids: Ids | None = None


class Embeddings(BaseModel):
    """What clients of SGLang's OpenAI-shaped route send."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Texts


class Scores(BaseModel):
    """What LLaMA-Factory sends: conversations as the policy's chat template writes them."""

    model: str | None = None
    messages: list[str] = Field(min_length=1)


class Slime(BaseModel):
    """What slime sends for each sample."""

    prompt: str | list[Turn]
    response: str
    label: Any = None


@router.post("/get_reward")
async def get_reward(asked: GetReward, request: Request, service: Serving) -> dict[str, Any]:
    """OpenRLHF: `--reward.remote_url http://HOST:PORT/get_reward`."""
    queries = [asked.query] if isinstance(asked.query, str) else asked.query
    if not queries:
        raise Refused(422, "bad_request", "query is empty; expected at least one text")
    prompts = asked.prompts if isinstance(asked.prompts, list) and len(asked.prompts) == len(queries) else []
    keys = [prompt if isinstance(prompt, str) else None for prompt in prompts] or [None] * len(queries)
    answers = await service.rewards(
        request,
        len(queries),
        lambda preparer: [
            preparer.text(query, which=f"query {n}", key=key)
            for n, (query, key) in enumerate(zip(queries, keys, strict=True))
        ],
    )
    rewards = [reward for answer in answers for reward in finite(answer)]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


@router.post("/classify")
async def classify(asked: Classify, request: Request, service: Serving) -> Any:
    """`/classify` of vLLM or SGLang, as verl and others use them."""
    if asked.text is None and asked.input_ids is None:
        answers = await _pooled(asked, request, service)
        data = [
            {"index": n, "label": "reward", "probs": finite(answer), "num_classes": 1}
            for n, answer in enumerate(answers)
        ]
        return _listed("classify", data, answers, service)
    one = isinstance(asked.text, str) or _is_one(asked.input_ids)
    inputs = asked.text if asked.text is not None else asked.input_ids
    answers = await _of_inputs(inputs or [], request, service)
    found = [
        {
            "embedding": finite(answer),
            "meta_info": {"id": uuid.uuid4().hex, "finish_reason": None, "prompt_tokens": _tokens(answer)},
        }
        for answer in answers
    ]
    return found[0] if one else found


@router.post("/pooling")
async def pooling(asked: Pooling, request: Request, service: Serving) -> dict[str, Any]:
    """`/pooling` of vLLM."""
    answers = await _pooled(asked, request, service)
    data = [{"index": n, "object": "pooling", "data": finite(answer)} for n, answer in enumerate(answers)]
    return _listed("pooling", data, answers, service)


@router.post("/v1/embeddings")
async def embeddings(asked: Embeddings, request: Request, service: Serving) -> dict[str, Any]:
    """SGLang's `/v1/embeddings`: the "embedding" of a reward model is one number, the reward."""
    answers = await _of_inputs(asked.input, request, service)
    data = [{"object": "embedding", "embedding": finite(answer), "index": n} for n, answer in enumerate(answers)]
    return _listed("embedding", data, answers, service)


@router.post("/v1/score/evaluation")
async def evaluation(asked: Scores, request: Request, service: Serving) -> dict[str, Any]:
    """LLaMA-Factory: `reward_model: http://HOST:PORT/v1/score/evaluation`, `reward_model_type: api`."""
    answers = await _of_inputs(asked.messages, request, service)
    return {
        "id": f"scoreval-{uuid.uuid4().hex}",
        "object": "score.evaluation",
        "model": service.name,
        "scores": [reward for answer in answers for reward in finite(answer)],
    }


@router.post("/slime")
async def slime(asked: Slime, request: Request, service: Serving) -> float:
    """slime: `--rm-type remote_rm --rm-url http://HOST:PORT/slime`; answers with a bare number."""
    prompt = asked.prompt if isinstance(asked.prompt, str) else [turn.model_dump() for turn in asked.prompt]
    (answer,) = await service.rewards(request, 1, lambda preparer: [preparer.answer(prompt, asked.response)])
    return finite(answer)[0]


async def _pooled(asked: Pooling, request: Request, service: Service) -> list[Answered]:
    """The answers to a request in vLLM's shape: messages, or input."""
    if (asked.input is None) == (asked.messages is None):
        raise Refused(422, "bad_request", "expected either input or messages")
    keep = asked.truncate_prompt_tokens
    if keep is not None and (keep < -1 or keep == 0 or keep > service.max_length):
        raise Refused(422, "bad_request", f"truncate_prompt_tokens is {keep}; expected -1 or 1 to {service.max_length}")
    if asked.input is not None:
        return await _of_inputs(asked.input, request, service, keep)
    if changing := next((name for name in CHANGING if (asked.model_extra or {}).get(name)), None):
        text = f"{changing} would change the reward; leave it out, the template is that of the training"
        raise Refused(422, "bad_request", text)
    messages = [turn.model_dump() for turn in asked.messages or []]
    if not messages or messages[-1]["role"] != "assistant":
        raise Refused(422, "bad_request", "expected messages that end with the assistant's")
    *prompt, last = messages
    return await service.rewards(
        request, 1, lambda preparer: [_keeping(preparer, keep).responses(prompt, [last["content"]])]
    )


async def _of_inputs(inputs: Texts, request: Request, service: Service, keep: int | None = None) -> list[Answered]:
    """The answers to texts or ids, one or several."""
    several: list[Any] = [inputs] if isinstance(inputs, str) or _is_one(inputs) else list(inputs)
    if not several:
        raise Refused(422, "bad_request", "the input is empty; expected at least one text or list of ids")

    def prepare(preparer: Preparer) -> list[Prepared]:
        kept = _keeping(preparer, keep)
        return [
            kept.text(one, which=f"input {n}") if isinstance(one, str) else kept.ids(one, which=f"input {n}")
            for n, one in enumerate(several)
        ]

    return await service.rewards(request, len(several), prepare)


def _keeping(preparer: Preparer, keep: int | None) -> Preparer:
    if keep is None:
        return preparer
    return Preparer(preparer.chat, preparer.limit if keep == -1 else keep, truncate=True)


def _is_one(inputs: Any) -> bool:
    """Whether a list is the ids of one conversation."""
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], int)


def _tokens(answer: Answered) -> int:
    return sum(map(len, answer.prepared.sequences))


def _listed(kind: str, data: list[dict[str, Any]], answers: list[Answered], service: Service) -> dict[str, Any]:
    tokens = sum(map(_tokens, answers))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": service.created,
        "model": service.name,
        "data": data,
        "usage": usage,
    }
