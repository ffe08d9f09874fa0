"""One trajectory: what only concerns memory, speed or processes does not change what is learnt.

One tiny fp32 model is trained for six steps of eight pairs in every way that must not matter: any layout of the rows,
any token budget, every ZeRO stage, recomputed or offloaded activations, one process or two. Every loss and every reward
at the end agree to 1e-5; the gradient of a single step agrees to 1e-6 of its norm.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import processes, trajectories
from support.trajectories import Trajectory, distance

from btrm_core.config import read_settings
from btrm_core.model import base
from btrm_core.training import Schedule, Session, plan_of_epoch, prepare, profiling, start_engine
from btrm_core.training.loop import Around, train_step
from btrm_core.training.micro_batches import steps
from btrm_core.training.offload import Activations
from btrm_core.training.processes.runtime import group, start
from btrm_core.training.processes.zero import PRESETS

EXACT = 1e-5
SAME_GRADIENT = 1e-6
STEPS = 6
SHORT = {"train__max_steps": STEPS, "train__learning_rate": 2e-3}
"""One and a half epochs, at a rate at which six steps are stable."""
BF16 = 0.08
"""How far bf16, which keeps 8 bits, may be from fp32 in any loss or reward: over six seeds and ten steps, 0.01 to
0.05 was measured, as for rows in any other order."""

LORA = {"lora__rank": 4, "train__learning_rate": 2e-2}
NEW_TOKEN = {"tokenizer__pad_token": "[PAD]"}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {"train__layout": "packed"},
    "padded": {"train__layout": "padded"},
    "one micro-batch": {"train__tokens_per_batch": 100_000},
    "a micro-batch for each pair": {"train__tokens_per_batch": 1},
    **{preset: {"distributed__deepspeed": preset} for preset in PRESETS if preset != "zero1"},
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "selective checkpointing, zero3": {"model__selective_checkpointing": True, "distributed__deepspeed": "zero3"},
    "activation offload": {"model__activation_offload": True},
    "activation offload, checkpointing, zero3": {
        "model__activation_offload": True,
        "model__gradient_checkpointing": True,
        "distributed__deepspeed": "zero3",
    },
}
LORA_WAYS = {
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "everything": {
        "distributed__deepspeed": "zero3",
        "model__gradient_checkpointing": True,
        "model__activation_offload": True,
    },
}
TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "as one": {},
    "one micro-batch": {"train__tokens_per_batch": 100_000},
    "padded, zero2-offload": {"train__layout": "padded", "distributed__deepspeed": "zero2-offload"},
    "checkpointing, zero3-offload": {"model__gradient_checkpointing": True, "distributed__deepspeed": "zero3-offload"},
    "lora, zero3": {**LORA, "distributed__deepspeed": "zero3"},
    "new token, zero3": {**NEW_TOKEN, "distributed__deepspeed": "zero3"},
}
GRADIENT_WAYS: dict[str, dict[str, Any]] = {
    "reference": {},
    "one micro-batch": {"train__tokens_per_batch": 100_000},
    "packed": {"train__layout": "packed"},
    "padded": {"train__layout": "padded"},
    "zero3": {"distributed__deepspeed": "zero3"},
}


def trajectory(root: Path, output: Path, **values: Any) -> Trajectory:
    return trajectories.trajectory(root, output, **{**SHORT, **values})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectories.prepare(tmp_path_factory.mktemp("trajectory"), rows=4 * trajectories.PAIRS, layers=2)


@pytest.fixture(scope="module")
def two(root: Path) -> Any:
    """Everything that two processes do, started first so that it is done when it is asked for."""
    group = processes.start(in_two_processes, str(root), str(root / "two"), log=root / "two.log", world=2)
    waited: list[int | None] = []

    def finished() -> Path:
        if not waited:
            waited.extend(processes.wait(group, timeout=240))
        assert waited == [0, 0], (root / "two.log").read_text()[-3000:]
        return root / "two"

    yield finished
    processes.wait(group, timeout=0)


@pytest.fixture(scope="module")
def reference(root: Path, two: Any) -> Trajectory:
    found = trajectory(root, root / "reference")
    assert len(found.losses) == STEPS
    assert abs(found.losses[0] - math.log(2)) < 0.1
    assert min(found.losses[-3:]) < 0.6, "it must learn, or there is nothing to compare"
    assert max(found.micro_batches) > 1
    return found


@pytest.fixture(scope="module")
def lora(root: Path) -> Trajectory:
    return trajectory(root, root / "lora", **LORA)


@pytest.mark.parametrize("way", WAYS)
def test_the_way_does_not_matter(root: Path, reference: Trajectory, way: str) -> None:
    found = trajectory(root, root / way, **WAYS[way])
    assert distance(reference, found) < EXACT
    np.testing.assert_allclose(found.norms, reference.norms, rtol=1e-4)
    if "micro-batch" in way:
        assert set(found.micro_batches) == ({1} if way.startswith("one") else {trajectories.PAIRS})


def test_another_learning_rate_would_show(root: Path, reference: Trajectory) -> None:
    found = trajectory(root, root / "other", train__learning_rate=2.001e-3)
    assert distance(reference, found) > 10 * EXACT


@pytest.mark.parametrize("way", LORA_WAYS)
def test_adapters(root: Path, lora: Trajectory, reference: Trajectory, way: str) -> None:
    assert distance(lora, reference) > 0.01
    assert lora.losses[-1] < lora.losses[0]
    found = trajectory(root, root / f"lora {way}", **LORA, **LORA_WAYS[way])
    assert distance(lora, found) < EXACT


def test_bf16_stays_near(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slow = {"train__learning_rate": 1e-3}
    reference = trajectory(root, root / "fp32", **slow)
    found = [
        trajectory(root, root / f"bf16 {stage}", **slow, model__dtype="bf16", distributed__deepspeed=stage)
        for stage in ("zero1", "zero2", "zero3")
    ]
    assert capfd.readouterr().out == "", "standard output is for results"
    for one, other in itertools.combinations([reference, *found], 2):
        assert distance(one, other) < BF16
    assert distance(reference, found[0]) > 10 * EXACT, "it did compute in bf16"
    assert all(weight.dtype == torch.bfloat16 for weight in found[0].weights.values())


@pytest.mark.distributed
@pytest.mark.parametrize("way", TWO_PROCESSES)
def test_two_processes_are_one(root: Path, reference: Trajectory, lora: Trajectory, two: Any, way: str) -> None:
    alone = lora if "lora" in way else reference
    if "new token" in way:
        alone = trajectory(root, root / "new token", **NEW_TOKEN)
    assert distance(alone, trajectories.stored(two(), way)) < EXACT


@pytest.mark.distributed
def test_the_gradient_of_a_step_is_the_same(root: Path, two: Any) -> None:
    alone = step_gradients(root)
    reference = alone["reference"]
    size = _norm(reference)
    assert size > 0.1
    for way, gradients in [*alone.items(), *torch.load(two() / "gradients.pt").items()]:
        assert _norm({n: gradients[n] - g for n, g in reference.items()}) < SAME_GRADIENT * size, way


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


@pytest.mark.distributed
def test_head_and_new_row_start_equal_everywhere(root: Path, two: Any) -> None:
    """Also where the weights are spread over processes whose random states differ."""
    hidden = trajectories.SHAPE["hidden_size"]
    alone = start_of(root, "zero1")
    for found in (start_of(root, "zero3"), *(torch.load(two() / f"start {rank}.pt") for rank in (0, 1))):
        assert torch.equal(found["head"], alone["head"])
        torch.testing.assert_close(found["rows"], alone["rows"], atol=1e-7, rtol=0)
    assert len(alone["rows"]) == alone["old rows"] + 1
    torch.testing.assert_close(alone["rows"][-1], alone["rows"][:-1].mean(0), atol=1e-7, rtol=0)
    std = 1 / math.sqrt(hidden + 1)
    assert abs(float(alone["heads"].std()) / std - 1) < 0.1, "over many seeds"
    assert abs(float(alone["heads"].mean())) < 0.1 * std


def test_only_activations_are_offloaded() -> None:
    """Weights stay: a linear layer saves its weight and a view of it for the backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    x = torch.randn(32, 64, requires_grad=True)
    model(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    activations = Activations(model)
    with activations.on_cpu():
        loss = model(x).square().sum()
    loss.backward()
    assert activations.moved in (3 * 32 * 64, 4 * 32 * 64)  # x, the output of tanh (once or twice), the output
    for found, gradient in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(found, gradient)


def in_two_processes(root: str, output: str) -> None:
    """What each of two processes does: the runs, the gradients, and the start of a model under ZeRO-3."""
    place = Path(output)
    place.mkdir(exist_ok=True)
    gradients = step_gradients(Path(root))
    rank = torch.distributed.get_rank()
    torch.manual_seed(1000 + rank)
    torch.save(start_of(Path(root), "zero3"), place / f"start {rank}.pt")
    if rank == 0:
        torch.save(gradients, place / "gradients.pt")
    runs = {name: {**SHORT, **values} for name, values in TWO_PROCESSES.items()}
    trajectories.run_many(root, output, runs)


@contextlib.contextmanager
def session_of(root: Path, **values: Any) -> Any:
    """A run that is ready for its first step."""
    config = read_settings(None, trajectories.settings(root, root / "unused", **values))
    with group(config):
        job = prepare.choose(config)
        with start(job.config) as runtime:
            data = prepare.load_data(job.config, job.chat, runtime)
            model, _ = base.build_model(job.config, job.family, job.chat, runtime.dtype, runtime.device)
            with start_engine(model, job.config, runtime) as engine:
                form = prepare.usable_form(job, model, data, runtime)
                budget, places = job.config.train.tokens_per_batch, data.train.places
                epoch = plan_of_epoch(job.config, places, form, runtime.world, budget)
                yield Session(job, runtime, data, engine, form, epoch, Schedule.of(job.config, epoch.num_steps))


def step_gradients(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """For each way, the whole gradient of the first step by parameter, just before the optimiser would use it."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for way, values in GRADIENT_WAYS.items():
        with session_of(root, **values) as session:
            engine, rank, form = session.engine, session.runtime.rank, session.form
            (step,) = steps(session.data.train, [session.epoch], rank=rank, form=form, first=0, last=1, workers=0)
            gradients: dict[str, torch.Tensor] = {}

            def instead(engine: Any = engine, gradients: dict[str, torch.Tensor] = gradients) -> None:
                for name, parameter in engine.module.named_parameters():
                    gradients[name] = safe_get_full_grad(parameter).clone()

            engine.step = instead
            nothing = Around(profiling.Profiler(None, print), contextlib.nullcontext)
            train_step(session, step, nothing, stop=False)
            found[way] = gradients
    return found


def start_of(root: Path, stage: str) -> dict[str, Any]:
    """Head and embedding as a run with a new token starts with them, on this process; and heads of many seeds."""
    values = {**NEW_TOKEN, "distributed__deepspeed": stage}
    config = read_settings(None, trajectories.settings(root, root / "unused", **values))
    with group(config), start((job := prepare.choose(config)).config) as runtime:
        family, config, chat = job.family, job.config, job.chat
        model, is_new = base.build_model(config, family, chat, runtime.dtype, runtime.device)
        assert is_new
        heads = []
        hf = model.base_model
        weights = hf.score.weight, hf.get_input_embeddings().weight
        with base.gathered(*weights):
            head, rows = (weight.detach().clone() for weight in weights)
        for seed in range(32):
            base.init_head(hf, family.init_head(hf.config.hidden_size), seed)
            with base.gathered(hf.score.weight):
                heads.append(hf.score.weight.detach().clone())
        old = base.base_config(config.model).vocab_size
        return {"head": head, "rows": rows, "heads": torch.cat(heads), "old rows": old}
