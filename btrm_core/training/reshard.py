"""A checkpoint read by another number of processes, or its weights alone under another ZeRO stage.

Decides: how DeepSpeed's files, which are cut by process and stage, become whole again. Another number of processes
goes through DeepSpeed's universal format, written to a temporary directory: every fp32 weight and every moment of Adam
comes back bit for bit. Another stage takes the fp32 weights by name and begins with a fresh optimiser.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from btrm_core.console import quiet_libraries
from btrm_core.files import explained
from btrm_core.model import gathered
from btrm_core.training.processes import Runtime

AS_LONG_AS_IT_TAKES = datetime.timedelta(days=7)
"""How long the others wait while the main process reads and writes a checkpoint of any size."""


def load_resharded(engine: Any, state: Path, place: Path, runtime: Runtime) -> None:
    """Load weights and optimiser from DeepSpeed's files of another number of processes; all processes take part.

    Args:
        engine: The DeepSpeed engine, of the ZeRO stage that wrote the files.
        state: Directory of DeepSpeed's files; it is only read.
        place: Directory for the converted copy, seen by all processes; it is removed again. Meanwhile it holds up to
            twice the size of `state`.
        runtime: This process.

    Raises:
        CheckpointError: there is no room for the copy.
    """
    try:
        with _main_first(runtime) as here:
            if here:
                _convert(state, place)
        with _reading_universal(engine), plainly_named(place) as link:
            engine.load_checkpoint(str(link), tag=state.name)
        runtime.barrier()
    finally:
        if runtime.is_main:
            shutil.rmtree(place, ignore_errors=True)
    load_weights(engine, state, runtime, lambda parameter: not parameter.requires_grad)


@torch.no_grad()
def load_weights(
    engine: Any, state: Path, runtime: Runtime, wanted: Callable[[torch.nn.Parameter], bool] = lambda _: True
) -> None:
    """Load weights, and no optimiser state, from DeepSpeed's files of any ZeRO stage and number of processes.

    The main process reads, and sends one parameter after the other to all.

    Args:
        engine: The DeepSpeed engine; its optimiser's fp32 weights are set as well.
        state: Directory of DeepSpeed's files.
        runtime: This process.
        wanted: Which parameters to load.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    parameters = {name: p for name, p in engine.module.named_parameters() if wanted(p)}
    if not parameters:
        return
    whole: dict[str, Any] = {}
    with _main_first(runtime) as here:
        if here:
            whole = _whole_weights(state)
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        dtype = torch.float32 if parameter.requires_grad else parameter.dtype
        value = torch.empty(shape, dtype=dtype, device=runtime.device)
        if runtime.is_main:
            found = whole.pop(name)
            value.copy_(torch.cat(found).view(shape) if isinstance(found, list) else found.contiguous())
        if runtime.world > 1:
            torch.distributed.broadcast(value, 0)
        with gathered(parameter):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value)


def _convert(state: Path, place: Path) -> None:
    """Write DeepSpeed's files in its universal format to `place/NAME`, where NAME is that of `state`.

    Raises:
        CheckpointError: there is no room for it.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    options = {
        "num_extract_workers": 1,  # more would be processes forked from one that holds a device
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,  # what ZeRO 1 and 2 leave out when there is no tensor parallelism
    }
    try:
        with (
            plainly_named(state) as source,
            plainly_named(place) as target,
            quiet_libraries(io.StringIO(), io.StringIO()),
        ):
            folders = {"input_folder": str(source), "output_folder": str(target / state.name)}
            ds_to_universal.main(argparse.Namespace(**folders, **options))
    except Exception as error:
        raise explained(error, place) from error


def _whole_weights(state: Path) -> dict[str, Any]:
    """Weights by name, those that are trained in fp32: a list of flat pieces, or what has `contiguous()`.

    Files are mapped into memory, and read when a weight is put together.
    """
    from deepspeed.checkpoint.constants import PARAM_SLICE_MAPPINGS, SINGLE_PARTITION_OF_FP32_GROUPS
    from deepspeed.utils import zero_to_fp32

    read = functools.partial(torch.load, map_location="cpu", mmap=True, weights_only=False)
    model = state / "mp_rank_00_model_states.pt"
    with plainly_named(state) as link, quiet_libraries(io.StringIO(), io.StringIO()):
        if not model.exists():  # ZeRO-3
            whole = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
            return dict(whole(str(link.parent), tag=link.name, lazy_mode=True))
        parts = [read(file)["optimizer_state_dict"] for file in zero_to_fp32.get_optim_files(str(link))]
    # the function above refuses ZeRO-1 in bf16, and misses there what is frozen
    weights = dict(read(model)["module"])
    pieces: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for names, flat in zip(part[PARAM_SLICE_MAPPINGS], part[SINGLE_PARTITION_OF_FP32_GROUPS], strict=True):
            for name, place in names.items():
                pieces.setdefault(name, []).append(flat.narrow(0, place.start, place.numel))
    return {**weights, **pieces}


@contextlib.contextmanager
def plainly_named(directory: Path) -> Iterator[Path]:
    """A link to a directory whose path has no special letters: DeepSpeed takes paths for patterns.

    Args:
        directory: It must exist; the link is removed at the end of the block, the directory stays.
    """
    with tempfile.TemporaryDirectory(prefix="btrm") as place:
        link = Path(place) / "link"
        link.symlink_to(directory.resolve())
        yield link


@contextlib.contextmanager
def _reading_universal(engine: Any) -> Iterator[None]:
    """As if the engine had been made with `"checkpoint": {"load_universal": true}`, which would be for good.

    Under ZeRO-3 DeepSpeed 0.19 then gives every group of parameters the settings of the first, weight decay among them,
    and all of them one and the same counter of Adam's steps. Both are put right.
    """
    config, optimizer = engine._config, engine.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


@contextlib.contextmanager
def _main_first(runtime: Runtime) -> Iterator[bool]:
    """True inside the block on the main process; the others wait at its end, for longer than a collective may take."""
    if runtime.world == 1:
        yield True
        return
    patient = torch.distributed.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)
    yield runtime.is_main
    torch.distributed.barrier(patient)
    torch.distributed.destroy_process_group(patient)
