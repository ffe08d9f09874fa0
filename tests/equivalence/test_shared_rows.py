"""Rows shared by processes give the rewards and gradients of whole rows, whatever is in them, whatever the heads are.

Four processes of one gloo group share rows by twos and by fours. What each has of a gradient is added up over those
that share a row, and the sum is that of one process that computes the row whole, to 1e-10 in float64. The rows are of
trees, of lengths that no number of processes divides, with windows that reach over several processes' tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes
from support.exactness import DEFAULT, difference, precisely, reward_model
from support.tiny_models import awkward_groups, deep_tree, gradients, group, weights_for

from btrm_core.errors import ConfigError
from btrm_core.model.kernels import eager
from btrm_core.model.parallel.check import divide_rows
from btrm_core.model.parallel.share import RowShare, kv_copies
from btrm_core.model.reward import RewardModel
from btrm_core.packing import Tree, Visibility, collate
from btrm_core.packing.trees import grow
from btrm_core.training.processes.join import join
from btrm_core.training.processes.runtime import leave

WORLD = 4
CASES: dict[str, dict[str, Any]] = {
    **{f"{name}, {DEFAULT[name]}": {"name": name} for name in DEFAULT},
    "llama3, sdpa": {"name": "llama3", "kernel": "sdpa"},
    "mistral, eager, checkpointing": {"name": "mistral", "kernel": "eager", "checkpointing": True},
    "gemma2, checkpointing": {"name": "gemma2", "checkpointing": True},
    "one key head": {"name": "qwen3", "num_key_value_heads": 1, "checkpointing": True},
    "as many key heads as heads": {"name": "phi3", "num_key_value_heads": 4},
    "three key heads of twelve heads": {
        "name": "llama3",
        "hidden_size": 48,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
    },
    "float32": {"name": "llama3", "dtype": torch.float32},
}
BY_FOUR = ("llama3, varlen", "gemma2, checkpointing", "one key head")
"""Cases that are shared by four as well; the two key heads of the others are copied there."""
OTHER_ROWS = ("float32", "one key head")
"""Cases that compute other rows than trees as well."""
FIVE_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 1}


def rows() -> dict[str, list[Tree]]:
    return {
        "trees": [*awkward_groups(), deep_tree(3), deep_tree(4)],
        "one long conversation": [group(0, 61)],
        "fewer tokens than processes": [grow([[5, 6, 7]])],
    }


def share_of(count: int) -> RowShare:
    """This process's share of a row that neighbours in rank have together; every process makes all groups."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = [torch.distributed.new_group(list(range(i, i + count))) for i in range(0, world, count)]
    return RowShare(rank % count, count, groups[rank // count])


def distance(share: RowShare, trees: list[Tree], case: dict[str, Any]) -> float:
    """How far a row computed together is from the same row computed by the first process alone; -1 on the others."""
    given = {"kernel": DEFAULT[case["name"]], "dtype": torch.float64, **case}
    name, kernel, dtype = (given.pop(key) for key in ("name", "kernel", "dtype"))
    batch, weights_S = collate(trees, kernel=kernel, multiple_of=given.pop("multiple_of", 1)), weights_for(trees, dtype)
    results = []
    for one in (share, None) if torch.distributed.get_rank() == 0 else (share,):
        model = reward_model(name, kernel, dtype, **given)
        model.share = one
        with precisely(dtype):
            rewards_S = model(batch)
            found = gradients(model, rewards_S, weights_S)
        if one is not None:
            for gradient in found.values():
                torch.distributed.all_reduce(gradient, group=one.processes)
        results.append((rewards_S.detach(), found))
    return difference(*results) if len(results) == 2 else -1.0


def without_exchange(self: RowShare, kernel: Any, query: Any, key: Any, value: Any, row: Any, options: Any) -> Any:
    """Attention of this process's tokens that sees no others: what is computed if nobody sends anything."""
    own = self.own(row.length)
    whole = [states.new_zeros(1, states.shape[1], row.length, states.shape[3]) for states in (query, key, value)]
    for place, states in zip(whole, (query, key, value), strict=True):
        place[:, :, own] = states
    return kernel(*whole, row, **options)[:, own]


def in_four(output: str) -> None:
    """What each of four processes does; the first leaves what was found."""
    join(60)
    shares = {count: share_of(count) for count in (2, 4)}
    found: dict[str, float] = {}
    for count, share in shares.items():
        for case, given in CASES.items():
            for row, trees in rows().items():
                if (count == 2 or case in BY_FOUR) and (row == "trees" or case in OTHER_ROWS):
                    found[f"{count}, {case}, {row}"] = distance(share, trees, given)
    told: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowShare, "attention", without_exchange)
        found["without the exchange"] = distance(shares[2], rows()["trees"], {"name": "llama3"})
        told["without the exchange"] = refused(reward_model("llama3", "varlen", torch.float32), shares[2])
    found["wider keys than values"] = of_unequal_widths(shares[4])
    told["five heads"] = refused(reward_model("gemma", "varlen", torch.float32, **FIVE_HEADS), shares[2])
    told["right"] = refused(reward_model("llama3", "varlen", torch.float32), shares[4])
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps([found, told]))
    torch.distributed.barrier()
    leave()


