"""Uploading a model to a hub on loopback, with the hub's own client."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.cards import blocks
from support.environments import HANGS
from support.hub_push import OWNER, TOKEN, Hub, serve
from support.scorer_samples import CONVERSATIONS, base_model

from btrm_core import config, run
from btrm_core.cli import main
from btrm_core.data.sample import sample_path
from btrm_core.scoring import Scorer

NAME = f"{OWNER}/reward"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # between the hub's client and httpx


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, asked instead of the one in the world."""
    with serve() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("push") / "base", "llama3")


def training(base: Path, output: Path) -> list[str]:
    small = ["--max-steps", "2", "--pairs-per-step", "4", "--max-length", "256"]
    data = ["--data", f"{sample_path('train')}[:40]", "--eval-data", f"{sample_path('held_out')}[:8]"]
    return ["train", "--family", "llama3", "--model", str(base), *data, *small, "--output", str(output)]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    values: dict[str, Any] = {
        "family": "llama3",
        "model.name": str(base),
        "data.train": (f"{sample_path('train')}[:40]",),
        "data.eval": (f"{sample_path('held_out')}[:8]",),
        "data.max_length": 256,
        "train.max_steps": 2,
        "train.pairs_per_step": 4,
        "output.dir": str(base.with_name("run")),
    }
    directory = run.train(config.read_settings(None, values)).directory
    assert directory is not None
    return directory


def btrm(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def on_disk(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_model_is_uploaded_whole_and_its_card_names_it(hub: Hub, trained: Path, tmp_path: Path) -> None:
    result = btrm("export", str(trained), "--push-to", NAME)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"uploaded: {hub.url}/{NAME}"
    assert len(hub.commits) == 1  # all of it or nothing
    found, own = dict(hub.repositories[NAME]), on_disk(trained)
    assert found.pop(".gitattributes") == b""
    card = found.pop("README.md").decode()
    assert found == {name: content for name, content in own.items() if name != "README.md"}
    assert f'pipeline("text-classification", model="{NAME}"' in blocks(card)["transformers"]
    assert "vllm serve someone/reward " in blocks(card)["vLLM, the server"]
    assert NAME not in own["README.md"].decode()
    assert NAME not in hub.private
    back = tmp_path / "back"
    back.mkdir()
    for name, content in hub.repositories[NAME].items():
        (back / name).write_bytes(content)
    one, other = (Scorer(str(place), device="cpu").rewards(CONVERSATIONS) for place in (back, trained))
    np.testing.assert_array_equal(one, other)


def test_a_card_that_somebody_wrote_is_left_alone(hub: Hub, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "README.md").write_text("# Mine\n")
    assert btrm("export", str(copy), "--push-to", NAME).exit_code == 0
    assert hub.repositories[NAME]["README.md"] == b"# Mine\n"


def test_nothing_of_an_earlier_model_is_left_to_be_mixed_up(hub: Hub, trained: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "tokenizer.model": b"x"}
    hub.repositories[NAME] = {**old, "notes.txt": b"mine", "btrm.json": b"{}", "images/plot.bin": b"x"}
    result = btrm("export", str(trained), "--push-to", NAME)
    assert result.exit_code == 0, result.output
    found = set(hub.repositories[NAME])
    assert not found & set(old)
    assert {"notes.txt", "images/plot.bin", "model.safetensors"} <= found


def test_a_private_repository(hub: Hub, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    result = btrm("export", str(trained), str(out), "--dtype", "bf16", "--push-to", "reward", "--private")
    assert result.exit_code == 0, result.output
    assert hub.private == {NAME}
    assert json.loads(hub.repositories[NAME]["btrm.json"])["dtype"] == "bfloat16"
    assert b"Weights are bfloat16" in hub.repositories[NAME]["README.md"]
    hub.private.clear()
    result = btrm("export", str(trained), "--push-to", NAME, "--private")
    assert result.exit_code == 2
    assert "is public, but --private is asked for" in result.output


def refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, why: str) -> str:
    """Make the hub refuse; returns the name to ask for."""
    if why == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent/token")
    elif why == "a wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif why == "another's name":
        return "another/reward"
    elif why == "no right to write":
        hub.repositories[NAME] = {}
        hub.foreign.add(NAME)
    elif why == "no name":
        return "a name/with spaces"
    elif why == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif why == "nobody there":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return NAME


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("no token", "hf auth login"),
        ("a wrong token", "the token is not valid; log in with `hf auth login`"),
        ("another's name", "the token may not write to it"),
        ("no right to write", "the token may not write to it"),
        ("no name", "expected OWNER/NAME"),
        ("offline", "HF_HUB_OFFLINE forbids it"),
        ("nobody there", "cannot be reached"),
    ],
)
def test_a_refusal_comes_before_the_work(
    hub: Hub, trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, said: str
) -> None:
    name = refused(hub, monkeypatch, why)
    for command in (["export", str(trained), str(tmp_path / "out")], training(base, tmp_path / "run")):
        result = btrm(*command, "--push-to", name)
        assert result.exit_code == 2, result.output
        (line,) = [line for line in result.output.splitlines() if line.startswith("btrm:")]
        assert said in line
        assert name in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run" / "model").exists()
    assert hub.commits == []


def in_this_program(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    result = btrm(*arguments)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def in_its_own(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new program takes endpoint and token from the environment as a user gives them."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, "-m", "btrm_core", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)


@pytest.mark.timeout(HANGS)
@pytest.mark.parametrize("called", [in_this_program, pytest.param(in_its_own, marks=pytest.mark.slow)])
def test_an_upload_that_breaks_off_loses_nothing(
    hub: Hub, base: Path, tmp_path: Path, called: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    hub.breaks = "/commit/"
    done = called(hub, *training(base, tmp_path / "run"), "--push-to", NAME, "--private")
    model = tmp_path / "run" / "model"
    assert done.returncode == 2, done.stderr
    assert f"model saved in {model}" in done.stdout
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"btrm: the model is whole in {model}, but was not uploaded to {NAME}: {hub.url} answers: ")
    assert set(hub.repositories[NAME]) == {".gitattributes"}
    hub.breaks = None
    result = btrm(*shlex.split(line.rpartition("then: btrm ")[2]))
    assert result.exit_code == 0, result.output
    assert hub.repositories[NAME]["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert NAME in hub.private
    assert f'"{NAME}"' in (model / "README.md").read_text()


def test_what_is_not_whole_is_not_uploaded(hub: Hub, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    result = btrm("export", str(copy), "--push-to", NAME)
    assert result.exit_code == 2
    assert "is not as it was written (config.json)" in result.output
    assert hub.commits == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is nothing to do"),
        (["--push-to", NAME, "--dtype", "bf16"], "give OUT"),
        (["out", "--private"], "give --push-to"),
    ],
)
def test_flags_that_mean_nothing(hub: Hub, trained: Path, arguments: list[str], said: str) -> None:
    result = btrm("export", str(trained), *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert hub.calls == []
