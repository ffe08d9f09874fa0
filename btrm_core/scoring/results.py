"""What was found of several models, put together: evaluations, comparisons and tables of one report."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core.console import LongWork
from btrm_core.errors import DataError
from btrm_core.evaluation import Comparison, PairRewards, Report, Table, assess, compare, percent, short
from btrm_core.scoring.evaluate import SourceRewards
from btrm_core.scoring.judge import ModelResult


def from_scores(parts: Sequence[PairRewards]) -> list[ModelResult]:
    """Results of the models that a file of rewards names.

    Args:
        parts: one per model and source; models keep the order of their first.
    """
    models: dict[str, list[SourceRewards]] = {}
    for part in parts:
        models.setdefault(part.model, []).append(SourceRewards(part, {}, {}, (), 0, 0.0))
    return [ModelResult(model, sources=tuple(sources)) for model, sources in models.items()]


def report_of(results: Sequence[ModelResult], against: Sequence[ModelResult] = (), title: str = "") -> Report:
    """Evaluate every model on every source and on all together, and compare each with those it stands against.

    Args:
        results: the models asked about.
        against: models that they are compared with; evaluated and shown as well.
        title: of the page; "" makes one of the models' names.

    Raises:
        DataError: a source holds no pair that can be judged, or two models share none.
    """
    everything = _told_apart([*results, *against])
    results, against = everything[: len(results)], everything[len(results) :]
    sets = [rewards for result in everything for rewards in _sets(result)]
    evaluations, comparisons = [], []
    with LongWork("computing figures", len(sets) + len(results) * len(against), "table") as work:
        for rewards in sets:
            evaluations.append((assess(rewards), rewards))
            work.add(1)
        for comparison in _comparisons(results, against):
            comparisons.append(comparison)
            work.add(1)
    return Report(
        title=title or _title(everything),
        evaluations=evaluations,
        comparisons=comparisons,
        facts=_facts(everything),
        tables=[*_suites(everything), *_best_of_n(everything), *_probes(everything)],
        extra={"models": [result.to_dict() for result in everything]},
    )


def _sets(result: ModelResult) -> list[PairRewards]:
    """The rewards of every source, and of all together if there are several."""
    sets = [source.rewards for source in result.sources]
    return [*sets, PairRewards.joined(sets)] if len(sets) > 1 else sets


def _told_apart(results: Sequence[ModelResult]) -> list[ModelResult]:
    """The results, those of equal short names renamed after the folders that differ, or numbered."""
    names = [short(result.model) for result in results]
    out = list(results)
    for name in {name for name in names if names.count(name) > 1}:
        places = [place for place, other in enumerate(names) if other == name]
        folders = zip(*(reversed(results[place].model.split("/")) for place in places), strict=False)
        tags = next((parts for parts in folders if len(set(parts)) == len(parts)), range(1, len(places) + 1))
        for place, tag in zip(places, tags, strict=True):
            model, result = f"{name} ({tag})", results[place]
            sources = [replace(one, rewards=replace(one.rewards, model=model)) for one in result.sources]
            out[place] = replace(result, model=model, sources=sources)
    return out


def calibration_values(result: ModelResult) -> dict[str, Any]:
    """What an evaluation measured of a model's rewards: the temperature that fits them best, their mean and spread.

    Args:
        result: of a model that gave rewards to pairs; those of several sources count together.

    Returns:
        JSON values for `btrm.json`; the temperature is null where none fits best, as when no pair is wrong.

    Raises:
        DataError: no pair can be judged, or the rewards do not vary.
    """
    rewards = PairRewards.joined([source.rewards for source in result.sources])
    temperature = assess(rewards).calibration.temperature
    finite = rewards.reward_P2[np.isfinite(rewards.reward_P2)]
    if not finite.std() > 0:
        raise DataError(f"the rewards of {result.model} do not vary, so they have no scale; nothing is saved")
    return {
        "temperature": temperature,
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "pairs": len(rewards),
        "data": [source.rewards.data for source in result.sources],
        "data_sha256": [source.fingerprint for source in result.sources],
        "btrm_version": version("btrm"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def notes(results: Sequence[ModelResult]) -> list[str]:
    """What the reader should know of rows left out and conversations cut, once for each source.

    Args:
        results: equal notes of several models are told once.
    """
    told = [(source.rewards.data, note) for result in results for source in result.sources for note in source.notes]
    return [f"{data}: {note}" for data, note in dict.fromkeys(told)]


def write_suites(results: Sequence[ModelResult], directory: str | Path) -> list[Path]:
    """Write the results of suites in their own forms, as `NAME.json`, one number more for each further model.

    Args:
        results: models that were asked no suite write nothing.
        directory: made if it is missing; files of these names in it are replaced.

    Returns:
        The files, in the order of models and suites.

    Raises:
        DataError: the directory cannot be written.
    """
    written: list[Path] = []
    asked = [result for result in results if result.suites]
    for place, result in enumerate(asked, start=1):
        for found, values in result.suites:
            several = f"-{place}" if len(asked) > 1 else ""
            path = Path(directory) / f"{found.suite}{several}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(_sound(values), indent=1, ensure_ascii=False) + "\n"
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise DataError(f"cannot write {path}: {error.strerror or error}; name another directory") from error
            written.append(path)
    return written


def _sound(value: Any) -> Any:
    """JSON knows no NaN: a reward that is missing becomes null."""
    if isinstance(value, Mapping):
        return {key: _sound(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_sound(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _comparisons(
    results: Sequence[ModelResult], against: Sequence[ModelResult]
) -> Iterator[tuple[Comparison, PairRewards]]:
    for result in results:
        for other in against:
            if result.sources and other.sources:
                first, second = (PairRewards.joined([s.rewards for s in one.sources]) for one in (result, other))
                yield compare(first, second), first


def _title(results: Sequence[ModelResult]) -> str:
    return "Reward model evaluation" if len(results) != 1 else f"Evaluation of {results[0].model}"


def _facts(results: Sequence[ModelResult]) -> dict[str, str]:
    facts = {"btrm": version("btrm")}
    for result in results:
        known = result.facts
        if known:
            shown = [known["dtype"], f"{known['pairs_per_second']:.1f} pairs/s"]
            shown += [f"family {known['family']}"] if known["family"] else []
            facts[result.model] = ", ".join(shown)
    return facts


def _suites(results: Sequence[ModelResult]) -> list[Table]:
    """One table per suite: its total and sections, then its subsets."""
    names = dict.fromkeys(found.suite for result in results for found, _ in result.suites)
    tables = []
    for name in names:
        rows: list[tuple[str, str, str, str]] = []
        for result in results:
            for found, _ in result.suites:
                if found.suite != name:
                    continue
                total = {"total": found.scores.total}
                for part, value in {**total, **found.scores.sections}.items():
                    ends = found.intervals.get(part)
                    interval = "–" if ends is None else f"{100 * ends.low:.1f} to {100 * ends.high:.1f}"
                    rows.append((short(result.model), part, percent(value), interval))
                subsets = {k: v for k, v in found.scores.subsets.items() if k not in found.scores.sections}
                rows += [(short(result.model), part, percent(value), "") for part, value in subsets.items()]
                if found.unscored:
                    rows.append(
                        (short(result.model), "could not be scored, counted as wrong", f"{found.unscored:,}", "")
                    )
        tables.append(Table(f"Suite {name}", ("model", "part", "score", "95 % interval"), rows))
    return tables


def _best_of_n(results: Sequence[ModelResult]) -> list[Table]:
    tables = []
    for result in results:
        for source, found in result.best_of_n:
            number = len(found.curve)
            shown = [point for point in found.curve if point.n in {1, 2, 3, 4, 8, 16, 32, 64, 128, number}]
            rows = [(p.n, p.gold, p.oracle, p.random, p.regret, p.kl) for p in shown]
            note = (
                f"{result.model}: gold value of the answer with the highest reward among n; {found.prompts:,} prompts"
            )
            note += f", {found.left_out:,} left out" if found.left_out else ""
            columns = ("n", "chosen", "oracle", "random", "regret", "KL in nats")
            tables.append(Table(f"Best of N: {source}", columns, rows, note))
    return tables


def _probes(results: Sequence[ModelResult]) -> list[Table]:
    tables = []
    for result in results:
        if not result.probes:
            continue
        rows: list[tuple[Any, ...]] = [
            (
                probe.name,
                probe.pairs,
                probe.shift,
                probe.moved,
                percent(probe.flips_both),
                percent(probe.flips_rejected),
                percent(probe.flips_chosen),
            )
            for probe in result.probes
        ]
        note = f"{short(result.model)}: answers edited; shifts in standard deviations of the rewards. "
        if (found := result.invariance) is not None:
            note += (
                f"The same answers alone differ by at most {found.alone:.2g}, in another order by {found.order:.2g} "
                f"(rewards have a standard deviation of {found.spread:.2g})."
            )
        columns = ("edit", "pairs", "mean shift", "mean size", "order changes", "rejected edited", "chosen edited")
        tables.append(Table("Probes", columns, rows, note))
    return tables
