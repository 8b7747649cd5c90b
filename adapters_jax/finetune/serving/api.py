"""The paths that every server has, and the Starlette application of them all."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from adapters_jax import __version__
from adapters_jax.errors import FileSystemError, UserError, file_errors
from adapters_jax.finetune.serving import schemas
from adapters_jax.finetune.serving.adapters import About
from adapters_jax.finetune.serving.guard import Guard, Limits, refused
from adapters_jax.finetune.serving.kept import Kept
from adapters_jax.finetune.serving.requests import BusyError, FullError, UnknownModelError

# The page is one file, and asks no other host.
_ALONE = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The figures of requests, and those that an engine counts itself.

    Attributes:
        registry: what `/metrics` shows.
        requests: requests by status.
        first: the seconds until the first piece of an answer.
    """

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "adapters_jax_http_requests", "Requests", ["status"], registry=self.registry
        )
        self.first = Histogram(
            "adapters_jax_first_token_seconds",
            "Time until the first piece of an answer",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._engine = engine
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Any]:
        """What the engine has counted."""
        counts = self._engine.counts
        ended = CounterMetricFamily("adapters_jax_completions", "Answers by end", labels=["end"])
        for why, n in dict(counts.ended).items():
            ended.add_metric([why], n)
        yield ended
        for name, text, value in (
            ("tokens", "New tokens", counts.tokens),
            ("prompt_tokens", "Tokens of prompts", counts.prompt_tokens),
            ("reused_tokens", "Tokens of prompts read before", counts.reused_tokens),
            ("steps", "Turns of the engine", counts.steps),
            ("adapter_changes", "Adapters added, replaced and dropped", counts.changes),
        ):
            yield CounterMetricFamily(f"adapters_jax_{name}", text, value)
        for name, text, value in (
            ("waiting", "Requests in the queue", self._engine.waiting),
            ("running", "Requests with a row", self._engine.running),
            ("adapters", "Adapters", len(self._engine.adapters)),
        ):
            yield GaugeMetricFamily(f"adapters_jax_{name}", text, value)


