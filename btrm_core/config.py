"""How a run is told its settings: TOML, then flags and `--set section.key=value`; every key and value is checked.

Decides: how text becomes a value, which keys are known, what wins. The settings themselves are listed in `settings`;
what one left at None becomes is the family's recipe (`resolve`). A parsed configuration is never changed; numbers
derived from it (steps, micro-batches) live with the plan that derives them.

Precedence, strongest first: flags and `--set`, the `--config` file, the family's recipe, btrm's defaults.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.settings import CHOICES, NOT_NEGATIVE, POSITIVE, LoraConfig, RunConfig

Number = TypeVar("Number", int, float)


def read_settings(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file (if any), apply overrides ("section.key" -> value or text) and check every value.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (with a suggestion), or a value has the wrong type or
            range.
    """
    values = _flatten(_read_toml(path)) if path else {}
    values.update(overrides or {})
    return apply(RunConfig(), values)


def apply(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return `config` with `values` ("section.key" -> value or its text) put in, checked.

    >>> apply(RunConfig(), {"train.learning_rate": "1e-5"}).train.learning_rate
    1e-05
    """
    known = setting_types()
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'.{did_you_mean(key, known)} Known sections: {_sections()}")
        section, _, name = key.rpartition(".")
        changes.setdefault(section, {})[name] = _convert(key, value, known[key])
    for section, change in changes.items():
        if section:
            part = dataclasses.replace(getattr(config, section), **change)
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **change)
    _check(config)
    return config


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Split `--set section.key=value` texts into a mapping; the value stays text until its type is known."""
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form section.key=value, e.g. --set train.seed=1")
        values[key.strip()] = value.strip()
    return values


def flat(config: RunConfig) -> dict[str, Any]:
    """All settings as "section.key" -> value, in the order of the dataclasses."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            out.update({f"{f.name}.{g.name}": getattr(value, g.name) for g in fields(value)})
        else:
            out[f.name] = value
    return out


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML that `load_config` reads back to an equal value (None is left out)."""
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
    """Fill the settings left open from a family's recipe (a `Recipe` without None)."""
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
    """Whether the model with the lowest evaluation loss becomes the final one: asked for, or stopped for it.

    Args:
        config: The settings.
    """
    return config.output.keep_best or config.train.early_stopping is not None


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


def setting_types() -> dict[str, Any]:
    """Every setting as "section.key" -> its type."""
    out: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if is_dataclass(kind):
            out.update({f"{name}.{key}": hint for key, hint in typing.get_type_hints(kind).items()})
        else:
            out[name] = kind
    return out


def _sections() -> str:
    return ", ".join(f.name for f in fields(RunConfig) if f.name != "family")


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            out[key] = value
    return out


def _convert(key: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(o for o in options if o is not type(None))
    try:
        return _to_kind(value, kind)
    except (TypeError, ValueError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a list")
        raise ConfigError(f"{key} = {value!r}: expected {wanted}") from None


def _to_kind(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(str(item).strip() for item in items)
    if kind is bool:
        return value if isinstance(value, bool) else _to_bool(str(value).lower())
    if isinstance(value, bool):
        raise TypeError("a truth value is not a number or text")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not whole")
    return kind(value)


def _to_bool(text: str) -> bool:
    if text not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError(text)
    return text in ("true", "yes", "1")


def _check(config: RunConfig) -> None:
    values = flat(config)
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            hint = did_you_mean(values[key], allowed)
            raise ConfigError(f"{key} = {values[key]!r}: expected one of {', '.join(allowed)}.{hint}")
    for key in POSITIVE:
        if values[key] is not None and not values[key] > 0:
            raise ConfigError(f"{key} = {values[key]}: expected a number above 0")
    for key in NOT_NEGATIVE:
        if values[key] is not None and not values[key] >= 0:
            raise ConfigError(f"{key} = {values[key]}: expected 0 or more")
    other = [name for name in ("margin", "label_smoothing") if getattr(config.loss, name)]
    if config.loss.ranking == "plackett-luce" and (other or config.data.ties == "half"):
        which = f"loss.{other[0]}" if other else "data.ties=half"
        raise ConfigError(f"loss.ranking=plackett-luce knows no {which}: leave that out, or use loss.ranking=pairs")
    if not 0 <= config.loss.label_smoothing < 0.5:
        raise ConfigError(f"loss.label_smoothing = {config.loss.label_smoothing}: expected at least 0 and below 0.5")
    if config.data.held_out_fraction >= 1:
        raise ConfigError(f"data.held_out_fraction = {config.data.held_out_fraction}: expected below 1")


SETTINGS = "adapter_config.json"


def check_adapters(config: RunConfig) -> None:
    """Refuse settings that say nothing without adapters, or that adapters would leave without effect.

    Raises:
        ConfigError: names the setting.
    """
    lora, default = config.lora, LoraConfig()
    if lora.rank is None:
        idle = [
            name for name in ("alpha", "dropout", "targets", "merge") if getattr(lora, name) != getattr(default, name)
        ]
        if idle:
            raise ConfigError(
                f"lora.{idle[0]} is set, but there are no adapters; give --lora-rank N too, or leave it out"
            )
        if config.model.quantize != "none":
            raise ConfigError(
                f"--quantize {config.model.quantize} needs --lora-rank N: weights of 4 bits cannot be trained, only "
                "adapters beside them"
            )
        return
    if lora.dropout >= 1:
        raise ConfigError(f"lora.dropout = {lora.dropout}: expected below 1")
    if config.model.train_last_layers is not None:
        raise ConfigError(
            "--train-last-layers and --lora-rank contradict each other: adapters are trained in every layer and "
            "nothing else is; leave one out, or choose layers with --lora-targets"
        )
