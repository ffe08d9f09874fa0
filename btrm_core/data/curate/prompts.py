"""The prompts of other data that should not occur: of pairs, ties, single answers, conversations, or prompts alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.cache import cache_root
from btrm_core.data.convert import Message, conversations_of
from btrm_core.data.curate.similar import passages
from btrm_core.data.issues import RowIssue
from btrm_core.data.pairs import PairData, prompt_hash
from btrm_core.data.readers import read_rows
from btrm_core.data.shapes.conversation import prompt_of
from btrm_core.data.shapes.naming import Naming
from btrm_core.data.shapes.values import RowError
from btrm_core.data.shapes.view import RowView
from btrm_core.data.sources import resolve
from btrm_core.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOGETHER = 1000


@dataclass(frozen=True)
class Prompts:
    """Prompts to look for; their texts are not kept.

    Attributes:
        hash_P: the hash of each, uint64 [P]; each prompt of a pair once.
        passages: their passages of 13 words, as `similar.passages` gives them.
        without: rows that hold no prompt.
    """

    hash_P: NDArray[np.uint64]
    passages: NDArray[np.uint64]
    without: int = 0

    @classmethod
    def of(cls, other: PairData | Prompts) -> Prompts:
        """The prompts of pairs that are loaded, or what is that already.

        Args:
            other: either.
        """
        return other if isinstance(other, Prompts) else cls(other.prompt_hash_P, passages(prompt_texts(other)))


def load_prompts(sources: Sequence[str], naming: Naming | None = None, cache_dir: str | None = None) -> Prompts:
    """Read the prompts of every row of some sources; no preference is needed, and no answer.

    Args:
        sources: files, folders and Hub ids, as for `load_pairs`.
        naming: the user's own names of columns and roles.
        cache_dir: as for `load_pairs`.

    Returns:
        The prompts, with the number of rows that have none.

    Raises:
        DataError: a source cannot be read, or no row holds a prompt.
    """
    hashes: list[int] = []
    without = 0

    def texts() -> Iterator[str]:
        nonlocal without
        for source in resolve(sources, cache_root(cache_dir)).sources:
            for _, row in read_rows(source):
                found = [] if isinstance(row, RowIssue) else _prompts(row, naming)
                without += not found
                for prompt in found:
                    hashes.append(prompt_hash(prompt))
                    yield _text(prompt)

    known = passages(texts())
    if not hashes:
        raise DataError(f"no row of {', '.join(sources)} holds a prompt; name its column with --map prompt=COLUMN.")
    return Prompts(np.array(hashes, dtype=np.uint64), known, without)


def prompt_texts(data: PairData) -> Iterator[str]:
    """The contents of every prompt, as one text.

    Args:
        data: P pairs.

    Yields:
        P texts: the contents of the messages, with line breaks between.
    """
    for rows in data.batches(_TOGETHER):
        yield from (_text(row["prompt"]) for row in rows)


def _text(prompt: Iterable[Message]) -> str:
    return "\n".join(message["content"] for message in prompt)


def _prompts(row: dict[str, Any], naming: Naming | None) -> list[list[Message]]:
    """The prompts of a row, each once: those before its answers, else what it holds apart."""
    try:
        made = [prompt for prompt, _ in conversations_of(RowView(row, naming))[1]]
    except RowError:
        try:
            alone = prompt_of(RowView(row, naming)).messages
        except RowError:
            return []
        made = [alone] if any(message["content"].strip() for message in alone) else []
    return [prompt for place, prompt in enumerate(made) if prompt not in made[:place] and _encodable(prompt)]


def _encodable(prompt: list[Message]) -> bool:
    try:
        _text(prompt).encode()
    except UnicodeEncodeError:
        return False
    return True
