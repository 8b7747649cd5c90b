"""What a request must pass before anything reads it: its origin, its key, its size and its time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters_jax.errors import visible
from adapters_jax.finetune.addresses import LOOPBACK

OPEN = ("/", "/healthz", "/livez", "/openapi.json", "/api/v1/healthz")  # need no key: no secrets
TRAINING, _LINKS = "/api/v1/", "/api/v1/files/"  # a link to a file is a secret itself
_JSON_PATHS = ("/v1/completions", "/v1/chat/completions", "/predict")
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
LATER = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


@dataclass(frozen=True)
class Limits:
    """The limits of requests.

    Attributes:
        body: bytes of a request's JSON.
        upload: bytes of an adapter's files.
        training: bytes of a request of Tinker's protocol, also without its compression.
        seconds: the time that an answer may take, in the queue and computed.
        receiving: the seconds that a body may take to arrive, and a reader to go on reading.
        connections: connections at a time.
    """

    body: int = 2**20
    upload: int = 2**28
    training: int = 2**23
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
        failure(status, message), status, {**LATER.get(status, {}), **(headers or {})}
    )


class Guard:
    """Refuses requests before the application reads them.

    Pages of other hosts cannot use the server of a browser's own machine: without a key, the `Host`
    must be this machine, and an `Origin` must be the server itself.

    What passes has in its scope, as "owner", a name of the key that it came with.
    """

    def __init__(self, app: ASGIApp, limits: Limits, keys: Sequence[str], requests: Any) -> None:
        self.app, self.limits, self.keys, self.requests = app, limits, tuple(keys), requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _by_path(scope)
        headers, upload = Headers(scope=scope), scope["path"].startswith("/v1/adapters/")
        most = self.limits.upload if upload else self.limits.body
        if scope["path"].startswith(TRAINING):
            most = self.limits.training
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
            scope["owner"] = self._owner(headers)
            await self.app(scope, _bounded(receive, most, self.limits.receiving), counted)
        finally:
            self.requests.labels(str(status)).inc()

    def _problem(self, scope: Scope, headers: Headers, most: int) -> tuple[int, str] | None:
        """Why a request is refused, with its status."""
        if not scope["path"].startswith("/"):
            return 400, f"the target is {scope['path']!r}, expected a path such as /v1/models"
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            page, name = urlsplit(origin or "").netloc, urlsplit(f"//{host}").hostname
        except ValueError:
            return 400, "the Host or the Origin is no address"
        if origin is not None and page != host:
            return 403, "a page of another host asks, which is not allowed"
        if not self.keys and name not in LOOPBACK:
            return 403, f"the Host is not this machine; ask {LOOPBACK[1]}"
        is_open = scope["path"] in OPEN or scope["path"].startswith(_LINKS)
        if self.keys and not is_open and self._owner(headers) is None:
            return 401, "the API key is missing or another one; send Authorization: Bearer KEY"
        # A number of digits without end would be an integer without end: 20 of them are enough.
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            return 413, f"the body has {length[:20]} bytes, expected at most {most}"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        posts_json = scope["path"] in _JSON_PATHS and scope["method"] == "POST"
        if posts_json and kind != "application/json":
            return 415, "expected a body of the type application/json"
        return None

    def _owner(self, headers: Headers) -> str | None:
        """A name of a request's key; None without a right one."""
        if not self.keys:
            return "everyone"
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        text = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        given = text.encode("latin-1")
        # compare_digest takes as long for every key, so the time does not tell how much is right.
        right = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        return hashlib.sha256(given).hexdigest()[:16] if any(right) else None


def _by_path(scope: Scope) -> Scope:
    """A request whose target is a whole address, as one for its path; others as they are.

    Its host counts, and the header `Host` does not: RFC 9112, section 3.2.2.
    """
    scheme, sign, rest = scope.get("raw_path", b"").partition(b"://")
    if scope["path"].startswith("/") or scheme.lower() != b"http" or not sign:
        return scope
    host, _, path = rest.partition(b"/")
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    return {
        **scope,
        "path": unquote(f"/{path.decode('ascii')}"),
        "raw_path": b"/" + path,
        "headers": [(b"host", host), *headers],
    }


def _bounded(receive: Receive, most: int, seconds: float) -> Receive:
    """A body of at most `most` bytes, which arrives within some seconds of its first being read."""
    left, whole = most, False
    until: float | None = None

    async def limited() -> Message:
        nonlocal left, whole, until
        if whole:
            return await receive()
        until = until or asyncio.get_running_loop().time() + seconds
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
