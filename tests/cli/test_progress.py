"""Every command says how far it is, in each of its parts that can take long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.scorer_samples import reward_model

from btrm_core import console
from btrm_core.cli import main
from btrm_core.config import read_settings
from btrm_core.console import LongWork
from btrm_core.run import train

ROWS = [
    {"prompt": f"How much is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "Who knows."} for n in range(8)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("progress") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The parts of the work that were announced, each counted to its end and closed; the lines come at once."""
    begun: list[LongWork] = []
    made = LongWork.__init__

    def begin(self: LongWork, *given: object, **options: object) -> None:
        made(self, *given, **options)  # type: ignore[arg-type]
        begun.append(self)

    monkeypatch.setattr(LongWork, "__init__", begin)
    monkeypatch.setattr(console, "LINE_EVERY", 0.05)

    def seen() -> list[str]:
        assert not LongWork._open
        assert all(work.done == work.total for work in begun if work.total is not None), [w.line() for w in begun]
        return [work.what for work in begun]

    return seen


COMMANDS: dict[str, tuple[str, set[str]]] = {
    "score": ("score MODEL ROWS -o OUT", {"opening MODEL", "loading MODEL", "scoring rows.jsonl"}),
    "eval": ("eval MODEL --data ROWS", {"loading MODEL", "reading rows.jsonl", "scoring ROWS"}),
    "verify": ("verify MODEL", {"loading MODEL", "checking self-test in fp32", "checking transformers pipeline"}),
    "export": ("export MODEL OUT", {"writing OUT", "loading MODEL"}),
    "doctor": ("doctor MODEL --data ROWS", {"looking at the data", "reading rows.jsonl", "checking", "loading MODEL"}),
    "plan": ("plan --model MODEL --gpu-memory 80 --data ROWS", {"reading rows.jsonl"}),
    "inspect": ("data inspect ROWS --model MODEL", {"reading rows.jsonl", "rows", "tokens"}),
    "convert": ("data convert ROWS -o OUT", {"reading rows.jsonl", "writing out.jsonl"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_takes_long_is_announced(
    command: str, model: Path, rows: Path, tmp_path: Path, parts: Callable[[], list[str]]
) -> None:
    line, expected = COMMANDS[command]
    output = tmp_path / ("out.jsonl" if command in ("score", "convert") else "out")
    places = {"MODEL": str(model), "ROWS": str(rows), "OUT": str(output)}

    def filled(text: str) -> str:
        return " ".join(places.get(word, word) for word in text.split())

    done = CliRunner().invoke(main, [filled(word) for word in line.split()])
    assert done.exit_code in (0, 1), done.output  # 1: a check failed, which is not what is looked at here
    assert {filled(part) for part in expected} <= set(parts())
    assert "\r" not in done.stderr


def test_training_announces_each_of_its_parts(
    model: Path, rows: Path, tmp_path: Path, parts: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    base, output = model.with_name("model-base"), tmp_path / "run"
    settings = {
        "model.name": str(base),
        "data.train": [str(rows)],
        "data.held_out_fraction": 0.5,
        "train.epochs": 2,
        "train.max_steps": 2,
        "train.pairs_per_step": 4,
        "output.dir": str(output),
        "output.save_every": 1,
        "output.keep_best": False,
    }
    train(read_settings(None, settings))
    seen = parts()
    assert {
        "reading rows.jsonl",
        "encoding the train data",
        f"loading {base}",
        f"reading the weights of {base}",
        "checking how rows may be packed",
        "starting DeepSpeed",
        "computing the loss before the first step",
        "training",
        "evaluating",
        "saving the checkpoint of step 1",
        f"saving the model in {output / 'model'}",
    } <= set(seen)
    assert "\r" not in capfd.readouterr().err
    train(read_settings(None, {**settings, "train.max_steps": 3, "output.resume": "auto"}))
    again = parts()[len(seen) :]
    assert any(part.startswith(f"reading the files of {output}") for part in again)
    assert any(part.startswith(f"loading the checkpoint {output}") for part in again)
