"""Preference pairs: loaded from any mix of sources and checked row by row.

Rows are streamed into an Arrow file in the cache and memory-mapped from there, so memory does not grow with
the data and a second run starts at once with the same pairs and the same report of issues. No token is made
here; `encode.py` does that.

Shapes: P pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core import cache, files
from btrm_core.console import LongWork
from btrm_core.data.convert import Message, Pair, Reading, text_batch, text_schema, text_values
from btrm_core.data.formats import Ties, WhichPairs
from btrm_core.data.inputs.memory import memory_rows
from btrm_core.data.issues import IssueReport, RowIssue, nothing_left
from btrm_core.data.readers import BATCH_ROWS, read_rows
from btrm_core.data.shapes.naming import Naming
from btrm_core.data.shapes.reading import read_pairs, strict_error
from btrm_core.data.sources import Resolved, Source, resolve
from btrm_core.errors import DataError
from btrm_core.locks import Shared

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 5
"""Part of every fingerprint: raised when equal files give other pairs than before."""


_CODE = ("data",)
"""Packages whose code decides what is stored."""
_PLAIN_NAMES = {"data", "dataset", "train", "test", "validation", "dev", "eval"}
"""Names of files and folders that every data set has."""


@dataclass(frozen=True)
class PairData:
    """Checked pairs, memory-mapped.

    Attributes:
        dataset: columns id, subset, prompt (list of role and content), chosen, rejected, margin (null where the
            row gives none), weight, probability, group, rejected_prompt (null where equal); as in `convert.Pair`.
        issues: what was read and why rows are missing; empty for the held-out part of a split.
        fingerprint: SHA-256 of what the pairs are made from; equal on every machine for equal file contents.
        prompt_hash_P: the first 8 bytes of each pair's prompt hash, uint64.
        held: keeps the cache entry from being removed meanwhile; None for pairs in memory.
        sets: the names of the sources that have one; a subset that their rows name is NAME/SUBSET.
    """

    dataset: datasets.Dataset
    issues: IssueReport
    fingerprint: str
    prompt_hash_P: np.ndarray = field(repr=False)
    held: Shared | None = field(default=None, repr=False)
    sets: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Pair:
        return Pair(**self.dataset[index])

    def __iter__(self) -> Iterator[Pair]:
        for rows in self.batches(BATCH_ROWS):
            for row in rows:
                yield Pair(**row)

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows in order.

        Args:
            size: rows of a batch; the last may be smaller.

        Yields:
            Lists of dictionaries, with the columns of `dataset` as keys.
        """
        for table in self.dataset.with_format("arrow").iter(batch_size=size):
            yield table.to_pylist()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return the rows from `start` up to `stop` (exclusive).

        Args:
            start: place of the first, from 0.
            stop: one past the last.
        """
        taken: list[dict[str, Any]] = self.dataset.with_format("arrow")[start:stop].to_pylist()
        return taken

    def group_P(self) -> np.ndarray:
        """The group of every pair, int64 [P]."""
        return np.asarray(self.dataset.with_format("numpy", columns=["group"])[:]["group"], dtype=np.int64)

    def select(self, indices_P: np.ndarray, label: str, issues: IssueReport) -> PairData:
        """Return some of the pairs.

        Args:
            indices_P: places of the pairs to keep, in the order they shall have.
            label: says how they were chosen; goes into the fingerprint.
            issues: the report of the result.
        """
        return PairData(
            dataset=self.dataset.select(indices_P),
            issues=issues,
            fingerprint=files.digest(self.fingerprint, label),
            prompt_hash_P=self.prompt_hash_P[indices_P],
            held=self.held,
        )


def load_pairs(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    strict: bool = False,
    cache_dir: str | None = None,
    scored: WhichPairs = "best-vs-worst",
    ties: Ties = "skip",
    naming: Naming | None = None,
    own_prompts: bool = False,
) -> PairData:
    """Read, convert and check all rows of all sources, in order.

    Args:
        sources: files, folders and Hub ids (one alone needs no list); `sources.py` says which.
        strict: raise at the first bad row instead of going on without it. Ties and other sound rows that hold
            no preference are not bad.
        cache_dir: where the pairs are kept; default `cache.cache_root()`.
        scored: which pairs scored responses give; `convert.py` says what they mean.
        ties: whether ties are skipped or become pairs with probability 0.5.
        naming: the user's own names of columns and roles, from `parse_naming`.
        own_prompts: whether two answers whose prompts differ become a pair, each after its own, or are refused.

    Returns:
        The pairs, and the report of what became of every row.

    Raises:
        DataError: a source cannot be read, `strict` met a bad row, or no pair is left.
    """
    return _load(sources, Reading(scored, ties, naming or Naming(), own_prompts), strict, cache_dir)


def load_evaluation(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    strict: bool = False,
    cache_dir: str | None = None,
    scored: WhichPairs = "best-vs-worst",
    naming: Naming | None = None,
) -> PairData:
    """Pairs to evaluate on, as `load_pairs` reads them, also with prompts of their own; several sources stay apart.

    Args:
        sources: as for `load_pairs`. Of several, each has a name of its own: the user's, else its file's, with the
            folder before it where two are called alike. A row's own subset is then NAME/SUBSET.
        strict: as for `load_pairs`.
        cache_dir: likewise.
        scored: likewise.
        naming: likewise.

    Returns:
        The pairs; their `sets` are the names of the sources that have one.

    Raises:
        DataError: as `load_pairs`.
    """
    several = not isinstance(sources, str | os.PathLike) and len(sources) > 1
    return _load(sources, Reading(scored, "skip", naming or Naming(), True), strict, cache_dir, apart=several)


def _load(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    reading: Reading,
    strict: bool,
    cache_dir: str | None,
    apart: bool = False,
) -> PairData:
    root = cache.cache_root(cache_dir)
    specs = [sources] if isinstance(sources, str | os.PathLike) else sources
    resolved = resolve([os.fspath(spec) for spec in specs], root)
    if apart:
        resolved = resolved.named_apart()
    contents = [[source.name, source.label, source.content, source.weight] for source in resolved.sources]
    fingerprint = files.digest("pairs", FORMAT_VERSION, contents, dataclasses.asdict(reading))
    # Reports name the sources as the user spelled them, so the spelling is part of the entry, not of the data.
    key = files.digest(
        fingerprint, [source.where for source in resolved.sources], resolved.notes, cache.code_digest(*_CODE)
    )
    with LongWork(f"reading {', '.join(source.name for source in resolved.sources)}") as work:
        entry = cache.build_once(root / "pairs" / key, lambda folder: _build(folder, resolved, strict, reading, work))
    report = IssueReport.from_dict(json.loads((entry.path / "report.json").read_text()))
    if strict and report.first_bad:
        raise strict_error(report.first_bad)
    if not report.pairs:
        raise nothing_left(report)
    sets = tuple(dict.fromkeys(source.label for source in resolved.sources if source.label))
    return dataclasses.replace(_opened(entry, report, fingerprint), sets=sets)


def pairs_from_rows(
    rows: Iterable[Mapping[str, Any]] | Any,
    *,
    name: str = "rows",
    scored: WhichPairs = "best-vs-worst",
    ties: Ties = "skip",
    naming: Naming | None = None,
) -> PairData:
    """Return pairs of rows that are already in memory, converted and checked like those of a file.

    Args:
        rows: mappings (values of numpy and pandas are understood), a table of pandas, Arrow or Polars, or a mapping of
            columns.
        name: stands for the source in reports, ids and subsets.
        scored: as for `load_pairs`.
        ties: likewise.
        naming: likewise.

    Returns:
        The pairs in memory; their fingerprint is that of their content.

    Raises:
        DataError: no pair is left.
    """
    import datasets
    import pyarrow

    report, reading = IssueReport(), Reading(scored, ties, naming or Naming())
    source = Source(name, name, "table", "")
    pairs = list(read_pairs(source, memory_rows(rows, name), report, reading, strict=False))
    if not pairs:
        raise nothing_left(report)
    table = pyarrow.Table.from_batches([text_batch(pairs)])
    hashes = np.array([prompt_hash(pair.prompt) for pair in pairs], dtype=np.uint64)
    content = files.digest("rows", [text_values(pair) for pair in pairs])
    return PairData(datasets.Dataset(table), report, content, hashes)


def raw_rows(source: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the rows of a source as they are, for other formats than pairs.

    Args:
        source: a file, folder or Hub id, as for `load_pairs`.

    Yields:
        (short name of its file or folder, line, row).

    Raises:
        DataError: the source cannot be read, or a row of it is none.
    """
    for found in resolve([source], cache.cache_root()).sources:
        for line, row in read_rows(found):
            if isinstance(row, RowIssue):
                raise DataError(f"{row}; expected one JSON object or table row each")
            yield _place(found), line, row


