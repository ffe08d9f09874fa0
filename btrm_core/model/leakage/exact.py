"""The exact test: what each reward depends on, read from its gradient with respect to every token's embedding.

A reward of a row must have exactly no gradient at tokens of other sequences, and at its own tokens the one it has when
its sequence is computed alone; and it must stay what it is when its neighbours are exchanged, re-ordered or grow. Short
sequences stand beside long ones, since a state that leaks over a border has decayed after a few tokens. All layers run.
The reading direction is fixed, so that a head of zeros does not hide a leak.

Shapes: S sequences, T tokens of a batch (lines one after another), n tokens of one sequence, H hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from btrm_core.errors import ConfigError
from btrm_core.model.leakage.positions import batch_dependent_lengths, position_limit
from btrm_core.model.leakage.structure import is_random
from btrm_core.packing import PADDED, Batch, Tree, grow, pack_row, pad_rows, row_form

if TYPE_CHECKING:
    from btrm_core.model.reward import RewardModel

SHORT, LONG = (2, 10), (40, 64)
"""Tokens of the short sequences and of the long ones beside them."""

REAL_TOKENS = 512
"""Tokens of real groups that are tested with their gradients."""

GROWN_TOKENS = 1024
"""A row is made to grow beyond a length at which positions change if that is no more than this."""


@dataclass(frozen=True)
class Leak:
    """The outcome of `examine`.

    Attributes:
        ok: whether every reward depends on its own sequence alone, and on all of it.
        reason: one line for the user.
        difference: largest difference of a reward from that of a separate pass, relative to the largest reward where
            that exceeds 1; infinite where gradients decided.
        tolerance: the largest difference accepted.
    """

    ok: bool
    reason: str
    difference: float
    tolerance: float


@dataclass
class _Truth:
    """Values and gradients of sequences computed alone, by their ids."""

    value: dict[bytes, float] = field(default_factory=dict)
    gradient: dict[bytes, np.ndarray | None] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return max(1.0, *(abs(value) for value in self.value.values()))


def examine(
    model: RewardModel,
    groups: Sequence[Tree] = (),
    *,
    layout: str,
    pad_id: int = 0,
    longest: int | None = None,
    training: bool = True,
) -> Leak:
    """Test that rewards in a layout depend on their own sequences alone.

    Args:
        model: the reward model, set to the kernel to test; left as it was.
        groups: real groups; those that fit into `REAL_TOKENS`, the shortest first, are tested beside made-up ones.
        layout: shared, packed or padded.
        pad_id: id of the tokens that fill up.
        longest: the longest sequence that will be computed, in tokens; None if that is not known.
        training: whether the model will be trained: the gradients are then looked at in training mode as well.

    Returns:
        The verdict. Exceptions of the model are not caught.
    """
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if exact else 5e-2
    spread_out = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO-3: no gradients by hand
    row, others = _made_up(model, longest)
    row += _short_ones(groups)
    was_training = model.training
    model.eval()
    try:
        truth = _Truth()
        with _reference(model):
            for sequence in _sequences(row):
                if sequence.tobytes() not in truth.value:
                    _alone(model, sequence, truth, gradients=not spread_out)
        worst = 0.0
        for number, arranged in enumerate(_arrangements(row, others, layout)):
            form = _Form(layout, model.kernel if layout != PADDED else PADDED, pad_id, model.device.type)
            difference, reason = _compare(model, arranged, form, truth, gradients=not (number or spread_out))
            worst = max(worst, difference)
            if reason is None and not worst <= tolerance:
                reason = f"rewards change with what else is in the batch (by {worst:.1e}, accepted {tolerance:.0e})"
            if reason is not None:
                return Leak(False, reason, worst, tolerance)
        if training and not spread_out:
            model.train()
            with torch.random.fork_rng(devices=_devices(model)):
                known = None if is_random(model) else truth
                difference, reason = _compare(model, row, form, known, gradients=True)
            if reason is None and not difference <= tolerance:
                reason = f"rewards differ from those in use (by {difference:.1e}, accepted {tolerance:.0e})"
            if reason is not None:
                return Leak(False, f"{reason}, in training mode", math.inf, tolerance)
    finally:
        model.train(was_training)
    what = "depend on nothing but their own sequences" if not spread_out else "do not change with their neighbours"
    return Leak(True, f"rewards {what} (largest difference {worst:.1e})", worst, tolerance)


@dataclass(frozen=True)
class _Form:
    layout: str
    kernel: str
    pad_id: int
    device_type: str

    def lay_out(self, groups: Sequence[Tree]) -> tuple[Batch, np.ndarray]:
        """The batch of these groups, and which of its tokens each reward may depend on: [S, T] booleans."""
        form = row_form(self.layout, self.kernel, self.device_type, self.pad_id)
        if form.kernel == PADDED:
            lines = pad_rows(groups, pad_id=self.pad_id, multiple_of=form.multiple_of)
            count, length = lines.input_ids_BT.size, lines.input_ids_BT.shape[1]
            last_S1, token_T = lines.reward_index_S[:, None], np.arange(count)
            return lines.batch(), (token_T <= last_S1) & (token_T >= last_S1 // length * length)
        shared = self.layout == "shared"
        row = pack_row(groups, share_prefix=shared, multiple_of=form.multiple_of, pad_id=self.pad_id)
        last_S1, token_T = row.reward_index_S[:, None], np.arange(row.computed)
        return row.batch(), (token_T <= last_S1) & (last_S1 < row.end_T)


def _devices(model: RewardModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _sequences(groups: Sequence[Tree]) -> list[np.ndarray]:
    return [np.asarray(sequence, dtype=np.int64) for group in groups for sequence in group.sequences]


def _made_up(model: RewardModel, longest: int | None) -> tuple[list[Tree], list[Tree]]:
    """A row of random groups, short ones beside long ones, and other long groups to exchange for them or to add."""
    config = model.base_model.config.get_text_config()
    rng = np.random.default_rng(0)
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "image", "decoder_start")]
    special = {token for ids in named for token in (ids if isinstance(ids, list | tuple) else [ids])}
    usable = [i for i in range(min(int(config.vocab_size), 4096)) if i not in special][-2048:]
    limit, learned = position_limit(model.base_model)
    allowed = [length for length in (limit if learned else None, longest) if length is not None]
    most = min(allowed, default=GROWN_TOKENS)

    def sequence(length: int) -> list[int]:
        return [int(token) for token in rng.choice(usable, max(1, min(length, most)))]

    def group(beginning: int, *tails: int) -> Tree:
        shared = sequence(beginning) if beginning else []
        return grow([(shared + sequence(tail))[:most] for tail in tails])

    few, some, many, most_tokens = SHORT[0], SHORT[1], LONG[0], LONG[1]
    row = [group(0, many), group(3, few, 3), group(0, few), group(4, 3, 1, 6), group(0, some)]
    row += [group(0, most_tokens), group(0, few, 5), group(many, 7, few)]
    grown = [length + 3 for length in batch_dependent_lengths(model.base_model.config) if length + 3 <= most]
    return row, [group(0, max([most_tokens + 16, *grown]))]


def _short_ones(groups: Sequence[Tree]) -> list[Tree]:
    """The shortest of the real groups, up to a number of tokens."""
    taken: list[Tree] = []
    room = REAL_TOKENS
    for group in sorted(groups, key=lambda group: len(group.tokens)):
        room -= len(group.tokens)
        if room < 0:
            break
        taken.append(group)
    return taken


def _arrangements(row: list[Tree], others: list[Tree], layout: str) -> Iterator[list[Tree]]:
    """The row; its groups and their responses in the reverse order; a neighbour exchanged; grown by one; one line."""
    yield row
    yield [grow(list(reversed(list(group.sequences)))) for group in reversed(row)]
    yield [*others, *row[1:]]
    yield [*row, *others]
    if layout == PADDED:  # where nothing is padded transformers gives some attention no mask
        yield [max((group for group in row if len(group.sequences) == 1), key=lambda group: len(group.tokens))]


@contextlib.contextmanager
def _reference(model: RewardModel) -> Iterator[None]:
    """Inside: sequences one at a time, through the model's own eager attention where that can be chosen."""
    before = model.one_by_one
    model.one_by_one = True
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ConfigError, ValueError, ImportError):
            stack.enter_context(model.own_attention())
        try:
            yield
        finally:
            model.one_by_one = before


