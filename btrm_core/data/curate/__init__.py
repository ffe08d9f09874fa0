"""Data sets looked through, divided, filtered and written: what `btrm data` does."""

from btrm_core.data.curate.judged import with_rewards
from btrm_core.data.curate.overview import Survey, survey
from btrm_core.data.curate.prompts import Prompts, load_prompts
from btrm_core.data.curate.report import format_survey, survey_report
from btrm_core.data.curate.select import Filters, filtered
from btrm_core.data.curate.write import check_target, write_pairs

__all__ = [
    "Filters",
    "Prompts",
    "Survey",
    "check_target",
    "filtered",
    "format_survey",
    "load_prompts",
    "survey",
    "survey_report",
    "with_rewards",
    "write_pairs",
]
