from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import plain_casts

from btrm_core.model import attention, kernels


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FlexAttention be traced on the CPU, where torch refuses inputs that need gradients."""
    import torch.nn.attention.flex_attention as module

    def with_plain_casts(*args: Any, **options: Any) -> torch.Tensor:
        with plain_casts():
            return kernels.flex(*args, **options)

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    monkeypatch.setitem(attention.FUNCTIONS, "flex", with_plain_casts)
    kernels._compiled_flex.cache_clear()
    torch._dynamo.reset()
    # a training run in this process may have turned compiling off (there is nothing to compile on a CPU otherwise)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    yield
    kernels._compiled_flex.cache_clear()
