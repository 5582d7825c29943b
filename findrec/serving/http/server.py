"""Runs the HTTP service in this process until SIGTERM or Ctrl-C, after which open requests are finished."""

from __future__ import annotations

import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from findrec.errors import FindRecError
from findrec.paths import resolve
from findrec.serving.http.app import Limits, create_app
from findrec.serving.http.events import EventStore
from findrec.serving.recommender import Recommender

_DRAIN_S = 30  # for open requests


def serve(
    run_folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    state: Path | None = None,
    index: str | None = None,
    limits: Limits | None = None,
    page: bool = True,
) -> None:
    """Serve a run or an export.

    Args:
        run_folder: the run or export.
        host: address to listen on; 0.0.0.0 for all. There is no authentication.
        port: 0 chooses a free one.
        state: SQLite file of appended events; default: `serving/<run>.sqlite` in FindRec's home.
        index: factory string of a saved index to make lists from.
        limits: batching and back-pressure.
        page: also serve the page, which shows users and their histories.

    Raises:
        FindRecError: for a run that cannot be loaded, an address in use, or a state file that cannot be
        written.
    """
    listening = listen(host, port)
    recommender = Recommender.load(run_folder, index)
    name = recommender.config.name
    store = EventStore(resolve(f"serving/{name}.sqlite") if state is None else state)
    limits = limits or Limits()
    app = create_app(recommender, store, limits, page=page)
    config = server_config(app, limits)
    address = f"[{host}]" if ":" in host else host
    place = f"http://{address}:{listening.getsockname()[1]}"
    _Server(config, f"serving {name} at {place} (appended events: {store.path})").run(sockets=[listening])


def server_config(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=_DRAIN_S,
    )


class _Server(uvicorn.Server):
    """A server that prints a line once it accepts connections."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._announcement, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; raises `FindRecError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY: without it each response takes 40 ms longer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise FindRecError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port"
        ) from None
    return listening
