"""The families that come with btrm pass the checks that everyone's pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from btrm_core.preflight.conformance.runner import FamilyConformance

REAL = Path(os.environ.get("BTRM_REAL_TOKENIZERS", "."))


class TestLlama3(FamilyConformance):
    family = "llama3"


class TestMistral(FamilyConformance):
    family = "mistral"


class TestGemma(FamilyConformance):
    family = "gemma"


class TestGemma2(FamilyConformance):
    family = "gemma2"


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


def test_every_built_in_family_is_checked():
    from btrm_core.families.discovery import discover

    built_in = {entry.name for entry in discover() if entry.distribution == "btrm"}
    checked = {cls.family for cls in FamilyConformance.__subclasses__() if cls.__module__ == __name__}
    assert checked == built_in
