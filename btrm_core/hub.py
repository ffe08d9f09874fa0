"""The Hugging Face Hub: what its refusals mean and what to do about them, and uploading a model to it.

The client's messages are several lines, of which the remedy is the last; here it is one, with the remedy in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx

from btrm_core.errors import ConfigError, first_line


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
    if any("trust_remote_code" in str(found) for found in _chain(error)):
        return (
            f"the {kind} {name} comes with code of its own; expected one that transformers knows: read that code, then "
            "`btrm train` runs it with --trust-remote-code"
        )
    return None


def has_own_code(config: Any) -> bool:
    """Whether a configuration is of a class that came with its checkpoint, and runs with its user's consent.

    Args:
        config: a transformers configuration.
    """
    return type(config).__module__.partition(".")[0] == "transformers_modules"


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


_REPLACED = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json", "tokenizer*", "chat_template*")
"""Files of an earlier model that a reader would take for a part of the new one."""


def prepare_upload(hub_id: str, *, private: bool) -> None:
    """Find out before the work whether a model can be uploaded; makes the repository if there is none.

    Args:
        hub_id: OWNER/NAME, or NAME of the token's owner.
        private: the repository must be private; otherwise a new one is what the owner's settings say.

    Raises:
        ConfigError: there is no valid token, the name is none, the repository may not be written or is not private, or
            the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
        made = api.create_repo(hub_id, private=private or None, exist_ok=True)
        api.auth_check(made.repo_id, write=True)
        public = private and not api.repo_info(made.repo_id).private
    except Exception as error:  # the client raises types of several libraries
        raise ConfigError(f"{hub_id} cannot be uploaded to: {_upload_problem(error, hub_id)}") from error
    if public:
        raise ConfigError(
            f"{hub_id} is public, but --private is asked for; make it private in its settings, or choose another name"
        )


def upload(directory: Path, hub_id: str, *, private: bool, card: str) -> str:
    """Upload a model directory in one commit; of an earlier model nothing is left that readers would mix up with it.

    Args:
        directory: its files, without folders, are uploaded.
        hub_id: OWNER/NAME, or NAME of the token's owner.
        private: as `prepare_upload`.
        card: the content of `README.md` there.

    Returns:
        The address of the model's page.

    Raises:
        ConfigError: as `prepare_upload`, or the upload breaks off; then the repository is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    prepare_upload(hub_id, private=private)
    api = HfApi()
    try:
        place = api.create_repo(hub_id, exist_ok=True).repo_id
        names = {file.name for file in directory.iterdir() if file.is_file()} | {"README.md"}
        old = [name for name in api.list_repo_files(place) if "/" not in name and name not in names]
        operations: list[Any] = [
            *(
                CommitOperationAdd(name, card.encode() if name == "README.md" else str(directory / name))
                for name in sorted(names)
            ),
            *(CommitOperationDelete(name) for name in old if any(fnmatch(name, kind) for kind in _REPLACED)),
        ]
        api.create_commit(place, operations, commit_message="Upload a reward model trained with btrm")
    except Exception as error:  # the client raises types of several libraries
        raise ConfigError(_upload_problem(error, hub_id)) from error
    return f"{api.endpoint}/{place}"


def _upload_problem(error: BaseException, hub_id: str) -> str:
    """Why the hub takes no model, and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    for found in _chain(error):
        if isinstance(found, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids it; unset it"
        if isinstance(found, errors.LocalTokenNotFoundError):
            return f"there is no token; {login}"
        if isinstance(found, errors.HFValidationError):
            return f"the name is none that the hub takes ({first_line(found)}); expected OWNER/NAME"
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status == 401:
            return f"the token is not valid; {login}"
        if status in (403, 404):
            return f"the token may not write to it; {login}, or choose a repository of your own"
        if isinstance(found, errors.HfHubHTTPError):
            return f"{constants.ENDPOINT} answers: {first_line(found)}"
        if isinstance(found, OSError | httpx.TransportError):
            return f"{constants.ENDPOINT} cannot be reached ({first_line(found)}); check the connection and HF_ENDPOINT"
    return first_line(error)
