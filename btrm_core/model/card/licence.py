"""The licence of a base model, from the front matter of its own card: what is trained from it is bound by it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

_SECONDS = 5.0
"""How long the hub has to give a card; without it the licence is not known, which is no reason to stop."""
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_LINK = re.compile(r"https?://[^\s<>\"'()\[\]]{1,300}")


@cache
def base_licence(name: str, revision: str | None = None) -> dict[str, str]:
    """The licence that a base model states, in the words of the hub's front matter.

    Args:
        name: a directory or a hub id; of a hub id its `README.md` alone is fetched, or taken from the cache.
        revision: branch, tag or commit of a hub id.

    Returns:
        `license`, and with a licence outside the hub's list also `license_name` and `license_link`; empty where nothing
        is stated, or the card cannot be read.
    """
    try:
        from huggingface_hub import hf_hub_download, metadata_load

        here = Path(name)
        file = here / "README.md"
        if not here.exists():
            file = Path(hf_hub_download(name, "README.md", revision=revision, etag_timeout=_SECONDS))
        return _stated(metadata_load(file) or {})
    except Exception:  # a stranger's card, or no connection: the licence is not known, and the run goes on
        return {}


def _stated(front: dict[str, Any]) -> dict[str, str]:
    """What of a front matter is well formed."""
    licence, name, link = (front.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(licence, list) and len(licence) == 1:
        (licence,) = licence
    if not isinstance(licence, str) or not _IDENTIFIER.fullmatch(licence):
        return {}
    found = {"license": licence}
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name):
        found["license_name"] = name
    if isinstance(link, str) and _LINK.fullmatch(link):
        found["license_link"] = link
    return found
