"""`btrm score` and `btrm eval`."""

from __future__ import annotations

import click

from btrm_core.console import dumps


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT.jsonl")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="Where to write, one line per input line.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto")
@click.option("--overwrite", is_flag=True, help="Replace a finished output file.")
def score(
    model: str,
    source: str,
    names: tuple[str, ...],
    output: str,
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
    click.echo(score_file(scorer, source, output, overwrite=overwrite, naming=naming), err=True)


@click.command("eval")
@click.argument("model")
@click.option("--data", metavar="SRC", multiple=True, required=True, help="Pairs to evaluate on; repeat for several.")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: str, data: tuple[str, ...], names: tuple[str, ...], tokens_per_batch: int, dtype: str, as_json: bool
) -> None:
    """Accuracy of a model on preference pairs, with its standard error and the length baseline."""
    from btrm_core.data import parse_naming
    from btrm_core.evaluation import format_evaluation
    from btrm_core.scoring import Scorer, evaluate_sources

    naming = parse_naming(names)
    scorer = Scorer(model, dtype=dtype, tokens_per_batch=tokens_per_batch)
    result = evaluate_sources(scorer, data, naming)
    click.echo(dumps(result) if as_json else format_evaluation(result))
