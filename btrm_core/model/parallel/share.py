"""One process's share of every row: a slice of its tokens, and some heads of attention over all of them.

Outside attention every token is computed by itself, so a process runs its slice of the row alone. Before attention the
processes exchange queries, keys and values: each gets all tokens of the row for its part of the heads, and the kernel
in force computes them as it would a row of a model with so many heads, trees, gathered keys and windows included, since
every process knows the layout of the whole row. Afterwards the outputs go back to the processes that hold the tokens.
Rewards are read where their tokens are and added up, zeros elsewhere, so that every process has all of them.

Slices are as equal as whole tokens allow: nothing is padded for it, and no token is left out. A row with fewer tokens
than there are processes is computed whole by each of them, and its gradient is the first one's.

DeepSpeed's own `UlyssesSPAttentionHF` is not used: it takes equal slices only and knows neither trees nor the kernels
here. Its process groups are not needed either: weights are the same on all processes of a run, so ZeRO spreads states
over all of them as ever, and its mean over processes is multiplied away in the loss as ever.

Shapes: N processes share a row of T tokens; t tokens are a process's own; S sequences; D the width of a head's
queries and keys, V that of its values.

Reference: Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509, section 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from btrm_core.errors import ConfigError
from btrm_core.model.parallel.exchange import exchange, total

if TYPE_CHECKING:
    from btrm_core.packing import Visibility

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class RowShare:
    """Which part of every row this process computes, and with whom.

    Attributes:
        index: of this process among those that share rows with it, from 0.
        count: N, how many they are.
        processes: their torch process group, in the order of their index.
    """

    index: int
    count: int
    processes: Any

    def divides(self, tokens: int) -> bool:
        """Whether a row of so many tokens is divided: every process must have a token.

        Args:
            tokens: of the row, filling included.
        """
        return tokens >= self.count

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of each process, in row order.

        Args:
            tokens: of the row.
        """
        borders = [tokens * index // self.count for index in range(self.count + 1)]
        return [stop - start for start, stop in itertools.pairwise(borders)]

    def own(self, tokens: int) -> slice:
        """Where in a row this process's tokens are.

        Args:
            tokens: of the row.
        """
        return slice(tokens * self.index // self.count, tokens * (self.index + 1) // self.count)

    def owned(self, index_S: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Where in this process's slice rewards are read, and which of them are its own.

        Args:
            index_S: offsets in the row.
            tokens: of the row.

        Returns:
            Offsets in the slice [S], some offset for those that are not in it; and booleans [S].
        """
        own = self.own(tokens)
        is_own_S = (index_S >= own.start) & (index_S < own.stop)
        return (index_S - own.start).clamp(0, own.stop - own.start - 1), is_own_S

    def together(self, rewards_S: Tensor, is_own_S: Tensor) -> Tensor:
        """The rewards [S] of a row on every process; the gradient of each goes to the process that has read it.

        Args:
            rewards_S: as this process reads them.
            is_own_S: which of them are its own; the others are left out.
        """
        return total(rewards_S.masked_fill(~is_own_S, 0.0), self.processes)

    def counted_once(self, rewards_S: Tensor) -> Tensor:
        """Rewards that every process has computed from the whole row; only the first one's have a gradient.

        Args:
            rewards_S: equal on all processes.

        Returns:
            The same values [S]. The others take part in the backward pass, as the weights' hooks expect, with zeros.
        """
        return rewards_S if self.index == 0 else rewards_S.detach() + 0.0 * rewards_S

    def attention(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visibility: Visibility,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Attention of this process's tokens, computed by heads over all processes.

        Args:
            kernel: computes [1, T, heads, V] from queries, keys, values and visibility of a whole row.
            query: [1, heads, t, D].
            key: [1, kv_heads, t, D].
            value: [1, kv_heads, t, V].
            visibility: who sees whom in the whole row.
            options: what else the kernel takes.

        Returns:
            [1, t, heads, V].

        Raises:
            ConfigError: N does not divide the heads.
            NotImplementedError: the model changes the number of tokens between its input and attention.
        """
        heads, kv_heads = query.shape[1], key.shape[1]
        require_heads(heads, self.count)
        sizes = self.sizes(visibility.length)
        own = sizes[self.index]
        if query.shape[2] != own:
            raise NotImplementedError("a model that changes the number of tokens before attention cannot share rows")
        copies = kv_copies(heads, kv_heads, self.count)
        parts = [query, _repeated(key, copies), _repeated(value, copies)]
        lines = torch.cat([self._by_process(part) for part in parts], dim=-1).flatten(0, 1)
        row = exchange(lines, [own] * self.count, sizes, self.processes)
        widths = [part.shape[1] // self.count * part.shape[3] for part in parts]
        states = [
            lines.view(visibility.length, -1, part.shape[3]).transpose(0, 1)[None]
            for lines, part in zip(torch.split(row, widths, dim=-1), parts, strict=True)
        ]
        output = kernel(*states, visibility, **options)  # [1, T, heads / N, D]
        back = exchange(output[0].flatten(1), sizes, [own] * self.count, self.processes)
        return back.view(self.count, own, heads // self.count, -1).transpose(0, 1).reshape(1, own, heads, -1)

    def _by_process(self, states: Tensor) -> Tensor:
        """[1, heads, t, D] to [N, t, heads / N * D]: what each process gets."""
        return states[0].transpose(0, 1).reshape(states.shape[2], self.count, -1).transpose(0, 1)


def require_heads(heads: int, count: int) -> None:
    """Refuse to share rows between more processes than the heads can be divided among.

    Args:
        heads: query heads of a layer.
        count: N.

    Raises:
        ConfigError: N does not divide them; says which N do.
    """
    if heads % count:
        raise ConfigError(
            f"--sequence-parallel {count}: the model has {heads} attention heads, which {count} processes cannot share "
            f"equally; expected one of {', '.join(map(str, divisors(heads)))}"
        )


def divisors(number: int) -> Sequence[int]:
    """All divisors of a number, in order.

    Args:
        number: at least 1.
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def kv_copies(heads: int, kv_heads: int, count: int) -> int:
    """How many processes' worth of each key head there must be, so that every process has those of its query heads.

    The query heads of a process are cut into chunks that have one key head each. Where N divides the key heads, that
    is every key head once.

    >>> kv_copies(32, 8, 8), kv_copies(32, 8, 16), kv_copies(8, 1, 4), kv_copies(12, 3, 2)
    (1, 2, 4, 2)

    Args:
        heads: query heads, a multiple of N.
        kv_heads: key heads, a divisor of the query heads.
        count: N.
    """
    group = heads // kv_heads
    return group // math.gcd(group, heads // count)


def _repeated(states: Tensor, copies: int) -> Tensor:
    """Keys or values [1, kv_heads, t, D] with every head `copies` times; gradients are added in a fixed order."""
    if copies == 1:
        return states
    return states[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2)
