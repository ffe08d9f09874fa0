"""Who sees whom in one packed row, in the form each attention kernel wants it.

A `Visibility` is made from the numbers of a packed row on the host, travels to the device with its batch, and is
shared by all layers and by the recomputation of checkpointed ones. Masks are built once per distinct
sliding window. It knows nothing about models or kernels.

Forms, all of the rule in `packing`:

* runs: queries [a, b) against the keys of the tokens before them on their path and of [a, b), causal
  from the bottom right. A run is an edge of a tree with the first edge that goes on from it, and so on:
  as many runs as leaves. Nothing is computed twice, and no mask is needed where the kernel knows causal
  and windowed attention by itself. What several runs read is gathered for each of them; the gradient of
  a token is the sum over its readers, in their order.
* `visible`: the T x T boolean matrix, the plain reference.
* `block_mask`: FlexAttention's 128 x 128 blocks, classified on the host from each block's smallest
  and largest `end` and position: no T x T tensor, nothing compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from btrm_core.packing.trees import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn.attention.flex_attention import BlockMask


class Run(NamedTuple):
    """Queries [start, stop) of a row against the `prefix` keys before them on their path and, causally, themselves.

    Attributes:
        start: row offset of the first query.
        stop: one past the last.
        prefix: number of keys before them, in tokens.
    """

    start: int
    stop: int
    prefix: int

    @property
    def queries(self) -> int:
        """Number of query tokens."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """Number of key tokens."""
        return self.prefix + self.queries


@dataclass(eq=False)
class Visibility:
    """Attention structure of one row of T tokens, R runs and K key rows (a run's path, then its own tokens).

    Attributes:
        runs: the runs, in row order, covering every token.
        end_T: int64, one past the last offset that may look at the token.
        position_T: int64, position of the token in its own sequence.
        query_starts: [R+1] int32, cumulative numbers of queries.
        key_starts: [R+1] int32, cumulative numbers of keys.
        key_index_K: int64 row offset of every key, or None when the keys are the row itself.
        own_index_T: int64 offset in the keys of each token as a key of its own run, or None.
        readers: the tokens that several runs read, by the number of their readers: `(offsets in the row [n],
            offsets in the keys [n * readers])`, the readers of one token next to each other and in order.
    """

    runs: tuple[Run, ...]
    end_T: torch.Tensor
    position_T: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    key_index_K: torch.Tensor | None
    own_index_T: torch.Tensor | None
    readers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    host_end_T: NDArray[np.int64]
    host_position_T: NDArray[np.int64]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_runs(
        cls,
        runs_R2: NDArray[np.int64],
        prefix_starts_R: NDArray[np.int64],
        prefixes_M2: NDArray[np.int64],
        end_T: NDArray[np.int64],
        position_T: NDArray[np.int64],
    ) -> Visibility:
        """Build the visibility of a packed row on the host; the arguments are `rows.Row`'s.

        Args:
            runs_R2: query start and end of each run, as row offsets.
            prefix_starts_R: [R + 1], where the ranges of each run begin in `prefixes_M2`.
            prefixes_M2: start and end of the ranges of tokens before runs, run after run.
            end_T: one past the last row offset that may look at the token.
            position_T: each token's position in its own sequence.
        """
        ranges_M = np.diff(prefixes_M2, axis=1)[:, 0]
        ends_R = np.append(0, np.cumsum(ranges_M))[prefix_starts_R]
        prefix_R = np.diff(ends_R)
        runs = tuple(map(Run, *runs_R2.T.tolist(), prefix_R.tolist()))
        queries_R = np.diff(runs_R2, axis=1)[:, 0]
        key_index, own_index, readers = (
            _key_index(runs_R2, prefix_starts_R, prefixes_M2) if len(prefixes_M2) else (None, None, ())
        )
        return cls(
            runs=runs,
            end_T=torch.from_numpy(end_T),
            position_T=torch.from_numpy(position_T),
            query_starts=_starts(queries_R),
            key_starts=_starts(prefix_R + queries_R),
            key_index_K=key_index,
            own_index_T=own_index,
            readers=readers,
            host_end_T=end_T,
            host_position_T=position_T,
        )

    @property
    def length(self) -> int:
        """T."""
        return len(self.host_end_T)

    @property
    def max_queries(self) -> int:
        """Queries of the longest run."""
        return max(run.queries for run in self.runs)

    @property
    def max_keys(self) -> int:
        """Keys of the longest run."""
        return max(run.keys for run in self.runs)

    def visible(self, window: int | None) -> torch.Tensor:
        """The whole mask as a [T, T] boolean tensor, True where a query (line) sees a key (column).

        Args:
            window: the layer's sliding window in tokens, or None for none.
        """
        mask: torch.Tensor = self._once(("visible", window), lambda: self._visible(window))
        return mask

    def _visible(self, window: int | None) -> torch.Tensor:
        offset_T = torch.arange(self.length, device=self.end_T.device)
        query, key = offset_T[:, None], offset_T[None, :]
        seen = (key <= query) & (query < self.end_T[None, :])
        if window is not None:
            seen &= self.position_T[:, None] - self.position_T[None, :] < window
        return seen

    @staticmethod
    def is_plain(run: Run, window: int | None) -> bool:
        """True where plain causal attention over the run's own tokens needs no mask.

        Args:
            run: an attention run of a row.
            window: the layer's sliding window in tokens, or None for none.
        """
        return run.prefix == 0 and (window is None or window >= run.keys)

    def run_mask(self, run: Run, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask of one run, [queries, keys].

        Args:
            run: one of `runs`.
            window: the layer's sliding window, or None.
            dtype: `torch.bool` for True where a query sees a key; a floating type for the additive
                form (0 or -inf), which CPU kernels would otherwise make again on every call.
        """
        narrow = window if window is not None and window < run.keys else None
        key = ("run", run.queries, run.prefix, narrow, dtype)
        mask: torch.Tensor = self._once(key, lambda: _run_mask(run, narrow, dtype, self.end_T.device))
        return mask

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's block mask of the row; T must be a multiple of 128.

        Args:
            window: the layer's sliding window in tokens, or None for none.
        """
        mask: BlockMask = self._once(("block", window), lambda: self._block_mask(window))
        return mask

    def _block_mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        if self.length % BLOCK:
            raise ValueError(f"FlexAttention needs rows of a multiple of {BLOCK} tokens, not {self.length}")
        partial, full = classify_blocks(self.host_end_T, self.host_position_T, window)
        partial_counts, partial_indices = _ordered(partial, self.end_T.device)
        full_counts, full_indices = _ordered(full, self.end_T.device)
        return BlockMask.from_kv_blocks(
            partial_counts,
            partial_indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(self.end_T, self.position_T, window),
            seq_lengths=(self.length, self.length),
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Visibility:
        """Return the visibility on `device`.

        Args:
            device: where its tensors shall lie.
            non_blocking: do not wait for copies from pinned memory.
        """
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Visibility:
        """Return the visibility in page-locked host memory."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Visibility:
        return Visibility(
            runs=self.runs,
            end_T=move(self.end_T),
            position_T=move(self.position_T),
            query_starts=move(self.query_starts),
            key_starts=move(self.key_starts),
            key_index_K=None if self.key_index_K is None else move(self.key_index_K),
            own_index_T=None if self.own_index_T is None else move(self.own_index_T),
            readers=tuple((move(row), move(key)) for row, key in self.readers),
            host_end_T=self.host_end_T,
            host_position_T=self.host_position_T,
        )


def _starts(counts_R: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(counts_R)).astype(np.int32))


