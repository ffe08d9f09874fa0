from btrm_core.testing import FamilyConformance


class TestQwen3(FamilyConformance):
    family = "qwen3"
