from btrm_core.testing import FamilyConformance


class TestPhi3(FamilyConformance):
    family = "phi3"
