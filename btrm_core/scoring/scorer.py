"""Rewards of conversations from a finished model: what `btrm score`, `btrm eval` and a user's own program call.

Decides how conversations become rows when there is no training step: prompts that several responses share are computed
once, rows are filled up to a token budget, results come back in the order of the input. The numbers are those of
scoring every conversation alone. Opening the model is `model.load`'s, arranging rows `packing`'s.

Shapes: S conversations, P pairs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from btrm_core.chat import Conversation
from btrm_core.console import LongWork, unused_gpu
from btrm_core.errors import CheckpointError, ConfigError, DataError, did_you_mean
from btrm_core.files import digest
from btrm_core.model import (
    RewardModel,
    Use,
    check_head,
    choose_kernel,
    find_model,
    identity,
    is_adapters,
    load_chat,
    load_weights,
    read_manifest,
    reward_scale,
    template_difference,
    trusted,
    uses_softcap,
)
from btrm_core.model import tolerance as model_tolerance
from btrm_core.packing import PADDED, Bundle, Tree, bundles, collate, grow, packed_rows, padded_rows, row_multiple
from btrm_core.scoring.responses import (
    Encoded,
    Responses,
    Rewards,
    as_pairs,
    as_responses,
    begin_alike,
    encoded_responses,
    length_limit,
    plain_groups,
    reward_array,
    rewards_of,
    usable_device,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WINDOW = 1024
"""Groups that are encoded and arranged together: enough to fill rows, few enough to keep in memory."""
_log = logging.getLogger("btrm")
PROBE = [{"role": "user", "content": "Name the largest planet."}]
ANSWERS = ["Jupiter is the largest planet of the solar system.", "No."]


@dataclass
class Tokens:
    """Running counts of what was scored.

    Attributes:
        computed: tokens that went through the model.
        useful: tokens of all conversations, each counted by itself.
    """

    computed: int = 0
    useful: int = 0


class Scorer:
    """A finished reward model, ready to score.

    Args:
        model: a model directory (whole, or adapters beside their base model), a run's output directory, or a hub id.
        dtype: auto (as saved on a GPU, fp32 on a CPU), bf16 or fp32. Head and rewards are fp32 in any case.
        attention: auto, or the kernel of packed rows: flash, varlen, flex, sdpa, eager.
        tokens_per_batch: tokens of a row; bounds the memory, never changes a reward beyond rounding.
        device: None takes the GPU if there is one.
        normalize: give rewards in standard deviations from the mean of the set that the model was calibrated on.

    Raises:
        CheckpointError: there is no such model, it is not a whole reward model, or it was never calibrated.
        ConfigError: a setting is unknown, or the kernel does not fit model and device.

    Attributes:
        directory: where the model was found.
        chat: how its conversations become ids.
        manifest: the content of `btrm.json`; empty for a model of another trainer.
        max_length: longest conversation in tokens; longer ones lose the beginning of their prompt, as in training.
        model: the reward model.
        tokens: what was computed so far.
        identity: changes when the rewards may, for programs that keep them.
        scale: mean and standard deviation of what rewards are given in; those of finished ids are never changed.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        attention: str = "auto",
        tokens_per_batch: int = 8192,
        device: str | torch.device | None = None,
        normalize: bool = False,
    ) -> None:
        if (dtype := str(dtype)) not in ("auto", *DTYPES):
            raise ConfigError(f"dtype '{dtype}' is unknown; expected auto, bf16 or fp32.{did_you_mean(dtype, DTYPES)}")
        if not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
            raise ConfigError(f"tokens_per_batch is {tokens_per_batch}; expected at least 1")
        self.device = usable_device(device)
        self.tokens_per_batch = tokens_per_batch
        self.tokens = Tokens()
        self.directory = find_model(str(model))
        self.manifest = read_manifest(self.directory)
        self.scale = reward_scale(self.manifest, self.directory) if normalize else (0.0, 1.0)
        check_head(self.directory)
        self.chat = load_chat(self.directory)
        compute = "auto" if dtype == "auto" and self.device.type != "cpu" else DTYPES.get(dtype, torch.float32)
        with LongWork(f"opening {model}"):
            hf = load_weights(self.directory, compute, self.device)
            self.max_length = self.chat.max_length or length_limit(hf.config, self.chat.tokenizer)
            self.identity = identity(self.directory, self.chat, hf, hf.dtype)
            if normalize:
                self.identity = digest(self.identity, self.scale)
            self.model = self._reward_model(hf, attention)
        idle = unused_gpu() if device is None else None
        for remark in (template_difference(self.manifest, self.chat), "; ".join(idle or ())):
            if remark:
                _log.warning("%s", remark)
        if is_adapters(self.directory):
            self._check_base()

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in; its head is fp32 in any case."""
        dtype: torch.dtype = self.model.base_model.dtype
        return dtype

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model so far: common beginnings once, padding counted."""
        return self.tokens.computed

    def _check_base(self) -> None:
        """Refuse adapters on another base model than their own."""
        tolerance = model_tolerance(self.manifest, self.dtype)
        if self.manifest.get("self_test") and not (off := self.self_test()) <= tolerance:
            raise CheckpointError(
                f"{self.directory} holds adapters, and with {self.model.base_model.config._name_or_path} the rewards "
                f"in btrm.json come out otherwise, by up to {off:.2g}; expected the base model they were trained on"
            )

    def _reward_model(self, hf: Any, attention: str) -> RewardModel:
        """The model with packed rows where they are exact, else padded batches or one at a time: as in training."""
        kernel = choose_kernel(
            attention, device_type=self.device.type, softcap=uses_softcap(hf.config), half=hf.dtype.itemsize == 2
        )
        model = RewardModel(hf, PADDED).eval()
        with contextlib.suppress(ConfigError):  # its attention cannot be chosen, and `trusted` says so
            model.use_kernel(kernel)
        trust = trusted(
            model, self._known_groups(), Use(pad_id=self.chat.pad_id, longest=self.max_length, training=False)
        )
        if trust.note:
            _log.warning("%s", trust.note)
        return model

    def _known_groups(self) -> list[Tree]:
        """Pairs to check the model with: the self-test's, or a made-up one."""
        vectors = [vector["input_ids"] for vector in self.manifest.get("self_test", ())]
        groups = [grow(vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
        return groups or [grow(self.chat.encode_group(PROBE, ANSWERS).sequences)]

    def rewards(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Return the rewards [S] of finished conversations, float32.

        Conversations with equal prompts need no more compute than in `group_rewards`.

        Args:
            conversations: lists of messages (role, content) that end with the assistant's.

        Raises:
            DataError: one cannot be scored; it says which and why.
        """
        groups = [as_responses(conversation, index) for index, conversation in enumerate(conversations)]
        return reward_array([reward for scored in self._all(groups, "conversation") for reward in scored])

    def pair_rewards(
        self, prompts: Sequence[Conversation], chosen: Sequence[str], rejected: Sequence[str]
    ) -> np.ndarray:
        """Return the rewards [P, 2] of two responses to each prompt, float32.

        Args:
            prompts: messages each.
            chosen: the first response to each.
            rejected: the second.

        Raises:
            DataError: a pair cannot be scored, or these are no three lists of one length.
        """
        groups = as_pairs(prompts, chosen, rejected)
        return reward_array([reward for scored in self._all(groups, "pair") for reward in scored]).reshape(-1, 2)

    def group_rewards(self, groups: Sequence[Responses]) -> list[np.ndarray]:
        """Return the rewards [N] of the N responses to each prompt, one float32 array per group.

        If a conversation of a group is over the maximum length, all of the group get the same shortened prompt.

        Args:
            groups: prompt and responses each.

        Raises:
            DataError: a response cannot be scored; `score` gives the others' rewards nevertheless.
        """
        return [reward_array(scored) for scored in self._all(groups, "group")]

    def _all(self, groups: Sequence[Responses], noun: str) -> list[tuple[float | None, ...]]:
        results = self.score(groups)
        for index, result in enumerate(results):
            for number, error in enumerate(result.errors, start=1):
                if error:
                    which = f", response {number}" if len(result.errors) > 1 else ""
                    raise DataError(f"{noun} {index + 1} of {len(results)}{which}: {error}")
        return [result.rewards for result in results]

    def score(self, groups: Sequence[Responses]) -> list[Rewards]:
        """Score groups of responses; never raises for a conversation that cannot be scored.

        Args:
            groups: prompts (messages, or a user's text) with their responses, at least one each.

        Returns:
            One result per group, in order.

        Raises:
            DataError: a group is no prompt with a list of responses.
        """
        groups = plain_groups(groups)
        windows = (groups[start : start + WINDOW] for start in range(0, len(groups), WINDOW))
        return [scored for window in self.stream(windows) for scored in window]

    def stream(self, chunks: Iterable[Sequence[Responses]]) -> Iterator[list[Rewards]]:
        """Score chunk after chunk, each as `score` does; the next one is encoded while the model computes.

        Args:
            chunks: groups to score together; read one ahead.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: tuple[Sequence[Responses], Future[list[Encoded]]] | None = None
            for chunk in chunks:
                encoding = pool.submit(self.encode, chunk)
                if waiting is not None:
                    yield self.score_encoded(waiting[0], waiting[1].result())
                waiting = chunk, encoding
            if waiting is not None:
                yield self.score_encoded(waiting[0], waiting[1].result())

    def encode(self, groups: Sequence[Responses]) -> list[Encoded]:
        """Return ids and one error or None per response; the ids are those of the responses without error, in order.

        Args:
            groups: prompt and responses each.
        """
        return encoded_responses(self.chat, groups, self.max_length)

    def score_encoded(self, groups: Sequence[Responses], encoded: Sequence[Encoded]) -> list[Rewards]:
        """Return the rewards of groups whose ids are there.

        Args:
            groups: prompt and responses each.
            encoded: what `encode` made of them.
        """
        sequences = [ids for result, _ in encoded for ids in result.sequences]
        rewards_S, (mean, std) = self.sequence_rewards(sequences, begin_alike(groups, encoded)), self.scale
        values = iter(((rewards_S - mean) / std).tolist())
        return [rewards_of(part, values) for part in encoded]

    def sequence_rewards(self, sequences: Sequence[Sequence[int]], together: Sequence[Hashable]) -> np.ndarray:
        """Return the rewards [S] of finished id sequences, float32.

        Args:
            sequences: as `ChatFormat.encode` gives them.
            together: one key per sequence; what sequences of equal keys begin with is computed once.

        Raises:
            ConfigError: GPU memory ran out.
        """
        return self.bundle_rewards(bundles(sequences, together, self.tokens_per_batch))

    def bundle_rewards(self, found: Sequence[Bundle]) -> np.ndarray:
        """Return the rewards [S] of bundles that hold the places 0 to S - 1 together, float32.

        Args:
            found: what is larger than `tokens_per_batch` divided already; each place once.

        Raises:
            ConfigError: GPU memory ran out.
        """
        arrange = padded_rows if self.model.kernel == PADDED else packed_rows
        places: list[int] = []
        parts = []
        for row in arrange(found, self.tokens_per_batch):
            places += [member for bundle in row for member in bundle.members]
            parts.append(self._row_rewards(row))
        rewards_S = np.zeros(len(places), dtype=np.float32)
        if parts:
            rewards_S[places] = torch.cat(parts).float().cpu().numpy()  # the only wait for the device
        return rewards_S

    @torch.inference_mode()
    def _row_rewards(self, row: Sequence[Bundle]) -> torch.Tensor:
        kernel = self.model.kernel
        batch = collate(
            [bundle.tree for bundle in row],
            kernel=kernel,
            multiple_of=row_multiple(kernel, self.device.type),
            pad_id=self.chat.pad_id,
        )
        self.tokens.computed += batch.computed
        self.tokens.useful += batch.useful
        try:
            rewards: torch.Tensor = self.model(batch.sent_to(self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"GPU memory ran out on {batch.computed} tokens; make --tokens-per-batch smaller "
                f"than {self.tokens_per_batch}, or use --dtype bf16"
            ) from error
        return rewards

    def self_test(self) -> float:
        """Score the vectors of `btrm.json` anew, each alone; returns the largest difference to the rewards in it.

        Raises:
            CheckpointError: the model has none.
        """
        vectors = self.manifest.get("self_test")
        if not vectors:
            raise CheckpointError(f"{self.directory}/btrm.json holds no self-test vectors to compare with")
        rewards_S = [self.sequence_rewards([vector["input_ids"]], [0])[0] for vector in vectors]
        return float(np.abs(np.array(rewards_S) - [vector["reward"] for vector in vectors]).max())
