"""What the Hugging Face Hub refuses is said with the remedy in it."""

from __future__ import annotations

import pytest
from huggingface_hub import constants, errors

from btrm_core.hub import hub_problem, is_gated

LOGIN = "`hf auth login`, or set HF_TOKEN"


def refused(kind: type[Exception]) -> OSError:
    """As transformers raises it: in words of its own, with the hub's answer as the cause."""
    inner = kind.__new__(kind)
    Exception.__init__(inner, "401 Client Error.\n\nCannot access gated repo for url https://huggingface.co/x")
    outer = OSError("You are trying to access a gated repo.\nMake sure to have access to it at ...")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, ("is gated: accept its licence at https://huggingface.co/meta/llama", LOGIN)),
        (errors.RepositoryNotFoundError, ("there is no model meta/llama", "or it is private", LOGIN.split(",")[0])),
        (errors.RevisionNotFoundError, ("has no such revision", "--revision")),
        (errors.OfflineModeIsEnabled, ("is not in the cache, and HF_HUB_OFFLINE forbids",)),
    ],
)
def test_each_refusal_has_its_remedy(kind, said):
    line = hub_problem(refused(kind), "meta/llama")
    assert line is not None
    assert "\n" not in line
    assert all(words in line for words in said)


def test_a_gated_data_set_is_not_called_missing():
    error = refused(errors.GatedRepoError)
    assert is_gated(error)
    assert not is_gated(refused(errors.RepositoryNotFoundError))
    line = hub_problem(error, "org/pairs", "data set")
    assert line.startswith(
        "the data set org/pairs is gated: accept its licence at https://huggingface.co/datasets/org/"
    )


def test_what_is_not_in_the_cache_depends_on_whether_it_may_be_fetched(monkeypatch):
    error = refused(errors.LocalEntryNotFoundError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "the Hugging Face Hub cannot be reached" in hub_problem(error, "a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to fetch it" in hub_problem(error, "a/b")


def test_other_errors_are_not_the_hubs():
    assert hub_problem(ValueError("Unrecognized model"), "a/b") is None
