"""`btrm serve`: a finished model over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from btrm_core.errors import ConfigError

EXTRA = "serving needs fastapi, uvicorn, httpx and prometheus-client; install them with `pip install 'btrm[serve]'`"


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--gpus", type=int, metavar="N", help="One copy of the model per GPU.")
@click.option("--name", help="What clients call the model. Default: the directory's name.")
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto", help="auto, flash, varlen, flex, sdpa or eager.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--max-length", type=int, help="Longest conversation in tokens. Default: the model's.")
@click.option("--truncate", is_flag=True, help="Cut the beginning of what is too long, unless a request forbids it.")
@click.option("--queue-tokens", type=int, default=1 << 20, show_default=True, help="Tokens that may wait.")
@click.option("--max-items", "items", type=int, default=1024, show_default=True, help="Conversations of a request.")
@click.option("--max-body", "body_bytes", type=int, default=16 << 20, show_default=True, help="Bytes of a request.")
@click.option("--deadline-seconds", type=float, default=150.0, show_default=True, help="Time for an answer.")
@click.option("--drain-seconds", type=float, default=30.0, show_default=True, help="Time to finish after SIGTERM.")
@click.option("--token", envvar="BTRM_TOKEN", metavar="TOKEN", help="Bearer token; better given as BTRM_TOKEN.")
@click.option("--backend-url", metavar="URL", help="A vLLM or SGLang server with this model, that computes.")
@click.option("--backend-token", envvar="BTRM_BACKEND_TOKEN", metavar="TOKEN", help="Its API key, likewise.")
@click.option("--backend", type=click.Choice(["vllm", "sglang"]), help="Which it is. Default: asks.")
def serve(model: str, host: str, port: int, drain_seconds: float, name: str | None, **options: Any) -> None:
    """Serve rewards over HTTP, to trainers in their own shapes and to people as a page.

    Routes: /v1/rewards, /v1/compare; OpenRLHF /get_reward; vLLM /classify, /pooling; SGLang /classify, /v1/embeddings;
    LLaMA-Factory /v1/score/evaluation; slime /slime; /health, /ready, /v1/models, /metrics; the page at /.
    """
    try:
        from btrm_core.serving import Limits, bound
        from btrm_core.serving import serve as serve_model
    except ModuleNotFoundError as error:
        raise ConfigError(EXTRA) from error
    keys = ("queue_tokens", "items", "max_length", "truncate", "body_bytes", "deadline_seconds", "token")
    if options["token"]:  # a file or a secret that it is read from ends with a line break
        options["token"] = options["token"].strip()
    limits = Limits(**{key: options[key] for key in keys})
    if options["backend"] is not None and options["backend_url"] is None:
        raise ConfigError("--backend says what a server behind is; give --backend-url as well")
    if not 0 <= drain_seconds < math.inf:
        raise ConfigError(f"--drain-seconds is {drain_seconds:g}; expected a number from 0")
    with bound(host, port) as socket:  # before the model is opened, which takes minutes
        options = {key: value for key, value in options.items() if key not in keys}
        behind = {key: options.pop(key) for key in ("backend_url", "backend", "backend_token")}
        found = _engines(model, **options) if behind["backend_url"] is None else _backend(model, **behind, **options)
        called = name or Path(model).resolve().name if Path(model).exists() else name or model
        serve_model(found, called, limits, socket=socket, drain_seconds=drain_seconds)


def _backend(
    model: str, *, backend_url: str, backend: str | None, backend_token: str | None, tokens_per_batch: int, **local: Any
) -> list[Any]:
    """The server behind."""
    from btrm_core.serving import Backend

    if local["gpus"] is not None:
        raise ConfigError("--gpus is for a model in this process; the server at --backend-url computes instead")
    return [Backend(model, backend_url, kind=backend, tokens_per_batch=tokens_per_batch, token=backend_token)]


def _engines(model: str, *, gpus: int | None, **options: Any) -> list[Any]:
    """One engine per device."""
    import torch

    from btrm_core.scoring import Scorer

    there = torch.cuda.device_count()
    if gpus is not None and not 1 <= gpus <= there:
        raise ConfigError(f"--gpus is {gpus}, and there are {there}; expected 1 to {there}" if there else
                          f"--gpus is {gpus}, but there is no GPU; leave it out to serve from the CPU")  # fmt: skip
    return [
        Scorer(model, device=device, **options) for device in ([f"cuda:{n}" for n in range(gpus)] if gpus else [None])
    ]