def _place(source: Source) -> str:
    """What a source is called; the folder of a file whose own name tells nothing, as in Natural/dataset.json."""
    name, path = source.subset, source.path
    while path is not None and not source.label and name.lower() in _PLAIN_NAMES and path.parent.name:
        path = path.parent
        name = path.name
    return name


def prompt_hash(prompt: Sequence[Message]) -> int:
    """Return the first 8 bytes of the SHA-256 of a prompt, as a number.

    The canonical form is the JSON of its roles and contents; space around a content does not count, because
    chat templates drop it.

    Args:
        prompt: its messages.

    Returns:
        0 to 2^64 - 1.
    """
    canonical = json.dumps(
        [[m["role"], m["content"].strip()] for m in prompt], ensure_ascii=False, separators=(",", ":")
    )
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big")


def _build(folder: Path, resolved: Resolved, strict: bool, reading: Reading, work: LongWork) -> None:
    """Write pairs.arrow, prompt_hash.npy and report.json of all sources."""
    import pyarrow

    report = IssueReport(notes=list(resolved.notes))
    hashes: list[np.ndarray] = []
    with (
        pyarrow.OSFile(str(folder / "pairs.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, text_schema()) as writer,
    ):
        for source in resolved.sources:
            held: list[Pair] = []
            for pair in read_pairs(source, read_rows(source), report, reading, strict=strict):
                held.append(pair)
                if len(held) == BATCH_ROWS:
                    _write(writer, held, hashes)
                    work.note(f"{report.rows:,} rows")
            _write(writer, held, hashes)
    np.save(folder / "prompt_hash.npy", np.concatenate(hashes) if hashes else np.empty(0, np.uint64))
    (folder / "report.json").write_text(json.dumps(report.to_dict()))


def _write(writer: Any, held: list[Pair], hashes: list[np.ndarray]) -> None:
    if held:
        writer.write_batch(text_batch(held))
        hashes.append(np.array([prompt_hash(pair.prompt) for pair in held], dtype=np.uint64))
        held.clear()


def _opened(entry: Shared, report: IssueReport, fingerprint: str) -> PairData:
    import datasets

    dataset = datasets.Dataset.from_file(str(entry.path / "pairs.arrow"))
    return PairData(dataset, report, fingerprint, np.load(entry.path / "prompt_hash.npy"), entry)
