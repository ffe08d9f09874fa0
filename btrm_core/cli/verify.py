"""`btrm verify`: one number on every path."""

from __future__ import annotations

import click

from btrm_core.console import dumps, table


@click.command()
@click.argument("model")
@click.option("--url", help="Also ask a running btrm, vLLM or SGLang server that has loaded it.")
@click.option("--token", envvar="BTRM_TOKEN", help="The server's bearer token.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(model: str, url: str | None, token: str | None, as_json: bool) -> None:
    """Check that a model directory, and a server, give the rewards that training wrote down.

    Exit code 1 if a check fails.
    """
    from btrm_core.preflight.verify import verify as verify_directory
    from btrm_core.preflight.verify import verify_url

    found, scorer = verify_directory(model)
    if url is not None and scorer is not None:
        found += verify_url(url, scorer, token.strip() if token else None)
    if as_json:
        click.echo(dumps([vars(check) for check in found]))
    else:
        click.echo("\n".join(table([(check.verdict, check.name, check.what) for check in found])))
        for check in found:
            if check.verdict == "fail":
                click.echo(f"{check.name}: {check.why}; {check.what_to_do}")
    if url is not None and scorer is None:
        click.echo(f"{url} was not asked: the model cannot be opened", err=True)
    if any(check.verdict == "fail" for check in found):
        raise SystemExit(1)
