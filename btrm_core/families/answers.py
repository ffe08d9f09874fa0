"""What an answer to each hook must be: the one rule that a run and the conformance checks hold a family to.

Decides which values are refused before anything is done with them, and how that is said. A stranger's object may fail
at whatever is asked of it, even at being shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from btrm_core.config import LARGEST_WHOLE
from btrm_core.errors import did_you_mean, printable
from btrm_core.families.hookspecs import PadToken, Recipe, TinyShape
from btrm_core.marks import OneOf, Setting
from btrm_core.settings import declared

KERNELS = tuple(
    kernel
    for rule in declared()["model.attention"].rules
    if isinstance(rule, OneOf)
    for kernel in rule.choices
    if kernel != "auto"
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MOST_TOKENS = 4096
"""Control tokens of a toy; real vocabularies reserve a few hundred."""
LONGEST_TOKEN = 256
LONGEST_TEMPLATE = 1 << 20
LARGEST_SIZE = 4096
"""Of what is counted in a toy's config: it is made anew in memory wherever it is needed."""

# What a recipe may recommend is what a user may set.
_NUMBERS = {
    "learning_rate": "train.learning_rate",
    "pairs_per_step": "train.pairs_per_step",
    "max_length": "data.max_length",
    "epochs": "train.epochs",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
}
# What a toy's size is made of; a window or a rotary base may be as large as it likes.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_GIVEN = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "claims": ("True, False or None", lambda value: isinstance(value, bool)),
    "setup_tokenizer": ("a tokenizer", lambda value: callable(getattr(value, "get_vocab", None))),
    "pad_token": ("a PadToken", lambda value: isinstance(value, PadToken)),
    "chat_template": ("a template that is not empty", lambda value: isinstance(value, str) and bool(value.strip())),
    "init_head": ("a function of one tensor", callable),
    "recipe": ("a Recipe", lambda value: isinstance(value, Recipe)),
}


def problem(hook: str, value: Any) -> str | None:
    """Say what is wrong with an answer, in words that follow "hook NAME", or None if nothing is.

    Args:
        hook: the hook's name.
        value: its answer, not None.
    """
    expected, fits = _KINDS[hook]
    try:
        fitting = fits(value)
    except Exception:  # it fails at being looked at
        fitting = False
    if not fitting:
        return f" answered with {shown(value)} ({type(value).__name__}); expected {expected}"
    for wrong, wanted in _PARTS[hook](value) if hook in _PARTS else ():
        return f": {wrong}; expected {wanted}"
    return None


def shown(value: Any) -> str:
    """A stranger's value on one line, however it is made.

    Args:
        value: what was answered.
    """
    try:
        text = repr(value)
    except Exception:
        text = f"an object of {type(value).__name__} that cannot be shown"
    return printable(text if len(text) <= 80 else f"{text[:77]}...")


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal; texts letter by letter, whatever their class says.

    Args:
        one: an answer that has no problem, or None.
        other: likewise.
    """
    if isinstance(one, str) and isinstance(other, str):
        return str.__eq__(one, other)
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # it fails at being compared
        return False


def difference(one: Any, other: Any) -> tuple[str, str]:
    """Two answers that are not the same, on one line each; of long texts the part where they part.

    Args:
        one: an answer.
        other: likewise.
    """
    if isinstance(one, str) and isinstance(other, str):
        common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        one, other = one[max(0, common - 20) :], other[max(0, common - 20) :]
    return shown(one), shown(other)


def state(tokenizer: Any) -> Any:
    """What a hook could change of a tokenizer that it is only shown, as a value to compare.

    Args:
        tokenizer: the tokenizer, or None.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        return None
    return len(tokenizer), repr(tokenizer.special_tokens_map), tokenizer.chat_template


Wrong = Iterator[tuple[str, str]]
"""What is wrong with a part of an answer, and what was expected."""


def _template(template: str) -> Wrong:
    if len(template) > LONGEST_TEMPLATE:
        yield f"the template has {len(template):,} letters", f"at most {LONGEST_TEMPLATE:,}"
    if not _is_text(template):
        yield "the template has half of a surrogate pair", "text that UTF-8 can hold"


