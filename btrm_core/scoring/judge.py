"""Everything `btrm eval` asks of one model: pairs, suites, best of N, probes.

Decides which pairs are probed and how many, and that a response which cannot be scored is a missing reward, not an end.

Shapes: P pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from btrm_core import files
from btrm_core.console import LongWork
from btrm_core.data import Naming, raw_rows
from btrm_core.errors import DataError
from btrm_core.evaluation import (
    PROBES,
    BestOfN,
    Invariance,
    Item,
    PairRewards,
    ProbeResult,
    Suite,
    SuiteResult,
    best_of_n,
    load_suite,
    probed,
    run_suite,
)
from btrm_core.scoring.evaluate import SourceRewards, source_rewards
from btrm_core.scoring.kept import Kept, Part
from btrm_core.scoring.records import record_of
from btrm_core.scoring.responses import Responses
from btrm_core.scoring.scorer import Scorer

PROBED_PAIRS = 300
INVARIANCE_PAIRS = 32
_TOGETHER = 128


@dataclass(frozen=True)
class Request:
    """What to ask.

    Attributes:
        data: sources of pairs.
        suites: NAME, or NAME=SRC for rows that are not where the suite has them; several of one name count together.
        best_of_n: sources of rows with `prompt`, `responses` and `gold`.
        probes: whether to probe the pairs of `data`.
        naming: the data's own names of columns and roles.
    """

    data: Sequence[str] = ()
    suites: Sequence[str] = ()
    best_of_n: Sequence[str] = ()
    probes: bool = False
    naming: Naming | None = None


@dataclass(frozen=True)
class ModelResult:
    """What was found of one model.

    Attributes:
        model: its directory, or the name in a file of rewards.
        facts: family, type and speed; empty if its rewards were read from a file.
        sources: the rewards of its pairs, per source.
        suites: results, with what to write in each suite's own form.
        best_of_n: per source.
        probes: per edit.
        invariance: of its rewards; None if it was not probed.
    """

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    sources: Sequence[SourceRewards] = ()
    suites: Sequence[tuple[SuiteResult, Any]] = ()
    best_of_n: Sequence[tuple[str, BestOfN]] = ()
    probes: Sequence[ProbeResult] = ()
    invariance: Invariance | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but the rewards as JSON values."""
        sources = [
            {"data": s.rewards.data, "rows": s.rows, "encoding": s.encoding, "notes": list(s.notes)}
            for s in self.sources
        ]
        return {
            "model": self.model,
            **self.facts,
            "sources": sources,
            "suites": [result.to_dict() for result, _ in self.suites],
            "best_of_n": [{"data": source, **found.to_dict()} for source, found in self.best_of_n],
            "probes": [result.to_dict() for result in self.probes],
            "invariance": None if self.invariance is None else self.invariance.to_dict(),
        }


def judge(scorer: Scorer, request: Request, kept: Kept | None = None) -> ModelResult:
    """Ask a model everything.

    Args:
        scorer: the model.
        request: sources of pairs, suites, best-of-N sources, and whether to probe; probes need a source of pairs.
        kept: goes on where an interrupted evaluation was, and keeps how far this one comes.

    Raises:
        DataError: a source cannot be read or holds nothing.
        ConfigError: there is no such suite.
        CheckpointError: the model gives a reward that is not a finite number.
    """
    suites: dict[str, list[str]] = {}
    for asked in dict.fromkeys(request.suites):
        name, _, source = asked.partition("=")
        suites.setdefault(name, []).extend([source] if source else load_suite(name).SOURCES)
    model = str(scorer.directory)
    sources = [source_rewards(scorer, source, request.naming, kept) for source in dict.fromkeys(request.data)]
    found = []
    for suite, places in [(load_suite(name), places) for name, places in suites.items()]:
        items = list(suite_items(suite, list(dict.fromkeys(places))))
        rewards = responses_rewards(scorer, [(i.prompt, i.responses) for i in items], suite.NAME, kept)
        found.append((run_suite(suite, items, rewards, model), suite.results(items, rewards, model)))
    results: list[ProbeResult] = []
    invariance = None
    if request.probes and sources:
        results, invariance = probe([s.rewards for s in sources], scorer, kept)
    pairs = sum(len(s.rewards) for s in sources)
    seconds = sum(s.seconds for s in sources)
    return ModelResult(
        model=model,
        facts={
            "family": scorer.manifest.get("family"),
            "dtype": str(scorer.model.hf.dtype).removeprefix("torch."),
            "bad_rows": sum(s.bad_rows for s in sources),
            "seconds": round(seconds, 3),
            "pairs_per_second": round(pairs / seconds, 3) if seconds else 0.0,
        },
        sources=sources,
        suites=found,
        best_of_n=[(source, best_of_source(scorer, source, kept)) for source in request.best_of_n],
        probes=results,
        invariance=invariance,
    )


def suite_items(suite: Suite, sources: Sequence[str]) -> Iterator[Item]:
    """The items of a suite's rows.

    Args:
        suite: what makes items of rows.
        sources: ids or files as after `--data`, read one after another.

    Raises:
        DataError: a source cannot be read, or a row is not of the suite's form; says where.
    """
    for source in sources:
        for where, line, row in raw_rows(source):
            try:
                yield from suite.items(row, where)
            except DataError as error:
                raise DataError(f"{source}, row {line} is none of suite {suite.NAME}: {error}") from error


