"""The families that come with btrm pass the checks that everyone's pass."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from support import processes
from support.checkpoints import zephyr

from btrm_core.preflight.conformance import contract, probe
from btrm_core.preflight.conformance.runner import FamilyConformance

REAL = Path(os.environ.get("BTRM_REAL_TOKENIZERS", "."))


def answering(arguments, cwd):
    """What a new process would print, in a child; before it, the hash of a text."""
    os.chdir(cwd)
    with contextlib.redirect_stdout(sys.stderr):
        found = probe.main(arguments)
    print(json.dumps([hash("text"), found]))


@pytest.fixture(autouse=True)
def forked_answers(request, monkeypatch):
    """Hooks answer in a fork that has imported transformers; those of one family in a new process, as at a user's."""
    run = contract._run_probe

    def forked(arguments, cwd=None):
        if arguments[0] != "answers":
            return run(arguments, cwd)
        done = processes.ended(answering, arguments, cwd)
        assert done.returncode == 0, done.stderr
        text, found = json.loads(done.stdout)
        assert text != hash("text"), "another hash seed"
        return found

    if request.cls is not TestLlama3:
        monkeypatch.setattr(contract, "_run_probe", forked)


class TestLlama3(FamilyConformance):
    family = "llama3"


class TestMistral(FamilyConformance):
    family = "mistral"


class TestGemma(FamilyConformance):
    family = "gemma"


class TestGemma2(FamilyConformance):
    family = "gemma2"


class TestGemma3(FamilyConformance):
    family = "gemma3"


class TestQwen3(FamilyConformance):
    family = "qwen3"


class TestQwen2(FamilyConformance):
    family = "qwen3"
    model: ClassVar = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


class TestCheckpoint(FamilyConformance):
    """On a checkpoint of an architecture and with a template that no family of btrm's is made for."""

    family = "checkpoint"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def own_checkpoint(cls, tmp_path_factory):
        cls.model = zephyr(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.mark.hub
class TestLlama3WithItsTokenizer(FamilyConformance):
    family = "llama3"
    tokenizer = REAL / "llama3.1"


@pytest.mark.hub
class TestMistralWithItsTokenizer(FamilyConformance):
    family = "mistral"
    tokenizer = REAL / "mistral-v1"


@pytest.mark.hub
class TestGemmaWithItsTokenizer(FamilyConformance):
    family = "gemma"
    tokenizer = REAL / "gemma"


@pytest.mark.hub
class TestGemma3WithItsTokenizer(FamilyConformance):
    family = "gemma3"
    tokenizer = REAL / "gemma3"


@pytest.mark.hub
class TestQwen3WithItsTokenizer(FamilyConformance):
    family = "qwen3"
    tokenizer = REAL / "qwen3"


def test_every_built_in_family_is_checked():
    from btrm_core.families.discovery import discover

    built_in = {entry.name for entry in discover() if entry.distribution == "btrm"}
    checked = {cls.family for cls in FamilyConformance.__subclasses__() if cls.__module__ == __name__}
    assert checked == built_in
