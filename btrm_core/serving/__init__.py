"""Serving: a finished reward model over HTTP, for trainers and for people. Never imports `training`."""

from btrm_core.serving.app import create_app
from btrm_core.serving.backend import Backend
from btrm_core.serving.limits import Limits
from btrm_core.serving.server import bound, serve
from btrm_core.serving.service import Service

__all__ = ["Backend", "Limits", "Service", "bound", "create_app", "serve"]
