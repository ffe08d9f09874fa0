"""What `btrm families` shows: the installed families, and one family's resolved answers with who gave each.

Decides what is shown and how it is laid out. Imports torch and transformers only when a model is named.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from btrm_core import families
from btrm_core.console import table
from btrm_core.errors import CheckpointError, FamilyError, one_line, printable
from btrm_core.families.family import Family
from btrm_core.families.hookspecs import PadToken, text_config
from btrm_core.families.installed import FamilyEntry
from btrm_core.files import text_sha256
from btrm_core.hub import hub_problem

if TYPE_CHECKING:
    pass

# Draws of the head from which its standard deviation is measured: enough to be right to about 1 %.
_NUM_DRAWS = 64


def describe(name: str, model: str | None = None, settings: object | None = None) -> dict[str, Any]:
    """What a family is and recommends and, for a model, every answer it gives: a value that can be written as JSON.

    Args:
        name: the family's name.
        model: a hub id or local directory whose config and tokenizer (no weights) the questions are asked about.
        settings: a `RunConfig`, whose own settings answer first.

    Raises:
        FamilyError: the family is unknown or broken, or an answer breaks the contract.
        CheckpointError: the model's config or tokenizer cannot be read.
    """
    family = families.load(name, settings, aside_first=True)
    entry = next(entry for entry in families.discover() if entry.name == name)
    answer = family.recipe()
    recipe = {**dataclasses.asdict(answer), "attention": list(answer.attention), "tiny": answer.tiny is not None}
    out = {
        "name": name,
        "origin": family.origin,
        "status": entry.status,
        "summary": families.summary(family.plugin),
        "plugin": entry.value,
        "hooks": list(family.hooks),
        "recipe": {**recipe, "given_by": family.ask("recipe").given_by},
    }
    return {**out, "model": model, "answers": _answers(family, model)} if model is not None else out


def _answers(family: Family, model: str) -> dict[str, dict[str, Any]]:
    """Every hook's answer for one model, in the order in which a run asks."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises whatever its many readers raise
        raise CheckpointError(
            hub_problem(error, model)
            or f"cannot read the config and tokenizer of {model} ({one_line(error)}); expected a hub id or a local "
            "directory with config.json and the tokenizer's files"
        ) from error
    claims = family.ask("claims", config=config)
    setup = family.ask("setup_tokenizer", tokenizer=tokenizer, config=config)
    tokenizer = setup.value
    pad, template = family.pad_answer(tokenizer), family.template_answer(tokenizer)
    size = text_config(config).hidden_size
    return {
        "claims": {"value": claims.value is True, "given_by": claims.given_by},
        "setup_tokenizer": {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "given_by": setup.given_by,
        },
        "pad_token": {**_pad(tokenizer, pad.value), "given_by": pad.given_by},
        "chat_template": {
            "sha256": text_sha256(template.value),
            "terminal_token": _terminal_token(tokenizer, template.value),
            "source": template.value,
            "given_by": template.given_by,
        },
        "init_head": {
            "hidden_size": size,
            "std": float(f"{family.drawn_head(size, _NUM_DRAWS).square().mean().sqrt().item():.3g}"),
            "given_by": family.ask("init_head", hidden_size=size).given_by,
        },
    }


def _pad(tokenizer: Any, pad: PadToken) -> dict[str, Any]:
    number = len(tokenizer) if pad.new else tokenizer.convert_tokens_to_ids(pad.token)
    return {"token": pad.token, "id": number, "new": pad.new, "reason": pad.reason}


def _terminal_token(tokenizer: Any, template: str) -> str:
    """The token that ends a rendered exchange, where the reward is read."""
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(exchange, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program of its own and may fail in any way
        raise FamilyError(
            f"the chat template cannot render a user and an assistant message: {one_line(error)}"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids[-1]))


def format_families(entries: Sequence[FamilyEntry]) -> str:
    """The list of families as a table; a broken one shows its cause in place of its summary.

    Args:
        entries: the installed families, from `list_families`.
    """
    if not entries:
        return "no families are installed; `pip install btrm` brings some"
    rows = [("NAME", "ORIGIN", "STATUS", "SUMMARY")]
    rows += [(entry.name, entry.origin, entry.status, entry.cause or entry.summary) for entry in entries]
    return "\n".join(table(rows))


def tracebacks(entries: Sequence[FamilyEntry]) -> list[str]:
    """Why each broken family is broken, with the traceback of its own error.

    Args:
        entries: the installed families, from `list_families`.
    """
    out = []
    for entry in entries:
        if entry.status != "ok":
            try:
                families.load(entry.name).ask("recipe")
            except FamilyError as error:
                out.append("".join(traceback.format_exception(error)))
    return out


def format_description(description: Mapping[str, Any]) -> str:
    """One family as `btrm families NAME [--model M]` prints it; what a line says is followed by who says it.

    Args:
        description: from `describe`.
    """
    lines = [
        f"{description['name']}  ({description['origin']}, {description['plugin']})",
        description["summary"],
        f"hooks: {', '.join(description['hooks'])}",
    ]
    recipe = description["recipe"]
    lines += ["", f"recipe  [{recipe['given_by']}]"]
    kernels = ", ".join(recipe["attention"]) or "any"
    shown = {**recipe, "attention": kernels, "tiny": "yes" if recipe["tiny"] else "no"}
    lines += [
        f"  {key:<15} {_number(value)}" for key, value in shown.items() if key != "given_by" and value is not None
    ]
    if "answers" in description:
        lines += ["", f"answers for {description['model']}", *_answer_lines(description["answers"])]
    return "\n".join(map(printable, lines))


def _answer_lines(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    setup, pad, template, head = (answers[h] for h in ("setup_tokenizer", "pad_token", "chat_template", "init_head"))
    claims = answers["claims"]
    new = "new" if pad["new"] else "in the vocabulary"
    rows = [
        ("claims it", "yes" if claims["value"] else "no", claims),
        ("tokenizer", f"{setup['class']}, {setup['size']} tokens", setup),
        ("pad token", f"{pad['token']} ({pad['id']}, {new}): {pad['reason'] or 'no reason given'}", pad),
        ("chat template", f"sha256 {template['sha256'][:16]}", template),
        ("terminal token", template["terminal_token"], template),
        ("head init", f"std {head['std']:g} over {head['hidden_size']} values", head),
    ]
    return [f"  {label:<15} {text}  [{answer['given_by']}]" for label, text, answer in rows]


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
