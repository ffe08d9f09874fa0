"""What was wrong with the rows of the data, and how it is told.

Nothing is dropped in silence: every row that gives no pair is counted under a short `kind`, and the first
few of each kind are kept word for word with their file and line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from btrm_core.errors import DataError

EXAMPLES_KEPT = 5
_NAMES_SHOWN = 20
_NAMES_KEPT = 200
_OTHER_KEYS = "(other keys)"


PROMPT_IN_EVALUATION = "prompt also in the evaluation data"


_CONTENT = "tool function reason think thought image audio video document context history".split()


def is_content(key: str) -> bool:
    """True if a key that was not used is likely to hold a part of what was judged, and no metadata.

    Args:
        key: the name of the key, with the object it is in before a dot.

    >>> is_content("messages.reasoning_content"), is_content("worker_id")
    (True, False)
    """
    return any(word in key.lower() for word in _CONTENT)


@dataclass(frozen=True)
class RowIssue:
    """One row (or one file) that gives no pair.

    Attributes:
        source: the file, folder or hub id as the user gave it.
        line: line of a text file or row of a table, counted from 1; 0 when the whole file is meant.
        reason: what is wrong, with the value, and what was expected.
        kind: the short class it is counted under, for example "missing key".
        bad: True when the row breaks the format; False when it is sound but holds no preference (a tie).
    """

    source: str
    line: int
    reason: str
    kind: str = ""
    bad: bool = True

    def __str__(self) -> str:
        return f"{_place(self)}: {self.reason}"


@dataclass
class IssueReport:
    """What was read, what was kept, and every reason for the difference.

    Attributes:
        rows: rows read from all sources (single-response rows of one prompt count each). All are accounted for:
            rows = used + those in `counts` + those in `skipped`.
        pairs: pairs made from them.
        counts: rows that break the format, by kind.
        skipped: sound rows without a preference and pairs left out on purpose, by kind.
        examples: the first `EXAMPLES_KEPT` issues of each kind, in reading order.
        notes: what else the user should know, such as files of a folder that were left out.
        used: rows that gave pairs.
        files: files that hold no row at all, by kind.
        unused: keys that held something which was not used, with the number of rows that gave pairs all the same.
        remarks: what was understood in a way the user should know, with the number of rows.
    """

    rows: int = 0
    pairs: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[RowIssue]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used: int = 0
    files: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """Number of rows that break the format."""
        return sum(self.counts.values())

    @property
    def noteworthy(self) -> bool:
        """True if the user should see the report: something was left out, or chosen on their behalf."""
        return bool(self.counts or self.skipped or self.notes or self.files or self.unused or self.remarks)

    @property
    def first_bad(self) -> RowIssue | None:
        """The first bad row of the first kind met, or the first empty file; None when everything is sound."""
        return next((self.examples[kind][0] for kind in (*self.counts, *self.files)), None)

    def add(self, issue: RowIssue, rows: int = 1) -> None:
        """Count the rows that an issue costs, and keep it as an example if it is among the first of its kind.

        Args:
            issue: what is wrong, and where it begins.
            rows: how many rows it costs (those of one prompt that were joined); 0 for a whole file.
        """
        tally = self.files if not rows else self.counts if issue.bad else self.skipped
        tally[issue.kind] = tally.get(issue.kind, 0) + max(rows, 1)
        self._keep(issue.kind, issue)

    def observe(self, source: str, line: int, unused: Iterable[str], remarks: Iterable[str], rows: int = 1) -> None:
        """Count what was left unused in a row that gave pairs, and what is worth saying about it.

        Args:
            source: the file, folder or hub id as the user gave it.
            line: line of the row, from 1.
            unused: keys that held something which was not used; of more than 200 the others are counted together.
            remarks: short phrases; the first rows of each are kept as examples.
            rows: how many rows it stands for (those of one prompt that were joined).
        """
        for name in unused:
            name = name if name in self.unused or len(self.unused) < _NAMES_KEPT else _OTHER_KEYS
            self.unused[name] = self.unused.get(name, 0) + rows
        for kind in sorted(remarks):
            self.remarks[kind] = self.remarks.get(kind, 0) + rows
            self._keep(kind, RowIssue(source, line, kind, kind, bad=False))

    def _keep(self, kind: str, issue: RowIssue) -> None:
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(issue)

    def skip(self, kind: str, number: int, examples: Iterable[RowIssue] = ()) -> IssueReport:
        """Return a copy in which `number` pairs were left out on purpose.

        Args:
            kind: the reason they are counted under.
            number: how many pairs; 0 gives the report itself.
            examples: some of them; no more than `EXAMPLES_KEPT` of a kind are kept.
        """
        if not number:
            return self
        kept = {**self.examples, kind: [*self.examples.get(kind, []), *examples][:EXAMPLES_KEPT]}
        skipped = {**self.skipped, kind: self.skipped.get(kind, 0) + number}
        return replace(self, pairs=self.pairs - number, skipped=skipped, examples=kept)

    def format(self) -> str:
        """Return the report for the screen: one summary line, then each kind with its examples.

        >>> report = IssueReport(rows=2, pairs=1)
        >>> report.add(RowIssue("a.jsonl", 2, "missing key 'rejected'", "missing key"))
        >>> print(report.format())
        2 rows read: 1 pair, 1 bad row
          bad: missing key (1)
            a.jsonl:2: missing key 'rejected'
        """
        parts = [_count(self.pairs, "pair")]
        if self.bad:
            parts.append(_count(self.bad, "bad row"))
        if self.skipped:
            parts.append(f"{sum(self.skipped.values()):,} left out")
        if self.files:
            parts.append(_count(sum(self.files.values()), "file") + " without a row")
        lines = [f"{_count(self.rows, 'row')} read: {', '.join(parts)}", *(f"  {note}" for note in self.notes)]
        for label, tally in (("bad", self.counts), ("no row", self.files), ("left out", self.skipped)):
            for kind, number in sorted(tally.items(), key=lambda item: -item[1]):
                lines.append(f"  {label}: {kind} ({number:,})")
                shown = self.examples.get(kind, [])
                lines += [f"    {issue}" for issue in shown]
                if number > len(shown) > 0:
                    lines.append(f"    and {number - len(shown):,} more")
        return "\n".join([*lines, *self.observations()])

    def observations(self) -> list[str]:
        """Return a line for each thing worth knowing of the rows that gave pairs, and one for the keys not used."""
        lines = [
            f"  note: {kind} ({number:,}, first in {_place(self.examples[kind][0])})"
            for kind, number in self.remarks.items()
        ]
        names = sorted(self.unused.items(), key=lambda item: -item[1])
        if names:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            lines.append(
                f"  not used: {', '.join(f'{name} ({number:,})' for name, number in names[:_NAMES_SHOWN])}{more}"
            )
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values, for `btrm.json` and the cache; `from_dict` reads them back."""
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            "bad": dict(self.counts),
            "left_out": dict(self.skipped),
            "examples": {
                kind: [[issue.source, issue.line, issue.reason, issue.bad] for issue in issues]
                for kind, issues in self.examples.items()
            },
            "notes": list(self.notes),
            "used": self.used,
            "files": dict(self.files),
            "unused": dict(self.unused),
            "remarks": dict(self.remarks),
        }

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> IssueReport:
        """Rebuild a report from `to_dict`'s values.

        Args:
            values: what `to_dict` gave, also after a way through JSON.

        Raises:
            KeyError: one of the values is not there.
        """
        stored: dict[str, list[list[object]]] = values["examples"]  # type: ignore[assignment]
        examples = {
            kind: [
                RowIssue(str(source), int(str(line)), str(reason), kind, bool(bad))
                for source, line, reason, bad in issues
            ]
            for kind, issues in stored.items()
        }
        return cls(
            rows=values["rows"],  # type: ignore[arg-type]
            pairs=values["pairs"],  # type: ignore[arg-type]
            counts=values["bad"],  # type: ignore[arg-type]
            skipped=values["left_out"],  # type: ignore[arg-type]
            examples=examples,
            notes=values["notes"],  # type: ignore[arg-type]
            used=values["used"],  # type: ignore[arg-type]
            files=values["files"],  # type: ignore[arg-type]
            unused=values["unused"],  # type: ignore[arg-type]
            remarks=values["remarks"],  # type: ignore[arg-type]
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _place(issue: RowIssue) -> str:
    return f"{issue.source}:{issue.line}" if issue.line else issue.source


def nothing_left(report: IssueReport) -> DataError:
    """Say that no pair is left, and what most rows are left out for.

    Args:
        report: what became of the rows.
    """
    counts = {**report.counts, **report.skipped, **report.files}
    if not counts:
        return DataError("no pairs: the data holds no rows.")
    kind = max(counts, key=lambda name: counts[name])
    number = sum(counts.values())
    if number == 1:
        return DataError(f"no pairs are left: {report.examples[kind][0]}.")
    return DataError(
        f"no pairs are left of {report.rows:,} rows: most are left out for '{kind}' ({counts[kind]:,}), "
        f"such as {report.examples[kind][0]}."
    )
