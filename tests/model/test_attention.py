from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import awkward_groups, deep_tree, group, tiny_model
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from btrm_core.errors import ConfigError
from btrm_core.model import attention, kernels
from btrm_core.model.attention import KERNELS, LayerMask, attend, choose_kernel, layer_mask, masks_for
from btrm_core.packing.forms import collate, row_multiple
from btrm_core.packing.rows import pack_row
from btrm_core.packing.trees import Tree
from btrm_core.packing.visibility import Visibility

WINDOWS = (None, 1, 5, 9, 1000)


def visibility_of(groups: list[Tree], multiple_of: int = 1) -> Visibility:
    visibility = pack_row(groups, multiple_of=multiple_of).batch().visibility
    assert visibility is not None
    return visibility


def states(visibility: Visibility, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Query [1, 4, T, 8], key and value [1, 2, T, 8], laid out in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 2, 2)
    made = [torch.randn(1, visibility.length, heads, 8, generator=generator, dtype=dtype) for heads in shapes]
    return tuple(state.requires_grad_() for state in made)


def evaluate(kernel: Callable[..., torch.Tensor], visibility: Visibility, **options: Any) -> list[torch.Tensor]:
    """A kernel's output and its gradients for queries, keys and values."""
    inputs = states(visibility)
    output = kernel(*(state.transpose(1, 2) for state in inputs), visibility, scaling=0.3, **options)
    assert output.shape == (1, visibility.length, 4, 8)
    (output * torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)).sum().backward()
    return [output.detach(), *(state.grad for state in inputs)]


