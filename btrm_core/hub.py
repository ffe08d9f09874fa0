"""What a refusal of the Hugging Face Hub means, and what to do about it.

The client's messages are several lines, of which the remedy is the last; here it is one, with the remedy in it.
"""

from __future__ import annotations

from collections.abc import Iterator

from btrm_core.errors import first_line


def hub_problem(error: BaseException, name: str, kind: str = "model") -> str | None:
    """Say in one line why the hub does not give `name`, or None if the error is not about that.

    Args:
        error: what a library raised; the errors that caused it are looked at too.
        name: the hub id that was asked for.
        kind: "model" or "data set".
    """
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{'datasets/' if kind != 'model' else ''}{name}"
    for found in _chain(error):
        if isinstance(found, errors.GatedRepoError):
            return (
                f"the {kind} {name} is gated: accept its licence at {page} with your account, then log in with "
                "`hf auth login`, or set HF_TOKEN"
            )
        if isinstance(found, errors.RevisionNotFoundError):
            return f"the {kind} {name} has no such revision; look at {page}/tree/main and give another --revision"
        if isinstance(found, errors.RepositoryNotFoundError):
            return (
                f"there is no {kind} {name} on the Hugging Face Hub, or it is private: check the name; for a private "
                "one log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
            )
        if isinstance(found, errors.EntryNotFoundError) and not isinstance(found, errors.LocalEntryNotFoundError):
            return f"the {kind} {name} on the Hugging Face Hub lacks a file that is needed: {first_line(found)}"
    for found in _chain(error):
        offline = constants.HF_HUB_OFFLINE and isinstance(found, errors.LocalEntryNotFoundError)
        if offline or isinstance(found, errors.OfflineModeIsEnabled):
            return (
                f"the {kind} {name} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give a "
                "local directory"
            )
        if isinstance(found, errors.LocalEntryNotFoundError):
            return (
                f"the {kind} {name} is not in the cache, and the Hugging Face Hub cannot be reached; check the "
                "connection (and HF_ENDPOINT), or give a local directory"
            )
    return None


def is_gated(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is the hub's that a licence must be accepted first.

    Args:
        error: what a library raised.
    """
    from huggingface_hub.errors import GatedRepoError

    return any(isinstance(found, GatedRepoError) for found in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
