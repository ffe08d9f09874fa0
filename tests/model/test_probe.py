"""Kernels on random heads: right ones pass in every type, and each kind of wrong one is found in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import awkward_groups, tiny_model
from torch.nn import functional as F

from btrm_core.errors import ConfigError
from btrm_core.model import attention, kernels
from btrm_core.model.attention import Call, calls_noted
from btrm_core.model.leakage import trust
from btrm_core.model.leakage.probe import probe
from btrm_core.model.leakage.trust import Use, trusted
from btrm_core.model.reward import RewardModel
from btrm_core.packing.forms import collate

CPU = torch.device("cpu")
PLAIN = Call(heads=4, kv_heads=2, head_dim=32, value_dim=32, window=None, scaling=None, softcap=None)
SLIDING = replace(PLAIN, window=4096)
CAPPED = replace(PLAIN, softcap=30.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [PLAIN, SLIDING, replace(PLAIN, heads=1, kv_heads=1, scaling=0.5)])
@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
def test_right_kernels_pass(kernel: str, call: Call, dtype: torch.dtype) -> None:
    found = probe(kernel, [call], CPU, dtype, training=True)
    assert found.ok
    assert found.difference < found.tolerance / 2


def eager_with(**changed: Any) -> Callable[..., torch.Tensor]:
    """Attention written out in float32, with other arguments than those asked for."""

    def kernel(query: Any, key: Any, value: Any, visibility: Any, **asked: Any) -> torch.Tensor:
        states = (state.float() for state in (query, key, value))
        return kernels.eager(*states, visibility, **{**asked, **changed}).to(query.dtype)

    return kernel


def masked(query: Any, key: Any, value: Any, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return made.transpose(1, 2)


def not_causal(query: Any, key: Any, value: Any, visibility: Any, **asked: Any) -> torch.Tensor:
    seen = visibility.visible(None)
    return masked(query, key, value, seen | seen.T, asked["scaling"])


def over_borders(query: Any, key: Any, value: Any, visibility: Any, **asked: Any) -> torch.Tensor:
    everything = torch.ones(visibility.length, visibility.length, dtype=torch.bool).tril()
    return masked(query, key, value, everything, asked["scaling"])


def other_heads(query: Any, key: Any, value: Any, visibility: Any, **asked: Any) -> torch.Tensor:
    """Key heads in turn, rather than each for the query heads that lie together."""
    group = query.shape[1] // key.shape[1]
    return eager_with()(query, key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1), visibility, **asked)


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        (not_causal, PLAIN),
        (over_borders, PLAIN),
        (other_heads, PLAIN),
        (eager_with(scaling=0.9 * 32**-0.5), PLAIN),
        (eager_with(window=None), SLIDING),
        (eager_with(window=25), SLIDING),
        (eager_with(softcap=None), CAPPED),
        (eager_with(softcap=40.0), CAPPED),
    ],
)
def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch, kernel: Any, call: Call) -> None:
    monkeypatch.setitem(attention.FUNCTIONS, "flash", eager_with())
    assert probe("flash", [call], CPU, torch.bfloat16, training=True).ok
    monkeypatch.setitem(attention.FUNCTIONS, "flash", kernel)
    found = probe("flash", [call], CPU, torch.bfloat16, training=False)
    assert not found.ok
    assert "differs from the same written out" in found.reason


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(query: Any, key: Any, value: Any, visibility: Any, **asked: Any) -> torch.Tensor:
        return eager_with()(query, key, value.detach() + 0 * value, visibility, **asked)

    monkeypatch.setitem(attention.FUNCTIONS, "flash", detached)
    assert probe("flash", [PLAIN], CPU, torch.bfloat16, training=False).ok
    assert not probe("flash", [PLAIN], CPU, torch.bfloat16, training=True).ok


def test_what_layers_ask_is_noted() -> None:
    model = RewardModel(tiny_model("gemma2"), "eager").eval()
    with calls_noted() as calls, torch.no_grad():
        model(collate(awkward_groups(), kernel="eager"))
    assert {(call.heads, call.kv_heads, call.head_dim, call.value_dim, call.softcap) for call in calls} == {
        (4, 2, 16, 16, 2.0)
    }
    assert {call.window for call in calls} == {None, 9}


def settle(model: RewardModel) -> trust.Trust:
    return trusted(model, awkward_groups()[:2], Use(layout="shared", training=True))


def test_a_kernel_that_does_not_compile_leads_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's errors are none of Python's own kinds, and name what the kernel needs."""
    from torch._inductor.exc import InductorError

    def refused(*_: Any, **__: Any) -> torch.Tensor:
        raise InductorError(
            RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory"), None
        )

    monkeypatch.setitem(attention.FUNCTIONS, "varlen", refused)
    found = settle(RewardModel(tiny_model("mistral"), "varlen"))
    assert (found.layout, found.kernel) == ("shared", "sdpa")
    assert found.note is not None
    assert "varlen attention: InductorError: " in found.note
    assert "shared memory" in found.note


def test_a_kernel_whose_rewards_pass_and_whose_heads_do_not_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "probe", lambda kernel, *rest: replace(probe("eager", *rest), ok=kernel != "varlen"))
    found = settle(RewardModel(tiny_model("mistral"), "varlen"))
    assert found.kernel == "sdpa"
    assert found.wrong


def test_memory_that_runs_out_in_the_checks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(attention.FUNCTIONS, "varlen", full)
    with pytest.raises(ConfigError, match="out of memory in the checks before the first step"):
        settle(RewardModel(tiny_model("mistral"), "varlen"))
