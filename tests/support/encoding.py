"""`python -m support.encoding`: btrm's command line with one command, which encodes a few pairs and never ends.

The first chunk is done at once, so that one can see when all processes are at work; every further one takes for ever.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import click

from btrm_core.chat import EncodedResponses
from btrm_core.signals import STOPPING

BALLAST = 4 << 20
"""Bytes that every process is told with its work: more than a pipe holds."""


class _Backend:
    def to_str(self) -> str:
        return "{}"


class _Tokenizer:
    backend_tokenizer = _Backend()


class Endless:
    """A chat format whose ids are the bytes of the texts, and which stops at the texts that say so.

    Args:
        at_load: ends a process that receives it.
    """

    template_sha256 = "endless"
    tokenizer = _Tokenizer()

    def __init__(self, at_load: bool = False) -> None:
        self.ballast, self.at_load = os.urandom(BALLAST), at_load

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.at_load:
            os._exit(7)

    def encode_groups(self, groups: Sequence[Any], max_length: int | None = None) -> list[EncodedResponses]:
        """Encode, wait, end the process or fail, as the prompts say."""
        text = str(groups)
        if "wait" in text:
            time.sleep(600)
        if "end" in text:
            os._exit(9)
        if "fail" in text:
            raise LookupError("what the chat format says")
        sequences = [[list(answer.encode()) for answer in answers] for _, answers in groups]
        return [EncodedResponses(found, altered=(None,) * len(found)) for found in sequences]


@click.command()
@click.argument("then", type=click.Choice(["wait", "fail", "die"]))
def endless(then: str) -> None:
    """Encode: the first chunk at once, then what `then` says."""
    from btrm_core.data import encode, encode_pairs, pairs_from_rows

    encode.CHUNK_PAIRS = 1
    prompts = ["at once"] + [f"{then} {number}" for number in range(15)]
    data = pairs_from_rows({"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts)
    chat: Any = Endless(at_load=then == "die")
    for number in STOPPING:  # as in a run, where the first one only means to save after this step
        signal.signal(number, lambda *_: None)
    encode_pairs(data, chat, 64, workers=2, progress=lambda done: print("done", done, flush=True))


if __name__ == "__main__":
    from btrm_core import cli

    cli.Commands.get_command = lambda *_: endless  # type: ignore[method-assign]
    cli.main()