def written_out(query, key, value, visibility, *, window, scaling, softcap=None) -> torch.Tensor:
    """Attention by the T x T rule, in the plainest form."""
    key, value = (state.repeat_interleave(query.shape[1] // key.shape[1], 1) for state in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~visibility.visible(window), -math.inf).softmax(-1) @ value).transpose(1, 2)


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(left, right, strict=True):
        assert float((a - b).abs().max()) < tolerance


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", [kernels.run_loop, kernels.varlen, kernels.dense, kernels.eager])
def test_kernels_compute_the_rule(kernel: Callable[..., torch.Tensor], window: int | None) -> None:
    visibility = visibility_of(awkward_groups(), multiple_of=16)
    assert_same(evaluate(kernel, visibility, window=window), evaluate(written_out, visibility, window=window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", [kernels.run_loop, kernels.dense, kernels.eager])
def test_kernels_compute_the_rule_on_deep_trees(kernel: Callable[..., torch.Tensor], window: int | None) -> None:
    visibility = visibility_of([deep_tree(depth, seed) for depth in (1, 3, 5) for seed in (0, 1)], multiple_of=16)
    assert len(visibility.readers) > 4, "tokens that are read by many runs"
    assert_same(evaluate(kernel, visibility, window=window), evaluate(written_out, visibility, window=window))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32]))
def test_the_gradient_of_gathered_keys_is_autograds_own(depth: int, seed: int, dtype: torch.dtype) -> None:
    visibility = visibility_of([group(3, 2), deep_tree(depth, seed), group(0, 4, 2)])
    assert visibility.key_index_K is not None
    states = torch.randn(1, 2, visibility.length, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    weights = torch.randn(
        len(visibility.key_index_K), 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1)
    )
    ours, theirs = (states.clone().requires_grad_() for _ in range(2))
    (kernels._keys(ours, visibility) * weights).sum().backward()
    (kernels._rows(theirs).index_select(0, visibility.key_index_K) * weights).sum().backward()
    assert float((ours.grad - theirs.grad).abs().max()) <= (1e-13 if dtype == torch.float64 else 1e-5)


def test_gathered_gradients_are_added_up_in_at_least_float32() -> None:
    """Forty readers in half precision: adding one after another in bfloat16 would lose the small ones."""
    visibility = visibility_of([group(1, *([1] * 40))])
    rows = torch.zeros(1, 1, visibility.length, 1, dtype=torch.bfloat16, requires_grad=True)
    kernels._keys(rows, visibility).backward(
        torch.full((len(visibility.key_index_K), 1, 1), 1 + 2**-7, dtype=torch.bfloat16)
    )
    assert rows.grad[0, 0, 0, 0].item() == torch.tensor(40 * (1 + 2**-7)).bfloat16().item()


@pytest.mark.parametrize("window", WINDOWS)
def test_eager_computes_softcaps(window: int | None) -> None:
    visibility = visibility_of(awkward_groups())
    expected = evaluate(written_out, visibility, window=window, softcap=0.7)
    assert_same(evaluate(kernels.eager, visibility, window=window, softcap=0.7), expected)


def flash_semantics(
    query, key, value, query_starts, key_starts, max_queries, max_keys, *, scale, window_size, enable_gqa
) -> torch.Tensor:
    """What variable-length flash attention documents: per run, causal from the bottom right."""
    outputs = []
    assert max(query_starts.diff()) == max_queries
    assert max(key_starts.diff()) == max_keys
    assert query_starts.dtype == key_starts.dtype == torch.int32
    for run in range(len(query_starts) - 1):
        q = query[query_starts[run] : query_starts[run + 1]].transpose(0, 1)
        k, v = (s[key_starts[run] : key_starts[run + 1]].transpose(0, 1) for s in (key, value))
        k, v = (s.repeat_interleave(len(q) // len(s), 0) for s in (k, v))
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        left, right = window_size
        assert right == 0
        seen = (distance >= 0) & (distance <= left if left >= 0 else True)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "groups",
    [awkward_groups(), [group(0, 7), group(0, 9, 4)], [deep_tree(5, 1)]],
    ids=["shared", "unshared", "deep"],
)
def test_the_variable_length_call_computes_the_rule(groups: list[Tree], window: int | None) -> None:
    """The numbers handed to the GPU kernels, through a reference of what those kernels do."""

    def call(query, key, value, visibility, *, window, scaling) -> torch.Tensor:
        options, native = kernels.varlen_options(frozenset({"window_size", "enable_gqa"}), window)
        assert native
        output = flash_semantics(
            kernels._rows(query),
            kernels._keys(key, visibility),
            kernels._keys(value, visibility),
            visibility.query_starts,
            visibility.key_starts,
            visibility.max_queries,
            visibility.max_keys,
            scale=scaling,
            enable_gqa=True,
            **options,
        )
        return output[None]

    visibility = visibility_of(groups, multiple_of=16)
    assert_same(evaluate(call, visibility, window=window), evaluate(written_out, visibility, window=window))


def test_variable_length_attention_is_asked_in_the_words_of_each_torch() -> None:
    assert kernels.varlen_options(frozenset({"is_causal"}), None) == ({"is_causal": True}, False)
    assert kernels.varlen_options(frozenset({"window_size"}), 5) == ({"window_size": (4, 0)}, False)
    assert kernels.varlen_options(frozenset({"window_size", "enable_gqa"}), None) == ({"window_size": (-1, 0)}, True)
    with pytest.raises(NotImplementedError, match="no variable-length attention with a sliding window"):
        kernels.varlen_options(frozenset({"is_causal"}), 5)


def test_an_unshared_row_copies_no_keys() -> None:
    visibility = visibility_of([group(0, 7), group(0, 9, 4)])
    assert visibility.key_index_K is None
    key = states(visibility)[1].transpose(1, 2)
    assert kernels._keys(key, visibility).data_ptr() == key.data_ptr()


# --- FlexAttention's block masks -----------------------------------------------------------------


def blocks_of(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Partly and wholly visible blocks as boolean matrices."""

    def dense(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        size = indices.shape[-1]
        found = torch.zeros(size, size, dtype=torch.bool)
        for line in range(size):
            found[line, indices[0, 0, line, : counts[0, 0, line]].long()] = True
        return found

    return dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)


lengths = st.tuples(st.integers(0, 150), st.integers(1, 120), st.integers(1, 120))


@settings(max_examples=15, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=5), st.sampled_from([None, 1, 40, 150]))
def test_host_built_blocks_agree_with_create_block_mask(sizes, window: int | None) -> None:
    visibility = visibility_of([group(*size) for size in sizes], multiple_of=128)
    built = visibility.block_mask(window)
    expected = create_block_mask(built.mask_mod, 1, 1, visibility.length, visibility.length, device="cpu")
    partial, full = blocks_of(built)
    expected_partial, expected_full = blocks_of(expected)
    assert not (full & ~expected_full).any(), "a block counted as wholly visible is not"
    assert not ((expected_partial | expected_full) & ~(partial | full)).any(), "a visible block is missing"
    if window is None:
        assert torch.equal(full, expected_full)
        assert torch.equal(partial, expected_partial)


@settings(max_examples=15, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.sampled_from([None, 1, 40, 150]))
def test_the_rule_inside_blocks_is_the_mask(sizes, window: int | None) -> None:
    visibility = visibility_of([group(*size) for size in sizes], multiple_of=128)
    offsets = torch.arange(visibility.length)
    rule = visibility.block_mask(window).mask_mod(torch.tensor(0), torch.tensor(0), offsets[:, None], offsets[None, :])
    assert torch.equal(rule, visibility.visible(window))


def test_block_masks_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="needs rows of a multiple of 128 tokens, not 130"):
        visibility_of([group(100, 20, 10)]).block_mask(None)


def test_masks_are_built_once_per_window() -> None:
    visibility = visibility_of([group(100, 20, 8)])
    assert visibility.block_mask(None) is visibility.block_mask(None)
    assert visibility.block_mask(None) is not visibility.block_mask(9)
    assert visibility.visible(9) is visibility.visible(9)
    run = visibility.runs[1]
    assert visibility.run_mask(run, None, torch.float32) is visibility.run_mask(run, 1000, torch.float32)


def test_flex_compiles_two_graphs_for_rows_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-capped, windowed and full layers, many row lengths, gradients compared each time."""
    import torch.nn.attention.flex_attention as module
    from torch._dynamo.backends.debugging import aot_eager

    # a training run in this process may have turned compiling off
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    compiled = torch.compile(module.flex_attention, backend=counting)
    monkeypatch.setattr(kernels, "_compiled_flex", lambda: compiled)
    for length in (128, 256, 384, 256):
        visibility = visibility_of([group(60, 20, 8, seed=length), group(3, 5, 4)], multiple_of=length)
        for window in (None, 9):
            options = {"window": window, "softcap": 0.7}
            assert_same(evaluate(kernels.flex, visibility, **options), evaluate(written_out, visibility, **options))
    assert graphs == 2


# --- what reaches the kernels --------------------------------------------------------------------


def understood(rule: Callable[..., Any], size: int | None = None) -> LayerMask:
    with masks_for(visibility_of([group(3, 2, 2)])):
        return layer_mask(mask_function=rule, local_size=size)


def test_causal_and_sliding_rules_are_understood() -> None:
    assert understood(causal_mask_function).window is None
    for size in (1, 2, 9, 4096):
        assert understood(sliding_window_causal_mask_function(size), size).window == size


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (bidirectional_mask_function, None),
        (sliding_window_causal_mask_function(9), None),
        (sliding_window_causal_mask_function(9), 8),
        (causal_mask_function, 9),
        (chunked_causal_mask_function(9, torch.zeros(1, dtype=torch.long)), 9),
        (chunked_causal_mask_function(17, torch.zeros(1, dtype=torch.long)), 17),
        (lambda b, h, q, kv: torch.zeros(4, 4, dtype=torch.bool)[q, kv], None),
    ],
    ids=["bidirectional", "window not told", "window told wrongly", "no window", "chunks", "chunks of 17", "looked up"],
)
def test_other_rules_are_refused(rule: Callable[..., Any], size: int | None) -> None:
    with pytest.raises(NotImplementedError, match="only causal and sliding-window attention can be packed"):
        understood(rule, size)


def call_attend(kernel: str = "eager", mask: object = None, **options: Any) -> torch.Tensor:
    visibility = visibility_of([group(3, 2, 2)])
    inputs = (state.transpose(1, 2) for state in states(visibility))
    with masks_for(visibility):
        return attend(
            torch.nn.Module(), *inputs, LayerMask(visibility, None) if mask is None else mask, kernel=kernel, **options
        )[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "attention dropout cannot be packed exactly"),
        ({"s_aux": torch.zeros(4)}, "attention with s_aux cannot be packed"),
        ({"position_bias": torch.zeros(1)}, "attention with position_bias cannot be packed"),
        ({"is_causal": False}, "only causal self-attention"),
        ({"mask": torch.ones(1, 1, 7, 7)}, "does not take its mask from transformers"),
        ({"softcap": 30.0, "kernel": "sdpa"}, "kernel 'sdpa' cannot compute this model's attention soft-capping"),
        ({"softcap": 30.0, "kernel": "varlen"}, "kernel 'varlen' cannot compute this model's attention soft-capping"),
    ],
)
def test_what_a_kernel_does_not_compute_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        call_attend(**options)
    assert call_attend(softcap=30.0, sliding_window=None, position_ids=None).shape == (1, 7, 4, 8)


