"""`btrm score`."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("-o", "--output", required=True, metavar="OUTPUT", help="Where to write, one line or row per input row.")
@click.option("--normalize", is_flag=True, help="In standard deviations of the set of `btrm eval --save-calibration`.")
@click.option("--tokens-per-batch", type=int, default=8192, show_default=True)
@click.option("--dtype", default="auto", help="auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32.")
@click.option("--attention", default="auto")
@click.option("--overwrite", is_flag=True, help="Replace a finished output file.")
@click.option("--gpus", metavar="N", help="One process with a copy of the model for each of N GPUs, or all.")
@click.option("--processes", type=int, metavar="N", help="N processes with a copy of the model each, on the CPU.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: the processes are actors of a Ray cluster, on any of its machines.",
)
def score(
    model: str,
    source: str,
    names: tuple[str, ...],
    output: str,
    overwrite: bool,
    gpus: str | None,
    processes: int | None,
    engine: str,
    **options: Any,
) -> None:
    """Give every conversation, pair or list of responses in a file its rewards.

    INPUT is JSON Lines, also packed (.gz, .zst, .bz2, .xz), Parquet, or - for standard input. OUTPUT is what its ending
    says: lines, packed lines or Parquet; - is standard output. Keeps the order, shows progress, needs the same memory
    for any number of rows, and goes on where an interrupted call stopped. A process that ends loses nothing: its rows
    are scored by another one.
    """
    from btrm_core.data import parse_naming
    from btrm_core.scoring import RayWorkers, Scorer, Workers, devices, score_file

    naming = parse_naming(names)
    if engine == "ray":
        count = actors(gpus, processes)
        with RayWorkers(model, count, gpus=gpus is not None, **options) as ray:
            click.echo(score_file(ray, source, output, overwrite=overwrite, naming=naming), err=True)
    elif places := devices(gpus, processes):
        with Workers(model, places, **options) as workers:
            click.echo(score_file(workers, source, output, overwrite=overwrite, naming=naming), err=True)
    else:
        scorer = Scorer(model, **options)
        click.echo(score_file(scorer, source, output, overwrite=overwrite, naming=naming), err=True)


def actors(gpus: str | None, processes: int | None) -> int:
    """How many actors are asked for; the GPUs are those of the cluster, which only Ray knows.

    Args:
        gpus: a number.
        processes: a number.

    Raises:
        ConfigError: not one of them is given, or it is no number from 1.
    """
    from btrm_core.errors import ConfigError

    if (gpus is None) == (processes is None):
        raise ConfigError("--engine ray: expected --gpus N or --processes N, the number of actors")
    count = processes if processes is not None else int(gpus) if str(gpus).isdecimal() else 0  # type: ignore[arg-type]
    if count < 1:
        raise ConfigError(f"--engine ray: {gpus or processes} actors; expected a number from 1")
    return count
