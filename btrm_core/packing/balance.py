"""Spreads items over bins so that the most expensive bin costs little more than the mean."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

EVEN = 1.002
"""Rows are even enough when the most expensive one is this far above the mean."""


def fill(items: list[int], tokens: list[int], cost: list[float], bins: int, limit: int) -> list[list[int]] | None:
    """Put items, most expensive first, each into the cheapest bin that has room.

    Args:
        items: indices into `tokens` and `cost`, most expensive first.
        tokens: room that each item takes.
        cost: cost of each item.
        bins: number of bins.
        limit: room of a bin.

    Returns:
        The items of every bin, or None if an item finds no room.
    """
    if bins < 1:
        return None if items else []
    members: list[list[int]] = [[] for _ in range(bins)]
    room = [limit] * bins
    heap = [(0.0, number) for number in range(bins)]
    for item in items:
        skipped = []
        while heap and tokens[item] > room[heap[0][1]]:
            skipped.append(heapq.heappop(heap))
        if not heap:
            return None
        load, number = heap[0]
        heapq.heapreplace(heap, (load + cost[item], number))
        members[number].append(item)
        room[number] -= tokens[item]
        for entry in skipped:
            heapq.heappush(heap, entry)
    return members


def even_out(members: list[list[int]], tokens: IntArray, cost: FloatArray, limit: int) -> list[list[int]]:
    """Swap items of the most expensive bin with smaller ones of others while that helps.

    With few items in a bin (many ranks), filling alone leaves the busiest 2 to 3 per cent above the
    mean, and more where the budget is tight.

    Args:
        members: the items of every bin, indices into `tokens` and `cost`.
        tokens: room that each item takes.
        cost: cost of each item.
        limit: room of a bin.

    Returns:
        The items of every bin, no bin above the limit if none was.
    """
    if len(members) < 2:
        return members
    load = np.array([cost[items].sum() for items in members])
    room = np.array([limit - tokens[items].sum() for items in members])
    items = np.array([item for bin_ in members for item in bin_], dtype=np.int64)
    bin_of = np.repeat(np.arange(len(members)), [len(bin_) for bin_ in members])
    for _ in range(4 * len(members)):
        top = int(load.argmax())
        if load[top] <= EVEN * load.mean():
            break
        inside = np.flatnonzero(bin_of == top)
        gain = cost[items[inside]][:, None] - cost[items][None, :]
        moved = tokens[items[inside]][:, None] - tokens[items][None, :]
        after = np.maximum(load[top] - gain, load[bin_of][None, :] + gain)
        after[(gain <= 0) | (moved > room[bin_of][None, :]) | (-moved > room[top])] = np.inf
        best = int(after.argmin())
        give, take = inside[best // len(items)], best % len(items)
        if after.flat[best] >= load[top] * (1 - 1e-9):
            break
        other, size = bin_of[take], moved.flat[best]
        load[top] -= gain.flat[best]
        load[other] += gain.flat[best]
        room[top] += size
        room[other] -= size
        items[give], items[take] = items[take], items[give]
    return [items[bin_of == number].tolist() for number in range(len(members))]


def share_out(rows: list[IntArray], cost: list[float], world: int) -> tuple[tuple[IntArray, ...], ...]:
    """Give every rank equally many rows, most expensive first, each to the rank with least to do.

    Args:
        rows: the rows, a multiple of `world`.
        cost: cost of each row.
        world: number of ranks.

    Returns:
        The rows of every rank, most expensive first.
    """
    per_rank = len(rows) // world
    ranks: list[list[IntArray]] = [[] for _ in range(world)]
    heap = [(0.0, rank) for rank in range(world)]
    for number in sorted(range(len(rows)), key=lambda i: (-cost[i], i)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(rows[number])
        if len(ranks[rank]) < per_rank:
            heapq.heappush(heap, (load + cost[number], rank))
    return tuple(tuple(rank) for rank in ranks)
