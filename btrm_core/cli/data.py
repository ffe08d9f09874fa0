"""`btrm data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from btrm_core.console import LongWork, dumps
from btrm_core.errors import ConfigError

if TYPE_CHECKING:
    from btrm_core.chat import ChatFormat

_RULES = ("best-vs-worst", "best-vs-each", "all", "random")


class FormatOption(click.Option):
    """An option whose help lists the formats, which are looked up when the help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The line of the help.

        Args:
            ctx: click's context.
        """
        from btrm_core.data import FORMATS

        self.help = f"Format of all rows, instead of what each looks like: {', '.join(FORMATS)}."
        return super().get_help_record(ctx)


@click.group()
def data() -> None:
    """Look through preference data, filter it and write it in the standard format."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("--model", metavar="ID|DIR", help="Count tokens with this model's tokenizer and template.")
@click.option("--family", metavar="NAME", help="Family of the model. Default: ask them all.")
@click.option("--against", metavar="SRC", multiple=True, help="Data that should not be in it, such as a benchmark.")
@click.option("--near/--no-near", default=True, help="Look for near-duplicate prompts (the slowest part).")
@click.option("--report", "report_dir", metavar="DIR", help="Write report.html, report.json and pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(sources: tuple[str, ...], **flags: Any) -> None:
    """Count pairs, bad rows with their reasons, lengths, duplicates, contradictions, contamination, tokens.

    Nothing is changed. 700,000 pairs take some minutes; progress is shown.
    """
    from btrm_core.data import curate, load_pairs, parse_naming
    from btrm_core.evaluation import require_matplotlib, write_report

    if flags["report_dir"]:
        require_matplotlib()
    pairs = load_pairs(sources, naming=parse_naming(flags["names"]))
    against = curate.load_prompts(flags["against"], parse_naming(flags["names"])) if flags["against"] else None
    chat = _chat(flags["model"], flags["family"])
    with _progress() as told:
        found = curate.survey(pairs, chat=chat, against=against, near=flags["near"], progress=told)
    click.echo(dumps(found.to_dict()) if flags["as_json"] else curate.format_survey(found))
    if flags["report_dir"]:
        page = write_report(curate.survey_report(pairs, found, sources), flags["report_dir"])
        click.echo(f"written: {page}", err=True)


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("-o", "--output", required=True, metavar="OUT", help="File to write: .jsonl, .jsonl.gz or .parquet.")
@click.option("--map", "names", metavar="NAME=COLUMN,...", multiple=True, help="The data's own names of columns.")
@click.option("--format", "form", metavar="NAME", cls=FormatOption)
@click.option(
    "--which-pairs",
    type=click.Choice(_RULES),
    default=_RULES[0],
    show_default=True,
    help="Of scored responses; random draws one pair, by a hash of the answers. `data.scored` of `btrm train`.",
)
@click.option(
    "--ties", type=click.Choice(["skip", "half"]), default="skip", show_default=True, help="Ties of the data."
)
@click.option("--min-margin", type=float, help="Leave out pairs with a smaller margin, or none.")
@click.option("--max-tokens", type=int, help="Leave out pairs with a longer conversation; needs --model.")
@click.option("--dedupe", is_flag=True, help="Leave out pairs that repeat an earlier one.")
@click.option("--decontaminate", metavar="SRC", multiple=True, help="Leave out pairs whose prompt is in SRC.")
@click.option("--sample", type=int, metavar="N", help="Keep N pairs, drawn the same every time.")
@click.option(
    "--split-by-prompt", type=float, metavar="SHARE", help="Write this share of the prompts to OUT's held_out."
)
@click.option("--model", metavar="ID|DIR", help="Tokenizer and template for --max-tokens.")
@click.option("--family", metavar="NAME", help="Family of the model. Default: ask them all.")
@click.option("--strict", is_flag=True, help="Stop at the first bad row.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was read, kept and left out as JSON.")
def convert(sources: tuple[str, ...], **flags: Any) -> None:
    """Write data of any accepted format in the standard format, filtered; every pair left out has a counted reason.

    The pairs are those that `btrm train --data SRC` makes of the same source.
    """
    from btrm_core.data import curate, load_pairs, parse_naming, split_held_out

    target = curate.check_target(flags["output"], flags["overwrite"])
    held_target = None
    if flags["split_by_prompt"] is not None:
        held_target = curate.check_target(held_out_name(target), flags["overwrite"])
    chat = _chat(flags["model"], flags["family"])
    pairs = load_pairs(
        sources,
        strict=flags["strict"],
        scored=flags["which_pairs"],
        ties=flags["ties"],
        naming=parse_naming(flags["names"], flags["form"]),
    )
    naming = parse_naming(flags["names"])
    other = curate.load_prompts(flags["decontaminate"], naming) if flags["decontaminate"] else None
    if other is not None and other.without:
        click.echo(f"{other.without:,} rows of --decontaminate hold no prompt", err=True)
    filters = curate.Filters(flags["min_margin"], flags["max_tokens"], flags["dedupe"], other, flags["sample"])
    with LongWork("filtering", len(pairs) if flags["max_tokens"] is not None else None, "pair") as work:
        pairs = curate.filtered(pairs, filters, chat, work.add)
    files = {str(target): pairs}
    if held_target is not None:
        train, held = split_held_out(pairs, flags["split_by_prompt"])
        if not len(held):
            raise ConfigError(
                f"--split-by-prompt {flags['split_by_prompt']:g} holds out no pair of {len(train):,}: "
                "expected a share above 0 and pairs of two prompts or more"
            )
        files = {str(target): train, str(held_target): held}
    for name, part in files.items():
        with LongWork(f"writing {Path(name).name}", len(part), "pair") as work:
            curate.write_pairs(part, name, work.add)
    if flags["as_json"]:
        written = {name: len(part) for name, part in files.items()}
        click.echo(dumps({**pairs.issues.to_dict(), "written": written}))
    else:
        click.echo(pairs.issues.format())
        for name, part in files.items():
            click.echo(f"{len(part):,} pairs written to {name}")


def held_out_name(target: Path) -> Path:
    """The file beside another that takes the held-out prompts.

    Args:
        target: the file for the other prompts; everything after the first dot of its name counts as ending.

    >>> held_out_name(Path("a/pairs.jsonl.gz")).as_posix()
    'a/pairs.held_out.jsonl.gz'
    """
    stem, dot, endings = target.name.partition(".")
    return target.with_name(f"{stem}.held_out{dot}{endings}")


def _chat(model: str | None, family: str | None) -> ChatFormat | None:
    """Tokenizer and template of a model, as training with it would have them."""
    if model is None:
        if family is not None:
            raise ConfigError("--family says how a model's conversations are written; name the model with --model")
        return None
    from btrm_core.chat import prepare_chat
    from btrm_core.families import detect, load
    from btrm_core.model import base_config, load_tokenizer
    from btrm_core.settings import ModelConfig

    settings = ModelConfig(name=model)
    config = base_config(settings)
    plugin = load(family) if family is not None else detect(config)
    return prepare_chat(load_tokenizer(settings), config, plugin)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar after another."""
    bars: dict[str, LongWork] = {}

    def told(what: str, done: int, of: int) -> None:
        if what not in bars:
            bars[what] = LongWork(what, of, "row")
        bars[what].reach(done)

    try:
        yield told
    finally:
        for bar in bars.values():
            bar.close()
