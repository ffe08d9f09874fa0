"""What an evaluation has scored so far: kept while it runs, so that an interrupted one goes on where it was.

Decides: where it is kept (a file per model and set in the cache), what it belongs to (the model's weights, the very
answers, how they are computed), and that it goes when the evaluation is finished.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btrm_core import files
from btrm_core.cache import cache_root
from btrm_core.errors import DataError
from btrm_core.scoring.bulk.partial import header_file, part_of, partial_lines
from btrm_core.scoring.scorer import Scorer
from btrm_core.signals import Stopped

FORMAT_VERSION = 1


def _weights(directory: Path) -> list[Path]:
    """Files of weights, of which no manifest of another trainer says what is in them."""
    return sorted(directory.glob("*.safetensors"))


class Part:
    """The rewards of one set in the order in which they are computed, as JSON values of chunks.

    Args:
        chunks: those from before.
        stream: where further ones are written; None keeps nothing.
    """

    def __init__(self, chunks: list[Any] | None = None, stream: Any = None) -> None:
        self.chunks = chunks or []
        self._stream = stream

    def add(self, chunk: Any) -> None:
        """Keep the rewards of a further chunk.

        Args:
            chunk: JSON values; numbers need not be finite.
        """
        if self._stream is not None:
            self._stream.write((json.dumps({"rewards": chunk}) + "\n").encode())
            self._stream.flush()


class Kept:
    """The parts of an evaluation, of any number of models."""

    def __init__(self) -> None:
        self._targets: list[Path] = []

    @contextlib.contextmanager
    def part(self, scorer: Scorer, name: str, of: str) -> Iterator[Part]:
        """Open what is kept of a model's rewards of one set; nothing is kept while another process does the same.

        Args:
            scorer: the model.
            name: which set, as the user calls it.
            of: a digest of what is scored; rewards of anything else are dropped, and that is said.
        """
        place = files.digest(str(scorer.directory.resolve()), name)[:32]
        target = cache_root() / "evaluations" / f"{place}.jsonl"
        weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _weights(scorer.directory)]
        how = [str(scorer.model.hf.dtype), scorer.tokens_per_batch, scorer.model.kernel]
        header = {"format": FORMAT_VERSION, "model": scorer.identity, "weights": weights, "of": of, "how": how}
        called = f"evaluation of {scorer.directory} on {name}"
        chunks: list[Any] = []

        def take(line: dict[str, Any]) -> int:
            chunks.append(line["rewards"])
            return sum(len(one) for one in line["rewards"])

        with contextlib.ExitStack() as stack:
            stream = None
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context(partial_lines(target, header, take, called))
                self._targets.append(target)
            except (DataError, OSError) as error:
                print(f"{name}: what is scored cannot be kept ({error})", file=sys.stderr)
                chunks = []
            try:
                yield Part(chunks, stream)
            except (KeyboardInterrupt, Stopped):
                if stream is not None:
                    print(f"{called} keeps what is scored; the same command goes on from there", file=sys.stderr)
                raise

    def finish(self) -> None:
        """The evaluation is done: nothing need be kept any more."""
        for target in self._targets:
            for path in (part_of(target), header_file(target)):
                path.unlink(missing_ok=True)
        self._targets = []
