"""`btrm data inspect`: what preference data holds, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc

from btrm_core.data import PairData
from btrm_core.data_checks import contradictory_pairs, duplicate_pairs, duplicate_prompts, longer_wins
from btrm_core.metrics import standard_error


def inspect_pairs(data: PairData) -> dict[str, Any]:
    """Counts, lengths, repeats, contradictions and the length baseline, as a value that can be written as JSON."""
    columns = data.dataset.with_format("arrow")[:]
    turns = np.array([len(prompt) for prompt in columns["prompt"]])
    characters = {side: pc.utf8_length(columns[side]).to_numpy() for side in ("chosen", "rejected")}
    baseline = longer_wins(data)
    findings = {
        "prompts seen before": duplicate_prompts(data),
        "pairs seen before": duplicate_pairs(data),
        "contradictory pairs": contradictory_pairs(data),
    }
    return {
        "rows": data.issues.to_dict(),
        "report": data.issues.format(),
        "fingerprint": data.fingerprint,
        "pairs": len(data),
        "multi_turn": int((turns > 1).sum()),
        "characters": {side: _quantiles(values) for side, values in characters.items()},
        "longer_wins": baseline,
        "longer_wins_standard_error": standard_error(baseline, len(data)),
        "findings": {name: {"count": f.count, "examples": list(f.examples)} for name, f in findings.items()},
        "subsets": dict(Counter(columns["subset"].to_pylist()).most_common()),
    }


def format_inspection(found: dict[str, Any]) -> str:
    """The inspection for the screen."""
    lines = [found["report"], ""]
    lines.append(f"pairs {found['pairs']:,}, of which {found['multi_turn']:,} have more than one message in the prompt")
    for side, quantiles in found["characters"].items():
        shown = ", ".join(f"{name} {value:,}" for name, value in quantiles.items())
        lines.append(f"{side + ' answer':<16} characters: {shown}")
    lines.append(
        f"longer wins      {found['longer_wins']:.3f} ± {found['longer_wins_standard_error']:.3f} "
        "(what preferring the longer answer gets)"
    )
    for name, finding in found["findings"].items():
        examples = f", such as {', '.join(finding['examples'][:3])}" if finding["examples"] else ""
        lines.append(f"{name:<20} {finding['count']:,}{examples}")
    if len(found["subsets"]) > 1:
        lines += ["subsets", *(f"  {name or '(none)'}: {count:,}" for name, count in found["subsets"].items())]
    return "\n".join(lines)


def _quantiles(values: np.ndarray) -> dict[str, int]:
    median, p90, largest = (int(np.quantile(values, q)) for q in (0.5, 0.9, 1.0))
    return {"median": median, "90 %": p90, "longest": largest}
