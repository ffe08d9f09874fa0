"""The content of `btrm.json`: what a run knows of the model that it has trained."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from btrm_core import families
from btrm_core.chat import ChatFormat
from btrm_core.config import flat
from btrm_core.data import parse_spec
from btrm_core.errors import FamilyError
from btrm_core.families import Family
from btrm_core.files import text_sha256
from btrm_core.settings import RunConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Trained:
    """What a run alone knows of the model that it has trained, as JSON values.

    Attributes:
        data: Report on the data.
        evaluation: Figures on held-out pairs; None if there are none.
        training: Steps, seconds, how it was computed.
        self_test: Conversations as ids, with the rewards that any reader must reproduce.
        dtype: Compute type, such as "bfloat16".
        base_commit: Of the base model, if it came from the hub.
        adapters: How they are saved; None without adapters.
        architecture: Class of transformers that the weights are of, such as "LlamaForSequenceClassification".
        causal: Class of the language model of that kind; None if transformers has none.
        softcap: Whether its attention is soft-capped.
        licence: Of the base model, as its own card states it.
    """

    data: dict[str, Any]
    evaluation: dict[str, Any] | None
    training: dict[str, Any]
    self_test: list[dict[str, Any]]
    dtype: str
    base_commit: str | None
    adapters: dict[str, Any] | None
    architecture: str
    causal: str | None
    softcap: bool
    licence: dict[str, str]


def run_manifest(config: RunConfig, family: Family, chat: ChatFormat, trained: Trained) -> dict[str, Any]:
    """The content of `btrm.json`: enough to score, to check, and to train again.

    Args:
        config: The run's settings, resolved.
        family: Who answered.
        chat: How conversations became ids.
        trained: What came of it.
    """
    return {
        "btrm_version": metadata.version("btrm"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "family": family.name,
        "origin": family.origin,
        "warnings": [family.warning] if family.warning else [],
        "base_model": config.model.name,
        "base_revision": config.model.revision,
        "template_sha256": chat.template_sha256,
        "terminal_token": chat.terminal_token,
        "terminal_token_id": chat.terminal_id,
        "pad_token": chat.pad.token,
        "pad_token_id": chat.pad_id,
        "answers": chat.answers,
        "max_length": config.data.max_length,
        "dtype": trained.dtype,
        "loss": "bradley-terry",
        "data": trained.data,
        "evaluation": trained.evaluation,
        "training": trained.training,
        "config": {key: list(v) if isinstance(v, tuple) else v for key, v in flat(config).items()},
        "self_test": trained.self_test,
        "base_commit": trained.base_commit,
        "adapters": trained.adapters,
        "card": {
            "architecture": trained.architecture,
            "causal": trained.causal,
            "softcap": trained.softcap,
            "licence": trained.licence,
            "base_is_local": Path(config.model.name or ".").exists(),
            "datasets": _hub_data_sets(config.data.train),
        },
    }


def _hub_data_sets(sources: Iterable[str]) -> list[str]:
    """Those sources that are data sets of the hub, by their ids."""
    places = [parse_spec(source, lambda path: Path(path).exists()).place for source in sources]
    return [place for place in places if _HUB_ID.fullmatch(place) and not Path(place).exists()]


def template_difference(manifest: Mapping[str, Any], chat: ChatFormat) -> str | None:
    """Say so if the family that trained a model is installed and now writes its conversations differently.

    None as well if the family is not installed or broken, or if the run brought its own template.

    Args:
        manifest: Content of `btrm.json`.
        chat: The model's own chat format.
    """
    name = manifest.get("family")
    if name is None or manifest.get("answers", {}).get("chat_template") == "run settings":
        return None
    try:
        family = families.load(str(name))
        template = family.chat_template(chat.tokenizer)
    except FamilyError:
        return None
    if text_sha256(template) == chat.template_sha256:
        return None
    return (
        f"the installed family '{name}' ({family.origin}) has another chat template than the one this model was "
        f"trained with ({manifest.get('origin', 'unknown origin')}); the model's own is used"
    )
