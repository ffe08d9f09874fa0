"""What is rehearsed: whole runs, kernels, memory that runs out, two processes; and each fault that must be found.

Every scene runs in a process of its own (`stage`) and returns what a test looks at.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from btrm_core.model import attention
from btrm_core.model.leakage.probe import probe
from btrm_core.model.reward import RewardModel
from btrm_core.packing.batch import Batch
from btrm_core.packing.forms import collate
from btrm_core.scoring.scorer import Scorer
from btrm_core.training import loop
from btrm_core.training.processes import runtime
from support import trajectories
from support.rehearsal import gpu, kernels, stage
from support.tiny_models import awkward_groups, group, tiny_model

STEPS = 3
"""DeepSpeed does some things from the third step on alone."""


def prepare(root: Path) -> Path:
    """What all scenes share: a base model, training pairs and held-out pairs."""
    root.mkdir()
    return trajectories.prepare(root, rows=24)


# ---- whole runs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, list[str]]]]:
    """The waits of every training step inside the block: within its micro-batches, and after the last of them."""
    found: list[dict[str, list[str]]] = []
    step, total = loop.train_step, runtime.Runtime.sum

    def train_step(*arguments: Any, **options: Any) -> Any:
        with gpu.waits() as waits:
            found.append({"micro_batches": waits, "after": []})
            result = step(*arguments, **options)
        return result

    def sum_(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        if found and not found[-1]["after"]:
            made = list(found[-1]["micro_batches"])
            found[-1]["after"], found[-1]["micro_batches"] = found[-1]["micro_batches"], made
            found[-1]["after"].clear()
        return total(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        patch.setattr(runtime.Runtime, "sum", sum_)
        yield found


@contextlib.contextmanager
def sums_seen() -> Iterator[list[float]]:
    """Of the gradient of every step, before the update: the share of entries that bf16 holds exactly."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    shares: list[float] = []
    step = BF16_Optimizer.step

    def stepped(self: Any, closure: Any = None) -> Any:
        with gpu.inside_a_kernel():
            (gradient, *_) = self.fp32_groups_gradient_flat_partition
            own = gradient[gradient != 0]
            shares.append(float((own == own.bfloat16().float()).float().mean()))
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BF16_Optimizer, "step", stepped)
        yield shares


def trained(root: Path, place: Path, **values: Any) -> dict[str, Any]:
    """A run of a few steps, and what was seen of it."""
    said = io.StringIO()
    given = {"train__max_steps": STEPS, "train__tokens_per_batch": 200, **values}
    with watched() as waits, sums_seen() as shares, contextlib.redirect_stderr(said):
        outcome = trajectories.train(root, place / "run", **given)
    figures = trajectories.metrics(place / "run")
    return {
        "directory": str(outcome.directory),
        "waits": waits,
        "bf16_shares": shares,
        "said": said.getvalue(),
        "kernels": sorted(set(kernels.CALLS)),
        "losses": [row["loss"] for row in figures],
        "micro_batches": [row["micro_batches"] for row in figures],
        "peak_memory_gib": [row["peak_memory_gib"] for row in figures],
        "norms": [row["grad_norm"] for row in figures],
        "evaluation": outcome.evaluation,
    }


def whole_run(root: Path, place: Path) -> dict[str, Any]:
    """Training in bf16 with what a GPU takes by itself, evaluation, saving; then scoring with what was saved."""
    found = trained(root, place)
    scorer = Scorer(found["directory"])
    conversation = [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}]
    scorer.rewards([conversation])
    with gpu.waits() as waits:
        scorer.rewards([conversation] * 3)
    return {
        **found,
        "device": str(scorer.device),
        "dtype": str(scorer.dtype),
        "scoring_waits": waits,
        "self_test": scorer.self_test(),
    }


def careless_run(root: Path, place: Path) -> dict[str, Any]:
    """A run that waits in every micro-batch: DeepSpeed's own timers, and a loss that is looked at."""
    file = place / "deepspeed.json"
    careless = {
        "zero_optimization": {"stage": 1},
        "timers": {"throughput": {"enabled": True}},
        "communication_data_type": "bf16",
    }
    file.write_text(json.dumps(careless))
    loss = loop._micro_loss

    def looked_at(*arguments: Any) -> torch.Tensor:
        made = loss(*arguments)
        assert made.item() >= 0
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_micro_loss", looked_at)
        return trained(root, place, distributed__deepspeed=str(file), data__held_out_fraction=0.0)


