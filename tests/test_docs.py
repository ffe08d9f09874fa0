"""What the documents say a user can type can be typed."""

import re
import shlex
from pathlib import Path

import click
import pytest

from btrm_core.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md") if (ROOT / path).exists()]


def commands():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text().replace("\\\n", " ")
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL):
            for line in block.splitlines():
                if line.strip().startswith("btrm "):
                    yield pytest.param(line.strip(), id=f"{name}: {line.strip()[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_in_the_documents_parses(line):
    arguments = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
        context = click.Context(command, parent=context)
    command.make_context(command.name, arguments, resilient_parsing=False)


def test_the_examples_of_toml_and_links_exist():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http") and "OWNER" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"
