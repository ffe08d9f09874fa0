"""Options and markers shared by all tests: what needs a GPU or files fetched separately is skipped with the reason."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.installed_plugins import install  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BTRM_CACHE", tempfile.mkdtemp(prefix="btrm-tests-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("btrm", deadline=None)  # the machine may be busy
settings.load_profile("btrm")

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# set by `make real` and `make test-vllm`; the first three with _MISSING and the reason where one could not be fetched
FETCHED = {
    "tokenizers": "BTRM_REAL_TOKENIZERS",
    "model": "BTRM_REAL_MODEL",
    "transformers 4.57": "BTRM_TRANSFORMERS_4",
    "vLLM": "BTRM_VLLM",
    "OpenRLHF": "BTRM_OPENRLHF",
}


LONG = ("rehearsal", "training", "equivalence", "model")
"""Directories whose files take longest; they come first, so that no process is left alone with one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # by the number of tests in a file, which says little of its time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_collection_finish() -> None:
    """What was imported and collected, half a million objects, is not looked at again by each garbage collection.

    Nor is all the rest as often as Python would.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: not any(item.path.is_relative_to(here / name) for name in LONG))
    for item in items:
        reason = _missing(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing(item: pytest.Item) -> str | None:
    """Say what a test marked `gpu`, `hub` (real tokenizers) or `hub("model")` lacks on this machine."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device"
    hub = item.get_closest_marker("hub")
    for kind in (hub.args or ("tokenizers",)) if hub else ():
        variable = FETCHED[kind]
        if not os.environ.get(variable):
            what = f"a real {kind.removesuffix('s')}" if kind in ("tokenizers", "model") else kind
            fetched = kind not in ("vLLM", "OpenRLHF")
            how = f"`make real` fetches it, or set {variable} to its directory" if fetched else f"set {variable} to it"
            return f"needs {what}: {os.environ.get(f'{variable}_MISSING') or how}"
    return None


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    """Take back what libraries write into the environment of this process as if a launcher had started it."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def drawn() -> random.Random:
    """Random draws whose seed is printed with a failure; BTRM_SEED draws the same again."""
    seed = int(os.environ.get("BTRM_SEED") or random.SystemRandom().randrange(2**32))
    print(f"draws of this test: BTRM_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """Directory with one directory per real tokenizer (for tests marked `hub`)."""
    return Path(os.environ[FETCHED["tokenizers"]])


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Directory of a real small language model (for tests marked `hub("model")`)."""
    return Path(os.environ[FETCHED["model"]])


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes go by their place: packed ones hold the second they were made in, and all workers must collect alike."""
    return argname if isinstance(val, bytes) else None
