"""`btrm families` and `btrm new-family`."""

from __future__ import annotations

import click

from btrm_core.console import dumps
from btrm_core.errors import ConfigError
from btrm_core.families import list_families


@click.command()
@click.argument("name", required=False)
@click.option("--model", metavar="ID|DIR", help="Show the answers for this model.")
@click.option("--check", is_flag=True, help="Run the conformance checks on family NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show why a family is broken, with its traceback.")
def families(name: str | None, model: str | None, check: bool, as_json: bool, debug: bool) -> None:
    """List the installed families, show what one answers, or check that it keeps the contract."""
    from btrm_core.families import describe, format_description, format_families, tracebacks

    if check and name is None:
        raise ConfigError("--check needs the NAME of a family; `btrm families` lists them")
    if name is None:
        entries = list_families()
        click.echo(dumps([vars(e) for e in entries]) if as_json else format_families(entries))
        for line in tracebacks(entries) if debug else ():
            click.echo(line, err=True)
    elif check:
        _check_family(name, model, as_json)
    else:
        described = describe(name, model)
        click.echo(dumps(described) if as_json else format_description(described))


def _check_family(name: str, model: str | None, as_json: bool) -> None:
    from btrm_core.preflight.conformance import format_checks, run_checks

    results = run_checks(name, model)
    click.echo(dumps([vars(result) for result in results]) if as_json else format_checks(results))
    if any(result.verdict == "fail" for result in results):
        raise SystemExit(1)


@click.command("new-family")
@click.argument("name")
@click.option("--directory", metavar="DIR", help="Where to write the package. Default: btrm-NAME.")
def new_family_command(name: str, directory: str | None) -> None:
    """Write a family package that can be installed, tested and published."""
    from btrm_core.families import write_family

    written = write_family(name, directory)
    click.echo(f"written: {written}; next: pip install -e {written} && pytest {written}")
