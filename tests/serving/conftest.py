from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scorer_samples import reward_model
from support.serving import Held, Running, serving

from btrm_core.scoring import Scorer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("serving") / "model", "llama3")


@pytest.fixture(scope="session")
def scorer(model: Path) -> Scorer:
    return Scorer(str(model), device="cpu")


@pytest.fixture
def held(scorer: Scorer) -> Held:
    return Held(scorer)


@pytest.fixture(scope="module")
def server(scorer: Scorer) -> Iterator[Running]:
    with serving(scorer) as running:
        yield running