@contextlib.contextmanager
def _embeddings(model: RewardModel) -> Iterator[list[torch.Tensor]]:
    """Inside, the outputs of the input embedding are leaves of the graph; they are added to the list that is given."""
    leaves: list[torch.Tensor] = []

    def cut(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.base_model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _read(model: RewardModel, batch: Batch) -> torch.Tensor:
    """Hidden states at the reward positions in a fixed direction [S], at least float32."""
    hidden_SH = model.hidden(batch).flatten(0, 1).index_select(0, batch.reward_index)
    hidden_SH = hidden_SH.to(torch.promote_types(hidden_SH.dtype, torch.float32))
    width = hidden_SH.shape[-1]
    direction_H = torch.cos(torch.arange(width, device=hidden_SH.device, dtype=torch.float64) * 1.7 + 0.3)
    return hidden_SH @ (direction_H / math.sqrt(width)).to(hidden_SH.dtype)


def _alone(model: RewardModel, sequence: np.ndarray, truth: _Truth, gradients: bool) -> None:
    batch = pad_rows([grow([sequence.tolist()])]).batch().to(model.device)
    key = sequence.tobytes()
    with torch.set_grad_enabled(gradients), _embeddings(model) as leaves:
        value_S = _read(model, batch)
        truth.value[key] = float(value_S[0].detach())
        truth.gradient[key] = None
        if gradients:
            (found,) = torch.autograd.grad(value_S[0], leaves[:1])
            truth.gradient[key] = found.flatten(0, 1).float().cpu().numpy()


def _compare(
    model: RewardModel, groups: list[Tree], form: _Form, truth: _Truth | None, gradients: bool
) -> tuple[float, str | None]:
    """The largest difference from the values of separate passes, and what is wrong with the gradients, or None."""
    batch, own_ST = form.lay_out(groups)
    batch = batch.to(model.device)
    with torch.set_grad_enabled(gradients), _embeddings(model) as leaves:
        value_S = _read(model, batch)
    if not torch.isfinite(value_S).all():
        return math.inf, "rewards are not finite"
    difference = 0.0
    sequences = _sequences(groups)
    if truth is not None:
        pairs = zip(sequences, value_S.tolist(), strict=True)
        known = [(truth.value[s.tobytes()], value) for s, value in pairs if s.tobytes() in truth.value]
        difference = max(abs(a - b) for a, b in known) / truth.scale
    if not gradients:
        return difference, None
    for place, sequence in enumerate(sequences):
        found_TH = _gradient(model, value_S[place], leaves, batch)
        alone_nH = None if truth is None else truth.gradient[sequence.tobytes()]
        if reason := _wrong(found_TH, own_ST[place], alone_nH):
            return difference, reason
    return difference, None


def _gradient(model: RewardModel, value: torch.Tensor, leaves: list[torch.Tensor], batch: Batch) -> np.ndarray:
    """The gradient [T, H] of one reward at every token's embedding."""
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    if model.one_by_one and batch.visibility is None:  # one leaf for each line, of the line's own length
        lines, length = batch.input_ids.shape
        whole = torch.zeros(lines, length, leaves[0].shape[-1])
        for line, part in enumerate(found):
            if part is not None:
                whole[line, : part.shape[1]] = part[0].float().cpu()
        return whole.flatten(0, 1).numpy()
    gradient = torch.zeros_like(leaves[0]) if found[0] is None else found[0]
    return np.asarray(gradient.flatten(0, 1).float().cpu().numpy())


def _wrong(found_TH: np.ndarray, own_T: np.ndarray, alone_nH: np.ndarray | None) -> str | None:
    """What a reward's gradient shows that must not be, or None."""
    if not np.isfinite(found_TH).all():
        return "gradients are not finite"
    foreign = int((found_TH[~own_T] != 0).any(axis=1).sum())
    if foreign:
        return f"a reward depends on {foreign} tokens of other sequences (gradient not zero)"
    if alone_nH is None:
        return None
    own_nH = found_TH[own_T]
    missed = int(((alone_nH != 0).any(axis=1) & ~(own_nH != 0).any(axis=1)).sum())
    seen = int(((own_nH != 0).any(axis=1) & ~(alone_nH != 0).any(axis=1)).sum())
    if missed or seen:
        what = f"does not depend on {missed}" if missed else f"depends on {seen}"
        return f"a reward {what} tokens of its own sequence {'that' if missed else 'beyond those that'} it has alone"
    return None
