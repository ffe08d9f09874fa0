"""`btrm new-family NAME`: a complete family package to start from, which passes the conformance checks as it is.

Decides what such a package holds. Its files lie in `family_package/` and are a package themselves, of a family called
"myfamily"; writing one for another name replaces that name and nothing else. CONTRIBUTING shows the same files.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import resources
from pathlib import Path

from btrm_core.errors import ConfigError
from btrm_core.families.discovery import discover

FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "btrm_{module}/__init__.py": "package.py.in",
    "btrm_{module}/chat_template.jinja": "chat_template.jinja.in",
    "btrm_{module}/py.typed": None,
    "tests/test_{module}.py": "test.py.in",
}
"""File of the package -> file of `family_package/`; None is an empty file."""


_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")


def write_family(name: str, directory: str | Path | None = None) -> Path:
    """Write a family package.

    Args:
        name: the family's name: what users will say after `--family`.
        directory: where to write; None takes `btrm-NAME` in the current directory.

    Returns:
        The package's directory, with pyproject.toml in it.

    Raises:
        ConfigError: the name is unfit or taken by an installed family, the directory holds something, or it cannot be
            written.
    """
    taken = [entry for entry in discover() if entry.name == name]
    if taken:
        raise ConfigError(f"family '{name}' is installed already ({taken[0].origin}); choose another name")
    files = package_files(name)
    module = f"btrm_{name.replace('-', '_')}"
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f"a module {module} is installed already; choose another name")
    target = Path(directory) if directory is not None else Path(f"btrm-{name}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target} exists already; choose another --directory, or remove it")
    try:
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another --directory") from error
    return target


def package_files(name: str) -> dict[str, str]:
    """The files of a family package, path -> text, without writing them.

    Args:
        name: of the new family.

    Raises:
        ConfigError: the name cannot be one of a family, a distribution and a module at once.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot be a family's name; expected small letters and digits, and single - or _ between them, "
            "such as 'my-family2'"
        )
    module = name.replace("-", "_")
    title = "".join(part.capitalize() for part in module.split("_"))
    words = {"btrm_myfamily": f"btrm_{module}", "btrm-myfamily": f"btrm-{name}", "MyFamily": title, "myfamily": name}
    pattern = re.compile("|".join(words))  # longest first: the names of package and module contain the family's
    source = resources.files("btrm_core") / "families" / "package"
    texts = {
        path.format(module=module): (source / file).read_text(encoding="utf-8") if file else ""
        for path, file in FILES.items()
    }
    return {path: pattern.sub(lambda match: words[match[0]], text) for path, text in texts.items()}
