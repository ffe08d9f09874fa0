"""What is computed at once: what begins alike, counted as the device computes it, and not all at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable

import httpx
import numpy as np
from support.scorer_samples import say
from support.serving import Held, serving, until

from btrm_core.packing import grow
from btrm_core.scoring import Scorer
from btrm_core.serving.batching import Work
from btrm_core.serving.choosing import LITTLE, TreeSize, chosen, packed, together

PROMPTS = [[n] * 40 for n in range(1, 9)]


def works(prompts: int, responses: int, keyed: bool = True) -> list[Work]:
    """Responses to prompts, those of one prompt as far apart as can be."""
    return [
        Work([[*PROMPTS[p], 100 + r, 200 + p]], key=p if keyed else None)
        for r in range(responses)
        for p in range(prompts)
    ]


def prompts_of(batch: list[Work]) -> list[int]:
    return [work.sequences[0][0] for work in batch]


def test_the_size_of_a_tree_is_that_of_the_tree_that_is_computed() -> None:
    draw = random.Random(0)
    for _ in range(50):
        sequences = [[draw.randrange(3) for _ in range(draw.randrange(1, 9))] for _ in range(draw.randrange(1, 12))]
        size = TreeSize()
        assert sum(size.add(packed(ids)) for ids in sequences) == len(grow(sequences).tokens)


def test_what_begins_alike_is_taken_together_and_counted_once() -> None:
    for keyed in (True, False):
        waiting = works(4, 8, keyed)
        tree = 40 + 8 * 2
        assert prompts_of(chosen(waiting, 10_000)) == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8, "little is not halved"
        assert prompts_of(chosen(waiting, 2 * tree)) == [1] * 8 + [2] * 8, "half of what waits"
        assert prompts_of(chosen(waiting, tree + 5)) == [1] * 8, "the budget"
        assert prompts_of(chosen(waiting, tree - 1)) == [1] * 7
        assert len(chosen(waiting, 1)) == 1, "never nothing"
    assert chosen([], 10) == []


def test_half_is_left_for_those_who_wait_for_answers_to_ask_again() -> None:
    waiting = works(8, 1)
    assert len(chosen(waiting, 42 * 8)) == 4
    assert len(chosen(waiting, 42 * 8 * LITTLE)) == 8


def test_nobody_is_passed_over_for_ever() -> None:
    waiting, rounds = [Work([[9, 9, 9]]), *works(8, 8)], 0
    old = waiting[0]
    waiting.insert(3, waiting.pop(0))
    while old in waiting:
        for work in chosen(waiting, 60):
            waiting.remove(work)
        waiting += works(1, 4)[:1]
        rounds += 1
    assert rounds <= 4, "older kinds come first, whatever joins newer ones"


def test_keys_and_common_beginnings_make_groups() -> None:
    batch: list[Work] = [
        Work([[1, 2, 3, 4, 5]], key="a"),
        Work([[1, 2, 9, 9, 9, 9, 9, 9]], key="a"),
        Work([[1, 2, 3, 4, 6]]),
        Work([[7, 7], [7, 8]], key="b"),
        Work([[5]]),
    ]
    a, again, without_key, b, also_b, alone = together(batch)
    assert a == again == without_key
    assert b == also_b
    assert len({a, b, alone}) == 3


def test_a_prompt_that_many_requests_share_is_computed_once(held: Held, scorer: Scorer) -> None:
    """The metric of computed tokens says so too."""
    asked = [say(f"{p} " + "Tell me of tea. " * 6, f"{r}.") for r in range(6) for p in range(3)]
    expected: np.ndarray = scorer.rewards(asked)
    lengths = [len(ids) for ids in scorer.chat.encode(asked)]
    held.free.clear()
    with serving(held) as running:
        found: dict[Hashable, float] = {}

        def ask(n: int) -> None:
            body = {"items": [{"messages": asked[n]}]}
            found[n] = httpx.post(running.url + "/v1/rewards", json=body, timeout=60).json()["rewards"][0][0]

        held.busy.clear()
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
        threads[0].start()
        until(held.busy.is_set)
        for thread in threads[1:]:
            thread.start()
        until(lambda: running.service.metrics.registry.get_sample_value("btrm_queue_tokens") == sum(lengths[1:]))
        before = scorer.tokens.computed
        held.free.set()
        for thread in threads:
            thread.join(60)
        counted = running.service.metrics.registry.get_sample_value
        until(lambda: counted("btrm_model_tokens_total") == scorer.tokens.computed - before)
        value = counted("btrm_model_tokens_total") or 0
    np.testing.assert_allclose([found[n] for n in range(len(asked))], expected, atol=1e-5)
    once = sum(len(grow(scorer.chat.encode(asked[p::3])).tokens) for p in range(3))
    assert once <= value <= once + lengths[0]
    assert once < sum(lengths) / 2
