"""Two thousand seeded rows: each is used or reported, and what is used can be trained on and written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.row_fuzz import Maker, check


@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_used_or_reported(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))
    maker = Maker(seed)
    scored, ties = (("best-vs-worst", "skip"), ("all", "half"), ("best-vs-each", "skip"))[seed % 3]
    names = ("margin=scores,prompt=question",) if seed % 2 else ()
    check([maker.line() for _ in range(250)], tmp_path, scored, ties, names)
