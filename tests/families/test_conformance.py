"""The families that come with btrm pass the checks that everyone's pass."""

from __future__ import annotations

from btrm_core.testing import FamilyConformance


class TestLlama3(FamilyConformance):
    family = "llama3"


class TestMistral(FamilyConformance):
    family = "mistral"


class TestGemma(FamilyConformance):
    family = "gemma"


class TestGemma2(FamilyConformance):
    family = "gemma2"


def test_every_built_in_family_is_checked():
    from btrm_core.families import discover

    built_in = {entry.name for entry in discover() if entry.distribution == "btrm"}
    checked = {cls.family for cls in FamilyConformance.__subclasses__() if cls.__module__ == __name__}
    assert checked == built_in