class Api:
    """What the paths of every server do: the base, the adapters, and the server's health.

    Args:
        base: what reads adapters onto the base: a `DecoderBase` or an `EncoderBase`.
        engine: what computes the answers, an `Engine` or a `Labeller`; it has been started.
        name: what requests call the base.
        kept: where adapters that come later are kept; None keeps them in memory alone.

    Attributes:
        training: what trains adapters, if anything does: `routes()`, and whether it is `alive`.
    """

    training: Any = None

    def __init__(
        self, base: Any, engine: Any, name: str, limits: Limits, kept: Kept | None = None
    ) -> None:
        self.files, self.reader = base.files, base
        self.engine, self.name, self.limits, self.kept = engine, name, limits, kept
        self.metrics = Metrics(engine)
        self.began = int(time.time())
        self._uploading = asyncio.Lock()
        self._changing = threading.Lock()  # so that what is kept is what is served

    def routes(self) -> list[Route]:
        """The paths."""
        one = "/v1/adapters/{name}"
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/adapters", self.adapters),
            Route(one, self.put, methods=["PUT"]),
            Route(one, self.drop, methods=["DELETE"]),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/healthz", self.health),
            Route("/livez", self.live),
        ]

    async def health(self, _: Request) -> Response:
        """Whether requests are answered; while the server compiles, the status is 503."""
        alive = self.engine.alive and (self.training is None or self.training.alive)
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    async def live(self, request: Request) -> Response:
        """Whether the process works; while the server compiles, the status is 200."""
        return await self.health(request)

    async def show_metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        """The base and the adapters."""
        names = [self.name, *self.engine.adapters]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """The base or an adapter."""
        name = request.path_params["name"]
        self._adapter(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = {} if name == self.name else {"parent": self.name}
        kept = {"id": name, "object": "model", "created": self.began, "owned_by": "adapters_jax"}
        return {**kept, **parent}

    async def adapters(self, _: Request) -> Response:
        """The adapters, and what they are."""
        rows = [{"name": n, **each.about.shown} for n, each in self.engine.adapters.items()]
        return JSONResponse({"base": self.name, "adapters": rows})

    async def put(self, request: Request) -> Response:
        """Adds an adapter of the files in a form, or replaces one."""
        name = request.path_params["name"]
        if name == self.name or not schemas.matches_name(name):
            raise UserError(
                f"an adapter cannot be named {name!r}, expected up to 64 letters, digits, dots, "
                "dashes and underscores, and not the base's name"
            )
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "expected multipart/form-data with the adapter's files")
        await self._admitted()
        try:
            with file_errors(Path("the upload"), "written"):
                return await self._put(name, request)
        finally:
            self._uploading.release()

    async def _admitted(self) -> None:
        """Waits until no other upload is under way, since each takes memory and disk."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                await self._uploading.acquire()
        except TimeoutError:
            raise HTTPException(503, "other adapters are still coming in; try again") from None

    async def _put(self, name: str, request: Request) -> Response:
        known = self.files
        # The form writes what is larger than a megabyte to files that have no name.
        async with request.form(max_files=len(known), max_fields=0) as form:
            files = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
            names = [file.filename or "" for file in files]
            wrong = [each for each in names if each not in known or names.count(each) > 1]
            if wrong or not files:
                raise UserError(
                    f"the form has the files {', '.join(names) or 'none'}, expected one each of "
                    f"those of an adapter, such as adapter_config.json and adapter.safetensors"
                )
            about, there = await asyncio.to_thread(self._add, name, files)
        return JSONResponse({"name": name, **about.shown}, 200 if there else 201)

    def _add(self, name: str, files: Sequence[UploadFile]) -> tuple[About, bool]:
        """Serves an adapter of files from anyone; returns whether there was one of that name."""
        with tempfile.TemporaryDirectory(prefix="adapters-jax-") as folder:
            for file in files:
                with open(Path(folder, file.filename or ""), "wb") as copy:
                    shutil.copyfileobj(file.file, copy)
            try:
                read = self.reader.read(Path(folder))
                fitted = self.engine.fit(name, (read.recipe, read.leaves))
            except UserError as error:
                raise UserError(
                    str(error).replace(f"{folder}/", "").replace(folder, name)
                ) from None
            with self._changing:
                if self.kept:
                    self.kept.check(name)
                there = name in self.engine.adapters
                self.engine.put(name, fitted, read.about, replace=True).result()
                if self.kept:
                    self._keep(self.kept, name, Path(folder))
        return read.about, there

    def _keep(self, kept: Kept, name: str, folder: Path) -> None:
        try:
            kept.put(name, folder)
        except FileSystemError as error:
            why = os.strerror(error.errno or errno.EIO)
            raise FileSystemError(
                f"{name} is served until the server ends, but cannot be kept: {why}; send it again"
            ) from error

    async def drop(self, request: Request) -> Response:
        """Drops an adapter."""
        name = request.path_params["name"]
        await asyncio.to_thread(self._drop, name)
        return JSONResponse({"name": name, "deleted": True})

    def _drop(self, name: str) -> None:
        with self._changing:
            kept = self.kept is not None and self.kept.drop(name)
            if name in self.engine.adapters or not kept:  # a damaged one is only kept
                self.engine.drop(name).result()

    def _adapter(self, model: str) -> Any:
        """What is served of the adapter that a request names; None for the base."""
        served = self.engine.adapters.get(model)
        if served is None and model != self.name:
            raise UnknownModelError(
                f"no model is named {model!r}; GET /v1/models lists those that there are"
            )
        return served

    async def complete(self, _: Request) -> Response:
        """Completes a prompt."""
        raise UserError(f"{self.name} is an encoder, which writes no texts; use /predict")

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self.complete(request)

    async def predict(self, _: Request) -> Response:
        """Labels texts."""
        raise UserError(f"{self.name} is a decoder, which labels no texts; use /v1/completions")


_STATUS: dict[type[Exception], int] = {
    UnknownModelError: 404,
    BusyError: 429,
    FullError: 409,
    FileSystemError: 507,
}


async def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return refused(error.status_code, str(error.detail), error.headers)
    if isinstance(error, ClientDisconnect):
        return refused(408, "the client hung up before its body was whole")
    return refused(_STATUS.get(type(error), 400), str(error))


def application(api: Any, page: str, limits: Limits, keys: Sequence[str] = ()) -> Starlette:
    """The application.

    Args:
        api: what its paths do.
        page: the HTML of its page.
        keys: the API keys; each request needs one. Without keys, only this machine may ask.
    """
    description = schemas.openapi(__version__, api.routes())

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _ALONE})

    async def describe(_: Request) -> Response:
        return JSONResponse(description)

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/openapi.json", describe),
            *api.routes(),
            *(api.training.routes() if api.training else ()),
        ],
        middleware=[Middleware(Guard, limits=limits, keys=keys, requests=api.metrics.requests)],
        exception_handlers=dict.fromkeys((UserError, HTTPException, ClientDisconnect), _refuse),
    )
