"""`btrm serve`: the model on every device, uvicorn in front, an orderly end.

SIGTERM and Ctrl-C refuse new connections, let what was accepted finish within `drain_seconds`, and end the process.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from btrm_core.errors import ConfigError
from btrm_core.serving.app import create_app
from btrm_core.serving.limits import Limits
from btrm_core.serving.service import Served, Service


def serve(engines: Sequence[Served], name: str, limits: Limits, *, host: str, port: int, drain_seconds: float) -> None:
    """Serve a model until a signal comes.

    Args:
        engines: one per device.
        name: what clients call the model.
        limits: what is taken on.
        host: the address to listen on.
        port: 0 takes a free one; standard error says which.
        drain_seconds: how long accepted requests may take after the signal.

    Raises:
        ConfigError: the address cannot be had.
    """
    import uvicorn

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="btrm: %(message)s")
    config = uvicorn.Config(
        create_app(Service(engines, name, limits)),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise ConfigError(f"cannot listen on {host}:{port}; choose another --port or --host") from None
    socket.listen(config.backlog)  # from here on a client waits instead of being refused
    address = socket.getsockname()
    print(f"btrm: serving {name} on http://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
    # uvicorn raises the signal again once it has drained; an orderly end is no failure
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[socket])
