"""Where pairs come from: turns what the user wrote after `--data` into files and tables to read.

A source is one of

* a file: `.jsonl`, `.ndjson`, `.json` (an array, or one object a line), `.csv`, `.tsv`, each also with
  `.gz`, and `.parquet`;
* a folder written by `datasets.save_to_disk`, or a folder of such files; of several splits "train" is
  taken, and what was left out is said; `folder:split` names another;
* a data set of the Hugging Face Hub: `org/name`, `org/name:split`, `org/name:config:split`.

What exists on disk wins over the Hub. Reading the rows is `readers.py`'s work.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from btrm_core import files
from btrm_core import files as files_module
from btrm_core.console import quiet_libraries
from btrm_core.errors import DataError, did_you_mean, first_line

if TYPE_CHECKING:
    import datasets

Kind = Literal["jsonl", "json", "csv", "parquet", "table"]


_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


ACCEPTED = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) or .parquet"


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_SPLIT_NAMES = ("train", "validation", "valid", "dev", "test", "eval")


_SPLIT_WORD = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLIT_NAMES)})(?=[-_./]|$)", re.IGNORECASE)


_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


_HUB_TIMEOUT_SECONDS = 15.0


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
    """

    where: str
    name: str
    kind: Kind
    content: str
    path: Path | None = None
    table: datasets.Dataset | None = field(default=None, repr=False, compare=False)

    @property
    def subset(self) -> str:
        """The subset of rows that name none: the source's name without its endings."""
        return self.name if self.kind == "table" else _stem(self.name)


@dataclass(frozen=True)
class Resolved:
    """All sources of a run, in order, and what the user should know about the choice."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()


def resolve(specs: Sequence[str], root: Path) -> Resolved:
    """Find every source, in the order given; nothing is read yet but the content hashes.

    Args:
        specs: what the user wrote, one string per source.
        root: the cache directory (content hashes are remembered there).

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
        notes += note
    return Resolved(tuple(sources), tuple(notes))


def _resolve_one(spec: str, root: Path) -> tuple[list[Source], list[str]]:
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(spec, path, None, root)
    if path.exists():
        return [_file(spec, path, root)], []
    before, colon, split = spec.rpartition(":")
    if colon and before and Path(before).expanduser().is_dir():
        return _folder(before, Path(before).expanduser(), split, root)
    name, *rest = spec.split(":")
    if not _HUB_ID.fullmatch(name) or len(rest) > 2 or _kind(Path(name)) or _local_typo(path):
        raise _missing(spec, path)
    return [_hub(spec, name, rest)], []


def _file(where: str, path: Path, root: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"cannot tell the format of '{where}': expected a file ending in {ACCEPTED}.")
    return Source(where, path.name, kind, files.file_sha256(path, root), path)


def _folder(where: str, folder: Path, split: str | None, root: Path) -> tuple[list[Source], list[str]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(where, folder, split, root)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _kind(path)
        and path.name not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"the folder '{where}' holds no data: expected files ending in {ACCEPTED}.")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = _choose(where, list(by_split), split)
    left = [path.relative_to(folder).as_posix() for name in by_split if name != chosen for path in by_split[name]]
    notes = [f"{where}: the split '{chosen}' is used; left out: {_shorten(left)}"] if left else []
    return [_file(f"{where.rstrip('/')}/{p.relative_to(folder)}", p, root) for p in by_split[chosen]], notes


def _saved(where: str, folder: Path, split: str | None, root: Path) -> tuple[list[Source], list[str]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any library underneath may raise its own type
        raise DataError(f"cannot load the data set folder '{where}': {_sentence(error)}") from error
    notes = []
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose(where, list(loaded), split)
        if left := [name for name in loaded if name != chosen]:
            notes.append(f"{where}: the split '{chosen}' is used; left out: {_shorten(left)}")
        loaded, folder = loaded[chosen], folder / chosen
    elif split is not None:
        raise DataError(f"the data set folder '{where}' has no splits. Drop ':{split}'.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = files_module.digest([[path.name, files_module.file_sha256(path, root)] for path in files])
    name = Path(where).expanduser().resolve().name
    return [Source(where, name, "table", content, table=loaded)], notes


def _hub(spec: str, name: str, rest: list[str]) -> Source:
    import datasets

    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    reached = _reach(spec, name)
    try:
        with quiet_libraries(), contextlib.nullcontext() if reached else _only_the_cache():
            table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub client, the data set's builder and Arrow raise what they like
        hint = "Check the id, the split and the connection, or pass a local file."
        if not reached:
            hint = "The Hub cannot be reached and the data set is not in its cache; pass a local file."
        raise DataError(f"cannot load '{spec}' from the Hugging Face Hub: {_sentence(error)} {hint}") from error
    # The builder's fingerprint follows the repository's revision and the split.
    return Source(spec, name, "table", files.digest(name, config, split, table._fingerprint), table=table)


def _reach(spec: str, name: str) -> bool:
    """Return False if the Hub cannot be reached; loading would retry for half a minute to find out.

    Raises:
        DataError: the Hub answers that there is no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"'{spec}' is neither a file here nor a data set of the Hugging Face Hub. "
            "Check the spelling; for a private data set, log in with 'hf auth login'."
        ) from error
    except Exception:  # offline, proxy, time-out: the cache may still have it
        return False
    return True


@contextlib.contextmanager
def _only_the_cache() -> Iterator[None]:
    """Let the Hub client answer from its cache alone."""
    import datasets
    import huggingface_hub.constants as hub

    before = (datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _choose(where: str, splits: list[str], wanted: str | None) -> str:
    """Pick the wanted split, else "train", else the only one."""
    named = ", ".join(sorted(name for name in splits if name)) or "none"
    if wanted is not None:
        if wanted in splits:
            return wanted
        raise DataError(f"'{where}' has no split '{wanted}': it has {named}.{did_you_mean(wanted, splits)}")
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    example = sorted(name for name in splits if name)[0]
    raise DataError(f"'{where}' has no split 'train': it has {named}. Name one, for example '{where}:{example}'.")


def _split_of(path: Path) -> str:
    """The split a file belongs to by its name or its folder's, or an empty string."""
    words = _SPLIT_WORD.findall(path.as_posix())
    return words[-1].lower() if words else ""


def _kind(path: Path) -> Kind | None:
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] == ".gz":
        kind = _KINDS.get(endings[-2]) if len(endings) > 1 else None
        return None if kind == "parquet" else kind
    return _KINDS.get(endings[-1]) if endings else None


def _stem(name: str) -> str:
    name = name.removesuffix(".gz")
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


def _sentence(error: BaseException) -> str:
    return f"{first_line(error).removesuffix('.')}."
