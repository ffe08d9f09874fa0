"""`pytest --btrm-family=NAME`: the conformance checks of an installed family, without writing a test file.

pytest loads this module in every environment where btrm is installed, so it imports nothing until the option is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("btrm").addoption(
        "--btrm-family",
        metavar="NAME",
        help="check an installed btrm family against its contract, and run nothing else unless paths are given",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the suite to the paths given, or take it alone if none are."""
    if name := config.getoption("btrm_family"):
        from btrm_core.preflight.conformance import suite

        suite.TestFamily.family = name
        given = config.args if config.args_source is config.ArgsSource.ARGS else []
        config.args = [*given, str(Path(suite.__file__))]
