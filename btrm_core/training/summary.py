"""What a run says about itself: before it starts, instead of starting (`--dry-run`), and when it has finished."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrm_core.config import to_toml
from btrm_core.console import dumps, say, unused_gpu
from btrm_core.data import curate
from btrm_core.errors import BtrmError, first_line
from btrm_core.evaluation import PairRewards, Report, assess, evaluation_text, short, subset_table, write_report
from btrm_core.model import device_name, read_manifest
from btrm_core.packing import EpochPlan, RowForm
from btrm_core.training.processes import deepspeed_config
from btrm_core.training.schedule import Schedule
from btrm_core.training.session import Data, Job, Session

if TYPE_CHECKING:
    import numpy as np

    from btrm_core.training.session import Outcome

EXAMPLE_WIDTH = 96


def introduce(session: Session) -> None:
    """Say in a few lines what is about to happen.

    Args:
        session: The run, before its first step.
    """
    job, runtime, data, config = session.job, session.runtime, session.data, session.config
    for line in data.lines:
        say(runtime, line)
    held_out = f", {len(data.eval)} held out" if data.eval is not None else ", no evaluation"
    dtype = str(runtime.dtype).removeprefix("torch.")
    schedule, form, budget = session.schedule, session.form, session.tokens_per_batch
    share = config.distributed.sequence_parallel
    shared, times = (f", each over {share} processes", f" x {share}") if share > 1 else ("", "")
    for warning in (job.family.warning, "; ".join(unused_gpu() or ())):
        if warning:
            say(runtime, f"warning: {warning}")
    say(runtime, f"family {job.family.name} ({job.family.origin}), base model {config.model.name}")
    say(runtime, f"{len(data.train)} training pairs{held_out}, at most {config.data.max_length} tokens a conversation")
    say(
        runtime,
        f"{schedule.total_steps} steps of {config.train.pairs_per_step} pairs, learning rate {schedule.peak:g}; rows "
        f"{form.layout} with {form.kernel} attention, at most {budget * share} tokens{shared}",
    )
    say(runtime, rows_text(data, session.epoch, form))
    if session.epoch.oversize:
        say(
            runtime,
            f"{session.epoch.oversize} pairs are longer than --tokens-per-batch {budget}{times}: "
            "each gets a row of its own",
        )
    say(
        runtime,
        f"{runtime.world} x {device_name(runtime.device)}, {dtype}, ZeRO {runtime.zero_stage}; reward at "
        f"{job.chat.terminal_token}, pad {job.chat.pad.token}",
    )


def rows_text(data: Data, epoch: EpochPlan, form: RowForm) -> str:
    """How much the rows of the first epoch waste and save, in one line.

    Args:
        data: The encoded pairs.
        epoch: The plan of the first epoch.
        form: How its rows are laid out.
    """
    places = data.train.places
    separate = int(places.tokens_P.sum())
    text = (
        f"of each epoch's {separate:,} tokens {epoch.saved_percent / 100:.1%} are shared and computed once; "
        f"padding {epoch.padding_percent:.1f} %, busiest process {epoch.step(0).imbalance:.3f} times the mean"
    )
    most = 100 * (1 - int(places.forest.size_E.sum()) / separate)
    if form.layout == "shared" and epoch.budget.group_by == "pair" and most > epoch.saved_percent + 1:
        text += f"; with --group-by prompt up to {most:.1f} % would be shared"
    return text


def describe_run(job: Job, data: Data, epoch: EpochPlan, schedule: Schedule) -> str:
    """Everything a run would do, resolved, as text for `--dry-run`.

    Args:
        job: Settings, family, chat format and output directory.
        data: The pairs, and what is to be said of them.
        epoch: The plan of the first epoch.
        schedule: Steps and learning rates.

    Returns:
        Lines for a person, then the settings as TOML and the DeepSpeed configuration as JSON.
    """
    chat, family = job.chat, job.family
    answers = ", ".join(f"{hook} by {who}" for hook, who in chat.answers.items())
    evaluation = len(data.eval) if data.eval is not None else 0
    return "\n".join(
        [
            *([f"warning: {family.warning}"] if family.warning else []),
            f"family: {family.name} ({family.origin}); {answers}",
            f"reward at {chat.terminal_token!r}; pad token {chat.pad.token!r} ({chat.pad.reason})",
            f"template sha256: {chat.template_sha256}",
            f"pairs: {len(data.train)} for training, {evaluation} for evaluation",
            *data.lines,
            f"steps: {schedule.total_steps}, {epoch.num_steps} per epoch, {schedule.warmup_steps} of warm-up",
            f"output: {job.output}",
            "",
            to_toml(job.config),
            "# deepspeed",
            dumps(deepspeed_config(job.config, epoch.budget.world * job.config.distributed.sequence_parallel)),
        ]
    )


def closing_text(outcome: Outcome) -> str:
    """What a finished run prints: how good it is, scored examples, where it is, what to do next.

    Args:
        outcome: What the run left.
    """
    lines: list[str] = []
    if outcome.evaluation is not None:
        lines += [evaluation_text(outcome.evaluation), subset_table(outcome.evaluation.get("subsets", []))]
    for example in outcome.examples:
        lines += ["", f"  {_one_line(example['prompt'])}", *_sides(example)]
    lines += ["", f"model saved in {outcome.directory}", *_adapters(outcome.directory)]
    lines += [f"next: btrm score {shlex.quote(str(outcome.directory))} INPUT.jsonl -o OUTPUT.jsonl"]
    return "\n".join(lines)


def _adapters(directory: Path | None) -> list[str]:
    """What merging the adapters did to the rewards, or what a reader of unmerged ones needs."""
    made = read_manifest(directory) if directory is not None else {}
    saved_as = made.get("adapters")
    if saved_as is None:
        return []
    if not saved_as["merged"]:
        return [
            f"adapters and head only: whoever loads them needs the base model {made['base_model']} unchanged, and peft"
        ]
    change, count = saved_as["largest_reward_change"], saved_as["conversations"]
    return [
        f"adapters merged, rounded to {made['dtype']}: rewards of {count} conversations change by at most {change:.1e}"
    ]


def _sides(example: dict[str, Any]) -> list[str]:
    sides = [(side, *example[side]) for side in ("chosen", "rejected")]
    return [f"    {reward:+7.3f}  {side:<8}  {_one_line(text)}" for side, reward, text in sides]


def _one_line(text: str) -> str:
    """Text of the data as a line on the screen: short, and nothing in it that a terminal would obey."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= EXAMPLE_WIDTH else line[: EXAMPLE_WIDTH - 1] + "…"