def responses_rewards(
    scorer: Scorer, groups: Sequence[Any], name: str = "", kept: Kept | None = None
) -> list[list[float]]:
    """Rewards of the responses to every prompt, with progress; NaN where one cannot be scored.

    Args:
        scorer: the model.
        groups: prompt and responses each.
        name: what the progress bar is called.
        kept: goes on where an interrupted evaluation was.

    Returns:
        One list per group, in the order of its responses.
    """
    of = files.digest([list(group) for group in groups])
    with contextlib.nullcontext(Part()) if kept is None else kept.part(scorer, name, of) as part:
        return _computed(scorer, groups, name, part)


def _computed(scorer: Scorer, groups: Sequence[Any], name: str, part: Part) -> list[list[float]]:
    """The rewards of a part, those from before first."""
    out: list[list[float]] = [one for chunk in part.chunks for one in chunk]
    chunks = [groups[start : start + _TOGETHER] for start in range(len(out), len(groups), _TOGETHER)]
    with LongWork(f"scoring {name}".rstrip(), len(groups), "prompt") as work:
        work.reach(len(out))
        for scored in scorer.stream(chunks):
            found = [[float("nan") if r is None else float(r) for r in one.rewards] for one in scored]
            part.add(found)
            out += found
            work.reach(len(out))
    return out


def best_of_source(scorer: Scorer, source: str, kept: Kept | None = None) -> BestOfN:
    """Best of N on rows with a prompt (text or messages), `responses` and their `gold` values.

    Args:
        scorer: the model.
        source: as after `--data`; `scores` is read where there is no `gold`.
        kept: goes on where an interrupted evaluation was.

    Raises:
        DataError: a row has something else.
    """
    groups: list[Responses] = []
    gold: list[list[float]] = []
    for _, line, row in raw_rows(source):
        responses, values = row.get("responses"), row.get("gold", row.get("scores"))
        if not isinstance(responses, list) or not isinstance(values, list) or len(responses) != len(values):
            raise DataError(f"{source}, row {line}: expected 'responses' and as many numbers in 'gold'")
        if not all(isinstance(r, str) for r in responses):
            raise DataError(f"{source}, row {line}: expected texts in 'responses'")
        asked = record_of({"prompt": row.get("prompt"), "responses": ["one", "another"]}, line)
        if asked.error:
            raise DataError(f"{source}, row {line}: {asked.error}")
        groups.append((asked.prompt, responses))
        gold.append([_gold(value, f"{source}, row {line}") for value in values])
    return best_of_n(responses_rewards(scorer, groups, source, kept), gold)


def _gold(value: Any, where: str) -> float:
    """A gold value; NaN where there is none, which leaves the prompt out."""
    try:
        if value is None or isinstance(value, int | float):
            return float("nan" if value is None else value)
    except OverflowError:
        pass
    raise DataError(f"{where}: 'gold' holds {str(value)[:40]!r}, expected a number or null")


def probe(
    parts: Sequence[PairRewards], scorer: Scorer, kept: Kept | None = None
) -> tuple[list[ProbeResult], Invariance]:
    """Edit the answers of some pairs, spread evenly over all, and compare the rewards.

    Args:
        parts: rewards of the unedited pairs, all with their texts; at most `PROBED_PAIRS` pairs of all are edited.
        scorer: the model that gave them.
        kept: goes on where an interrupted evaluation was.

    Returns:
        One result per edit; and how far rewards depend on what is scored with them, from the first of these pairs.
    """
    every = PairRewards.joined(parts)
    assert every.text is not None
    places = np.unique(np.linspace(0, len(every) - 1, min(PROBED_PAIRS, len(every))).round().astype(np.int64))
    texts = [every.text(int(place)) for place in places]
    prompts = [[{"role": role, "content": content} for role, content in text.prompt] for text in texts]
    before_P2 = every.reward_P2[places]
    results = []
    for name, edit in PROBES.items():
        groups = [
            (prompt, [edit(prompt[-1]["content"], answer) for answer in (text.chosen, text.rejected)])
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        after_P2 = np.array(responses_rewards(scorer, groups, f"probe: {name}", kept)).reshape(-1, 2)
        results.append(probed(name, before_P2, after_P2, every.prompt_P[places]))
    some = [(p, [t.chosen, t.rejected]) for p, t in zip(prompts, texts, strict=True)][:INVARIANCE_PAIRS]
    return results, invariance_of(scorer, some)


def invariance_of(scorer: Scorer, groups: Sequence[tuple[Any, list[str]]]) -> Invariance:
    """Score the same answers together, each alone, and in the opposite order.

    Prompts that were cut are left out: how much is cut depends, rightly, on the longest answer to a prompt.

    Args:
        scorer: the model.
        groups: prompt and responses each.

    Returns:
        The largest differences in reward, and the rewards' standard deviation; all 0 if every prompt was cut or failed.
    """
    scored = scorer.score(groups)
    whole = [group for group, one in zip(groups, scored, strict=True) if not one.truncated and not any(one.errors)]
    if not whole:
        return Invariance(0.0, 0.0, 0.0)
    together = np.array([r for one in responses_rewards(scorer, whole) for r in one])
    alone = np.array([responses_rewards(scorer, [(p, [answer])])[0][0] for p, answers in whole for answer in answers])
    turned = responses_rewards(scorer, [(p, answers[::-1]) for p, answers in reversed(whole)])
    back = np.array([r for one in reversed(turned) for r in reversed(one)])
    return Invariance(
        alone=float(np.abs(alone - together).max()),
        order=float(np.abs(back - together).max()),
        spread=float(together.std()),
    )
