"""`btrm export`: a finished model for another reader."""

from __future__ import annotations

import click


@click.command("export")
@click.argument("model")
@click.argument("out")
@click.option("--dtype", metavar="bf16|fp32", help="Type of the weights. Default: as they are.")
@click.option("--merge-adapter", is_flag=True, help="Make whole weights of adapters.")
@click.option("--compat", type=click.Choice(["v4", "v5"]), help="Readers it must suit; what btrm writes suits both.")
@click.option("--target", metavar="NAME", help="Refuse if transformers, vllm, sglang or tei would score it wrongly.")
@click.option("--overwrite", is_flag=True, help="Replace a finished model.")
def export_command(
    model: str,
    out: str,
    dtype: str | None,
    merge_adapter: bool,
    compat: str | None,
    target: str | None,
    overwrite: bool,
) -> None:
    """Write a model anew: in another type, whole instead of adapters, for readers of either transformers."""
    from btrm_core.scoring import export

    click.echo(export(model, out, dtype=dtype, merge=merge_adapter, target=target, overwrite=overwrite))
