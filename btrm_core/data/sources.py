"""Where pairs come from: turns what the user wrote after `--data` into files and tables to read.

A source is one of

* a file: `.jsonl`, `.ndjson`, `.json` (arrays, one object a line, or one object that holds the array), `.csv`, `.tsv`,
  each also packed (`.gz`, `.zst`, `.bz2`, `.xz`), `.parquet`, `.arrow`, `.feather`; a pattern of them; a pipe or `-`;
* a folder written by `datasets.save_to_disk`, or a folder of such files, as a downloaded repository of the Hub is; of
  several splits "train" is taken, and what was left out is said; `folder:split` names another; where the folder's
  README names the files of its configurations, `folder:config:split` names one of these too;
* a data set of the Hugging Face Hub: `org/name`, `org/name:split`, `org/name:config:split`.

`inputs/spec.py` says what may stand around these: slices, revisions, options, weights and names. What exists on disk
wins over the Hub. Reading the rows is `readers.py`'s work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from btrm_core import files
from btrm_core.cache import file_sha256
from btrm_core.data.inputs import hub
from btrm_core.data.inputs.card import read_card
from btrm_core.data.inputs.spec import Slice, Spec, apart, expand, is_pattern, parse_spec
from btrm_core.data.inputs.splits import choose_split, split_of
from btrm_core.data.inputs.streams import PACKED, STANDARD_INPUT, kind_of_file, local_path, spooled
from btrm_core.data.shapes.values import clean_text
from btrm_core.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow", "table"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
ACCEPTED = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz, .zst, .bz2 or .xz), .parquet, .arrow or .feather"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_ADDRESS = re.compile(r"(?:hf://datasets/|https?://huggingface\.co/datasets/)(.+)")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Source:
    """One thing to read rows from.

    Attributes:
        where: the place as messages show it, in the user's own spelling.
        name: short name without folders, for the ids of rows that have none.
        kind: how to read it.
        path: the file; None for a table.
        table: the rows of a `save_to_disk` folder or a Hub data set, memory-mapped.
        content: SHA-256 of the content, or what stands for it.
        rows: the slice of the rows that is meant; None for all.
        whole: the files of a split of which it is the slice, where they are several; this is one of them.
        weight: what every pair of it counts in the loss.
        label: the user's own name for it.
    """

    where: str
    name: str
    kind: Kind
    content: str
    path: Path | None = None
    table: datasets.Dataset | None = field(default=None, repr=False, compare=False)
    rows: Slice | None = None
    whole: tuple[Source, ...] = field(default=(), repr=False)
    weight: float = 1.0
    label: str | None = None

    def __post_init__(self) -> None:
        for name in ("where", "name", "label"):  # a file's name may be no UTF-8
            object.__setattr__(self, name, (value := getattr(self, name)) and clean_text(value))

    @property
    def subset(self) -> str:
        """The subset of rows that name none: the user's name, else the source's without its endings."""
        if self.label:
            return self.label
        return self.name if self.kind == "table" else _stem(self.name)


@dataclass(frozen=True)
class Resolved:
    """All sources of a run, in order, and what the user should know about the choice.

    Attributes:
        sources: what rows are read from; one that the user wrote may be several files.
        notes: a line for each choice made on the user's behalf.
    """

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()

    def named_apart(self) -> Resolved:
        """The same sources, each that the user has not named under a name of its own."""
        folders = ["" if s.label or s.path is None else s.path.resolve().parent.name for s in self.sources]
        names = apart([source.subset for source in self.sources], folders)
        return replace(self, sources=tuple(replace(s, label=n) for s, n in zip(self.sources, names, strict=True)))


def resolve(specs: Sequence[str], root: Path) -> Resolved:
    """Find every source, in the order given; nothing is read yet but the content hashes.

    Args:
        specs: what the user wrote, one string per source; `inputs/spec.py` says what may stand there.
        root: the cache directory (content hashes are remembered there).

    Returns:
        The sources to read rows from, and notes on what was chosen on behalf of the user.

    Raises:
        DataError: no source given, a file that does not exist, a folder without data, an unknown format,
            an unreadable file, or a Hub data set that cannot be loaded.
    """
    if not specs or not all(spec.strip() for spec in specs):
        raise DataError("no data given. Pass at least one file, folder or Hub id, for example --data pairs.jsonl.")
    sources: list[Source] = []
    notes: list[str] = []
    for spec in specs:
        found, note = _resolve_one(spec, root)
        sources += found
        notes += map(clean_text, note)
    return Resolved(tuple(sources), tuple(notes))


def _resolve_one(text: str, root: Path) -> tuple[list[Source], list[str]]:
    text = match.group(1) if (match := _HUB_ADDRESS.fullmatch(text)) else text
    spec = parse_spec(text, lambda place: kind_of_file(local_path(place), place) != "")
    made, notes = _found(spec, root)
    sources = []
    whole = tuple(made) if spec.rows and len(made) > 1 and not is_pattern(spec.place) else ()
    for source in made:
        slice_of = (source.content, str(spec.rows), *(other.content for other in whole))
        content = files.digest(*slice_of) if spec.rows else source.content
        changed = replace(source, content=content, rows=spec.rows, whole=whole, weight=spec.weight, label=spec.name)
        sources.append(replace(changed, name=spec.name) if spec.name and len(made) == 1 else changed)
    if spec.rows and len(made) > 1 and not whole:
        notes = [*notes, f"{spec.text}: the slice is taken of each of the {len(sources)} files"]
    return sources, notes


def _found(spec: Spec, root: Path) -> tuple[list[Source], list[str]]:
    """The sources at the place of a spec, and what should be said about them."""
    path = local_path(spec.place)
    kind = kind_of_file(path, spec.place)
    where = spec.place
    if kind == "folder":
        if inner := spec.option("data_dir"):
            path, where = path / inner, f"{where.rstrip('/')}/{inner}"
        if kind_of_file(path, where) != "folder":
            raise DataError(f"no such folder: '{where}'.")
        return _folder(where, path, spec, root)
    if kind == "pipe":
        return [_piped(where, root)], []
    if kind == "file":
        if spec.parts:
            raise DataError(f"'{where}' is a file and has no splits. Drop ':{':'.join(spec.parts)}'.")
        return [_file(where, path, root)], []
    if is_pattern(where):
        return _pattern(where, root)
    if not _HUB_ID.fullmatch(where) or len(spec.parts) > 2 or _kind(Path(where)) or _local_typo(path):
        raise _missing(where, path)
    # The builder's fingerprint follows the repository's revision and the split.
    table = hub.load(spec)
    asked = [spec.place, spec.config, spec.split or "train", *map(list, spec.options)]
    return [Source(spec.text, where, "table", files.digest(*asked, table._fingerprint), table=table)], []


def _pattern(where: str, root: Path) -> tuple[list[Source], list[str]]:
    found = [path for path in expand(str(local_path(where))) if kind_of_file(path, str(path)) == "file" and _kind(path)]
    if not found:
        raise DataError(f"no file fits the pattern '{where}': expected files ending in {ACCEPTED}.")
    return [_file(str(path), path, root) for path in found], []


def _piped(where: str, root: Path) -> Source:
    path = spooled(where, root)
    name = "stdin" if where in STANDARD_INPUT else Path(where).name
    kind = _kind(Path(where)) or _kind(path) or "json"
    return Source(where, name, kind, file_sha256(path, root), path)


def _file(where: str, path: Path, root: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"cannot tell the format of '{where}': expected a file ending in {ACCEPTED}.")
    return Source(where, path.name, kind, file_sha256(path, root), path)


def _folder(where: str, folder: Path, spec: Spec, root: Path) -> tuple[list[Source], list[str]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(where, folder, spec.split, root)
    chosen, taken = _described(where, folder, spec) or _by_name(where, folder, folder, spec.split)
    left = [path.relative_to(folder).as_posix() for path in _data_files(where, folder) if path not in taken]
    notes = [f"{where}: {chosen} is used; left out: {_shorten(left)}"] if left else []
    return [_file(f"{where.rstrip('/')}/{p.relative_to(folder)}", p, root) for p in taken], notes


def _described(where: str, folder: Path, spec: Spec) -> tuple[str, list[Path]] | None:
    """The split that is meant and its files, as the folder's README has them; None if it says nothing of files."""
    card = read_card(where, folder)
    if card is None:
        return None
    config, split = card.configuration(spec.config, spec.split)
    splits = card.splits(config)
    if splits is None:
        chosen, files_ = _by_name(where, folder, card.base(config), split)
        return f"{chosen} of the configuration '{config}'", files_
    name = choose_split(where, list(splits), split)
    return f"the split '{name}' of the configuration '{config}'", card.files(config, name, splits[name])