EXAMPLES = 3


def examples(session: Session) -> tuple[dict[str, Any], ...]:
    """The first held-out pairs with their rewards in the last evaluation, to be shown to a person.

    Args:
        session: The run, after an evaluation.

    Returns:
        At most `EXAMPLES` mappings: `prompt` (its last message), `chosen` and `rejected` (reward, text).
    """
    data = session.data
    if data.eval is None or data.eval_rows is None or session.evaluated is None:
        return ()
    rewards_P2 = session.evaluated[1]
    shown = []
    for i in range(min(EXAMPLES, len(data.eval))):
        pair = data.eval_rows[int(data.eval.index_P[i])]
        chosen, rejected = (float(r) for r in rewards_P2[i])
        question = pair.prompt[-1]["content"] if pair.prompt else ""
        shown.append({"prompt": question, "chosen": (chosen, pair.chosen), "rejected": (rejected, pair.rejected)})
    return tuple(shown)


def held_out_rewards(session: Session, directory: Path, rewards_P2: np.ndarray | None) -> PairRewards | None:
    """The held-out pairs with the rewards that the saved model gives them; None if there are none.

    Args:
        session: The run.
        directory: The saved model.
        rewards_P2: Its rewards, or None.
    """
    data = session.data
    if data.eval is None or data.eval_rows is None or rewards_P2 is None:
        return None
    return curate.with_rewards(data.eval_rows, data.eval, rewards_P2, str(directory), "held out")


def figures_in(metrics: Path) -> list[dict[str, Any]]:
    """The figures that a run has written; half a line, which a full disk has left, is none.

    Args:
        metrics: Its `metrics.jsonl`.
    """
    found = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_training_report(outcome: Outcome) -> str:
    """Write the report of a finished run beside its model, with the curve of its loss; returns a line that says where.

    A report is an extra: what is missing for it, or goes wrong, is said and is no reason to fail a finished run.

    Args:
        outcome: What the run left.
    """
    if outcome.held_out is None or outcome.directory is None:
        return ""
    output = outcome.directory.parent
    try:
        lines = figures_in(output / "metrics.jsonl")
        evaluated = [(assess(outcome.held_out), outcome.held_out)]
        report = Report(f"Reward model {short(str(outcome.directory))}", evaluated, training=lines)
        return f"report: {write_report(report, output / 'report')}"
    except (BtrmError, OSError, ValueError) as error:
        return f"no report: {first_line(error)}"
