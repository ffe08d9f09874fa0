"""`btrm doctor`: what a run would train on, as it would see it, and whether anything is wrong with it.

Decides: which checks are made and in which order; cheap ones first, so that a wrong template shows before weights are
loaded. A template or pad token that `btrm train` refuses is looked at nevertheless: its conversations are shown and
counted as it writes them. Nothing is trained, no process group is started.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from btrm_core.chat import ONE, TWO, ChatFormat, Conversation, prepare_chat
from btrm_core.config import apply
from btrm_core.data import PROMPT_IN_EVALUATION, PairData, Ties, WhichPairs, load_pairs, parse_naming
from btrm_core.errors import BtrmError, ConfigError, DataError, FamilyError
from btrm_core.families import Family
from btrm_core.model import (
    NOT_RECOMPUTED,
    build_model,
    check_ids,
    is_finished,
    load_chat,
    load_tokenizer,
    positions_problem,
    read_manifest,
    saved_config,
)
from btrm_core.model import tolerance as model_tolerance
from btrm_core.preflight import Check
from btrm_core.preflight.doctor.check import refused
from btrm_core.preflight.doctor.examples import Example, encode_example, format_as_written, pairs_as_written
from btrm_core.preflight.doctor.kept import messages_kept, positions
from btrm_core.preflight.doctor.model import Patient, loaded, model_checks
from btrm_core.preflight.doctor.rows import content_unused, rows_read
from btrm_core.preflight.doctor.texts import (
    dropped_pairs,
    dropped_reasons,
    labels,
    length_bias,
    repeated_prompts,
    shared_tokens,
    truncation,
)
from btrm_core.preflight.doctor.tokens import count_tokens, one_bos, pad_token, terminal_token
from btrm_core.scoring import Scorer
from btrm_core.settings import RunConfig
from btrm_core.training import Data, choose_family, load_data
from btrm_core.training.processes import compute_dtype

_MODEL_CHECKS = ("model", "head", "packed = separate", "first loss", "pipeline parity")


@dataclass
class Case:
    """What is looked at, as far as it is known before the checks.

    Attributes:
        config: the settings, filled.
        family: who answers; None for a finished model, which answers for itself.
        title: family and model in words.
        directory: of a finished model; None for a base model.
        chat: how conversations become ids; None if nothing can be rendered.
        refusal: why `btrm train` refuses tokenizer or template; `chat` is then as the template has it.
        rows: the training pairs.
        examples: pairs to show.
    """

    config: RunConfig
    family: Family | None
    title: str
    directory: Path | None
    chat: ChatFormat | None
    refusal: FamilyError | None
    rows: PairData
    examples: list[Example]


def examine(config: RunConfig, num_examples: int = 3) -> Case:
    """Find family, tokenizer and data, and encode a few pairs.

    A finished model's directory is looked at as `btrm score` uses it, unless a family is named: then it is a base model
    to go on with.

    Args:
        config: as for `run.train`; without model and data it is the toy.
        num_examples: pairs to show, spread over the data.

    Raises:
        BtrmError: what is named cannot be found or read.
    """
    directory = _finished(config)
    chat: ChatFormat | None = None
    family, refusal = None, None
    if directory is not None:
        own = load_chat(directory)
        config, title = _settings_of(config, directory, own)
        chat = own
    else:
        family, config, described = choose_family(config)
        title = f"family {family.name} ({family.origin}), base model {config.model.name}"
        if family.warning:
            title += f"; warning: {family.warning}"
        try:
            chat = prepare_chat(load_tokenizer(config.model), described, family)
            check_ids(chat, described, str(config.model.name))
        except FamilyError as error:
            refusal = error
    rows = _read(config, config.data.train)
    if family is not None and refusal is not None:
        chat = format_as_written(load_tokenizer(config.model), described, family)
    number, limit = min(num_examples, len(rows)), int(config.data.max_length or 0)
    chosen = [rows[index * len(rows) // number] for index in range(number)]
    examples = [encode_example(row, chat, limit, as_written=refusal is not None) for row in chosen]
    return Case(config, family, title, directory, chat, refusal, rows, examples)


def checks(case: Case, *, with_model: bool = True, full: bool = False) -> Iterator[Check]:
    """Make the checks one at a time.

    Args:
        case: from `examine`.
        with_model: load the weights too.
        full: also make the checks that take long for a large model.

    Raises:
        BtrmError: evaluation data cannot be read.
    """
    yield _format_check(case)
    data, failure = _encoded(case)
    yield from _token_checks(case, data)
    yield from _data_checks(case, data, failure)
    if not with_model or data is None or case.chat is None:
        reason = "not asked for" if not with_model else "needs a sound chat format" if case.refusal else "needs pairs"
        yield from (Check(name, "skip", reason) for name in _MODEL_CHECKS)
        return
    yield from _checks_of_model(case, case.chat, data, full)


def _read(config: RunConfig, sources: Sequence[str]) -> PairData:
    """The pairs of some sources as training reads them."""
    data = config.data
    scored, ties = cast(WhichPairs, data.scored), cast(Ties, data.ties)
    names = parse_naming(data.map, data.format)
    how: dict[str, Any] = {"strict": data.strict, "cache_dir": data.cache_dir, "own_prompts": data.own_prompts}
    return load_pairs(sources, scored=scored, ties=ties, naming=names, **how)


def _format_check(case: Case) -> Check:
    """Whether tokenizer and template are what `btrm train` accepts."""
    name, chat = "chat format", case.chat
    if case.refusal is not None or chat is None:
        error = case.refusal or FamilyError("the template renders nothing")
        return refused(
            name, error, "`btrm train` refuses it", "look at the answers with `btrm families NAME --model M`"
        )
    answers = chat.answers
    pad = f" ({chat.pad.reason})" if chat.pad.reason else ""
    what = (
        f"template by {answers['chat_template']}, reward at {chat.terminal_token}, "
        f"pad {chat.pad.token} by {answers['pad_token']}{pad}"
    )
    figures = {"template_sha256": chat.template_sha256, "answers": answers, "terminal_token": chat.terminal_token}
    return Check(name, "ok", what, figures={**figures, "pad_token": chat.pad.token})


def _encoded(case: Case) -> tuple[Data | None, DataError | None]:
    """The encoded data as training makes it, or why there is none."""
    if case.refusal is not None or case.chat is None:
        return None, None
    try:
        return load_data(case.config, case.chat), None
    except DataError as error:
        return None, error


def _token_checks(case: Case, data: Data | None) -> Iterator[Check]:
    """BOS, terminal token, pad: in all encoded pairs, or in some as a refused template writes them."""
    names, chat = ("one BOS", "terminal token", "pad token"), case.chat
    if chat is None or (data is None and case.refusal is None):
        yield from (Check(name, "skip", "no pair can be encoded") for name in names)
        return
    if data is not None:
        parts = [part for part in (data.train, data.eval) if part is not None]
        counts = count_tokens(((part.id(i), part.pair(i)) for part in parts for i in range(len(part))), chat)
    else:
        counts = count_tokens(pairs_as_written(case.rows, chat), chat)
    yield one_bos(counts, chat)
    yield terminal_token(counts, chat, dropped_reasons(_reports(data)))
    yield pad_token(counts, chat) if chat.pad_id >= 0 else Check(names[2], "skip", "there is no usable pad token")


def _data_checks(case: Case, data: Data | None, failure: DataError | None) -> Iterator[Check]:
    """Rows, lengths, repeats and labels."""
    config = case.config.data
    others = _read(case.config, config.eval) if config.eval else None
    issues = {"train": case.rows.issues} | ({"eval": others.issues} if others is not None else {})
    yield rows_read(issues)
    if found := content_unused(issues):
        yield found
    reports, encoded = _reports(data), ("messages", "truncation", "dropped pairs", "shared tokens")
    if data is not None:
        yield messages_kept(reports)
        yield truncation(reports)
        yield dropped_pairs(reports, data.report["rows"]["train"]["left_out"].get(PROMPT_IN_EVALUATION, 0))
        yield shared_tokens(reports)
    elif failure is not None:
        yield from (Check(name, "skip", "no pair can be encoded") for name in encoded if name != "dropped pairs")
        yield Check(
            "dropped pairs",
            "fail",
            str(failure).partition(". ")[0].rstrip("."),
            "`btrm train` stops there",
            "raise --max-length, mend the pairs, or give other evaluation data",
        )
    else:
        yield from (Check(name, "skip", "needs a sound chat format") for name in encoded)
    yield repeated_prompts(case.rows)
    yield labels(case.rows, dropped_reasons(reports))
    yield length_bias(case.rows)
    if others is not None:
        yield length_bias(others, " (eval)")


def _checks_of_model(case: Case, chat: ChatFormat, data: Data, full: bool) -> Iterator[Check]:
    """Load the model and look at it; a finished one also reproduces the rewards it was saved with."""
    try:
        patient, scorer = admit(case, chat, data)
    except BtrmError as error:
        why = "`btrm train` would stop here" if case.family else "it cannot be used"
        yield refused("model", error, why, "name a whole model with --model")
        yield from (Check(name, "skip", "needs the model") for name in _MODEL_CHECKS[1:])
        return
    model = patient.model
    hf, longest = model.base_model, max(report["longest"] for report in _reports(data))
    if (problem := positions_problem(hf.config, longest, hf)) is not None:
        yield positions(*problem)
        if problem[0]:
            yield from (Check(name, "skip", "needs a position for every token") for name in _MODEL_CHECKS[1:])
            return
    yield loaded(patient)
    if scorer is not None and scorer.manifest.get("self_test"):
        yield _self_test(scorer)
    yield from model_checks(patient, full)


def _self_test(scorer: Scorer) -> Check:
    """Whether a finished model still gives the rewards it was saved with."""
    difference = scorer.self_test()
    tolerance = model_tolerance(scorer.manifest, scorer.model.base_model.dtype)
    figures = {"difference": difference, "tolerance": tolerance}
    what = f"the rewards in btrm.json come out again, to {difference:.1e}"
    if difference <= tolerance:
        return Check("self-test", "ok", what, figures=figures)
    what = f"rewards differ from those in btrm.json by {difference:.2g}"
    why = "weights, configuration or a library are not what the model was saved with"
    return Check("self-test", "fail", what, why, "copy the directory anew, and compare library versions", figures)


def admit(case: Case, chat: ChatFormat, data: Data) -> tuple[Patient, Scorer | None]:
    """Load the model to its device, its head drawn as training draws it.

    Args:
        case: what is looked at, from `examine`.
        chat: how conversations become ids.
        data: the encoded pairs.

    Returns:
        What the checks of a model need, and the scorer that loaded a finished model.

    Raises:
        BtrmError: the model cannot be loaded, or its head not drawn.
    """
    config, scorer = case.config, None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if case.directory is not None:
        dtype, attention, budget = config.model.dtype, config.model.attention, config.train.tokens_per_batch
        scorer = Scorer(str(case.directory), dtype=dtype, attention=attention, tokens_per_batch=budget)
        model, head_is_new = scorer.model, False
    else:
        assert case.family is not None
        # adapters begin as no change, packed weights cannot be saved for other programs, nothing here goes backward
        plain = apply(config, {"lora.rank": None, "model.quantize": "none", **NOT_RECOMPUTED})
        model, head_is_new = build_model(plain, case.family, chat, compute_dtype(config.model.dtype), device)
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{config.model.name} does not fit into {device}'s memory; try --dtype bf16") from error
    limit = int(config.data.max_length or 0)
    patient = Patient(
        model=model,
        head_is_new=head_is_new,
        family=case.family,
        chat=chat,
        pairs=data.train,
        conversations=_plain_conversations(case.rows, chat, limit),
        layout=config.train.layout,
        tokens_per_batch=config.train.tokens_per_batch,
        max_length=limit,
    )
    return patient, scorer


def _plain_conversations(rows: PairData, chat: ChatFormat, limit: int) -> list[Conversation]:
    """A pair's conversations that are not cut and spell no control token, so that any program gets the same ids."""
    for row in rows.rows(0, 50):
        if row["rejected_prompt"]:
            continue
        answers = [row["chosen"], row["rejected"]]
        both = [[*row["prompt"], {"role": "assistant", "content": answer}] for answer in answers]
        group = chat.encode_group(row["prompt"], answers, limit)
        if group.error or group.dropped_turns or group.cut_characters:
            continue
        if group.sequences == chat.encoder.encode([chat.render(c) for c in both]):
            return both
    return [TWO, ONE]


