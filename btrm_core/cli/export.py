"""`btrm export`: a finished model for another reader."""

from __future__ import annotations

from typing import Any

import click

from btrm_core.errors import ConfigError


@click.command("export")
@click.argument("model")
@click.argument("out", required=False)
@click.option("--dtype", metavar="bf16|fp32", help="Type of the weights. Default: as they are.")
@click.option("--merge-adapter", is_flag=True, help="Make whole weights of adapters.")
@click.option("--compat", type=click.Choice(["v4", "v5"]), help="Readers it must suit; what btrm writes suits both.")
@click.option("--target", metavar="NAME", help="Refuse if transformers, vllm, sglang or tei would score it wrongly.")
@click.option("--onnx", is_flag=True, help="Also write model.onnx, if ONNX Runtime gives equal rewards.")
@click.option("--overwrite", is_flag=True, help="Replace a finished model.")
@click.option("--push-to", metavar="HUB_ID", help="Upload it to the Hugging Face Hub; without OUT, as it is.")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
def export_command(
    model: str,
    out: str | None,
    push_to: str | None,
    private: bool,
    onnx: bool,
    **options: Any,
) -> None:
    """Write a model anew: in another type, whole instead of adapters, for readers of either transformers.

    With --push-to it is uploaded as well; token and repository are tried first.
    """
    from btrm_core.hub import prepare_upload
    from btrm_core.model import find_model
    from btrm_core.scoring import export, need_onnx, push, refuse, write_onnx

    options.pop("compat")
    if out is None and push_to is None:
        raise ConfigError("there is nothing to do; expected OUT, where to write, or --push-to HUB_ID")
    if out is None and (onnx or any(options[key] for key in ("dtype", "merge_adapter", "overwrite"))):
        raise ConfigError(
            "--dtype, --merge-adapter, --onnx and --overwrite write a model anew; give OUT, where to write"
        )
    if onnx:
        need_onnx()
    if private and push_to is None:
        raise ConfigError("--private says what becomes of a repository; give --push-to HUB_ID as well")
    if push_to is not None:
        prepare_upload(push_to, private=private)
    if out is not None:
        click.echo(export(model, out, merge=options.pop("merge_adapter"), **options))
        if onnx:
            click.echo(write_onnx(find_model(out)))
    else:
        refuse(find_model(model), options["target"])
    if push_to is not None:
        click.echo(push(out or model, push_to, private=private))
