from btrm_core.testing import FamilyConformance


class TestSmolLM2(FamilyConformance):
    family = "smollm2"
