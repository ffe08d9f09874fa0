"""What a finished model says about itself: `btrm.json` and the model card."""

from btrm_core.model.card.licence import base_licence
from btrm_core.model.card.manifest import Trained, run_manifest, template_difference
from btrm_core.model.card.page import model_card

__all__ = ["Trained", "base_licence", "model_card", "run_manifest", "template_difference"]