def refused(model: RewardModel, share: RowShare) -> str:
    """What the check before the first step says of a model; nothing if it lets it share rows."""
    try:
        divide_rows(model, share, awkward_groups())
    except ConfigError as error:
        return str(error)
    assert model.share is share
    assert model.training
    return ""


def of_unequal_widths(share: RowShare) -> float:
    """Largest difference of attention whose values have another width than its keys."""
    row = collate(awkward_groups(), kernel="eager").visibility
    assert isinstance(row, Visibility)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, row.length, width) for heads, width in ((8, 6), (2, 6), (2, 3)))
    own, options = share.own(row.length), {"window": 9, "scaling": 0.5}
    parts = share.attention(eager, query[:, :, own], key[:, :, own], value[:, :, own], row, options)
    return float((parts - eager(query, key, value, row, **options)[:, own]).abs().max())


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("shared")
    started = processes.start(in_four, str(place / "found.json"), log=place / "log", world=WORLD)
    assert processes.wait(started, timeout=240) == [0] * WORLD, (place / "log").read_text()[-3000:]
    return json.loads((place / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(("count", "case"), [*((2, case) for case in CASES), *((4, case) for case in BY_FOUR)])
def test_shared_rows_are_whole_rows(four: Any, case: str, count: int) -> None:
    found = {key: value for key, value in four[0].items() if key.startswith(f"{count}, {case}, ")}
    assert len(found) == (3 if case in OTHER_ROWS else 1)
    assert max(found.values()) < (2e-5 if case == "float32" else 1e-10), found


@pytest.mark.distributed
def test_other_widths_of_values(four: Any) -> None:
    assert four[0]["wider keys than values"] < 1e-5


@pytest.mark.distributed
def test_without_the_exchange_it_would_show(four: Any) -> None:
    assert four[0]["without the exchange"] > 1e-2
    assert four[1]["without the exchange"].startswith(
        "--sequence-parallel 2: rewards differ from those of whole rows by"
    )


@pytest.mark.distributed
def test_what_cannot_share_is_refused_and_what_can_is_not(four: Any) -> None:
    assert four[1]["five heads"] == (
        "--sequence-parallel 2: the model has 5 attention heads, which 2 processes cannot share equally; expected one "
        "of 1, 5"
    )
    assert four[1]["right"] == ""


@pytest.mark.parametrize("tokens", [3, 4, 61, 128])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_token_is_left_out(tokens: int, count: int) -> None:
    shares = [RowShare(index, count, None) for index in range(count)]
    parts = [share.own(tokens) for share in shares]
    assert [offset for part in parts for offset in range(part.start, part.stop)] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == shares[0].sizes(tokens)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("heads", range(1, 13))
def test_every_process_has_the_key_heads_of_its_query_heads(heads: int) -> None:
    """The heads that a process gets, as attention will match them, are the model's own."""
    for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        for count in (n for n in range(1, heads + 1) if heads % n == 0):
            copies = kv_copies(heads, kv_heads, count)
            slots = [head for head in range(kv_heads) for _ in range(copies)]
            own, own_keys = heads // count, len(slots) // count
            assert len(slots) % count == own % own_keys == 0
            for query in range(heads):
                process, place = divmod(query, own)
                key = slots[process * own_keys + place // (own // own_keys)]
                assert key == query // (heads // kv_heads)
            if kv_heads % count == 0:
                assert copies == 1


def test_flex_takes_what_was_exchanged(flex_on_cpu: None) -> None:
    """A process that shares rows with itself alone: the same way to the kernel, which torch compiles."""
    join(60)
    share = RowShare(0, 1, torch.distributed.group.WORLD)
    case = {"name": "mistral", "kernel": "flex", "multiple_of": 128}
    assert distance(share, rows()["one long conversation"], case) < 1e-10
