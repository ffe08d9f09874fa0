"""The flags of `btrm train` and `btrm doctor`, made from the settings: name, type, default and help stand there.

Decides: how a field becomes a click option. A flag that is not given says nothing, so that the configuration file and
the family speak; what it says is text until `config` reads it, so that every wrong value gets the same one line.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import click

from btrm_core import config, settings
from btrm_core.marks import OneOf, Setting
from btrm_core.settings import RunConfig, declared

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
METAVARS = {int: "INTEGER", float: "FLOAT"}


HELP = {"help_option_names": ["-h", "--help"]}
"""How help is asked for, also of a command that is looked at without its group."""


def flags(*keys: str, but: Iterable[str] = (), **helps: str) -> Decorator:
    """Give a command the flags of settings, in the order named.

    Args:
        keys: Settings by key, or sections, which stand for all their settings that have a flag.
        but: Settings that a section does not bring along.
        helps: What this command says of a flag in other words than the setting, by the flag's name.
    """
    left_out = {*but, *keys}
    chosen = [
        setting
        for key in keys
        for setting in declared().values()
        if setting.flag and (setting.key == key or (setting.key.startswith(f"{key}.") and setting.key not in left_out))
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(chosen):
            command = _option(setting, helps.get(_name(setting).replace("-", "_")))(command)
        return command

    return decorate


def with_file(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--config` and `--set`, through which every setting can be reached.

    Args:
        command: the function, before `click.command` makes it one; it gets `config_file` and `assignments`.
    """
    more = click.option("--set", "assignments", metavar="SECTION.KEY=VALUE", multiple=True, help="Any other setting.")
    file = click.option("--config", "config_file", metavar="RUN.toml", help="Settings file; flags win over it.")
    return file(more(command))


def read(given: Mapping[str, Any]) -> RunConfig:
    """The settings that the parameters of a command with `flags` and `with_file` say.

    Args:
        given: the command's parameters by their Python names, `config_file` and `assignments` among them; one that is
            None or () was not given.

    Raises:
        ConfigError: as `config.read_settings`.
    """
    keys = {_name(setting).replace("-", "_"): key for key, setting in declared().items() if setting.flag}
    overrides = {keys[name]: value for name, value in given.items() if name in keys and value not in (None, ())}
    overrides.update(config.parse_assignments(given["assignments"]))
    return config.read_settings(given["config_file"], overrides)


def _option(setting: Setting, said: str | None) -> Decorator:
    assert setting.flag is not None
    flag, name = setting.flag, _name(setting)
    more: dict[str, Any] = {"metavar": flag.metavar or METAVARS.get(setting.kind), "multiple": flag.repeat}
    if setting.kind is bool:
        more = {"default": None} if flag.negated else {"default": None, "is_flag": True}
    elif flag.bare is not None:
        more |= {"is_flag": False, "flag_value": flag.bare}
    spelled = f"--{name}/--no-{name}" if flag.negated else f"--{name}"
    return click.option(spelled, help=said or _help(setting), **more)


def _name(setting: Setting) -> str:
    return (setting.flag and setting.flag.name) or setting.key.rpartition(".")[2].replace("_", "-")


def _help(setting: Setting) -> str:
    """The first sentence of the field's docstring, and the one after it that gives the default, if there is one."""
    if setting.flag and setting.flag.names_choices:
        (choices,) = (rule.choices for rule in setting.rules if isinstance(rule, OneOf))
        return f"{', '.join(choices[:-1])} or {choices[-1]}."
    first, *more = re.split(r"(?<=\.) (?=[A-Z`])", _docstrings()[setting.key])
    return " ".join([first, *(sentence for sentence in more[:1] if sentence.startswith("Default:"))])


@cache
def _docstrings() -> dict[str, str]:
    """The text under each field, which Python itself forgets, by key."""
    sections = {getattr(part.default_factory, "__name__", ""): f"{part.name}." for part in fields(RunConfig)}
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[sections.get(node.name, "") + ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
