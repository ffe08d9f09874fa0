"""Selective checkpointing: the gradients are those of keeping everything, and no product is computed twice."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from support.exactness import DEFAULT, TOLERANCE, difference, precisely
from support.tiny_models import CONFIGS, awkward_groups, tiny_model
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from btrm_core.errors import ConfigError
from btrm_core.model import kernels
from btrm_core.model.adapters import add_adapters
from btrm_core.model.reward import RewardModel
from btrm_core.model.savings import recompute_activations
from btrm_core.packing.forms import collate
from btrm_core.settings import LoraConfig, ModelConfig

KEPT = {
    "everything": ModelConfig(),
    "inputs": ModelConfig(gradient_checkpointing=True),
    "products": ModelConfig(selective_checkpointing=True),
}


class Operations(TorchDispatchMode):
    """Counts the operations that are computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def dear(self) -> int:
        attention = sum(n for name, n in self.counts.items() if "attention" in name)
        return attention + sum(self.counts[name] for name in ("mm", "addmm", "bmm", "baddbmm"))


def model_of(name: str, kernel: str, kept: str, dtype: torch.dtype, *, lora: bool = False, **changes: Any) -> Any:
    hf = tiny_model(name, dtype, **changes)
    recomputes = recompute_activations(hf, KEPT[kept])
    assert recomputes is (kept != "everything")
    if lora:
        hf = add_adapters(hf, LoraConfig(rank=2), 0)
        if recomputes:
            hf.enable_input_require_grads()
    return RewardModel(hf, kernel).train()


def computed(model: RewardModel, kernel: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rewards_S = model(collate(awkward_groups(), kernel=kernel, multiple_of=128 if kernel == "flex" else 1))
    (rewards_S * torch.cos(torch.arange(len(rewards_S)))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return rewards_S.detach(), gradients


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_keeping_everything(name: str, lora: bool) -> None:
    kernel, dtype = DEFAULT[name], torch.float64
    with precisely(dtype):
        expected, found = (
            computed(model_of(name, kernel, kept, dtype, lora=lora), kernel) for kept in ("everything", "products")
        )
    assert expected[1].keys() == found[1].keys()
    assert difference(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
def test_other_kernels(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled kernel is computed again as a whole: what is inside it is not seen."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # off a GPU it refuses gradients
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set by a run of this process
    kernels._compiled_flex.cache_clear()
    torch._dynamo.reset()
    name = "gemma2" if kernel == "flex" else "llama3"
    expected, found = (
        computed(model_of(name, kernel, kept, torch.float32, hidden_size=64, head_dim=16), kernel)
        for kept in ("everything", "products")
    )
    assert difference(found, expected) < TOLERANCE[torch.float32]


def test_more_than_one_backward_pass() -> None:
    """As where each reward's gradient is looked at."""
    model = model_of("llama3", "varlen", "products", torch.float32)
    rewards_S = model(collate(awkward_groups(), kernel="varlen"))
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(rewards_S[0], parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_nothing_dear_is_computed_twice(name: str) -> None:
    dear = {}
    for kept in KEPT:
        model = model_of(name, DEFAULT[name], kept, torch.float32)
        with Operations() as operations:
            computed(model, DEFAULT[name])
        dear[kept] = operations.dear
    assert dear["products"] == dear["everything"]
    assert dear["inputs"] > dear["everything"]


def test_a_product_that_is_overwritten_is_refused() -> None:
    """It would be read as what the matrix gave, and be changed once more."""
    model = model_of("llama3", "varlen", "products", torch.float32)
    query = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
    query.register_forward_hook(lambda module, given, product: product.mul_(2))
    with pytest.raises(ConfigError, match=r"overwrites the product of a matrix \(aten.mul_.Tensor\)"):
        computed(model, "varlen")


def test_a_layer_that_computes_something_else_is_refused() -> None:
    model = model_of("llama3", "varlen", "products", torch.float32)
    query = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
    passes: list[int] = []

    def other(module: Any, given: Any, product: torch.Tensor) -> torch.Tensor | None:
        passes.append(1)
        return torch.bmm(product, torch.eye(product.shape[-1])[None]) if len(passes) > 1 else None

    query.register_forward_hook(other)
    with pytest.raises(ConfigError, match=r"where a layer of this model computed aten\.mm.*, it computes aten\.bmm"):
        computed(model, "varlen")


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_stays_behind(backward: bool) -> None:
    """Without the garbage collector's help, which comes when it comes: a layer's activations are large."""

    def alive() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    model, batch = model_of("llama3", "varlen", "products", torch.float32), collate(awkward_groups(), kernel="varlen")
    model(batch).sum().backward()  # the batch keeps its masks
    gc.collect()
    gc.disable()
    try:
        before = alive()
        rewards_S = model(batch)
        if backward:
            torch.autograd.grad(rewards_S.sum(), list(model.parameters()))
        del rewards_S
        assert alive() == before
    finally:
        gc.enable()
