"""Serves from the start: connections are bounded, and what is not made yet is said to be coming.

While the application is made in another thread (the base is loaded, the programs are compiled),
every request is answered at once. SIGTERM drains the server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.guard import LATER, Limits, refused

Says = Callable[[str, str], None]  # takes the state in one word, and a line for people
# Makes the application, and what to do once it answers.
Make = Callable[[Says], tuple[ASGIApp, Callable[[], None]]]

# Written to the socket as it is, since the application never sees the connection; 72 is the length
# of the JSON with its spaces.
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


class Starting:
    """What answers until the application is there.

    An orchestrator asks `/livez` whether to start the process anew, and `/healthz` whether it may
    get requests; Kubernetes takes 200 as yes, and 503 as no.

    Attributes:
        app: the application; None while it is made.
        state: what the server does meanwhile, in one word.
    """

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.state = "starting"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        answer = refused(503, f"the server is {self.state}, and takes requests later; try again")
        if scope["path"] in ("/livez", "/healthz"):
            status = 200 if scope["path"] == "/livez" else 503
            answer = JSONResponse({"status": self.state}, status, LATER.get(status))
        await answer(scope, receive, send)


class Server(uvicorn.Server):
    """A server whose application is made while it listens.

    Args:
        make: makes the application in another thread, and says what it does.
        say: shows its lines.
    """

    making: asyncio.Task[None]

    def __init__(self, limits: Limits, make: Make, say: Callable[[str], None]) -> None:
        self.starting = Starting()
        self._make, self._say = make, say
        config = uvicorn.Config(
            self.starting,
            http=protocol(limits),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(limits.seconds) + 1,
        )
        super().__init__(config)

    async def startup(self, sockets: Any = None) -> None:
        """Listens, and begins to make the application."""
        await super().startup(sockets)
        self.making = asyncio.create_task(self._made())
        self.making.add_done_callback(self._over)

    async def _made(self) -> None:
        self.starting.app, ready = await asyncio.to_thread(self._make, self._tell)
        ready()

    def _tell(self, state: str, line: str) -> None:
        """Notes what `make` does; after a signal, that ends it."""
        if self.should_exit:
            raise UserError("the server ends")
        self.starting.state = state
        self._say(line)

    def _over(self, making: asyncio.Task[None]) -> None:
        """Ends the server if there is nothing to serve."""
        if not making.cancelled() and making.exception() is not None:
            self.should_exit = True


def serve(
    sockets: Sequence[socket.socket], limits: Limits, make: Make, say: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or Ctrl-C, which end it once the answers that run are whole.

    Args:
        sockets: where it listens; it closes them.
        limits, make, say: as for `Server`.

    Raises:
        Exception: what `make` raised.
    """
    server = Server(limits, make, say)
    server.run(list(sockets))
    if not server.making.cancelled():
        server.making.result()
