"""`btrm score`."""

from __future__ import annotations

import click


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT.jsonl")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="Where to write, one line per input line.")
@click.option("--normalize", is_flag=True, help="In standard deviations of the set of `btrm eval --save-calibration`.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto")
@click.option("--overwrite", is_flag=True, help="Replace a finished output file.")
def score(
    model: str,
    source: str,
    names: tuple[str, ...],
    output: str,
    normalize: bool,
    tokens_per_batch: int,
    dtype: str,
    attention: str,
    overwrite: bool,
) -> None:
    """Give every conversation, pair or list of responses in a JSONL file its rewards.

    Keeps the order, shows progress, and goes on where an interrupted call stopped.
    """
    from btrm_core.data import parse_naming
    from btrm_core.scoring import Scorer, score_file

    naming = parse_naming(names)
    scorer = Scorer(model, dtype=dtype, attention=attention, tokens_per_batch=tokens_per_batch)
    told = score_file(scorer, source, output, overwrite=overwrite, naming=naming, normalize=normalize)
    click.echo(told, err=True)
