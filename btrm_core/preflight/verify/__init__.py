"""Verify: one number on every path, from a finished model's files to a server that has loaded them."""

from btrm_core.preflight.verify.directory import verify
from btrm_core.preflight.verify.server import verify_url

__all__ = ["verify", "verify_url"]
