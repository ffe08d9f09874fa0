"""Pairs as tokens: encoded once, stored in Arrow, memory-mapped by every process that reads them.

Decides what a stored pair is (`[shared | chosen tail | rejected tail]`), which pairs cannot be trained on,
and when an earlier encoding may be used again. What the ids of a conversation are is `chat`'s decision.

The stored bytes do not depend on the number of workers: the pairs are encoded in fixed chunks and written in
their order.

Shapes: P pairs that are left after encoding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btrm_core import files
from btrm_core.data import cache
from btrm_core.data.encode import Chunk, encoded_chunks
from btrm_core.data.grouping import PairGroups
from btrm_core.errors import DataError
from btrm_core.evaluation import Judged
from btrm_core.packing import Group

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat
    from btrm_core.data.pairs import PairData

ENCODING_VERSION = 2
"""Part of every cache key: raised when equal pairs get other tokens than before."""


_CODE = ("chat", "data", "packing")
"""Packages whose code decides what is stored."""


_KINDS_KEPT = 20


_EXAMPLES_KEPT = 5


_NUMBERS = {
    "index": "int64",
    "shared": "int32",
    "chosen": "int32",
    "rejected": "int32",
    "margin": "float32",
    "weight": "float32",
    "probability": "float32",
    "group": "int64",
    "chosen_place": "int32",
    "rejected_place": "int32",
}


class TokenStore:
    """Encoded pairs of one cache entry, memory-mapped; pickles as its path and reopens where it arrives.

    Attributes:
        folder: the cache entry.
        shared_P: tokens that both sequences of a pair begin with, int32.
        chosen_P: further tokens of the chosen sequence, int32; may be 0.
        rejected_P: further tokens of the rejected sequence, int32; may be 0.
        margin_P: the data's margin, 0 where it gives none, float32.
        weight_P: the pair's weight in the loss, float32.
        probability_P: how likely it is that chosen is the better one, 0.5 to 1, float32.
        group_P: a number that only pairs of one row share; 0 for a lone pair, int64.
        chosen_place_P: which response of the group the chosen one is, int32; 0 in a lone pair.
        rejected_place_P: likewise of the rejected one; 1 in a lone pair.
        index_P: position of the pair in the `PairData` that was encoded, int64.
        report: counts of the encoding; see `encode_pairs`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        import pyarrow

        self.folder = Path(folder)
        try:
            self.report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
            mapped = pyarrow.memory_map(str(self.folder / "encoded.arrow"))
            table = pyarrow.ipc.open_stream(mapped).read_all()
        except OSError as error:
            raise DataError(
                f"the encoded pairs '{self.folder}' cannot be read ({error.strerror or error}). "
                "The cache was changed or removed; start again to build it anew."
            ) from error
        self._ids, self._subsets = table["id"], table["subset"]
        self.shared_P, self.chosen_P, self.rejected_P = (_array(table, key) for key in ("shared", "chosen", "rejected"))
        self.margin_P, self.weight_P, self.index_P = (_array(table, key) for key in ("margin", "weight", "index"))
        self.probability_P, self.group_P = (_array(table, key) for key in ("probability", "group"))
        self.chosen_place_P, self.rejected_place_P = (_array(table, f"{s}_place") for s in ("chosen", "rejected"))
        # Views into the memory map, one per chunk: no token is copied before a row is built.
        chunks = table["tokens"].chunks
        self._tokens = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __getstate__(self) -> str:
        return str(self.folder)

    def __setstate__(self, state: str) -> None:
        TokenStore.__init__(self, state)

    def __len__(self) -> int:
        return len(self.shared_P)

    @functools.cached_property
    def digest(self) -> str:
        """XXH3 of all that training and evaluation see of the pairs, as hex; equal wherever the pairs come from."""
        import xxhash

        whole = xxhash.xxh3_128()
        columns = (self.shared_P, self.chosen_P, self.rejected_P, self.margin_P, self.weight_P, self.probability_P)
        for column in (*columns, self.group_P, self.chosen_place_P, self.rejected_place_P, *self._tokens):
            whole.update(np.ascontiguousarray(column).data)
        return str(whole.hexdigest())

    @functools.cached_property
    def judged(self) -> Judged:
        """What the data says of the pairs, for an evaluation."""
        longer_by_P = self.chosen_P.astype(np.int64) - self.rejected_P.astype(np.int64)
        return Judged(longer_by_P, self.probability_P, self.subsets())

    @property
    def tails_P2(self) -> NDArray[np.int64]:
        """Tokens of chosen and rejected after what both begin with."""
        return np.stack([self.chosen_P, self.rejected_P], axis=1).astype(np.int64)

    @functools.cached_property
    def groups(self) -> PairGroups:
        """The pairs by the prompts they are trained with."""
        return PairGroups(self)

    def tokens(self, index: int) -> NDArray[np.int32]:
        """The stored ids `[shared | chosen tail | rejected tail]` of a pair: a read-only view of the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[chunk])
        start, stop = self._offsets[chunk][row : row + 2]
        return cast("NDArray[np.int32]", self._tokens[chunk][start:stop])

    def group(self, index: int) -> Group:
        """The pair's chosen and rejected sequence as a group, its ids a view of the file."""
        tails = (int(self.chosen_P[index]), int(self.rejected_P[index]))
        return Group(self.tokens(index), int(self.shared_P[index]), tails)

    def id(self, index: int) -> str:
        """The pair's id."""
        return str(self._ids[index].as_py())

    def subset(self, index: int) -> str:
        """The pair's subset."""
        return str(self._subsets[index].as_py())

    def subsets(self) -> list[str]:
        """The subset of every pair, in order."""
        return cast("list[str]", self._subsets.to_pylist())

    def describe(self) -> str:
        """One line on what was cut and dropped; empty if every pair was encoded whole."""
        report = self.report
        parts = []
        if report["truncated"]:
            parts.append(f"{report['truncated']:,} of {report['given']:,} pairs cut to {report['max_length']} tokens")
        for reason, number in report["dropped"].items():
            parts.append(f"{number:,} dropped ({reason}; such as {report['examples'][reason][0]})")
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

    The report of the result counts: `given` and `encoded` pairs, `dropped` pairs by reason (with the ids of
    the first `examples`), `truncated` pairs with the `dropped_turns` (messages) and `cut_characters` of their
    prompts, stored `tokens`, how many of them are `shared_tokens`, `longest` sequence, and `with_margin` pairs.

    Args:
        data: the pairs.
        chat: how conversations become ids; only its `encode_groups` is called.
        max_length: tokens of the longest sequence, at least 1; longer pairs lose the beginning of their prompt.
        workers: processes that encode. Each loads the tokenizer, so fewer are started for little data.
        cache_dir: where the tokens are kept; default `cache.cache_root()`.
        progress: called now and then with the number of pairs done so far; not called for a stored encoding.

    Raises:
        DataError: none of the pairs given is left, or the cache cannot be written.
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
    cache.build_once(
        entry, lambda folder: _build(folder, encoded_chunks(data, chat, max_length, workers), max_length, progress)
    )
    encoded = TokenStore(entry)
    if not len(encoded) and len(data):
        reason, number = max(encoded.report["dropped"].items(), key=lambda item: item[1])
        raise DataError(
            f"no pairs are left after encoding {encoded.report['given']:,}: most are dropped for '{reason}' "
            f"({number:,}). Raise --max-length, or look at the pairs with: btrm doctor."
        )
    return encoded


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of what decides a fast tokenizer's ids; padding and truncation settings do not count."""
    # Cut out of the text: parsing the JSON of a large vocabulary would take a second on every start.
    text = re.sub(
        r'"truncation":.*?"added_tokens":', "", tokenizer.backend_tokenizer.to_str(), count=1, flags=re.DOTALL
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _build(folder: Path, chunks: Iterable[Chunk], max_length: int, progress: Callable[[int], None] | None) -> None:
    """Write encoded.arrow and report.json."""
    import pyarrow

    report: dict[str, Any] = dict.fromkeys(
        ("given", "encoded", "truncated", "dropped_turns", "cut_characters", "tokens", "shared_tokens", "longest"), 0
    )
    report |= {"with_margin": 0, "dropped": {}, "examples": {}, "max_length": max_length}
    with (
        pyarrow.OSFile(str(folder / "encoded.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, _schema()) as writer,
    ):
        for chunk in chunks:
            if len(chunk.columns["id"]):
                writer.write_batch(_record_batch(chunk))
            _count(report, chunk)
            if progress:
                progress(report["given"])
    (folder / "report.json").write_text(json.dumps(report))


def _record_batch(chunk: Chunk) -> pyarrow.RecordBatch:
    import pyarrow

    tokens = pyarrow.ListArray.from_arrays(pyarrow.array(chunk.offsets), pyarrow.array(chunk.tokens))
    schema = _schema()
    columns = {**chunk.columns, "tokens": tokens}
    return pyarrow.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    types = {"id": pa.string(), "subset": pa.string(), "tokens": pa.list_(pa.int32())}
    return pa.schema([*types.items(), *((name, getattr(pa, kind)()) for name, kind in _NUMBERS.items())])


def _count(report: dict[str, Any], chunk: Chunk) -> None:
    report["given"] += chunk.given
    report["encoded"] += len(chunk.columns["id"])
    for name in ("truncated", "dropped_turns", "cut_characters", "with_margin"):
        report[name] += getattr(chunk, name)
    report["tokens"] += len(chunk.tokens)
    report["shared_tokens"] += int(chunk.columns["shared"].sum())
    report["longest"] = max(report["longest"], chunk.longest)
    for reason, name in chunk.dropped:
        if reason not in report["dropped"] and len(report["dropped"]) >= _KINDS_KEPT:
            reason = "other reasons"
        report["dropped"][reason] = report["dropped"].get(reason, 0) + 1
        examples = report["examples"].setdefault(reason, [])
        if len(examples) < _EXAMPLES_KEPT:
            examples.append(name)


def _array(table: pyarrow.Table, name: str) -> np.ndarray:
    """A numeric column in one piece (a copy: a few bytes a pair)."""
    column = table[name].combine_chunks()
    return np.array(column.to_numpy(zero_copy_only=False))
