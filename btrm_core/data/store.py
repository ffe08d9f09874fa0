"""Pairs as tokens: encoded once, stored in Arrow, memory-mapped by every process that reads them.

Decides what is stored, which pairs cannot be trained on, and when an earlier encoding may be used again. A conversation
is stored once, and a prompt's conversations together: `groups.arrow` has the tree of each prompt's distinct
conversations, `pairs.arrow` says which two of them a pair compares. What the ids of a conversation are is `chat`'s
decision, what is one group is `encode`'s.

The stored bytes do not depend on the number of workers: the pairs are encoded in fixed chunks and written in
their order.

Shapes: P pairs that are left after encoding, G groups, S distinct conversations of all groups.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btrm_core import cache, files
from btrm_core.chat import tokenizer_fingerprint
from btrm_core.data.encode import Chunk, encoded_chunks
from btrm_core.data.tables import LISTS, Lists, numbers, record_batches, write_store
from btrm_core.errors import DataError
from btrm_core.evaluation import Judged
from btrm_core.locks import Shared
from btrm_core.packing import Forest, PairPlaces, Tree, grow, part

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat
    from btrm_core.data.pairs import PairData

    IntArray = NDArray[np.int64]

ENCODING_VERSION = 3
"""Part of every cache key: raised when equal pairs get other tokens than before."""
_CODE = ("chat", "data", "packing")
"""Packages whose code decides what is stored."""


class TokenStore:
    """Groups of encoded conversations, and the pairs that compare them.

    `open` maps a cache entry into memory; such a store pickles as its path and reopens where it arrives. `of_ids` makes
    one of ids that are at hand.

    Args:
        groups: a table with the tree of every group (lists `tokens`, `edges` and `leaf`) and its `first_pair`.
        pairs: a table with a row per pair, those of a group next to each other.
        report: counts of the encoding; see `encode_pairs`.
        held: the cache entry that the tables are mapped from; it is not removed as long as the store lives.

    Attributes:
        folder: the cache entry; None for a store in memory.
        first_pair_G: the first pair of each group, and one more entry: P.
        group_P: the group of each pair, int64.
        chosen_P: which of its group's conversations is the chosen one, int32.
        rejected_P: which is the rejected one, int32.
        margin_P: the data's margin, 0 where it gives none, float32.
        weight_P: the pair's weight in the loss, float32.
        probability_P: how likely it is that chosen is the better one, 0.5 to 1, float32.
        ranking_P: a number that only pairs of one row of scored responses share; 0 for a lone pair, int64.
        index_P: position of the pair in the `PairData` that was encoded, int64.
        report: counts of the encoding; see `encode_pairs`.
    """

    def __init__(
        self, groups: pyarrow.Table, pairs: pyarrow.Table, report: dict[str, Any], held: Shared | None = None
    ) -> None:
        self.folder, self.report, self._held = held and held.path, report, held
        self._tables = groups, pairs
        self._lists = {name: Lists(groups[name]) for name in LISTS}
        self._ids, self._subsets = pairs["id"], pairs["subset"]
        self.group_P, self.chosen_P, self.rejected_P = (numbers(pairs, key) for key in ("group", "chosen", "rejected"))
        self.margin_P, self.weight_P, self.index_P = (numbers(pairs, key) for key in ("margin", "weight", "index"))
        self.probability_P, self.ranking_P = (numbers(pairs, key) for key in ("probability", "ranking"))
        self.sets: tuple[str, ...] = ()
        self.first_pair_G = np.append(numbers(groups, "first_pair"), len(self.group_P))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenStore:
        """Map a cache entry into memory, if it is as it was written.

        Args:
            folder: the entry.

        Args:
            folder: the entry.

        Raises:
            DataError: it is damaged, or not there.
        """
        path = Path(folder)
        held = Shared(path, path / cache.COMPLETE)
        if problem := cache.damage(path):
            raise DataError(
                f"the encoded pairs '{path}' cannot be read ({problem}). "
                "The cache was changed or removed; start again to build it anew."
            )
        return cls._mapped(held)

    @classmethod
    def _mapped(cls, held: Shared) -> TokenStore:
        """Map an entry that was found whole."""
        import pyarrow

        report = json.loads((held.path / "report.json").read_text())
        mapped = (pyarrow.memory_map(str(held.path / f"{name}.arrow")) for name in ("groups", "pairs"))
        groups, pairs = (pyarrow.ipc.open_stream(file).read_all() for file in mapped)
        return cls(groups, pairs, report, held)

    @classmethod
    def of_ids(cls, groups: Sequence[tuple[Sequence[Sequence[int]], Sequence[tuple[int, int]]]]) -> TokenStore:
        """A store in memory, of finished sequences as ids.

        Args:
            groups: the distinct sequences of each group, and its pairs as (place of the chosen one, of the rejected).

        Raises:
            ValueError: a group has no sequence, or an empty one.
        """
        import pyarrow

        plain = {"subset": "", "margin": 0.0, "weight": 1.0, "probability": 1.0, "ranking": 0}
        chunk = Chunk()
        for number, (sequences, pairs) in enumerate(groups):
            chunk.groups.append(grow(sequences))
            chunk.pairs_G.append(len(pairs))
            for chosen, rejected in pairs:
                index = len(chunk.pairs)
                places = {"group": number, "chosen": chosen, "rejected": rejected}
                chunk.pairs.append({"id": str(index), "index": index, **places, **plain})
        groups_table, pairs_table = (pyarrow.Table.from_batches([batch]) for batch in record_batches(chunk, 0, 0))
        return cls(groups_table, pairs_table, {})

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return TokenStore.open, (self.folder,)
        return TokenStore, (*self._tables, self.report)

    def __len__(self) -> int:
        return len(self.group_P)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.first_pair_G) - 1

    @functools.cached_property
    def places(self) -> PairPlaces:
        """The pairs as places in the trees of their groups, for planning; no token is read for it."""
        edges, leaf = self._lists["edges"], self._lists["leaf"]
        forest = Forest.of_columns(edges.flat().reshape(-1, 3), leaf.flat(), edges.sizes() // 3, leaf.sizes())
        first_P = forest.starts_G[self.group_P]
        changes = np.diff(self.group_P, prepend=-1) != 0
        changes |= (self.ranking_P == 0) | (np.diff(self.ranking_P, prepend=-1) != 0)
        return PairPlaces(
            forest=forest,
            tree_P=self.group_P,
            chosen_P=first_P + self.chosen_P,
            rejected_P=first_P + self.rejected_P,
            unit_P=np.cumsum(changes) - 1,
        )

    @property
    def lengths_P2(self) -> IntArray:
        """Tokens of the chosen and of the rejected conversation of each pair."""
        places = self.places
        lengths_S = places.forest.lengths_S
        return np.stack([lengths_S[places.chosen_P], lengths_S[places.rejected_P]], axis=1)

    @functools.cached_property
    def digest(self) -> str:
        """XXH3 of all that training and evaluation see of the pairs, as hex; equal wherever the pairs come from."""
        import xxhash

        whole = xxhash.xxh3_128()
        columns = (self.group_P, self.chosen_P, self.rejected_P, self.margin_P, self.weight_P, self.probability_P)
        lists = (part for column in self._lists.values() for part in (column.sizes(), *column.chunks))
        for values in (*columns, self.places.unit_P, *lists):
            whole.update(np.ascontiguousarray(values).data)
        return str(whole.hexdigest())

    @functools.cached_property
    def judged(self) -> Judged:
        """What the data says of the pairs, for an evaluation."""
        lengths_P2 = self.lengths_P2
        return Judged(lengths_P2[:, 0] - lengths_P2[:, 1], self.probability_P, self.subsets(), self.sets)

    def group(self, index: int) -> Tree:
        """The distinct conversations of a group; its ids are a read-only view of the file.

        Args:
            index: the group, from 0.

        Raises:
            IndexError: there is no such group.
        """
        if not 0 <= index < self.num_groups:
            raise IndexError(f"group {index} of {self.num_groups}")
        tokens, edges, leaf = (self._lists[name][index] for name in LISTS)
        return Tree(tokens, edges.reshape(-1, 3), leaf)

    def pair(self, index: int) -> Tree:
        """The chosen and the rejected conversation of a pair.

        Args:
            index: the pair, from 0.

        Returns:
            A tree of these two, in this order.

        Raises:
            IndexError: there is no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return part(self.group(int(self.group_P[index])), [int(self.chosen_P[index]), int(self.rejected_P[index])])

    def longest(self, count: int) -> list[Tree]:
        """The pairs with most tokens.

        Args:
            count: how many at most.

        Returns:
            A tree of two conversations each, the one with most tokens first.
        """
        order = np.argsort(-self.lengths_P2.sum(1), kind="stable")
        return [self.pair(int(index)) for index in order[:count]]

    def pairs_of(self, groups: IntArray) -> IntArray:
        """The pairs of some groups.

        Args:
            groups: numbers of groups, at least one.

        Returns:
            Numbers of pairs, int64 [pairs of these groups], group after group.
        """
        starts_G = self.first_pair_G
        return np.concatenate([np.arange(starts_G[g], starts_G[g + 1]) for g in groups])

    def id(self, index: int) -> str:
        """The id of a pair.

        Args:
            index: the pair, from 0.
        """
        return str(self._ids[index].as_py())

    def subset(self, index: int) -> str:
        """The subset of a pair.

        Args:
            index: the pair, from 0.
        """
        return str(self._subsets[index].as_py())

    def subsets(self) -> list[str]:
        """The subset of every pair, in order."""
        return cast("list[str]", self._subsets.to_pylist())

    def describe(self) -> str:
        """One line on what was cut, changed and dropped; empty if every pair was encoded whole."""
        report = self.report
        parts = []
        if report["truncated"]:
            parts.append(f"{report['truncated']:,} of {report['given']:,} pairs cut to {report['max_length']} tokens")
        for reason, number in report["dropped"].items():
            parts.append(f"{number:,} dropped ({reason}; such as {report['examples'][reason][0]})")
        for reason, number in report["altered"].items():
            parts.append(f"in {number:,} {reason} (such as {report['examples'][reason][0]})")
        return "; ".join(parts)


