"""The rehearsed device: built from `device.cpp`, loaded before torch, and told to `torch.cuda`."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
MEMORY = 79 * 2**30
IGNORE, TELL, REFUSE = 0, 1, 2
"""What becomes of an operation for which the host waits for the device, as in `device.cpp`."""
LIBRARY: Any = None


def build(cache: Path, compiler: str = "g++") -> Path:
    """Compile the device for this torch; once, as long as neither changes."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    facts = SOURCE.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode()
    made = cache / f"device-{hashlib.sha256(facts).hexdigest()[:16]}.so"
    if not made.exists():
        staging = made.with_suffix(f".{os.getpid()}")
        # not optimised: that halves the time, and the kernels themselves are torch's
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch}/include", f"-L{torch}/lib"]
        end = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib", "-o", str(staging)]
        subprocess.run([compiler, *flags, str(SOURCE), *end], check=True, capture_output=True, text=True)
        staging.replace(made)
    return made


def arrive(library: str) -> None:
    """From here on this process has a GPU; to be called before anything imports torch."""
    global LIBRARY
    assert "torch" not in sys.modules
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    LIBRARY = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    LIBRARY.rehearsed_held.restype = LIBRARY.rehearsed_most_held.restype = ctypes.c_int64
    LIBRARY.rehearsed_capacity.argtypes = [ctypes.c_int64]
    # these look once whether torch has CUDA, and must find that it has not: there is no compiler for it
    import torch._dynamo
    import torch._inductor.utils
    import torch.nn.attention.flex_attention
    import torch.nn.attention.varlen  # noqa: F401

    _tell_torch()
    _compile_without_triton()


def capacity(bytes_: int) -> None:
    """How much memory the device has from now on; 0 is without limit."""
    LIBRARY.rehearsed_capacity(bytes_)


@contextlib.contextmanager
def waits(only: tuple[str, ...] = ("btrm_core", "transformers", "deepspeed")) -> Iterator[list[str]]:
    """Every time that the host waits for the device inside the block: why, and from which lines."""
    found: list[str] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def tell(why: bytes) -> None:
        frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in only)]
        lines = [f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}" for frame in frames[-1:-4:-1]]
        found.append(f"{why.decode()} at {' < '.join(lines)}")

    LIBRARY.rehearsed_listener(tell)
    LIBRARY.rehearsed_waits(TELL)
    try:
        yield found
    finally:
        LIBRARY.rehearsed_waits(IGNORE)
        LIBRARY.rehearsed_listener(None)


@contextlib.contextmanager
def inside_a_kernel() -> Iterator[None]:
    """What stands in for a kernel may look at its tensors: a real one does so on the device."""
    before = LIBRARY.rehearsed_waits(IGNORE)
    try:
        yield
    finally:
        LIBRARY.rehearsed_waits(before)


class Stream:
    """The only stream: what is put into it is done."""

    device_index = stream_id = cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cuda:0")

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        LIBRARY.rehearsed_wait(b"stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """Something that has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None:
        LIBRARY.rehearsed_wait(b"event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=MEMORY,
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
    is_integrated=0,
)


def _tell_torch() -> None:
    """What `torch.cuda` and the places that look past it answer."""
    import torch
    from torch.cuda import nccl, nvtx, random

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    nothing = constant(None)
    stream = Stream()
    answers: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(("is_available", "_is_compiled", "is_initialized", "is_bf16_supported"), constant(True)),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), constant(0)),
        **dict.fromkeys(("set_device", "_lazy_init", "empty_cache", "ipc_collect", "manual_seed", "seed"), nothing),
        "device_count": constant(1),
        "manual_seed_all": nothing,
        "_lazy_call": lambda function, **_: function(),
        "synchronize": lambda *_: LIBRARY.rehearsed_wait(b"synchronize"),
        "current_stream": constant(stream),
        "default_stream": constant(stream),
        "stream": lambda _: contextlib.nullcontext(),
        "memory_allocated": lambda *_: LIBRARY.rehearsed_held(),
        "memory_reserved": lambda *_: LIBRARY.rehearsed_held(),
        "max_memory_allocated": lambda *_: LIBRARY.rehearsed_most_held(),
        "max_memory_reserved": lambda *_: LIBRARY.rehearsed_most_held(),
        "reset_peak_memory_stats": lambda *_: LIBRARY.rehearsed_forget_most(),
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (MEMORY - LIBRARY.rehearsed_held(), MEMORY),
        "initial_seed": lambda: torch.initial_seed(),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "get_device_name": constant(PROPERTIES.name),
        "get_device_properties": constant(PROPERTIES),
        "get_device_capability": constant((9, 0)),
        "get_arch_list": constant(["sm_90"]),
        "is_current_stream_capturing": constant(False),
        "can_device_access_peer": constant(True),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Stream": Stream,
        "Event": Event,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _own(answer))
    torch.version.cuda = "13.0"
    elsewhere: list[tuple[Any, str, Callable[..., Any]]] = [
        (random, "manual_seed_all", nothing),
        (torch._C, "_cuda_getDeviceCount", constant(1)),
        (torch._C, "_cuda_setDevice", nothing),
        (torch._C, "_cuda_getDevice", constant(0)),
        (torch.Tensor, "record_stream", nothing),
        (nccl, "version", constant((2, 27, 7))),
        *((nvtx, name, nothing) for name in ("range_push", "range_pop", "mark")),
    ]
    for place, name, answer in elsewhere:
        setattr(place, name, _own(answer))


def _own(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function like no other: dynamo knows them by their identity."""
    return answer if isinstance(answer, type) else lambda *arguments, **options: answer(*arguments, **options)


def _set_sync_debug_mode(mode: Any) -> None:
    LIBRARY.rehearsed_waits(REFUSE if mode in ("error", 2) else IGNORE)


def _compile_without_triton() -> None:
    """Trace as for a GPU, and compute what was traced with torch's own kernels."""
    import torch

    real = torch.compile

    def compile_(model: Any = None, *, backend: Any = "inductor", **options: Any) -> Any:
        return real(model, backend="aot_eager" if backend == "inductor" else backend, **options)

    torch.compile = compile_  # type: ignore[assignment]
