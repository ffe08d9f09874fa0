"""btrm's own arms, and the bare backbone on the same rows.

The btrm arms are the trainer itself: its engine, loader and `fit`, stopped at the gate where it logs a step. The
backbone arms are the ceiling: forward and backward of the transformers backbone over exactly the rows of `btrm-shared`,
built beforehand, with no head, loss, metrics, clipping or optimiser.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gate import Gate
from benchmarks.workload import Workload, store_of


def bring_in() -> None:
    """Import what every arm here needs, before the clock starts or the device is free."""
    import deepspeed  # noqa: F401

    import btrm_core.run  # noqa: F401


SAVINGS = {"liger": {"model.kernels": "liger"}, "selective": {"model.selective_checkpointing": True}}
"""Settings of arms that are `btrm-shared` but for them."""


def run_config(work: Workload, layout: str, saving: str | None = None) -> Any:
    """The settings for this workload: what every arm shares, what one saves by, and btrm's defaults for the rest."""
    from btrm_core.config import apply
    from btrm_core.settings import RunConfig

    s = work.settings
    values = {
        "model.name": str(work.model_dir),
        "model.dtype": s.precision,
        "model.attention": s.attention,
        "model.gradient_checkpointing": s.gradient_checkpointing,
        "train.pairs_per_step": s.pairs_per_step,
        "train.tokens_per_batch": s.tokens_per_batch,
        "train.learning_rate": s.learning_rate,
        "train.weight_decay": 0.0,
        "train.warmup_ratio": 0.0,
        "train.epochs": float(s.passes + 1),
        "train.seed": s.seed,
        "train.layout": layout,
        **(SAVINGS[saving] if saving else {}),
    }
    return apply(RunConfig(), values)


def load_model(work: Workload, config: Any, layout: str, dtype: Any, device: Any) -> tuple[Any, Any]:
    """The common starting weights as btrm's reward model, and the form of its rows."""
    from btrm_core.model import RewardModel, base, choose_for
    from btrm_core.model.savings import recompute_activations, use_kernels
    from btrm_core.packing import row_form

    hf = base.load_base(config.model, dtype).hf
    base.set_reward_config(hf, work.pad_id)
    use_kernels(hf, config.model.kernels, keep_products=config.model.selective_checkpointing)
    recompute_activations(hf, config.model)
    model = RewardModel(hf, choose_for(hf, config.model.attention, device.type))
    return model, row_form(layout, model.kernel, device.type, work.pad_id)


def run_btrm(work: Workload, gate: Gate, steps: range, *, layout: str, saving: str | None = None) -> None:
    """Train with btrm's own loop on rows of the given layout (shared, packed or padded)."""
    from btrm_core.training import Data, Job, Progress, Schedule, Seams, Session, fit, make_engine
    from btrm_core.training.processes import runtime as runtime_module

    config = run_config(work, layout, saving)
    stopped = False

    def log(split: str, step: int, figures: dict[str, Any]) -> None:
        nonlocal stopped
        if step == steps.start + 1:
            gate.note_loss(1, figures["loss"])
        stopped = not gate.step_done()

    with runtime_module.group(config), runtime_module.start(config) as runtime:
        pairs = store_of(work.pairs, work.prompts)
        model, form = load_model(work, config, layout, runtime.dtype, runtime.device)
        plans = plans_of(work, pairs, form)
        check_order(work, plans)
        model.register_forward_pre_hook(partial(_count, gate))
        engine = make_engine(model, config, runtime)
        time_optimizer(engine, gate, runtime.device)
        schedule = Schedule(steps.stop, work.settings.steps, warmup_steps=0, peak=work.settings.learning_rate)
        job: Any = Job(config, None, None, work.directory)  # type: ignore[arg-type]  # no step asks a family
        session = Session(job, runtime, Data(pairs, None, {}, [], None), engine, form, plans[0], schedule)
        if gate.open():
            fit(session, Progress(step=steps.start), Seams(log=log, stop_requested=lambda: stopped))
        engine.destroy()