def test_a_visibility_is_seen_only_inside_its_context() -> None:
    visibility = visibility_of([group(3, 2, 2)])
    with pytest.raises(ZeroDivisionError), masks_for(visibility):
        _ = 1 / 0
    assert attention._ROW.get() is None


@pytest.mark.parametrize(("name", "kernel"), [("mistral", "varlen"), ("gemma2", "eager")])
def test_a_model_called_by_hand_does_what_transformers_does(name: str, kernel: str) -> None:
    model, own = tiny_model(name), tiny_model(name)
    model.set_attn_implementation(attention.registered_name(kernel))
    own.set_attn_implementation("eager")
    ids = torch.randint(3, 60, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    ids[1, 12:] = 0
    difference = model(input_ids=ids, attention_mask=mask).logits - own(input_ids=ids, attention_mask=mask).logits
    assert float(difference.detach().abs().max()) < 1e-5


# --- the choice ----------------------------------------------------------------------------------


@pytest.fixture
def flash_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...] | None], None]:
    return lambda version: monkeypatch.setattr(kernels, "flash_version", lambda: version)


@pytest.mark.parametrize(
    ("device", "softcap", "half", "flash", "expected"),
    [
        ("cpu", False, False, (2, 8, 0), "varlen"),
        ("cpu", True, False, (2, 8, 0), "eager"),
        ("cuda", False, True, (2, 8, 0), "flash"),
        ("cuda", False, True, None, "varlen"),
        ("cuda", True, True, (2, 6, 2), "flash"),
        ("cuda", True, True, (2, 6, 1), "flex"),
        ("cuda", True, True, None, "flex"),
        ("cuda", False, False, (2, 8, 0), "flex"),
        ("cuda", True, False, (2, 8, 0), "flex"),
        ("mps", False, True, None, "varlen"),
    ],
)
def test_auto(device, softcap, half, flash, expected, flash_installed) -> None:
    flash_installed(flash)
    assert choose_kernel("auto", device_type=device, softcap=softcap, half=half) == expected
    assert choose_kernel("auto", device_type=device, softcap=softcap, half=half, allowed=KERNELS) == expected


