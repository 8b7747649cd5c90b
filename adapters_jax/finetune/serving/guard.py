"""Listening, with bounded connections, and what a request must pass before anything reads it.

That is its origin, its key, its size and its time. SIGTERM drains the server.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapters_jax.errors import visible

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/healthz", "/openapi.json")  # need no key, and have no secret
_JSON_PATHS = ("/v1/completions", "/v1/chat/completions", "/predict")
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
_LATER = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


@dataclass(frozen=True)
class Limits:
    """The limits of requests.

    Attributes:
        body: bytes of a request's JSON.
        upload: bytes of an adapter's files.
        seconds: the time that an answer may take, in the queue and computed.
        receiving: the seconds that a body may take to arrive, and a reader to go on reading.
        connections: connections at a time.
    """

    body: int = 2**20
    upload: int = 2**28
    seconds: float = 300.0
    receiving: float = 30.0
    connections: int = 512


def failure(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form; what a terminal would obey in its message is written out."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": visible(message), "type": kind, "param": None, "code": None}}


def refused(status: int, message: str, headers: Any = None) -> JSONResponse:
    """The answer to a request that is not done."""
    return JSONResponse(
        failure(status, message), status, {**_LATER.get(status, {}), **(headers or {})}
    )


class Guard:
    """Refuses requests before the application reads them.

    Pages of other hosts cannot use the server of a browser's own machine: without a key, the `Host`
    must be this machine, and an `Origin` must be the server itself.
    """

    def __init__(self, app: ASGIApp, limits: Limits, key: str | None, requests: Any) -> None:
        self.app, self.limits, self.key, self.requests = app, limits, key, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, upload = Headers(scope=scope), scope["path"].startswith("/v1/adapters/")
        most = self.limits.upload if upload else self.limits.body
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            problem = self._problem(scope, headers, most)
            if problem is not None:
                await refused(*problem)(scope, receive, counted)
                return
            await self.app(scope, _bounded(receive, most, self.limits.receiving), counted)
        finally:
            self.requests.labels(str(status)).inc()

    def _problem(self, scope: Scope, headers: Headers, most: int) -> tuple[int, str] | None:
        """Why a request is refused, with its status."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            page, name = urlsplit(origin or "").netloc, urlsplit(f"//{host}").hostname
        except ValueError:
            return 400, "the Host or the Origin is no address"
        if origin is not None and page != host:
            return 403, "a page of another host asks, which is not allowed"
        if self.key is None and name not in LOOPBACK:
            return 403, f"the Host is not this machine; ask {LOOPBACK[1]}"
        scheme, _, given_key = headers.get("authorization", "").partition(" ")
        # compare_digest takes as long for every key, so the time does not tell how much is right.
        given = given_key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        wanted = (self.key or "").encode()
        if self.key and scope["path"] not in OPEN and not hmac.compare_digest(given, wanted):
            return 401, "the API key is missing or another one; send Authorization: Bearer KEY"
        # A number of digits without end would be an integer without end: 20 of them are enough.
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            return 413, f"the body has {length[:20]} bytes, expected at most {most}"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            scope["path"] in _JSON_PATHS
            and scope["method"] == "POST"
            and kind != "application/json"
        ):
            return 415, "expected a body of the type application/json"
        return None


def _bounded(receive: Receive, most: int, seconds: float) -> Receive:
    """A body of at most `most` bytes, which arrives within some seconds."""
    left, whole = most, False
    until = asyncio.get_running_loop().time() + seconds

    async def limited() -> Message:
        nonlocal left, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body took longer than {seconds:g} s") from None
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body has more than {most} bytes")
        whole = not message.get("more_body", False)
        return message

    return limited


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


def serve(app: Starlette, host: str, port: int, limits: Limits, ready: Any) -> None:
    """Serves until SIGTERM or Ctrl-C, which end it once the answers that run are whole."""
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
