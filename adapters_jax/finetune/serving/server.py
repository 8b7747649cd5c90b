"""Listens: a uvicorn server with bounded connections, which SIGTERM drains."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapters_jax.finetune.serving.guard import Limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: 72\r\n\r\n"
    b'{"error":{"message":"too many connections","type":"server_error"}}      '
)


def protocol(limits: Limits) -> type[H11Protocol]:
    """The protocol of a connection, with the limits of a server."""

    class Limited(H11Protocol):
        """Refuses connections beyond the limit, and ends those that stall."""

        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Takes a connection, or refuses it."""
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_FULL)
                transport.close()
                return
            self._wait_for_progress()

        def data_received(self, data: bytes) -> None:
            """Takes data; a request that has begun has some seconds to become whole headers."""
            super().data_received(data)
            if self.flow.write_paused:
                return  # what it sends does not make it read
            if self.cycle is not None and not self.cycle.response_complete:
                self._go_on()
            elif self._stalled is None and not self.transport.is_closing():
                self._wait_for_progress()

        def pause_writing(self) -> None:
            """The client reads slowly."""
            super().pause_writing()
            self._wait_for_progress()

        def resume_writing(self) -> None:
            """The client reads on."""
            super().resume_writing()
            self._go_on()

        def connection_lost(self, exc: Exception | None) -> None:
            """The connection is gone."""
            self._go_on()
            super().connection_lost(exc)

        def _wait_for_progress(self) -> None:
            self._go_on()
            self._stalled = self.loop.call_later(limits.receiving, self.transport.abort)

        def _go_on(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Limited


def serve(app: Starlette, host: str, port: int, limits: Limits, ready: Any) -> None:
    """Serves until SIGTERM or Ctrl-C, which end it once the answers that run are whole.

    Args:
        app: the application.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        limits: the limits of requests.
        ready: called with the port once it listens.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )

    class Server(uvicorn.Server):
        """A server that says when it listens."""

        async def startup(self, sockets: Any = None) -> None:
            """Listens."""
            await super().startup(sockets)
            if self.started:
                ready(self.servers[0].sockets[0].getsockname()[1])

    Server(config).run()
