"""Record finished training runs as a result: `python -m benchmarks.record_run RUN_DIR... --name NAME --command "..."`.

Takes the curve, the time and the last evaluation from a run's own `metrics.jsonl` and `model/btrm.json`, so nothing is
typed by hand but the name, the command and remarks. Several runs (seeds) make one result.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.results import RESULTS, SCHEMA

CURVE = ("step", "loss", "accuracy", "reward_margin", "learning_rate")


def read_run(directory: Path) -> dict[str, Any]:
    """The curve, the evaluations and the settings of one run."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    manifest = json.loads((directory / "model" / "btrm.json").read_text("utf-8"))
    evaluations = [line for line in lines if line["split"] == "eval"]
    return {
        "family": manifest["family"],
        "origin": manifest["origin"],
        "base_model": Path(manifest["base_model"]).name,
        "settings": {k: v for k, v in manifest["config"].items() if k.startswith(("train.", "loss.", "lora."))},
        "data": [Path(source).name for source in manifest["data"]["sources"]],
        "pairs": {name: report["encoded"] for name, report in manifest["data"]["encoding"].items()},
        "encoding": manifest["data"]["encoding"],
        "minutes": round(manifest["training"]["seconds"] / 60, 2),
        "curve": [{key: line[key] for key in CURVE} for line in lines if line["split"] == "train"],
        "evaluations": [{k: v for k, v in line.items() if k not in ("split", "time")} for line in evaluations],
        "final": manifest["evaluation"],
    }


def main() -> None:
    """Write `results/NAME.json`; refuses uncommitted changes unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of finished runs")
    parser.add_argument("--name", required=True)
    parser.add_argument("--command", required=True, help="the command as a user would type it")
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    result = {
        "schema": SCHEMA,
        "benchmark": "quality",
        "name": arguments.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment.require_clean(arguments.allow_dirty),
        "command": arguments.command,
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions(),
        "runs": [read_run(run) for run in arguments.runs],
        "notes": arguments.note,
    }
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for run in result["runs"]:
        final = run["final"]
        print(
            f"{path.name}: accuracy {final['accuracy']:.3f} ± {final['accuracy_standard_error']:.3f} on "
            f"{final['pairs']} held-out pairs, longer wins {final['longer_wins_tokens']:.3f}, {run['minutes']} minutes"
        )


if __name__ == "__main__":
    main()
