"""What a check runs in a process of its own: `python -m btrm_core.preflight.conformance.probe import|answers NAME ...`.

Prints JSON. `import` says what importing a plugin does beyond importing it; `answers` says what its hooks answer, each
as a value or a digest that can be compared with another process's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from btrm_core.families import family_points

HEAVY = ("torch", "transformers", "tokenizers", "deepspeed", "accelerate", "datasets", "tensorflow", "jax")


# Events of `sys.audit` that no import needs; those of files are looked at one by one.
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.chdir",
    "urllib.",
    "http.client.",
)


_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.", "tempfile.")


_CODE = (".py", ".pyc", ".so", ".pyd", ".dylib", ".zip")


def import_effects(name: str) -> dict[str, list[str]]:
    """Import a family's plugin under an audit hook and return the heavy modules and forbidden events it caused.

    Args:
        name: the family's name.
    """
    point = next(point for point in family_points()[0] if point.name == name)
    own = _package_directory(point.module)
    before, events, active = set(sys.modules), [], True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if active and (text := _offence(event, arguments, own)):
            events.append(text)

    sys.addaudithook(watch)  # for the life of this process: hooks cannot be removed
    point.load()
    active = False
    return {"modules": [m for m in HEAVY if m in sys.modules and m not in before], "events": events}


def _package_directory(module: str) -> str:
    """The directory of a top-level package or module, found without importing it."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        return ""
    return str(Path(spec.origin).resolve().parent if spec.submodule_search_locations else Path(spec.origin).resolve())


def _offence(event: str, arguments: tuple[Any, ...], own: str) -> str | None:
    """Say what an audit event is, if it is nothing that an import may do."""
    if event.startswith((*_FORBIDDEN, *_CHANGES)):
        return f"{event} {' '.join(str(argument) for argument in arguments)}"[:160]
    if event != "open" or not isinstance(arguments[0], str | bytes):
        return None
    path, mode = os.path.realpath(os.fsdecode(arguments[0])), str(arguments[1] or "r")
    if any(letter in mode for letter in "wax+"):
        return f"opens {path} for writing"
    inside = bool(own) and (path == own or path.startswith(own + os.sep))
    metadata = Path(path).parent.suffix in (".dist-info", ".egg-info")
    return None if inside or metadata or path.endswith(_CODE) else f"reads {path}"


def answers(family: Any, config: Any, tokenizer: Any) -> dict[str, Any]:
    """What every hook answers, as JSON values: long ones as digests.

    Args:
        family: the loaded `Family`.
        config: a transformers config.
        tokenizer: a fresh tokenizer; changed by the family.

    Raises:
        FamilyError: a hook fails, or its answer is of the wrong type.
    """
    import torch

    given = {
        "claims": family.claims(config),
        "recipe": json.loads(json.dumps(dataclasses.asdict(family.recipe()), sort_keys=True, default=str)),
    }
    tokenizer = family.setup_tokenizer(tokenizer, config) or tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = [backend.to_str() if backend else type(tokenizer).__name__, repr(tokenizer.special_tokens_map)]
    weight_1H = torch.full((1, 64), torch.nan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family.init_head(64)(weight_1H)
    return {
        **given,
        "setup_tokenizer": _digest("\n".join(described)),
        "pad_token": dataclasses.asdict(family.pad_token(tokenizer)),
        "chat_template": _digest(family.chat_template(tokenizer)),
        "init_head": _digest(str(weight_1H.tolist())),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def main(arguments: list[str]) -> dict[str, Any]:
    """Do what the command line says and return what to print.

    Args:
        arguments: `import NAME`, or `answers NAME CHECKPOINT TOKENIZER`.
    """
    if arguments[0] == "import":
        return import_effects(arguments[1])
    from transformers import AutoConfig, AutoTokenizer

    from btrm_core.families import load

    _, name, checkpoint, source = arguments
    return answers(load(name), AutoConfig.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(source))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints must not end up in the JSON
        result = main(sys.argv[1:])
    print(json.dumps(result))
