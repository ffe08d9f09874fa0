"""`btrm serve`: the model on every device, uvicorn in front, an orderly end.

SIGTERM and Ctrl-C refuse new connections, let what was accepted finish within `drain_seconds`, and end the process.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Sequence

from btrm_core.errors import ConfigError, first_line
from btrm_core.serving.app import create_app
from btrm_core.serving.limits import Limits
from btrm_core.serving.service import Served, Service


def bound(host: str, port: int) -> socket.socket:
    """An address that is taken, but where nobody is listened to yet.

    Args:
        host: a name or a number.
        port: 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, UnicodeError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None
    return found


def serve(engines: Sequence[Served], name: str, limits: Limits, *, socket: socket.socket, drain_seconds: float) -> None:
    """Serve a model until a signal comes.

    Args:
        engines: one per device.
        name: what clients call the model.
        limits: what is taken on.
        socket: from `bound`; standard error says where it is.
        drain_seconds: how long accepted requests may take after the signal.
    """
    import uvicorn

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="btrm: %(message)s")
    config = uvicorn.Config(
        create_app(Service(engines, name, limits)),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    socket.listen(config.backlog)  # from here on a client waits instead of being refused
    host, port = socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"btrm: serving {name} on http://{shown}:{port}", file=sys.stderr, flush=True)
    # uvicorn raises the signal again once it has drained; an orderly end is no failure
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[socket])