def index_of_the_host(root: Path, place: Path) -> dict[str, Any]:
    """A row whose reward positions stay on the host."""
    moved = Batch.to

    def forgetful(self: Batch, *arguments: Any, **options: Any) -> Batch:
        made = moved(self, *arguments, **options)
        made.reward_index = self.reward_index.cpu()
        return made

    model = RewardModel(tiny_model("llama3"), "varlen").to("cuda")
    batch = collate([group(5, 3, 4)], kernel="varlen", multiple_of=128)
    model(batch.to("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "to", forgetful)
        return {"error": _error(lambda: model(batch.to("cuda")))}


def _error(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# ---- memory --------------------------------------------------------------------------------------------------------

ROOM = 3_000_000
"""Bytes beyond what the model takes: enough for small rows, not for large ones."""


def memory_runs_out(root: Path, place: Path) -> dict[str, Any]:
    """The first rows do not fit: the budget is halved, and the run goes on."""
    with _little_memory():
        return trained(root, place, train__tokens_per_batch=2000, train__auto_budget=True, train__max_steps=2)


def memory_is_kept(root: Path, place: Path) -> dict[str, Any]:
    """The same, while something still holds the pass that failed."""
    kept: list[BaseException] = []
    smaller = loop.smaller_budget

    def keeping(error: torch.OutOfMemoryError, session: Any) -> int:
        kept.append(error)
        return smaller(error, session)

    with _little_memory(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "smaller_budget", keeping)
        patch.setattr(loop.traceback, "clear_frames", lambda _: None)
        run = lambda: trained(root, place, train__tokens_per_batch=2000, train__auto_budget=True, train__max_steps=2)  # noqa: E731
        return {"error": _error(run)}


def no_memory_at_all(root: Path, place: Path) -> dict[str, Any]:
    """A model that does not fit, before anything is trained."""
    gpu.capacity(gpu.LIBRARY.rehearsed_held() + 100_000)
    return {"error": _error(lambda: trajectories.train(root, place / "run", train__max_steps=1))}


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """From the first step on the device has little more memory than it holds then."""
    run_steps = loop._run_steps

    def limited(*arguments: Any) -> None:
        if not limits:
            limits.append(gpu.LIBRARY.rehearsed_held() + ROOM)
            gpu.capacity(limits[0])
        run_steps(*arguments)

    limits: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run_steps", limited)
        try:
            yield
        finally:
            gpu.capacity(0)


# ---- kernels -------------------------------------------------------------------------------------------------------


def every_kernel(root: Path, place: Path) -> dict[str, Any]:
    """Each kernel in bf16 inside a model, and by itself on random heads."""
    kernels.install_flash_attn()
    pairs = (("varlen", "mistral"), ("flash", "gemma2"), ("sdpa", "mistral"), ("eager", "gemma2"))
    return {kernel: _kernel(kernel, name, [awkward_groups()]) for kernel, name in pairs}


def flex_kernel(root: Path, place: Path) -> dict[str, Any]:
    """FlexAttention as it is traced for a GPU: rows of several lengths, with and without gradients; few graphs."""
    from torch._dynamo.utils import counters

    found = _kernel("flex", "gemma2", [awkward_groups()[:4], [group(300, 9, 4)]])
    return {**found, "graphs": counters["stats"]["unique_graphs"]}


def _kernel(kernel: str, name: str, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Waits of passes through a model, which kernels were called, and their error against attention written out."""
    # FlexAttention takes no smaller heads
    hf = tiny_model(name, torch.bfloat16, hidden_size=64, head_dim=16)
    model = RewardModel(hf, kernel).to("cuda").train()
    kernels.CALLS.clear()
    with gpu.waits() as waits, attention.calls_noted() as calls:
        for groups in rows:
            batch = collate(groups, kernel=kernel, multiple_of=128).sent_to(model.device)
            model(batch).sum().backward()
            with torch.no_grad():
                model(batch)
    called = sorted(set(kernels.CALLS))
    found = probe(kernel, calls, model.device, torch.bfloat16, training=True)
    inside = "btrm_core/model/kernels.py"  # traced FlexAttention is computed by other operations than on a GPU
    kept = [wait for wait in waits if kernel != "flex" or (inside not in wait and not wait.endswith(" at "))]
    return {"waits": kept, "called": called, "calls": len(calls), "error": found.difference, "ok": found.ok}


def padded_lines(root: Path, place: Path) -> dict[str, Any]:
    """The fallback, transformers' own attention, and one line at a time."""
    found = {}
    for one_by_one in (False, True):
        model = RewardModel(tiny_model("mistral"), "padded").to("cuda").train()
        model.one_by_one = one_by_one
        batch = collate(awkward_groups(), kernel="padded").pin_memory()
        with gpu.waits(("btrm_core", "transformers")) as waits:
            model(batch.to("cuda", non_blocking=True)).sum().backward()
        found[str(one_by_one)] = waits
    return found


# ---- two processes -------------------------------------------------------------------------------------------------


def two_processes(root: Path, place: Path) -> dict[str, Any]:
    """ZeRO 1 and 3 over NCCL's rules, a checkpoint, evaluation and agreement; the same steps as alone."""
    stages: dict[str, dict[str, Any]] = {"zero1": {"output__save_every": 1}, "zero3": {"output__best_by": "loss"}}
    given = {"train__max_steps": 2, "train__tokens_per_batch": 200}

    def play(rank: int) -> dict[str, Any]:
        losses = {}
        for name, values in stages.items():
            outcome = trajectories.train(root, place / name, **given, **values, distributed__deepspeed=name)
            losses[name] = [row["loss"] for row in trajectories.metrics(place / name)]
            assert outcome.evaluation is not None
        calls = sorted(set(torch.distributed.group.WORLD.calls))  # type: ignore[union-attr]
        runtime.leave()
        return {"losses": losses, "calls": calls}

    return _pair(place, play)


def collective_of_the_host(root: Path, place: Path) -> dict[str, Any]:
    """Two processes that ask each other with a tensor of the host."""

    def play(rank: int) -> dict[str, Any]:
        from btrm_core.training.processes.join import join

        join(20)
        there, here = torch.ones(1, device="cuda"), torch.ones(1)
        torch.distributed.all_reduce(there)
        return {"sum": there.item(), "error": _error(lambda: torch.distributed.all_reduce(here))}

    return _pair(place, play)


def _pair(place: Path, play: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Play in two processes that a launcher has shown a GPU each; what the first returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        variables = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        name = f"rank {rank}"
        children.append(
            stage.start(name, lambda rank=rank: (place / f"{rank}.json", play(rank)), **variables)  # type: ignore[misc]
        )
    codes = [stage.wait(child, stage.SECONDS) for child in children]
    assert codes == [0, 0], codes
    found: dict[str, Any] = json.loads((place / "0.json").read_text())
    return found
