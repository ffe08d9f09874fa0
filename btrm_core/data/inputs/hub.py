"""Data sets of the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from btrm_core.console import quiet_libraries
from btrm_core.errors import DataError, first_line
from btrm_core.hub import hub_problem, is_gated

if TYPE_CHECKING:
    import datasets

    from btrm_core.data.inputs.spec import Spec

_TIMEOUT_SECONDS = 15.0


def load(spec: Spec) -> datasets.Dataset:
    """Load one split of a data set of the Hub; "train" if none is named.

    Args:
        spec: the id of the data set, and its configuration, split and options if given.

    Returns:
        The rows of the split, memory-mapped.

    Raises:
        DataError: there is no such data set, it may not be read, or it cannot be loaded.
    """
    import datasets

    reached = _reach(spec)
    options = {key: value for key in ("data_dir", "data_files", "revision") if (value := spec.option(key))}
    try:
        with quiet_libraries(), contextlib.nullcontext() if reached else _only_the_cache():
            return datasets.load_dataset(spec.place, spec.config, split=spec.split or "train", **options)
    except Exception as error:  # the Hub client, the data set's builder and Arrow raise what they like
        if is_gated(error):  # its description may be had without a licence, its files may not
            raise DataError(f"cannot load '{spec.text}': {hub_problem(error, spec.place, 'data set')}.") from error
        hint = "Check the id, the split and the connection, or pass a local file."
        if not reached:
            hint = "The Hub cannot be reached and the data set is not in its cache; pass a local file."
        raise DataError(f"cannot load '{spec.text}' from the Hugging Face Hub: {sentence(error)} {hint}") from error


def sentence(error: BaseException) -> str:
    """The first line of what a library says, as a sentence.

    Args:
        error: what the library raised.
    """
    return f"{first_line(error).removesuffix('.')}."


def _reach(spec: Spec) -> bool:
    """Return False if the Hub cannot be reached; loading would retry for half a minute to find out.

    Raises:
        DataError: the Hub answers that there is no such data set, or that it is gated.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(spec.place, revision=spec.option("revision"), timeout=_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise DataError(f"cannot load '{spec.text}': {hub_problem(error, spec.place, 'data set')}.") from error
    except RevisionNotFoundError as error:
        raise DataError(f"'{spec.text}': the data set has no revision '{spec.option('revision')}'.") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"'{spec.text}' is neither a file here nor a data set of the Hugging Face Hub. "
            "Check the spelling; for a private data set, log in with 'hf auth login'."
        ) from error
    except Exception:  # offline, proxy, time-out: the cache may still have it
        return False
    return True


@contextlib.contextmanager
def _only_the_cache() -> Iterator[None]:
    """Let the Hub client answer from its cache alone."""
    import datasets
    import huggingface_hub.constants as hub

    before = (datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