def encode_pairs(
    data: PairData,
    chat: ChatFormat,
    max_length: int,
    *,
    workers: int = 1,
    cache_dir: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Encode all pairs, or reuse what an equal call has stored.

    The report of the result counts: `given` and `encoded` pairs, the `groups` they are in, `dropped` pairs by reason
    (with the ids of the first `examples`), `truncated` pairs with the `dropped_turns` (messages) and `cut_characters`
    of their prompts, `altered` pairs by what the template changed in their messages, stored `tokens`, the `pair_tokens`
    of both sides of every pair (what each of them would take by itself), `longest` sequence, and `with_margin` pairs.

    Args:
        data: the pairs.
        chat: how conversations become ids; only its `encode_groups` is called.
        max_length: tokens of the longest sequence, at least 1; longer pairs lose the beginning of their prompt.
        workers: processes that encode. Each loads the tokenizer, so fewer are started for little data.
        cache_dir: where the tokens are kept; default `cache.cache_root()`.
        progress: called now and then with the number of pairs done so far; not called for a stored encoding.

    Returns:
        The store, mapped from the cache.

    Raises:
        DataError: `max_length` is below 1, none of the pairs given is left, an encoding process ended early, or the
            cache cannot be written.
    """
    if max_length < 1:
        raise DataError(f"the maximum length is {max_length} tokens, expected at least 1.")
    key = files.digest(
        ENCODING_VERSION,
        data.fingerprint,
        chat.template_sha256,
        tokenizer_fingerprint(chat.tokenizer),
        max_length,
        cache.code_digest(*_CODE),
    )
    entry = cache.cache_root(cache_dir) / "encoded" / key
    held = cache.build_once(
        entry, lambda folder: write_store(folder, encoded_chunks(data, chat, max_length, workers), max_length, progress)
    )
    encoded = TokenStore._mapped(held)
    if not len(encoded) and len(data):
        reason, number = max(encoded.report["dropped"].items(), key=lambda item: item[1])
        raise DataError(
            f"no pairs are left after encoding {encoded.report['given']:,}: most are dropped for '{reason}' "
            f"({number:,}). Raise --max-length, or look at the pairs with: btrm doctor."
        )
    return encoded
