"""Doctor: shows how a few pairs are encoded and checks everything that a run depends on."""

from btrm_core.preflight.doctor.case import checks, examine
from btrm_core.preflight.doctor.view import as_json, closing, opening, verdict_line, worst

__all__ = ["as_json", "checks", "closing", "examine", "opening", "verdict_line", "worst"]
