"""Two families as strangers would publish them, built, installed beside btrm, used, and uninstalled again.

`third_party/btrm-smollm2` is of an architecture that btrm's own families have too, with a tokenizer full of traps;
`third_party/btrm-phi3` is of another one. Nothing in btrm knows either.
A third one is as `btrm new-family` writes it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.environments import Environment, build_wheel

from btrm_core.families.new_family import write_family

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PACKAGES = Path(__file__).parents[1] / "third_party"
NAMES = {"smollm2": "btrm-smollm2 0.2.0", "phi3": "btrm-phi3 1.0.0"}
TOKENS = {"smollm2": ("<|im_end|>", "<|endoftext|>"), "phi3": ("<|end|>", "<|placeholder1|>")}
SAMPLE = Path(__file__).parents[2] / "btrm_core" / "data" / "sample" / "held_out.jsonl"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("wheels")
    return {name: build_wheel(PACKAGES / f"btrm-{name}", directory) for name in NAMES}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as `btrm new-family` leaves it."""
    return write_family("sea-dog", tmp_path_factory.mktemp("written") / "btrm-sea-dog")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], written: Path) -> Environment:
    """An environment in which all three stay installed."""
    made = Environment(tmp_path_factory.mktemp("third_party"))
    made.install(*wheels.values(), build_wheel(written, tmp_path_factory.mktemp("written_wheel")))
    return made


def done_well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def listed(environment: Environment) -> dict[str, str]:
    """Family -> origin and status, as `btrm families` shows them."""
    entries = json.loads(done_well(environment.btrm("families", "--json")))
    return {e["name"]: f"{e['distribution']} {e['version']} {e['status']}" for e in entries}


SEVERAL = """
import sys
from btrm_core.cli import main
for command in sys.argv[1].splitlines():
    try:
        main(command.split("\\t"))
    except SystemExit as ended:
        assert not ended.code, command
"""


def several(environment: Environment, *commands: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """`btrm` with several command lines one after another, in one process: imports take longest."""
    return environment.run("-c", SEVERAL, "\n".join("\t".join(command) for command in commands))


def scored(environment: Environment, models: Sequence[Path], source: Path) -> list[list[dict[str, Any]]]:
    """The lines that `btrm score` writes for an input file, by each model."""
    outputs = [source.with_name(f"{model.name}.scored.jsonl") for model in models]
    commands = [("score", str(m), str(source), "-o", str(o)) for m, o in zip(models, outputs, strict=True)]
    done_well(several(environment, *commands))
    return [[json.loads(line) for line in o.read_text(encoding="utf-8").splitlines()] for o in outputs]


def manifest_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "model" / "btrm.json").read_text(encoding="utf-8"))
    return found


def test_their_own_tests_pass(environment, written, tmp_path):
    directories = [str(PACKAGES / f"btrm-{name}" / "tests") for name in NAMES] + [str(written)]
    options = ["-q", "-rs", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(tmp_path)]
    # The packages lie below this repository's settings and conftest, which are none of theirs.
    done = environment.run("-m", "pytest", "-c", "/dev/null", "--noconftest", *options, *directories, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed, 1 skipped in ", done.stdout, re.MULTILINE), done.stdout
    assert "the tokenizer has no beginning-of-sequence token" in done.stdout


def test_they_are_packages_that_can_be_published(tmp_path):
    for name in NAMES:
        files = {str(p.relative_to(PACKAGES / f"btrm-{name}")) for p in (PACKAGES / f"btrm-{name}").rglob("*.*")}
        assert {"pyproject.toml", "README.md", f"btrm_{name}/py.typed", f"tests/test_{name}.py"} <= files
        assert (PACKAGES / f"btrm-{name}" / "LICENSE").is_file()
        test = (PACKAGES / f"btrm-{name}/tests/test_{name}.py").read_text(encoding="utf-8")
        assert len([line for line in test.splitlines() if line.strip()]) <= 4


def test_installed_they_train_and_evaluate_and_uninstalled_their_models_score_the_same(wheels, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install(*wheels.values())
    assert {name: listed(environment)[name] for name in NAMES} == {name: f"{NAMES[name]} ok" for name in NAMES}
    models = [str(tmp_path / name) for name in NAMES]
    for name in NAMES:
        train = ("train", "--family", name, "--max-steps", "2", "--output", str(tmp_path / name))
        after = [("eval", *models, "--data", str(SAMPLE), "--json")] if name == "phi3" else []
        done = several(environment, train, *after)
        assert f"family {name} ({NAMES[name]})" in " ".join((done_well(done) + done.stderr).split())
        manifest = manifest_of(tmp_path / name)
        assert (manifest["family"], manifest["origin"]) == (name, NAMES[name])
        assert (manifest["terminal_token"], manifest["pad_token"]) == TOKENS[name]
        assert manifest["answers"] == dict.fromkeys(("setup_tokenizer", "pad_token", "chat_template"), f"family {name}")
    evaluated = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert [one["accuracy"]["pairs"] for one in evaluated["evaluations"]] == [131, 131]

    environment.uninstall(*(f"btrm-{name}" for name in NAMES))
    assert not listed(environment).keys() & NAMES.keys()
    gone = environment.btrm("families", "phi3")
    assert (gone.returncode, gone.stderr.startswith("btrm: unknown family 'phi3'.")) == (2, True)
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    for name, lines in zip(NAMES, scored(environment, [tmp_path / name for name in NAMES], source), strict=True):
        after = [line[key] for line in lines for key in ("chosen_reward", "rejected_reward")]
        expected = [vector["reward"] for vector in manifest_of(tmp_path / name)["self_test"]]
        assert after == pytest.approx(expected, abs=1e-5)


@pytest.mark.hub("model")
def test_smollm2_with_its_real_weights(environment, real_model, tmp_path):
    answers = json.loads(done_well(environment.btrm("families", "smollm2", "--model", str(real_model), "--json")))
    assert {hook: answer["given_by"] for hook, answer in answers["answers"].items()} == {
        **dict.fromkeys(("claims", "setup_tokenizer", "pad_token", "chat_template"), "family smollm2"),
        "init_head": "btrm default",
    }
    pad = answers["answers"]["pad_token"]
    assert (pad["token"], pad["id"], pad["new"]) == ("<|endoftext|>", 0, False)
    refused = environment.btrm("train", "--family", "llama3", "--model", str(real_model), "--data", str(SAMPLE))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(": use --family smollm2; --force-family uses it nevertheless")
    # No --family: smollm2 is the only one that claims it.
    settings = [
        "--max-steps",
        "2",
        "--pairs-per-step",
        "4",
        "--max-length",
        "256",
        "--set",
        "model.train_last_layers=1",
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    output = tmp_path / "run"
    train = ["train", "--model", str(real_model), "--data", str(source), "--output", str(output), *settings]
    done_well(environment.btrm(*train))
    manifest = manifest_of(output)
    assert (manifest["family"], manifest["origin"], manifest["pad_token_id"]) == ("smollm2", NAMES["smollm2"], 0)
    (lines,) = scored(environment, [output], source)
    assert len(lines) == 40
    assert all(line["chosen_reward"] != line["rejected_reward"] for line in lines)


@pytest.mark.hub("model")
def test_smollm2_passes_the_checks_on_the_real_checkpoint(environment, real_model):
    report = done_well(environment.btrm("families", "smollm2", "--check", "--model", str(real_model)))
    assert re.search(r"^\d\d passed, 0 failed, 0 skipped$", report, re.MULTILINE), report
