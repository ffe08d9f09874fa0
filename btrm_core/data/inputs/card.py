"""What the README of a downloaded data set says of its files: which belong to which configuration and split.

`datasets` reads the same lines (`configs:` before the text) with the same rules; they come before the names of files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from btrm_core.errors import DataError, did_you_mean, first_line

CARD = "README.md"


class Card:
    """The configurations that a folder's README names."""

    def __init__(self, where: str, folder: Path, configs: Any) -> None:
        self._where, self._folder, self._configs = where, folder, configs

    def configuration(self, config: str | None, split: str | None) -> tuple[str, str | None]:
        """The configuration that is meant, and the split that is left to choose in it.

        Args:
            config: the one asked for; None for the default one.
            split: the split asked for; a word alone may also name a configuration.

        Raises:
            DataError: there is no such configuration, or several and none is the default.
        """
        names = [str(name) for name in self._configs]
        if config is not None:
            if config not in names:
                said = f"'{self._where}' has no configuration '{config}': its {CARD} names {', '.join(names)}."
                raise DataError(f"{said}{did_you_mean(config, names)}")
            return config, split
        default = names[0] if len(names) == 1 else self._configs.get_default_config_name()
        if split in names and (default is None or split not in (self.splits(default) or {})):
            return str(split), None
        if default is None:
            raise DataError(
                f"'{self._where}' has several configurations and none is the default: {', '.join(names)}. "
                f"Name one, for example '{self._where}:{names[0]}'."
            )
        return str(default), split

    def splits(self, config: str) -> dict[str, list[str]] | None:
        """The patterns of files by split; None where the configuration names none.

        Args:
            config: one of the README's.

        Raises:
            DataError: they are no such thing.
        """
        from datasets.data_files import sanitize_patterns

        named = self._configs[config].get("data_files")
        if named is None:
            return None
        try:
            return {split: list(map(str, patterns)) for split, patterns in sanitize_patterns(named).items()}
        except (ValueError, TypeError) as error:
            raise DataError(f"the {CARD} of '{self._where}' cannot be read: {first_line(error)}") from error

    def base(self, config: str) -> Path:
        """The folder in which the files of a configuration lie.

        Args:
            config: one of the README's.
        """
        return self._folder / str(self._configs[config].get("data_dir") or "")

    def files(self, config: str, split: str, patterns: Iterable[str]) -> list[Path]:
        """The files of a split, in the order of its patterns.

        Args:
            config: the configuration.
            split: its split, for the message.
            patterns: as `splits` gives them.

        Raises:
            DataError: there is no such file, or one outside of the folder.
        """
        from datasets.data_files import resolve_pattern

        found: list[Path] = []
        for pattern in patterns:
            said = f"the {CARD} of '{self._where}' says that the split '{split}' is in '{pattern}'"
            try:
                if "://" in pattern:
                    raise FileNotFoundError(pattern)
                base = str(self.base(config).resolve())
                paths = [Path(os.path.normpath(path)) for path in resolve_pattern(pattern, base)]
            except (OSError, ValueError) as error:
                raise DataError(f"{said}, which is not there: download it, or name a file.") from error
            if not all(path.is_relative_to(self._folder.resolve()) for path in paths):
                raise DataError(f"{said}, which is outside of the folder.")
            found += [path for path in paths if path not in found]
        return [self._folder / path.relative_to(self._folder.resolve()) for path in found]


def read_card(where: str, folder: Path) -> Card | None:
    """What a folder's README says of its files; None if there is none that says anything.

    Args:
        where: the folder as messages show it.
        folder: where it is.

    Raises:
        DataError: the README cannot be read.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---") or "configs" not in text:
        return None
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard(text, ignore_metadata_errors=True).data)
    except Exception as error:  # YAML and `datasets` raise what they like
        raise DataError(f"the {CARD} of '{where}' cannot be read: {first_line(error)}") from error
    return Card(where, folder, configs) if configs else None
