"""What a run says about itself: before it starts, instead of starting (`--dry-run`), and when it has finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.chat import ChatFormat
from btrm_core.config import to_toml
from btrm_core.console import dumps, say
from btrm_core.evaluation import evaluation_text, subset_table
from btrm_core.families import Family
from btrm_core.model import device_name, read_manifest
from btrm_core.packing import EpochPlan, RowForm
from btrm_core.settings import RunConfig
from btrm_core.training.processes import Runtime, deepspeed_config
from btrm_core.training.schedule import Schedule
from btrm_core.training.session import Data

if TYPE_CHECKING:
    from btrm_core.training.session import Outcome

EXAMPLE_WIDTH = 96


def introduce(
    config: RunConfig,
    family: Family,
    chat: ChatFormat,
    data: Data,
    made: EpochPlan,
    plan: Schedule,
    runtime: Runtime,
    form: RowForm,
) -> None:
    """Say in a few lines what is about to happen."""
    for line in data.lines:
        say(runtime, line)
    held_out = f", {len(data.eval)} held out" if data.eval is not None else ", no evaluation"
    dtype = str(runtime.dtype).removeprefix("torch.")
    say(runtime, f"family {family.name} ({family.origin}), base model {config.model.name}")
    say(runtime, f"{len(data.train)} training pairs{held_out}, at most {config.data.max_length} tokens a conversation")
    say(
        runtime,
        f"{plan.total_steps} steps of {config.train.pairs_per_step} pairs, learning rate {plan.peak:g}; rows "
        f"{form.layout} with {form.kernel} attention, at most {config.train.tokens_per_batch} tokens",
    )
    say(runtime, rows_text(data, made, form))
    if made.oversize:
        say(
            runtime,
            f"{made.oversize} pairs are longer than --tokens-per-batch {config.train.tokens_per_batch}: each gets a "
            "row of its own",
        )
    say(
        runtime,
        f"{runtime.world} x {device_name(runtime.device)}, {dtype}, ZeRO {runtime.zero_stage}; reward at "
        f"{chat.terminal_token}, pad {chat.pad.token}",
    )


def rows_text(data: Data, made: EpochPlan, form: RowForm) -> str:
    """How much the rows of the first epoch waste and save, in one line."""
    lengths = data.train.groups.lengths
    separate = float(lengths.tokens(share_prefix=False).sum())
    saved = separate - float(lengths.tokens().sum()) if form.layout == "shared" else 0.0
    return (
        f"of each epoch's {separate:,.0f} tokens {saved / separate:.1%} are shared and computed once; "
        f"padding {made.padding_percent:.1f} %, busiest process {made.step(0).imbalance:.3f} times the mean"
    )


def describe_run(
    config: RunConfig, family: Family, chat: ChatFormat, data: Data, made: EpochPlan, plan: Schedule, output: Path
) -> str:
    """Everything a run would do, resolved, as text for `--dry-run`."""
    answers = ", ".join(f"{hook} by {who}" for hook, who in chat.answers.items())
    evaluation = len(data.eval) if data.eval is not None else 0
    return "\n".join(
        [
            f"family: {family.name} ({family.origin}); {answers}",
            f"reward at {chat.terminal_token!r}; pad token {chat.pad.token!r} ({chat.pad.reason})",
            f"template sha256: {chat.template_sha256}",
            f"pairs: {len(data.train)} for training, {evaluation} for evaluation",
            *data.lines,
            f"steps: {plan.total_steps}, {made.num_steps} per epoch, {plan.warmup_steps} of warm-up",
            f"output: {output}",
            "",
            to_toml(config),
            "# deepspeed",
            dumps(deepspeed_config(config, made.world)),
        ]
    )


def closing_text(outcome: Outcome) -> str:
    """What a finished run prints: how good it is, scored examples, where it is, what to do next."""
    lines: list[str] = []
    if outcome.evaluation is not None:
        lines += [evaluation_text(outcome.evaluation), subset_table(outcome.evaluation.get("subsets", []))]
    for example in outcome.examples:
        lines += ["", f"  {_one_line(example['prompt'])}", *_sides(example)]
    lines += ["", f"model saved in {outcome.directory}", *_adapters(outcome.directory)]
    lines += [f"next: btrm score {outcome.directory} INPUT.jsonl -o OUTPUT.jsonl"]
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


def examples(data: Data, rewards_P2: np.ndarray) -> tuple[dict[str, Any], ...]:
    """The first held-out pairs with their rewards, to be shown to a person."""
    if data.eval is None or data.eval_rows is None:
        return ()
    shown = []
    for i in range(min(EXAMPLES, len(data.eval))):
        pair = data.eval_rows[int(data.eval.index_P[i])]
        chosen, rejected = (float(r) for r in rewards_P2[i])
        question = pair.prompt[-1]["content"] if pair.prompt else ""
        shown.append({"prompt": question, "chosen": (chosen, pair.chosen), "rejected": (rejected, pair.rejected)})
    return tuple(shown)
