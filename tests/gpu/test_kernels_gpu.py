"""The GPU kernels against explicit float32 attention on the same device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import WINDOW, awkward_groups, deep_sequences, group, tiny_model

from btrm_core.model import kernels
from btrm_core.model.attention import Call
from btrm_core.model.leakage.probe import probe
from btrm_core.model.reward import RewardModel
from btrm_core.model.selfcheck import self_check
from btrm_core.packing.forms import collate
from btrm_core.packing.rows import pack_row
from btrm_core.packing.trees import grow
from btrm_core.packing.visibility import Visibility

pytestmark = pytest.mark.gpu

needs_flash = pytest.mark.skipif(kernels.flash_version() is None, reason="needs the flash-attn package")
HALF_KERNELS = [
    pytest.param(kernels.varlen, id="varlen"),
    pytest.param(kernels.flash, id="flash", marks=needs_flash),
    pytest.param(kernels.flex, id="flex"),
]
CAPPING = [pytest.param(kernels.flash, id="flash", marks=needs_flash), pytest.param(kernels.flex, id="flex")]


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    kernels._compiled_flex.cache_clear()
    torch._dynamo.reset()


def long_groups(seed: int = 0, scale: int = 10) -> list[Any]:
    lengths = [(40, 7, 5), (0, 6, 9), (12, 0, 4), (20, 1, 1), (18, 3, 0, 1, 12)]
    # every token of a deep tree several times: the same branches, long enough for a kernel's blocks
    deep = [grow([np.repeat(ids, scale) for ids in deep_sequences(depth, seed)]) for depth in (3, 5)]
    return [*(group(*(scale * n for n in sizes), seed=seed) for sizes in lengths), *deep]


def visibility_of(groups: list[Any]) -> Visibility:
    visibility = pack_row(groups, multiple_of=128).batch().to("cuda").visibility
    assert visibility is not None
    return visibility


def evaluate(
    kernel: Callable[..., Any], visibility: Visibility, dtype: torch.dtype, head_dim: int, kv_heads: int, **options: Any
) -> list[torch.Tensor]:
    """Output and gradients of a kernel for inputs that are the same up to rounding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to("cuda", dtype)

    inputs = [random(1, visibility.length, heads, head_dim).requires_grad_() for heads in (8, kv_heads, kv_heads)]
    output = kernel(*(state.transpose(1, 2) for state in inputs), visibility, scaling=head_dim**-0.5, **options)
    (output * random(*output.shape)).sum().backward()
    return [output.detach().float(), *(state.grad.float() for state in inputs)]


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of all tensors. Where nothing is to come out, as of queries that see one key: beside the others."""
    assert all(tensor.isfinite().all() for tensor in found)
    norms = [float(tensor.norm()) for tensor in expected]
    scales = [norm if norm > 1e-6 * max(norms) else max(norms) for norm in norms]
    return max(float((a - b).norm()) / scale for a, b, scale in zip(found, expected, scales, strict=True))


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 8), (64, 2), (128, 1), (256, 1), (256, 4)])
@pytest.mark.parametrize("kernel", HALF_KERNELS)
def test_half_precision(kernel: Callable[..., torch.Tensor], head_dim: int, kv_heads: int, window: int | None) -> None:
    visibility = visibility_of(long_groups())
    found = evaluate(kernel, visibility, torch.bfloat16, head_dim, kv_heads, window=window)
    expected = evaluate(kernels.eager, visibility, torch.float32, head_dim, kv_heads, window=window)
    assert relative_error(found, expected) < 1e-2


def test_gathered_gradients_are_the_same_every_time() -> None:
    """Keys that many runs read: their gradients are added up in one order, without atomic additions."""
    visibility = visibility_of(long_groups())
    assert visibility.key_index_K is not None
    rows = torch.randn(1, 4, visibility.length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(len(visibility.key_index_K), 4, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for _ in range(5):
        rows.grad = None
        kernels._keys(rows, visibility).backward(weights)
        found.append(rows.grad.clone())
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("kernel", CAPPING)
def test_half_precision_with_softcap(kernel: Callable[..., torch.Tensor], head_dim: int, window: int | None) -> None:
    visibility = visibility_of(long_groups())
    options = {"window": window, "softcap": 1.5}
    found = evaluate(kernel, visibility, torch.bfloat16, head_dim, 4, **options)
    assert relative_error(found, evaluate(kernels.eager, visibility, torch.float32, head_dim, 4, **options)) < 1e-2


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 50])
def test_flex_in_float32(window: int | None, softcap: float | None) -> None:
    visibility = visibility_of(long_groups())
    options = {"window": window, "softcap": softcap}
    found = evaluate(kernels.flex, visibility, torch.float32, 64, 2, **options)
    assert relative_error(found, evaluate(kernels.eager, visibility, torch.float32, 64, 2, **options)) < 2e-3


@pytest.mark.parametrize("window", [None, 50])
def test_the_run_loop_stands_in_for_float32(window: int | None) -> None:
    visibility = visibility_of(long_groups())
    found = evaluate(kernels.varlen, visibility, torch.float32, 64, 2, window=window)
    assert relative_error(found, evaluate(kernels.eager, visibility, torch.float32, 64, 2, window=window)) < 2e-3


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("kernel", ["varlen", pytest.param("flash", marks=needs_flash), "flex", "sdpa"])
def test_the_check_before_training_lets_a_right_kernel_pass(kernel: str, window: int | None) -> None:
    """With room: a kernel that is right on this GPU is far below what is accepted."""
    softcap = 50.0 if kernel in ("flash", "flex") else None
    call = Call(heads=8, kv_heads=2, head_dim=128, value_dim=128, window=window, scaling=None, softcap=softcap)
    for dtype in (torch.bfloat16, torch.float16):
        found = probe(kernel, [call], torch.device("cuda"), dtype, training=True)
        assert found.difference < found.tolerance / 2


def gradients_of(model: RewardModel, groups: list[Any]) -> list[torch.Tensor]:
    batch = collate(groups, kernel=model.kernel, multiple_of=128).to("cuda")
    model.zero_grad()
    rewards_S = model(batch)
    (rewards_S * torch.cos(torch.arange(len(rewards_S), device="cuda"))).sum().backward()
    return [rewards_S.detach(), *(p.grad.float().clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_softcapped_model_with_flex(checkpointing: bool) -> None:
    """Soft-capping, windows, block masks and recomputed layers together: wrong gradients here are silent."""
    found = []
    for kernel in ("flex", "eager"):
        hf = tiny_model("gemma2")
        if checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients_of(RewardModel(hf, kernel).to("cuda").train(), awkward_groups()))
    assert relative_error(*found) < 2e-3


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "qwen3", "phi3"])
@pytest.mark.parametrize("kernel", ["varlen", pytest.param("flash", marks=needs_flash), "flex"])
def test_half_precision_models(name: str, kernel: str) -> None:
    def made(dtype: torch.dtype) -> Any:
        return tiny_model(name, dtype, hidden_size=64, head_dim=16)  # FlexAttention takes no smaller heads

    def error(model: RewardModel) -> float:
        return relative_error(gradients_of(model.to("cuda").train(), awkward_groups()), expected)

    expected = gradients_of(RewardModel(made(torch.float32), "eager").to("cuda").train(), awkward_groups())
    model = RewardModel(made(torch.bfloat16), kernel)
    # a small model in bf16 is far from itself in fp32 whatever computes its attention
    assert error(model) < 1.25 * error(RewardModel(made(torch.bfloat16), "eager")) + 0.01
    assert self_check(model, awkward_groups()).ok


def test_few_graphs_for_many_row_lengths() -> None:
    """Training and evaluation over rows of many lengths, through full and sliding layers."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = RewardModel(tiny_model("gemma2", torch.bfloat16), "flex").to("cuda").train()
    for step in range(8):
        groups = long_groups(seed=step, scale=6 + 3 * step)
        gradients_of(model, groups)
        with torch.no_grad():
            model(collate(groups, kernel="flex", multiple_of=128).to("cuda"))
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("kernel", ["varlen", pytest.param("flash", marks=needs_flash), "flex"])
def test_the_host_never_waits(kernel: str) -> None:
    name = "gemma2" if kernel == "flex" else "mistral"
    model = RewardModel(tiny_model(name, torch.bfloat16), kernel).to("cuda").train()
    batches = [collate(long_groups(seed=n), kernel=kernel, multiple_of=128).pin_memory() for n in range(3)]
    for batch in batches[:2]:
        model(batch.to("cuda", non_blocking=True)).sum().backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(batches[2].to("cuda", non_blocking=True)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_windows_of_the_tiny_models_are_shorter_than_their_sequences() -> None:
    assert max(len(sequence) for g in awkward_groups() for sequence in g.sequences) > 3 * WINDOW