def _finished(config: RunConfig) -> Path | None:
    """The directory of a finished model, if that is what the settings name and no family is."""
    if config.family is not None or config.model.name is None:
        return None
    base = Path(config.model.name)
    return next((d for d in (base, base / "model") if is_finished(d)), None)


def _settings_of(config: RunConfig, directory: Path, chat: ChatFormat) -> tuple[RunConfig, str]:
    """The settings for a finished model, and what to call it."""
    own = {"tokenizer.pad_token": config.tokenizer.pad_token, "tokenizer.chat_template": config.tokenizer.chat_template}
    own["head.init_std"] = config.head.init_std  # type: ignore[assignment]
    if given := [key for key, value in own.items() if value is not None]:
        raise ConfigError(
            f"{given[0]} is set, but {directory} is a finished model with its own; leave it out, or name --family to "
            "look at it as a base model"
        )
    if not config.data.train:
        raise ConfigError("no data is named: give --data SRC (a file, a dataset directory or a hub id)")
    made = read_manifest(directory)
    positions = saved_config(directory).get_text_config().max_position_embeddings
    limit = config.data.max_length or chat.max_length or positions
    title = f"finished model {directory}, trained by family {made.get('family')} ({made.get('origin')})"
    return apply(config, {"data.max_length": int(limit)}), title


def _reports(data: Data | None) -> list[dict[str, Any]]:
    return list(data.report["encoding"].values()) if data is not None else []