_Readers = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def _key_index(
    runs_R2: NDArray[np.int64], prefix_starts_R: NDArray[np.int64], prefixes_M2: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, _Readers]:
    """Row offset of every key, where each token is a key of its own run, and which keys the shared tokens are."""
    ranges = np.insert(prefixes_M2, prefix_starts_R[1:], runs_R2, axis=0)  # a run's own after its path
    own = np.insert(np.zeros(len(prefixes_M2), dtype=bool), prefix_starts_R[1:], True)
    size = ranges[:, 1] - ranges[:, 0]
    index_K = np.arange(size.sum()) + np.repeat(ranges[:, 0] - (np.cumsum(size) - size), size)
    count_T = np.bincount(index_K, minlength=runs_R2[-1, 1])
    keys_K = np.argsort(index_K, kind="stable")  # the keys that each token is, token after token
    first_T = np.cumsum(count_T) - count_T
    readers = []
    for count in np.unique(count_T[count_T > 1]):
        tokens = np.flatnonzero(count_T == count)
        readers.append((torch.from_numpy(tokens), torch.from_numpy(keys_K[_columns(first_T[tokens], count)])))
    own_T = np.flatnonzero(np.repeat(own, size))
    return torch.from_numpy(index_K), torch.from_numpy(own_T), tuple(readers)


def _columns(first: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` numbers from each of `first` on, one after another."""
    return (first[:, None] + np.arange(count)).ravel()


def _run_mask(run: Run, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    query = torch.arange(run.prefix, run.keys, device=device)[:, None]
    distance = query - torch.arange(run.keys, device=device)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def _mask_mod(
    end_T: torch.Tensor, position_T: torch.Tensor, window: int | None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The rule for FlexAttention, which evaluates it inside partly visible blocks only.

    The window is put into a tensor of lowest visible positions: layers with and without one, and rows
    of any length, then share one compiled graph.
    """
    lowest_T = torch.zeros_like(position_T) if window is None else position_T - (window - 1)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (kv <= q) & (q < end_T[kv]) & (position_T[kv] >= lowest_T[q])

    return visible


def classify_blocks(
    end_T: NDArray[np.int64], position_T: NDArray[np.int64], window: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which 128 x 128 blocks are partly and which wholly visible, as two [N, N] boolean matrices.

    Without a window the classes are exact; with one a few blocks without a visible entry may count
    as partial, which costs their evaluation and changes nothing.

    Args:
        end_T: one past the last offset that may look at each token; T is 128 * N.
        position_T: position of each token in its own sequence.
        window: the sliding window, or None.
    """
    end, position = end_T.reshape(-1, BLOCK), position_T.reshape(-1, BLOCK)
    blocks = len(end)
    first_query = np.arange(blocks) * BLOCK
    last_query = first_query + BLOCK - 1
    below = np.tri(blocks, k=-1, dtype=bool)
    some = first_query[:, None] < end.max(1)[None, :]
    every = last_query[:, None] < end.min(1)[None, :]
    if window is not None:
        some &= position.min(1)[:, None] - position.max(1)[None, :] < window
        every &= position.max(1)[:, None] - position.min(1)[None, :] < window
    full = below & every
    partial = (below & some & ~every) | np.eye(blocks, dtype=bool)
    return partial, full


def _ordered(blocks: NDArray[np.bool_], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, 1, N] and indices [1, 1, N, N] of the True entries of each line, in order, on `device`."""
    counts = torch.from_numpy(blocks.sum(1).astype(np.int32))[None, None]
    indices = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))[None, None]
    if device.type != "cuda":
        return counts, indices
    # Through page-locked memory, so that the host does not wait for the device.
    return (
        counts.pin_memory().to(device, non_blocking=True),
        indices.pin_memory().to(device, non_blocking=True),
    )
