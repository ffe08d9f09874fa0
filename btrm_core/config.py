"""How a run is told its settings: TOML, then flags and `--set section.key=value`; every key and value is checked.

Decides: how text becomes a value, which keys are known, what wins. The settings themselves are listed in `settings`;
what one left at None becomes is the family's recipe (`resolve`). A parsed configuration is never changed; numbers
derived from it (steps, micro-batches) live with the plan that derives them.
Precedence, strongest first: flags and `--set`, the `--config` file, the family's recipe, btrm's defaults.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from btrm_core.errors import ConfigError, did_you_mean, printable
from btrm_core.marks import OneOf, Setting
from btrm_core.settings import LoraConfig, RunConfig, declared

Number = TypeVar("Number", int, float)


def read_settings(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file (if any), apply overrides ("section.key" -> value or text) and check them, also together.

    Args:
        path: The file; None for none.
        overrides: What wins over the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is wrong, or settings contradict each other.
    """
    try:
        config = apply(RunConfig(), _flatten(_read_toml(path)) if path else {})
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    config = apply(config, overrides or {})
    check(config)
    return config


def apply(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return `config` with `values` ("section.key" -> value or its text) put in, each checked by itself.

    Args:
        config: Keeps what `values` does not name; it is not changed.
        values: By key.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or range.

    >>> apply(RunConfig(), {"train.learning_rate": "1e-5"}).train.learning_rate
    1e-05
    """
    known = declared()
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key in _SECTIONS:
            raise ConfigError(f"{key} is a section: write [{key}] on a line of its own, and its settings below")
        if key not in known:
            raise ConfigError(
                f"unknown setting '{key}'.{did_you_mean(key, known)} Known sections: {', '.join(_SECTIONS)}"
            )
        section, _, name = key.rpartition(".")
        changes.setdefault(section, {})[name] = _convert(known[key], value)
    for section, change in changes.items():
        if section:
            part = dataclasses.replace(getattr(config, section), **change)
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **change)
    return config


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Split `--set section.key=value` texts into a mapping; the value stays text until its type is known.

    Args:
        assignments: texts such as "train.seed=1"; of a key said twice the last counts.

    Raises:
        ConfigError: a text has no "=" or nothing before it.
    """
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form section.key=value, e.g. --set train.seed=1")
        values[key.strip()] = value.strip()
    return values


def flat(config: RunConfig) -> dict[str, Any]:
    """All settings as "section.key" -> value, in the order of the dataclasses.

    Args:
        config: the settings, resolved or not.
    """
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            out.update({f"{f.name}.{g.name}": getattr(value, g.name) for g in fields(value)})
        else:
            out[f.name] = value
    return out


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML that `read_settings` reads back to an equal value (None is left out).

    Args:
        config: the settings, resolved or not.
    """
    import tomli_w

    tree: dict[str, Any] = {}
    for key, value in flat(config).items():
        if value is None:
            continue
        section, _, name = key.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        target[name] = list(value) if isinstance(value, tuple) else value
    return tomli_w.dumps(tree)


def resolve(config: RunConfig, recipe: Any) -> RunConfig:
    """Fill the settings left open from a family's recipe (a `Recipe` without None).

    Args:
        config: the settings; those that are not None stay.
        recipe: the family's values for those that are None.
    """
    open_values: dict[str, Any] = {
        "data.max_length": recipe.max_length,
        "train.pairs_per_step": recipe.pairs_per_step,
        "train.learning_rate": recipe.learning_rate,
        "train.epochs": recipe.epochs,
        "train.warmup_ratio": recipe.warmup_ratio,
        "train.weight_decay": recipe.weight_decay,
    }
    current = flat(config)
    return apply(config, {k: v for k, v in open_values.items() if current[k] is None and v is not None})


def keeps_best(config: RunConfig) -> bool:
    """Whether the best model of all evaluations becomes the final one: asked for, or stopped for it.

    Args:
        config: The settings.
    """
    output = config.output
    return output.keep_best or output.best_by != "loss" or config.train.early_stopping is not None


def settled(value: Number | None, key: str) -> Number:
    """A setting that a recipe fills, in a resolved configuration.

    Args:
        value: Its value.
        key: Its name, as "section.key".

    Raises:
        ConfigError: neither the user nor a recipe has said it.
    """
    if value is None:
        raise ConfigError(f"{key} is open: set it (--set {key}=VALUE), or resolve the settings by a family's recipe")
    return value


_SECTIONS = tuple(f.name for f in fields(RunConfig) if f.name not in ("family", "force_family"))


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors of Windows write a mark in front
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text, as TOML must be: save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else {key: value}
    return out


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _convert(setting: Setting, value: Any) -> Any:
    if setting.optional and (value is None or value == "none"):
        return None
    try:
        converted = _to_kind(value, setting.kind)
    except (TypeError, ValueError, OverflowError, KeyError):
        raise ConfigError(f"{setting.key} = {value!r}: expected {_WANTED.get(setting.kind, 'a list')}") from None
    text = "".join(converted) if isinstance(converted, tuple) else str(converted)
    if "\0" in text:
        raise ConfigError(f"{setting.key} holds a character of value 0, which no name or path can have")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{setting.key} holds '{printable(text)}': expected UTF-8; rename the file or folder")
    _check_value(setting, converted)
    return converted


def _to_kind(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if isinstance(value, Mapping):
            value = [f"{name}={inner}" for name, inner in _flatten(value).items()]
        return tuple(str(item).strip() for item in (value.split(",") if isinstance(value, str) else value))
    if kind is bool:
        return _TRUTH[str(value).lower()]
    if isinstance(value, bool):
        raise TypeError("a truth value is not a number or text")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not whole")
    return kind(value)


LARGEST_WHOLE = 2**63 - 1
"""The largest number that every library below can count to."""


def _check_value(setting: Setting, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{setting.key} = {value}: expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ConfigError(f"{setting.key} = {value}: expected a whole number below 2^63")
    for rule in setting.rules:
        if not rule.allows(value):
            hint = did_you_mean(value, rule.choices) if isinstance(rule, OneOf) else ""
            raise ConfigError(f"{setting.key} = {value!r}: expected {rule}{hint}")


def check(config: RunConfig) -> None:
    """Refuse complete settings if one is out of range, or some contradict each other.

    Args:
        config: However it was made.

    Raises:
        ConfigError: names the settings, and which to leave out.
    """
    values = flat(config)
    for key, setting in declared().items():
        _convert(setting, values[key])
    for rule in RULES:
        if said := rule(config):
            raise ConfigError(said)


def check_zero(config: RunConfig, zero: Mapping[str, Any]) -> None:
    """Refuse settings that contradict the DeepSpeed configuration they name.

    Args:
        config: Complete settings.
        zero: `zero_optimization` of that configuration.

    Raises:
        ConfigError: names the settings, and which to change.
    """
    for rule in ZERO_RULES:
        if said := rule(config, zero):
            raise ConfigError(said)


def _ranking_is_whole(config: RunConfig) -> str | None:
    other = [f"loss.{name}" for name in ("margin", "label_smoothing") if getattr(config.loss, name)]
    other += ["data.ties=half"] if config.data.ties == "half" else []
    if config.loss.ranking != "plackett-luce" or not other:
        return None
    return f"loss.ranking=plackett-luce knows no {other[0]}: leave that out, or use loss.ranking=pairs"


def _adapters_have_a_rank(config: RunConfig) -> str | None:
    names = ("alpha", "dropout", "targets", "merge")
    idle = [name for name in names if getattr(config.lora, name) != getattr(LoraConfig(), name)]
    if config.lora.rank is not None or not idle:
        return None
    return f"lora.{idle[0]} is set, but there are no adapters; give --lora-rank N too, or leave it out"


def _four_bits_have_adapters(config: RunConfig) -> str | None:
    if config.lora.rank is not None or config.model.quantize == "none":
        return None
    return (
        f"--quantize {config.model.quantize} needs --lora-rank N: weights of 4 bits cannot be trained, only "
        "adapters beside them"
    )


def _adapters_are_everywhere(config: RunConfig) -> str | None:
    if config.lora.rank is None or config.model.train_last_layers is None:
        return None
    return (
        "--train-last-layers and --lora-rank contradict each other: adapters are trained in every layer and "
        "nothing else is; leave one out, or choose layers with --lora-targets"
    )


def _four_bits_stay_whole(config: RunConfig, zero: Mapping[str, Any]) -> str | None:
    if config.model.quantize == "none" or _stage(zero) != 3:
        return None
    return (
        f"--quantize {config.model.quantize} with --deepspeed {config.distributed.deepspeed}: ZeRO-3 cuts weights into "
        "pieces, and packed 4-bit weights lose their scales by it; use --deepspeed zero1 or zero2"
    )


def _eight_bits_stay_whole(config: RunConfig, zero: Mapping[str, Any]) -> str | None:
    offloaded = any(
        str((zero.get(f"offload_{part}") or {}).get("device", "none")) != "none" for part in ("optimizer", "param")
    )
    if not config.train.optimizer.startswith("adamw-8bit") or not (_stage(zero) == 3 or offloaded):
        return None
    return (
        f"--optimizer {config.train.optimizer} with --deepspeed {config.distributed.deepspeed}: 8-bit states are known "
        "to be right only where the optimizer stays whole on its GPU; use --deepspeed zero1 or zero2, or "
        "--optimizer adamw"
    )


def _stage(zero: Mapping[str, Any]) -> int:
    return int(zero.get("stage", 1))


RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    _ranking_is_whole,
    _adapters_have_a_rank,
    _four_bits_have_adapters,
    _adapters_are_everywhere,
)
"""What settings mean together: each rule says what is wrong, or None."""


ZERO_RULES: tuple[Callable[[RunConfig, Mapping[str, Any]], str | None], ...] = (
    _four_bits_stay_whole,
    _eight_bits_stay_whole,
)
"""The same for settings and ZeRO's own, which are known once the DeepSpeed configuration is read."""