def run_backbone(work: Workload, gate: Gate, steps: range, *, own_attention: bool) -> None:
    """Forward and backward of the backbone over the rows of `btrm-shared`.

    With `own_attention` as btrm runs it (exact). Without, as transformers runs one long causal sequence with SDPA:
    wrong rewards, but the price of the same tokens with no attention code of btrm's.
    """
    import torch

    from btrm_core.training import steps as load_steps
    from btrm_core.training.processes import compute_dtype

    config = run_config(work, "shared")
    device = torch.device(work.settings.device)
    pairs = store_of(work.pairs, work.prompts)
    model, form = load_model(work, config, "shared", compute_dtype(work.settings.precision), device)
    model.to(device).train()
    plans = plans_of(work, pairs, form)
    stream = load_steps(pairs, plans, rank=0, form=form, first=steps.start, last=steps.stop, workers=0)
    rows = [[micro.to(device).batch for micro in step.micro_batches] for step in stream]
    if own_attention:
        forward = model.hidden
    else:
        model.hf.set_attn_implementation("sdpa")
        forward = partial(_causal, getattr(model.hf, model.hf.base_model_prefix))
    going = gate.open()
    for batches in rows:
        if not going:
            return
        for batch in batches:
            _add(gate, batch)
            hidden = forward(batch)
            hidden.backward(torch.ones_like(hidden))
        for parameter in model.parameters():
            parameter.grad = None
        going = gate.step_done()


def plans_of(work: Workload, pairs: Any, form: Any) -> list[Any]:
    """The plan of every epoch, as btrm makes it."""
    from btrm_core.training import plan_of_epoch

    config = run_config(work, form.layout)
    epochs, budget = range(work.settings.passes + 1), work.settings.tokens_per_batch
    return [plan_of_epoch(config, pairs.places, form, 1, budget, epoch) for epoch in epochs]


def check_order(work: Workload, plans: list[Any]) -> None:
    """Raise RuntimeError unless btrm's steps hold the pairs that every other arm is given."""
    made = [set(map(int, plan.step(i).pair_ids)) for plan in plans for i in range(plan.num_steps)]
    if made != [set(step) for step in work.steps]:
        raise RuntimeError("btrm's plan puts other pairs into its steps than the workload: arms would differ")


def time_optimizer(engine: Any, gate: Gate, device: Any) -> None:
    """Let the gate know how much of a step is the optimiser's update (clipping included); a GPU is waited for."""
    step = engine.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        _wait_for(device)
        started = time.perf_counter()
        out = step(*args, **kwargs)
        _wait_for(device)
        gate.parts["optimizer"] = gate.parts.get("optimizer", 0.0) + time.perf_counter() - started
        return out

    engine.step = timed


def _wait_for(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _count(gate: Gate, _: Any, args: tuple[Any, ...]) -> None:
    _add(gate, args[0])


def _add(gate: Gate, batch: Any) -> None:
    """Count a row's tokens, and those of them that belong to no conversation."""
    gate.tokens += batch.computed
    gate.parts["padding"] = gate.parts.get("padding", 0) + batch.computed + batch.shared - batch.useful


def _causal(backbone: Any, batch: Any) -> Any:
    """Hidden states of a row as one sequence; a 2-D mask keeps transformers from splitting it by its positions."""
    import torch

    mask = torch.ones_like(batch.input_ids)
    out = backbone(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    return out.last_hidden_state


OURS: dict[str, Callable[[Workload, Gate, range], None]] = {
    **{f"btrm-{layout}": partial(run_btrm, layout=layout) for layout in ("shared", "packed", "padded")},
    **{f"btrm-{name}": partial(run_btrm, layout="shared", saving=name) for name in SAVINGS},
    "backbone": partial(run_backbone, own_attention=True),
    "backbone-causal": partial(run_backbone, own_attention=False),
}
