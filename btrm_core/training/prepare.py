"""What a run needs before its first step: family, settings, data, model, engine; one function each.

Decides: the order of asking (settings, then family, then default) and what is checked before anything expensive starts.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from btrm_core import config as config_module
from btrm_core import families
from btrm_core.cache import cache_root
from btrm_core.chat import ChatFormat, prepare_chat
from btrm_core.config import apply, flat, resolve, settled
from btrm_core.console import LongWork, say
from btrm_core.data import (
    PairData,
    TokenStore,
    drop_overlap,
    encode_pairs,
    load_evaluation,
    load_pairs,
    parse_naming,
    sample_path,
    split_held_out,
)
from btrm_core.errors import ConfigError, DataError, FamilyError
from btrm_core.evaluation import check_figure, require_decided
from btrm_core.families import Family
from btrm_core.model import (
    RewardModel,
    Use,
    base_config,
    check_first_loss,
    check_heads,
    check_ids,
    divide_rows,
    expected_kernel,
    load_tokenizer,
    toy_model,
    trusted,
)
from btrm_core.packing import RowForm, row_form
from btrm_core.settings import RunConfig
from btrm_core.signals import stopping_at_once
from btrm_core.training.processes import Runtime, compute_dtype, first_that_shares
from btrm_core.training.report import trackers
from btrm_core.training.rewards import some_rewards
from btrm_core.training.session import Data, Job, Session

if TYPE_CHECKING:
    from btrm_core.data import Ties, WhichPairs

CHECKED_PAIRS = 64
CHECKED_GROUPS = 3
MAX_WORKERS = 8
SHOW_PROGRESS_FROM = 20_000


def choose(config: RunConfig) -> Job:
    """Find the family, fill the settings from its recipe (without a base model the toy's), set up its tokenizer.

    Args:
        config: The settings as the user gave them.

    Raises:
        FamilyError: as `choose_family`, or an answer of the family breaks the contract of its hook.
        ConfigError: as `choose_family`.
    """
    family, config, described = choose_family(config)
    tokenizer = load_tokenizer(config.model)
    try:
        chat = prepare_chat(tokenizer, described, family)
    except FamilyError as error:
        if family.origin in str(error):
            raise
        raise FamilyError(f"family '{family.name}' ({family.origin}): {error}") from error
    check_ids(chat, described, str(config.model.name))
    return Job(config, family, chat, output_directory(config, family))


def choose_family(config: RunConfig) -> tuple[Family, RunConfig, Any]:
    """Find the family and fill the settings; returns the base model's transformers configuration as well.

    Args:
        config: The settings as the user gave them.

    Returns:
        The family; the settings with nothing left open; the configuration, in which no weight was read.

    Raises:
        FamilyError: the family is unknown or broken, or does not claim the checkpoint; without `--family`, not exactly
            one claims it.
        ConfigError: no data is named for a base model, nothing says what to train, settings of adapters are given
            without a rank, or processes cannot share the model's heads as asked.
    """
    trackers(config.output.report_to)
    config_module.check(config)
    if config.force_family and config.family is None:
        raise ConfigError("--force-family forces the family that is named: give --family NAME too")
    if config.model.name is None and config.family is None:
        raise ConfigError("nothing says what to train: give --family NAME for the demo, or --model ID|DIR")
    if config.model.name is None:
        family = families.load(str(config.family), config, aside_first=True)
        config = toy_settings(config, family, cache_root(config.data.cache_dir))
        described = base_config(config.model)
    else:
        described = base_config(config.model)
        named = config.family
        family = families.load(named, config, aside_first=True) if named else families.detect(described, config)
    family.warning = families.require_claim(family, described, force=config.force_family)
    config = resolve(config, family.recipe())
    check_heads(described, config.distributed.sequence_parallel)
    if not config.data.train:
        raise ConfigError("no training data is named: give --data SRC (a file, a dataset directory or a hub id)")
    return family, config, described


def load_data(config: RunConfig, chat: ChatFormat, runtime: Runtime | None = None) -> Data:
    """Read, check, split and encode the pairs; of processes that share a cache the first does it, the others read.

    Args:
        config: Resolved settings.
        chat: What the ids of a conversation are.
        runtime: This process among those of the run; None for a process alone.

    Raises:
        DataError: a source cannot be read, or no training pair is left.
        ConfigError: the loss takes no soft labels and the data has some.
    """
    with stopping_at_once():  # nothing is there yet that could be saved
        if runtime is None or runtime.world == 1:
            return _load_data(config, chat)
        return _load_in_turn(config, chat, runtime)


def _load_in_turn(config: RunConfig, chat: ChatFormat, runtime: Runtime) -> Data:
    root = cache_root(config.data.cache_dir)
    with contextlib.suppress(OSError):  # whoever has to write there will say so
        root.mkdir(parents=True, exist_ok=True)
    first = first_that_shares(root, runtime) == runtime.rank
    if not first:
        runtime.barrier()
    made = _load_data(config, chat)
    if first:
        runtime.barrier()
    return made


def _load_data(config: RunConfig, chat: ChatFormat) -> Data:
    data = config.data
    scored, ties = cast("WhichPairs", data.scored), cast("Ties", data.ties)
    names = parse_naming(data.map, data.format)
    read = partial(load_pairs, strict=data.strict, cache_dir=data.cache_dir, naming=names)
    rows = read(data.train, scored=scored, ties=ties, own_prompts=data.own_prompts)
    held_out: PairData | None = None
    if data.eval:
        held_out = load_evaluation(data.eval, strict=data.strict, cache_dir=data.cache_dir, scored=scored, naming=names)
        rows, _ = drop_overlap(rows, held_out)
    issues = {"train": rows.issues, **({"eval": held_out.issues} if held_out is not None else {})}
    if not data.eval and data.held_out_fraction > 0:
        rows, held_out = split_held_out(rows, data.held_out_fraction)
    parts = {"train": rows, "eval": held_out}
    encoded = {
        name: _encoded(name, part, config, chat) for name, part in parts.items() if part is not None and len(part)
    }
    if "eval" in encoded and held_out is not None:
        encoded["eval"].sets = held_out.sets
        require_decided(encoded["eval"].judged)  # not after the steps that the first evaluation comes after
    if config_module.keeps_best(config):
        if "eval" not in encoded:
            asked = "--early-stopping" if config.train.early_stopping is not None else "--best-by"
            asked = "--keep-best" if config.output.keep_best else asked
            raise ConfigError(f"{asked} needs evaluation pairs: give --eval-data SRC, or hold some out")
        decided = encoded["eval"].probability_P > 0.5
        subsets = [s for s, ok in zip(encoded["eval"].subsets(), decided, strict=True) if ok]
        check_figure(config.output.best_by, subsets, encoded["eval"].sets)
    if not len(encoded.get("train", ())):
        raise DataError("no training pairs are left after encoding; see the counts above, or raise --max-length")
    if config.loss.ranking == "plackett-luce" and (encoded["train"].probability_P < 1).any():
        raise ConfigError("loss.ranking=plackett-luce takes no soft labels, and the data has some (key 'probability')")
    report = {
        "sources": list(data.train),
        "eval_sources": list(data.eval) or f"held out by prompt hash, {data.held_out_fraction:g} of the pairs",
        "fingerprint": rows.fingerprint,
        "training_pairs": encoded["train"].digest,
        "rows": {name: issue.to_dict() for name, issue in issues.items()},
        "encoding": {name: part.report for name, part in encoded.items()},
    }
    lines = [f"{name} data: {issue.format()}" for name, issue in issues.items() if issue.noteworthy]
    lines += [f"{name} data: {text}" for name, part in encoded.items() if (text := part.describe())]
    lines += _prompts_text(encoded["train"], data.group_by)
    return Data(encoded["train"], encoded.get("eval"), report, lines, held_out)


def _encoded(name: str, part: PairData, config: RunConfig, chat: ChatFormat) -> TokenStore:
    """The tokens of the pairs of one side, "train" or "eval", which errors name."""
    data = config.data
    workers = data.workers or max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 2))
    length = settled(data.max_length, "data.max_length")
    with LongWork(f"encoding the {name} data", len(part), "pair") as work:
        try:
            found = encode_pairs(part, chat, length, workers=workers, cache_dir=data.cache_dir, progress=work.reach)
        except DataError as error:
            raise DataError(f"{name} data: {error}") from error
        work.reach(len(part))  # also where it was kept from before
    if data.strict and found.report["altered"]:
        raise DataError(f"{name} data: {found.describe()}; expected every message as the data has it (--strict)")
    return found


def _prompts_text(store: TokenStore, group_by: str) -> list[str]:
    """What becomes of prompts with several pairs, if there are any."""
    pairs, units = len(store), store.places.num_units
    if store.num_groups == pairs:
        return []
    kept = "share a step" if group_by == "prompt" else "are shuffled one by one"
    text = f"train data: {pairs:,} pairs of {store.num_groups:,} prompts; the pairs of a prompt {kept}"
    if units < pairs:
        text += f"; those of one row of scored responses count as one: {units:,} in all"
    return [text]


def usable_form(job: Job, model: RewardModel, data: Data, runtime: Runtime) -> RowForm:
    """The rows asked for; if they are not exact for this model, the next that are, with the reason said.

    Args:
        job: Settings, family and chat format.
        model: The reward model on its device; its kernel may be changed to another, or to "padded".
        data: Its longest groups are what is checked.
        runtime: All processes take part, and agree.

    Returns:
        The form of rows in which training and evaluation compute.

    Raises:
        ConfigError: no way of computing the model is exact here, or none in which processes can share rows as asked.
    """
    for note in model.notes:
        say(runtime, note)
    use = Use(
        layout=job.config.train.layout,
        pad_id=job.chat.pad_id,
        longest=job.config.data.max_length,
        allowed=job.family.recipe().attention,
        cache_dir=job.config.data.cache_dir,
    )
    longest = data.train.longest(CHECKED_GROUPS)
    with LongWork("checking how rows may be packed"):
        trust = trusted(model, longest, use, agree=runtime.any)
    if trust.note:
        say(runtime, trust.note)
    if runtime.share is not None:
        divide_rows(model, runtime.share, longest, agree=runtime.any)
    return row_form(trust.layout, model.kernel, runtime.device.type, job.chat.pad_id)


def check_first(session: Session) -> float:
    """The loss before the first step over some pairs of the training data; warns if it is not near ln 2.

    Args:
        session: The run, its engine untrained and its head new; all processes take part.

    Returns:
        The mean Bradley-Terry loss of at most `CHECKED_PAIRS` pairs.
    """
    pairs, budget = session.data.train, session.tokens_per_batch
    with LongWork("computing the loss before the first step"):
        ids, rewards_P2 = some_rewards(
            session.engine, pairs, session.runtime, session.form, tokens_per_batch=budget, count=CHECKED_PAIRS
        )
    first = check_first_loss(rewards_P2, [pairs.id(int(i)) for i in ids])
    if first.warning:
        say(session.runtime, first.warning)
    return first.loss


def expected_form(job: Job) -> RowForm:
    """The form of rows that a run on this machine takes, from the configuration of its model alone.

    What the self-check decides is left out: it needs the weights.

    Args:
        job: Settings, family and chat format; the kernel asked for, or the first one usable here.

    Raises:
        ConfigError: the attention asked for cannot be used here.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = expected_kernel(job.config.model, job.family, compute_dtype(job.config.model.dtype), device)
    return row_form(job.config.train.layout, kernel, device, job.chat.pad_id)


def output_directory(config: RunConfig, family: Family) -> Path:
    """Where the run writes: `--output`, else runs/<family>-<base model>.

    Args:
        config: Settings with the base model named.
        family: Gives its name.
    """
    if config.output.dir:
        return Path(config.output.dir).expanduser()  # a shell leaves the ~ of --output=~/x
    return Path("runs") / f"{family.name}-{Path(str(config.model.name)).name}"


SETTINGS: dict[str, Any] = {
    "data.max_length": 512,
    "train.pairs_per_step": 16,
    "train.learning_rate": 1e-3,
    "train.epochs": 3.0,
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.01,
}


def toy_settings(config: RunConfig, family: Family, cache_dir: Path) -> RunConfig:
    """Fill in the toy base model, the sample and settings that suit them, where the run says nothing.

    Args:
        config: Settings of a run without `--model`; what they say is kept.
        family: Whose tiny shape the toy has.
        cache_dir: The root of btrm's cache, where the toy is kept.

    Returns:
        Settings in which base model, data, output directory and the keys of `SETTINGS` are filled in.

    Raises:
        FamilyError: the family's recipe gives no `tiny` shape.
    """
    current = flat(config)
    values: dict[str, Any] = {"model.name": str(toy_model(family, cache_dir))}
    if not config.data.train:
        values["data.train"] = (sample_path("train"),)
        if not config.data.eval:
            values["data.eval"] = (sample_path("held_out"),)
    values.update({k: v for k, v in SETTINGS.items() if current[k] is None})
    if config.output.dir is None:
        values["output.dir"] = f"runs/{family.name}-demo"
    return apply(config, values)
