"""What the checks look at: a family, a tokenizer and a tiny model of it, each made once and on first use.

Decides where they come from. By default everything is made in memory from the shape that the family's recipe gives, so
the checks need no download; a tokenizer directory, config values or a whole checkpoint can be given instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from btrm_core import families
from btrm_core.errors import first_line
from btrm_core.families import Family, TinyShape
from btrm_core.preflight.conformance.small import SMALL, small_config
from btrm_core.preflight.conformance.verdict import Missing

LONG = 160
"""Tokens (at least) of the longest conversation in `groups`: more than the sliding windows of tiny shapes."""


_ROWS = 6


_STEPS = 3


_LONGEST = 4096


class Subject:
    """One family under test.

    Args:
        name: the family's name, as its entry point gives it.
        special_tokens: instead of those of the recipe's tiny shape.
        control_tokens: instead of those of the recipe's tiny shape.
        tokenizer: directory (or hub id) of a tokenizer to use instead of one made in memory.
        model: config values of a tiny model, `model_type` among them, instead of the recipe's tiny shape; or directory
            or hub id of a checkpoint, of which a copy of two small layers with random weights is made.
        loaded: tokenizer and config of a checkpoint that is read already, instead of `model`.
    """

    def __init__(
        self,
        name: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        control_tokens: tuple[str, ...] | None = None,
        tokenizer: str | Path | None = None,
        model: Mapping[str, object] | str | Path | None = None,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        self.name = name
        self._special_tokens = special_tokens
        self._control_tokens = control_tokens
        self._tokenizer = None if tokenizer is None else str(tokenizer)
        self._config_values = dict(model) if isinstance(model, Mapping) else None
        self._checkpoint = str(model) if isinstance(model, str | Path) else None
        self._loaded = loaded
        self.directory = Path(tempfile.mkdtemp(prefix="btrm-check-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def close(self) -> None:
        """Remove everything that was written."""
        self._remove()

    @cached_property
    def points(self) -> list[EntryPoint]:
        """The entry points with this name; more than one is an error that a check reports."""
        return [point for point in families.family_points()[0] if point.name == self.name]

    @cached_property
    def _deadly(self) -> str | None:
        """What importing the plugin does to a process, found in another one: asked once for all checks."""
        return families.deadly(families.entry_of(self.points[0]))

    @cached_property
    def plugin(self) -> object:
        """What the entry point names, as it was imported."""
        if not self.points:
            raise Missing(f"no family '{self.name}' is installed")
        if self._deadly is not None:
            raise Missing(f"the plugin cannot be imported: {self._deadly}")
        with _or_missing("the plugin cannot be imported"):
            plugin = families.import_plugin(self.points[0])
        return plugin

    @cached_property
    def family(self) -> Family:
        """The family as a run loads it."""
        _ = self.plugin
        with _or_missing("the family cannot be loaded"):
            return families.load(self.name)

    @cached_property
    def shape(self) -> TinyShape | None:
        """What the tiny model is made from, or None if nothing says it."""
        with _or_missing("the recipe cannot be asked"):
            shape = self.family.recipe().tiny
        if self._config_values is not None:
            values = dict(self._config_values)
            shape = dataclasses.replace(
                shape or TinyShape(""), model_type=str(values.pop("model_type", "llama")), config=values
            )
        if shape is not None and self._special_tokens is not None:
            shape = dataclasses.replace(shape, special_tokens=self._special_tokens)
        if shape is not None and self._control_tokens is not None:
            shape = dataclasses.replace(shape, control_tokens=self._control_tokens)
        return shape

    @cached_property
    def base(self) -> Path:
        """Directory of a tiny base model (config, weights, tokenizer), like one that a user would start from."""
        directory = self.directory / "base"
        with _or_missing("the tiny model cannot be built"):
            if self._loaded is not None or self._checkpoint is not None or self._tokenizer is not None:
                self._write_small_copy(directory)
            else:
                from btrm_core.model import build_toy

                build_toy(self._require_shape(), directory)
        return directory

    @cached_property
    def config(self) -> Any:
        """The transformers config that hooks are asked about: the checkpoint's own if there is one."""
        from transformers import AutoConfig

        if self._loaded is not None:
            return self._loaded[1]
        with _or_missing("the config cannot be read"):
            return AutoConfig.from_pretrained(self.checkpoint)

    def fresh_tokenizer(self) -> Any:
        """The tokenizer as it is loaded before any hook has seen it, anew on every call."""
        from transformers import AutoTokenizer

        if self._loaded is not None:
            return copy.deepcopy(self._loaded[0])
        with _or_missing("the tokenizer cannot be loaded"):
            return AutoTokenizer.from_pretrained(self.source)

    @property
    def checkpoint(self) -> str:
        """The checkpoint whose config is used: the one given, or the tiny base model."""
        return self._checkpoint or str(self.base)

    @property
    def source(self) -> str:
        """Where the tokenizer is loaded from."""
        return self._tokenizer or self._checkpoint or str(self.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer after the `setup_tokenizer` hook, without the pad token of the `pad_token` hook."""
        tokenizer = self.fresh_tokenizer()
        with _or_missing("hook setup_tokenizer fails"):
            answer = self.family.setup_tokenizer(tokenizer, self.config)
        return tokenizer if answer is None else answer

    @cached_property
    def template(self) -> str:
        """The chat template, unchecked."""
        with _or_missing("there is no chat template"):
            return self.family.chat_template(self.tokenizer)

    @cached_property
    def chat(self) -> Any:
        """The `ChatFormat` that a run would use; its tokenizer is another object than `tokenizer`."""
        from btrm_core.chat import prepare_chat

        with _or_missing("the answers do not go together"):
            return prepare_chat(self.fresh_tokenizer(), self.config, self.family)

    @cached_property
    def groups(self) -> list[Any]:
        """A few pairs of the bundled sample as trees, the last one with a long shared prompt."""
        from btrm_core.packing import grow

        pairs = _sample()
        turns = [message for pair in pairs for message in pair["chosen"] if message["role"] != "system"]
        with _or_missing("the sample cannot be encoded"):
            encoded = [self.chat.encode([pair["chosen"], pair["rejected"]]) for pair in pairs[:_ROWS]]
            for count in range(4, len(turns) + 1, 4):
                long = self.chat.encode([[*turns[:count], *_exchange(answer)] for answer in ("Yes, it is.", "No.")])
                if len(long[0]) > LONG:
                    encoded.append(long)
                    break
        return [grow(sequences) for sequences in encoded]

    @cached_property
    def model(self) -> Any:
        """A `RewardModel` from the tiny base model, through the functions that a run uses; `losses` trains it."""
        import torch

        from btrm_core.config import apply
        from btrm_core.model import build_model
        from btrm_core.settings import RunConfig

        values = {"model.name": str(self.base), "model.dtype": "fp32"}
        with _or_missing("the tiny model cannot be given a reward head"):
            return build_model(
                apply(RunConfig(family=self.name), values), self.family, self.chat, torch.float32, torch.device("cpu")
            )[0]

    @cached_property
    def trust(self) -> Any:
        """How the rows of `model` are laid out, which is set accordingly, by the function that a run uses."""
        from btrm_core.errors import BtrmError
        from btrm_core.model import Use, trusted
        from btrm_core.preflight.conformance.verdict import NotConforming

        longest = sorted(self.groups, key=lambda group: -len(group.tokens))
        try:
            return trusted(self.model, longest, Use(pad_id=self.chat.pad_id, allowed=self.family.recipe().attention))
        except BtrmError as error:
            raise NotConforming(
                str(error), "no model of this family can be trained", "give recipe().tiny another architecture"
            ) from error

    @cached_property
    def losses(self) -> list[float]:
        """The loss on one repeated batch before each of a few training steps and after the last; trains `model`."""
        import torch

        from btrm_core.packing import collate
        from btrm_core.training import bradley_terry

        _ = self.trust
        model, losses = self.model, []
        batch = collate(self.groups, kernel=model.kernel, pad_id=self.chat.pad_id)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.train()
        for step in range(_STEPS + 1):
            rewards_P2 = model(batch).view(-1, 2)
            loss = bradley_terry(rewards_P2[:, 0], rewards_P2[:, 1]).mean()
            losses.append(float(loss.detach()))
            if step < _STEPS:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        model.eval()
        return losses

    def rewards(self, conversations: list[list[dict[str, str]]]) -> list[float]:
        """Rewards from the trained model in memory, computed in one row.

        Args:
            conversations: each a list of messages, the last one the assistant's.
        """
        import torch

        from btrm_core.packing import collate, grow

        _ = self.losses
        groups = [grow([ids]) for ids in self.chat.encode(conversations)]
        with torch.no_grad():
            batch = collate(groups, kernel=self.model.kernel, pad_id=self.chat.pad_id)
            return [float(reward) for reward in self.model(batch)]

    @cached_property
    def saved(self) -> Path:
        """The trained model's directory, as a run saves it."""
        from btrm_core.model import write_model

        _ = self.losses
        chat, directory = self.chat, self.directory / "saved"
        manifest = {
            "family": self.name,
            "origin": self.family.origin,
            "template_sha256": chat.template_sha256,
            "terminal_token": chat.terminal_token,
            "max_length": _LONGEST,  # not what the checkpoint has positions for, which the copy has not seen either
        }
        state = {name.removeprefix("hf."): value for name, value in self.model.state_dict().items()}
        write_model(directory, self.model.hf, state, chat, manifest, card="")
        return directory

    def _require_shape(self) -> TinyShape:
        if self.shape is None:
            raise ValueError("the recipe gives no `tiny` shape, and no tokenizer or model is given instead")
        return self.shape

    def _write_small_copy(self, directory: Path) -> None:
        """Write a base model of two small layers around a given tokenizer, or after a given checkpoint."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = self.fresh_tokenizer()
        if self._loaded is not None or self._checkpoint is not None:
            config = small_config(self.config.get_text_config(), len(tokenizer))
        else:
            shape = self._require_shape()
            config = AutoConfig.for_model(
                shape.model_type, **{**SMALL, **dict(shape.config)}, vocab_size=len(tokenizer)
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            hf.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _exchange(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Is all of that right?"}, {"role": "assistant", "content": answer}]


def _sample() -> list[dict[str, Any]]:
    """The first pairs of the bundled sample."""
    from btrm_core.data import sample_path

    with Path(sample_path("train")).open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(40), strict=False)]


@contextlib.contextmanager
def _or_missing(what: str) -> Iterator[None]:
    """Turn any failure into `Missing`: families and checkpoints may fail in any way."""
    try:
        yield
    except Missing:
        raise
    except Exception as error:
        raise Missing(f"{what}: {first_line(error)}") from error