def test_auto_follows_the_family(flash_installed) -> None:
    flash_installed((2, 8, 0))
    common = {"device_type": "cuda", "softcap": False}
    assert choose_kernel("auto", allowed=("flex", "eager"), **common) == "flex"
    assert choose_kernel("auto", allowed=("sdpa", "varlen"), **common) == "sdpa"
    assert choose_kernel("auto", allowed=("flex", "eager"), device_type="cpu", softcap=False) == "eager"


def test_auto_with_nothing_left_says_why() -> None:
    with pytest.raises(ConfigError) as error:
        choose_kernel("auto", device_type="cpu", softcap=True, allowed=("flash", "sdpa"))
    assert str(error.value) == (
        "no attention kernel is left on cpu: the family allows flash, sdpa, and flash needs a CUDA device; sdpa would "
        "silently drop this model's attention soft-capping. Extend the family's recipe, or train padded."
    )


@pytest.mark.parametrize(
    ("requested", "options", "message"),
    [
        (
            "flahs",
            {"device_type": "cpu", "softcap": False},
            "attention kernel 'flahs' is unknown; expected one of auto, flash, varlen, flex, sdpa, eager. "
            "Did you mean 'flash'?",
        ),
        (
            "sdpa",
            {"device_type": "cpu", "softcap": True},
            "attention kernel 'sdpa' would silently drop this model's attention soft-capping; allowed here: eager. "
            "Choose one of these, or auto.",
        ),
        (
            "sdpa",
            {"device_type": "cpu", "softcap": False, "allowed": ("eager", "flex")},
            "attention kernel 'sdpa' is not among the kernels that the model's family allows (eager, flex); allowed "
            "here: eager. Choose one of these, or auto.",
        ),
        (
            "flex",
            {"device_type": "cpu", "softcap": False},
            "attention kernel 'flex' needs a CUDA device (torch has no backward pass for it elsewhere); allowed here: "
            "varlen, sdpa, eager. Choose one of these, or auto.",
        ),
        (
            "flash",
            {"device_type": "cuda", "softcap": False},
            "attention kernel 'flash' needs the flash-attn package (pip install 'btrm[flash]'); allowed here: varlen, "
            "flex, sdpa, eager. Choose one of these, or auto.",
        ),
        (
            "varlen",
            {"device_type": "cuda", "softcap": False, "half": False},
            "attention kernel 'varlen' computes in float16 and bfloat16 only on CUDA; allowed here: flex, sdpa, eager. "
            "Choose one of these, or auto.",
        ),
    ],
)
def test_a_kernel_that_cannot_be_used_is_refused(requested, options, message, flash_installed) -> None:
    flash_installed(None)
    with pytest.raises(ConfigError) as error:
        choose_kernel(requested, **options)
    assert str(error.value) == message


