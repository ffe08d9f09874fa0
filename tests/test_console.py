"""What is printed, and what is kept from being printed."""

import io
import json
import logging
import sys

import pytest
import torch

from btrm_core import console
from btrm_core.console import dumps, quiet_libraries, table


def test_json_holds_no_number_that_json_does_not_know():
    value = {"loss": float("nan"), "subsets": [{"margin": float("inf"), "pairs": 3}], "sides": (1.5, float("-inf"))}
    assert json.loads(dumps(value), parse_constant=pytest.fail) == {
        "loss": None,
        "subsets": [{"margin": None, "pairs": 3}],
        "sides": [1.5, None],
    }


def test_libraries_are_quiet_inside_and_as_before_after():
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    before, bars_before = [logger.level for logger in loggers], bars.is_progress_bar_enabled()
    said, complained = io.StringIO(), io.StringIO()
    with pytest.raises(RuntimeError), quiet_libraries(said, complained):  # noqa: PT012 (all of it is what is tested)
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert not bars.is_progress_bar_enabled()
        print("to standard output")
        print("to standard error", file=sys.stderr)
        raise RuntimeError
    assert (said.getvalue(), complained.getvalue()) == ("to standard output\n", "to standard error\n")
    assert [logger.level for logger in loggers] == before
    assert bars.is_progress_bar_enabled() == bars_before


def test_a_table_without_rows_has_no_lines():
    assert table([]) == []


@pytest.mark.parametrize(
    ("cuda", "why"),
    [("13.0", "is built for CUDA 13.0, for which the driver may be too old"), (None, "is built without CUDA")],
)
def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch, cuda, why):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    pattern = str(tmp_path / "nvidia[0-9]*").removeprefix("/")
    monkeypatch.setattr(console, "GPU_FILES", (pattern,))
    assert console.unused_gpu() is None
    (tmp_path / "nvidia0").touch()
    what, to_do = console.unused_gpu()
    assert what.startswith(f"this machine has a GPU ({tmp_path / 'nvidia0'}), but torch ")
    assert why in what
    assert "CUDA_VISIBLE_DEVICES=" in to_do
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert console.unused_gpu() is None, "the user has said so"