def _pad(pad: PadToken) -> Wrong:
    if not (_token(pad.token) and pad.token.strip()):
        yield f"token is {shown(pad.token)}", f"a text of at most {LONGEST_TOKEN} letters"
    if not isinstance(pad.new, bool):
        yield f"new is {shown(pad.new)}", "True or False"
    if not isinstance(pad.reason, str):
        yield f"reason is {shown(pad.reason)}", "text"


def _recipe(recipe: Recipe) -> Wrong:
    for name, key in _NUMBERS.items():
        value, setting = getattr(recipe, name), declared()[key]
        if value is not None and not _fits(value, setting):
            kind = "a whole number" if setting.kind is int else "a finite number"
            rules = ", ".join(str(rule).removeprefix("a number ") for rule in setting.rules)
            yield f"{name} is {shown(value)}", f"{kind}, {rules}, or None"
    kernels = recipe.attention
    if not isinstance(kernels, tuple | list | None):
        yield f"attention is {shown(kernels)}", "a tuple of names, such as ('flex', 'eager'); empty allows all"
    elif unknown := [kernel for kernel in kernels or () if kernel not in KERNELS]:
        hint = did_you_mean(unknown[0], KERNELS) if isinstance(unknown[0], str) else ""
        yield f"attention names {shown(unknown[0])}", f"some of {', '.join(KERNELS)}, or nothing to allow all.{hint}"
    if not isinstance(recipe.example_model, str | None):
        yield f"example_model is {shown(recipe.example_model)}", "the id of a model, or None"
    if isinstance(recipe.tiny, TinyShape):
        yield from _tiny(recipe.tiny)
    elif recipe.tiny is not None:
        yield f"tiny is {shown(recipe.tiny)}", "a TinyShape, or None"


def _fits(value: Any, setting: Setting) -> bool:
    kinds: Any = int if setting.kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return abs(value) < LARGEST_WHOLE and all(rule.allows(value) for rule in setting.rules)


def _tiny(tiny: TinyShape) -> Wrong:
    if not (isinstance(tiny.model_type, str) and tiny.model_type.strip()):
        yield f"tiny.model_type is {shown(tiny.model_type)}", "the model_type of a transformers config"
    if not (isinstance(tiny.config, Mapping) and all(isinstance(key, str) for key in tiny.config)):
        yield f"tiny.config is {shown(tiny.config)}", "values of the model's config by their names"
        return
    try:
        json.dumps(dict(tiny.config))
    except (TypeError, ValueError, RecursionError):
        yield f"tiny.config is {shown(tiny.config)}", "values that config.json can hold"
    for key in _GIVEN:
        if key in tiny.config:
            yield f"tiny.config names {key}", "no such value, which btrm takes from the tokenizer"
    for key in _SIZES:
        size = tiny.config.get(key, 1)
        if isinstance(size, bool) or not (isinstance(size, int) and 0 < size <= LARGEST_SIZE):
            yield f"tiny.config has {key} {shown(size)}", f"a whole number from 1 to {LARGEST_SIZE:,}"
    special = tiny.special_tokens
    if not (isinstance(special, Mapping) and all(_token(text) for text in special.values())):
        yield f"tiny.special_tokens is {shown(special)}", "texts by name; leave out what the real tokenizer lacks"
    elif unknown := [name for name in special if name not in SPECIAL_TOKENS]:
        yield f"tiny.special_tokens names {shown(unknown[0])}", f"some of {', '.join(SPECIAL_TOKENS)}"
    control = tiny.control_tokens
    if not (isinstance(control, tuple | list) and all(map(_token, control)) and len(control) <= MOST_TOKENS):
        yield f"tiny.control_tokens is {shown(control)}", f"a tuple of at most {MOST_TOKENS:,} texts"


def _token(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= LONGEST_TOKEN and _is_text(text)


def _is_text(text: str) -> bool:
    """Whether a file can hold it: half of a surrogate pair cannot be written."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


_PARTS: dict[str, Callable[[Any], Wrong]] = {
    "chat_template": _template,
    "pad_token": _pad,
    "recipe": _recipe,
}
"""Hook -> what is looked at in an answer of the right kind."""
