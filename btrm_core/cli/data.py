"""`btrm data`."""

from __future__ import annotations

import click

from btrm_core.console import dumps


@click.group()
def data() -> None:
    """Look at preference data."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(sources: tuple[str, ...], names: tuple[str, ...], as_json: bool) -> None:
    """Count pairs, bad rows with their reasons, duplicates, contradictions and the length baseline."""
    from btrm_core.data import format_inspection, inspect_pairs, load_pairs, parse_naming

    result = inspect_pairs(load_pairs(sources, naming=parse_naming(names)))
    click.echo(dumps(result) if as_json else format_inspection(result))