def _by_name(where: str, folder: Path, base: Path, split: str | None) -> tuple[str, list[Path]]:
    """The split that is meant and its files, by the names of files and folders below `base`."""
    by_split: dict[str, list[Path]] = {}
    for path in _data_files(where, folder):
        if path.is_relative_to(base):
            by_split.setdefault(split_of(path.relative_to(base)), []).append(path)
    if not by_split:
        raise DataError(f"the folder '{where}' holds no data: expected files ending in {ACCEPTED}.")
    chosen = choose_split(where, list(by_split), split)
    return f"the split '{chosen}'", by_split[chosen]


def _data_files(where: str, folder: Path) -> list[Path]:
    """The data files of a folder, at any depth, but for hidden ones.

    Raises:
        DataError: a folder cannot be read, or a data file is a link to nothing.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read '{error.filename}': {error.strerror}.") from error

    found = []
    for base, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(base, name)
            if name.startswith(".") or name in _NOT_DATA or _kind(path) is None:
                continue
            if kind_of_file(path, f"{where.rstrip('/')}/{path.relative_to(folder)}") == "file":
                found.append(path)
    return sorted(found)


def _saved(where: str, folder: Path, split: str | None, root: Path) -> tuple[list[Source], list[str]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any library underneath may raise its own type
        raise DataError(f"cannot load the data set folder '{where}': {hub.sentence(error)}") from error
    notes = []
    if isinstance(loaded, datasets.DatasetDict):
        chosen = choose_split(where, list(loaded), split)
        if left := [name for name in loaded if name != chosen]:
            notes.append(f"{where}: the split '{chosen}' is used; left out: {_shorten(left)}")
        loaded, folder = loaded[chosen], folder / chosen
    elif split is not None:
        raise DataError(f"the data set folder '{where}' has no splits. Drop ':{split}'.")
    parts = sorted(path for path in folder.rglob("*") if path.is_file())
    content = files.digest([[path.name, file_sha256(path, root)] for path in parts])
    return [Source(where, local_path(where).resolve().name, "table", content, table=loaded)], notes


def _kind(path: Path) -> Kind | None:
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in PACKED:
        kind = _KINDS.get(endings[-2]) if len(endings) > 1 else None
        return None if kind in ("parquet", "arrow") else kind
    return _KINDS.get(endings[-1]) if endings else None


def _stem(name: str) -> str:
    if Path(name).suffix in PACKED:
        name = Path(name).stem
    return name[: -len(Path(name).suffix)] if Path(name).suffix in _KINDS else name


def _local_typo(path: Path) -> bool:
    """True if `folder/name` has a close match in an existing folder: more likely a typo than a Hub id."""
    return path.parent.is_dir() and path.parent != Path() and bool(did_you_mean(path.name, _names(path.parent)))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() or _kind(path))
    except OSError:
        return []


def _missing(spec: str, path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"no such file or folder: '{spec}' ('{path.parent}' does not exist either).")
    names = _names(path.parent)
    hint = did_you_mean(path.name, names)
    if not hint and names:
        hint = f" The folder has: {_shorten(names)}."
    return DataError(f"no such file or folder: '{spec}'.{hint} A Hub data set is written org/name or org/name:split.")


def _shorten(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