def test_an_old_flash_attn_is_refused(flash_installed) -> None:
    flash_installed((2, 5, 9))
    with pytest.raises(ConfigError, match=re.escape("needs flash-attn 2.6.2 or later (installed: 2.5.9)")):
        choose_kernel("flash", device_type="cuda", softcap=False)


@pytest.mark.parametrize("kernel", ["varlen", "sdpa", "eager"])
def test_a_usable_kernel_can_be_forced(kernel: str) -> None:
    assert choose_kernel(kernel, device_type="cpu", softcap=False) == kernel


def test_flash_attn_is_reported_missing_where_it_is() -> None:
    pytest.importorskip("torch")
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        assert kernels.flash_version() is None
    else:
        assert kernels.flash_version() >= (2,)


def test_row_lengths_are_rounded_where_it_pays() -> None:
    assert row_multiple("varlen", "cpu") == 1
    assert row_multiple("varlen", "cuda") == 128
    assert row_multiple("flex", "cpu") == 128
    assert row_multiple("padded", "cuda") == 1


def test_collate_lays_out_for_the_kernel() -> None:
    groups = [group(5, 3, 2)]
    assert collate(groups, kernel="varlen").computed == 10
    assert collate(groups, kernel="varlen", share_prefix=False).computed == 15
    assert collate(groups, kernel="varlen", multiple_of=128).computed == 128
    padded = collate(groups, kernel="padded")
    assert padded.visibility is None
    assert np.prod(padded.input_ids.shape) == 16


def test_flex_needs_what_triton_compiles_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(attention.sysconfig, "get_path", lambda name: str(tmp_path))
    assert attention.compiler_lacks() == f"Python's headers are missing ({header}; apt install python3-dev)"
    header.touch()
    assert attention.compiler_lacks() is None
    monkeypatch.setattr(attention.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="'flex' is compiled when it is first used, and there is no C compiler"):
        choose_kernel("flex", device_type="cuda", softcap=True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert attention.compiler_lacks() == "the package triton is not installed"
