"""The paths of Tinker's protocol, for the client of the package `tinker`.

Reference: the sources and the documentation of `tinker` 0.38; where they leave something open, the
server of `skyrl-tx` 0.3.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.guard import TRAINING, Limits
from adapters_jax.finetune.serving.requests import UnknownModelError
from adapters_jax.finetune.serving.schemas import parsed
from adapters_jax.finetune.tinker import wire
from adapters_jax.finetune.tinker.archives import Archives
from adapters_jax.finetune.tinker.bodies import Reader, lora_in, owner_of
from adapters_jax.finetune.tinker.sampling import asked
from adapters_jax.finetune.tinker.service import Model, Service

_PATIENCE = 20.0  # seconds that a question for an answer is held; the client waits for 45
_FORGOTTEN = "this answer is no more: send its request again"
_MOST_JSON = 2**16  # bytes of a request that waits for its turn, as thousands of them may
_CLONE = 1_000_000_000  # clones of a sampling client count from multiples of it


class TrainingApi:
    """The paths.

    Args:
        name: what clients call the base, beside what it was called on the command line.
        context: the largest number of tokens of a text.
    """

    def __init__(
        self, service: Service, names: tuple[str, ...], context: int, limits: Limits
    ) -> None:
        self._do, self._names, self._context = service, names, context
        self._reader = Reader(limits)

    def routes(self) -> list[Route]:
        """The paths."""
        posts: dict[str, Callable[[Request], Any]] = {
            "client/config": self.config,
            "client/dynamic_config": self.dynamic_config,
            "create_session": self.create_session,
            "session_heartbeat": self.heartbeat,
            "sessions/{session}/finish": self.finish,
            "create_model": self.create_model,
            "get_info": self.info,
            "unload_model": self.unload,
            "forward": self.forward,
            "forward_backward": self.forward,
            "optim_step": self.step,
            "save_weights": self.save,
            "save_weights_external": self.save,
            "save_weights_for_sampler": self.save,
            "load_weights": self.load,
            "create_sampling_session": self.create_sampling_session,
            "asample": self.sample,
            "retrieve_future": self.retrieve,
            "retrieve_futures": self.retrieve_many,
            "telemetry": self.telemetry,
        }
        return [
            *(Route(f"{TRAINING}{path}", each, methods=["POST"]) for path, each in posts.items()),
            Route(f"{TRAINING}healthz", self.health),
            Route(f"{TRAINING}get_server_capabilities", self.capabilities),
            Route(f"{TRAINING}samplers/{{sampler}}", self.sampler),
            *Archives(self._do, self._names[0], self._reader).routes(),
        ]

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._do.alive

    # The server and its sessions

    async def health(self, _: Request) -> Response:
        """Whether requests are answered."""
        alive = self.alive
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    async def config(self, _: Request) -> Response:
        """What the client is to do: pack its data, and ask for all samples of a session at once."""
        flags = types.ClientConfigResponse(
            proto_compress_fwdbwd=True,
            sample_use_retrieve_futures=True,
            # That of httpx instead: pyqwest's loses a cancellation, and the client then hangs as it
            # closes, with one question for samples under way.
            use_pyqwest_transport=False,
        )
        return JSONResponse(flags.model_dump())

    async def dynamic_config(self, _: Request) -> Response:
        """What of it may change while a client runs."""
        return JSONResponse(types.ClientDynamicConfigResponse().model_dump())

    async def telemetry(self, request: Request) -> Response:
        """Takes what a client tells of itself, and keeps nothing of it."""
        await request.body()
        return JSONResponse({"status": "accepted"})

    async def capabilities(self, _: Request) -> Response:
        """The base."""
        model = {
            "model_name": self._names[0],
            "max_context_length": self._context,
            "trainable": True,
            "sampleable": True,
        }
        return JSONResponse({"supported_models": [model]})

    async def create_session(self, request: Request) -> Response:
        """Begins a session."""
        await self._reader.read(types.CreateSessionRequest, request)
        return JSONResponse({"session_id": self._do.begin_session(owner_of(request))})

    async def heartbeat(self, request: Request) -> Response:
        """Keeps a session."""
        body = await self._reader.read(types.SessionHeartbeatRequest, request)
        try:
            self._do.session(owner_of(request), body.session_id)
        except UnknownModelError as error:
            raise HTTPException(410, str(error)) from None  # which ends the client's heartbeats
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(self, request: Request) -> Response:
        """Ends a session with its models."""
        await request.body()
        self._do.end_session(owner_of(request), request.path_params["session"])
        return JSONResponse({})

    # Models

    async def create_model(self, request: Request) -> Response:
        """Begins to create a model."""
        body = await self._reader.read(
            lambda data: _or_error(types.CreateModelRequest, data), request
        )
        if isinstance(body, UserError):
            raise body
        self._check_base(body.base_model)
        model, name = self._do.create(owner_of(request), body)
        return _later(name, model)

    async def info(self, request: Request) -> Response:
        """What a model is."""
        body = await self._reader.read(types.GetInfoRequest, request)
        model = self._do.model(owner_of(request), body.model_id)
        decoder = self._do.base.decoder
        data = {
            "arch": decoder.settings()["model_type"],
            "model_name": self._names[0],
            "tokenizer_id": self._names[-1],
        }
        about = {"model_id": model.id, "model_name": self._names[0], **lora_in(model.about)}
        return JSONResponse({"type": "get_info", "model_data": data, **about})

    async def unload(self, request: Request) -> Response:
        """Forgets a model."""
        body = await self._reader.read(types.UnloadModelRequest, request)
        owner = owner_of(request)
        model = self._do.model(owner, body.model_id)
        name = f"{model.id}:unload"
        entry = self._do.futures.make(owner, name)
        self._do.unload(model)
        self._do.futures.end(
            owner, entry, json.dumps({"model_id": model.id, "type": "unload_model"}).encode()
        )
        return _later(name, model.id)

    async def forward(self, request: Request) -> Response:
        """Begins a forward pass; its path and its body say whether with gradients."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wire.PROTOBUF:
            raise HTTPException(415, f"expected a body of the type {wire.PROTOBUF}")
        message, rows, tokens = await self._reader.read(_whole_pass, request)
        model = self._do.model(owner_of(request), message.model_id)
        if request.url.path.endswith("/forward"):
            message.forward_only = True
        return _later(self._do.passed(model, message, rows, tokens), model.id)

    async def step(self, request: Request) -> Response:
        """Begins a step of the optimiser."""
        model, body = await self._numbered(types.OptimStepRequest, request)
        return _later(body if isinstance(body, str) else self._do.step(model, body), model.id)

    async def save(self, request: Request) -> Response:
        """Begins to save a model."""
        last = request.url.path.rpartition("/")[2]
        kind: Any = {
            "save_weights": types.SaveWeightsRequest,
            "save_weights_external": types.SaveWeightsExternalRequest,
            "save_weights_for_sampler": types.SaveWeightsForSamplerRequest,
        }[last]
        model, body = await self._numbered(kind, request)
        if isinstance(body, str):
            name = body
        elif last == "save_weights_for_sampler":
            name = self._do.save_for_sampler(model, body)
        else:
            where = "weights" if last == "save_weights" else "external_weights"
            name = self._do.save(model, body, where)
        return _later(name, model.id)

    async def load(self, request: Request) -> Response:
        """Begins to load a checkpoint, into a model that is there or a new one."""
        model: Any
        kind = types.LoadWeightsRequest
        body = await self._reader.read(lambda data: _or_error(kind, data), request)
        if not isinstance(body, UserError) and body.model_id is None:
            if body.base_model is not None:
                self._check_base(body.base_model)
            model, name = self._do.create_from(owner_of(request), body)
            return _later(name, model)
        model, body = await self._numbered(kind, request)
        return _later(body if isinstance(body, str) else self._do.load(model, body), model.id)

    def _check_base(self, name: str) -> None:
        if name not in self._names:
            raise UserError(
                f"the base model is {name!r}, expected {self._names[0]!r}, this server's"
            )

    async def _numbered(self, kind: Any, request: Request) -> tuple[Model, Any]:
        """The model and the body of a request in a model's order.

        The client counts a request that is refused, so what is wrong with it is its answer: the
        name of that comes in place of the body.
        """
        body, ids = await self._reader.read(
            lambda data: (_or_error(kind, data), _ids(data)), request
        )
        problem = body if isinstance(body, UserError) else None
        if ids is None:
            raise problem or UserError("the body: model_id, seq_id: expected a text and a number")
        model = self._do.model(owner_of(request), ids[0])
        if problem is None:
            return model, body

        def refuse() -> Any:
            raise problem

        return model, self._do.ordered(model, ids[1], refuse)

    # Samples

    async def create_sampling_session(self, request: Request) -> Response:
        """Begins a session of samples."""
        body = await self._reader.read(types.CreateSamplingSessionRequest, request)
        if body.model_path is None:
            self._check_base(body.base_model or "")
        name = await self._do.begin_sampling(owner_of(request), body)
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": name})

    async def sampler(self, request: Request) -> Response:
        """What a session of samples samples from."""
        name = request.path_params["sampler"]
        self._do.samplers.find(owner_of(request), name)
        return JSONResponse({"sampler_id": name, "base_model": self._names[0]})

    async def sample(self, request: Request) -> Response:
        """Begins to sample."""
        body = await self._reader.read(types.SampleRequest, request)
        owner, session = owner_of(request), body.sampling_session_id
        if session is None:
            if body.model_path is None:
                self._check_base(body.base_model or "")
            weights = await self._do.weights(owner, body.model_path)
            name, target = f"sample:{secrets.token_hex(16)}", None
        else:
            weights, number = self._do.samplers.find(owner, session), body.seq_id
            if number is None:  # or it would get the answer of another such request
                raise UserError("the body: seq_id: a request of a sampling session needs a number")
            name, target = f"{session}:{number}", f"{session}:{number // _CLONE}"
        decoder = self._do.base.decoder
        checked = asked(body, self._context, decoder.end, secrets.randbits(32))
        self._do.sample(owner, name, target, weights, checked)
        ids = [f"{name}:{i}" for i in range(checked.n)]
        return JSONResponse({"request_id": name, "sample_sequence_ids": ids})

    # Answers

    async def retrieve(self, request: Request) -> Response:
        """An answer, once it is there."""
        body = await self._reader.read(types.FutureRetrieveRequest, request)
        entry = self._do.futures.find(owner_of(request), body.request_id)
        if entry is None:
            raise HTTPException(410, _FORGOTTEN)
        if not await self._do.futures.wait(owner_of(request), entry.done, _PATIENCE):
            more = {"request_id": entry.id, "queue_state": "active"}
            return JSONResponse({"type": "try_again", **more})
        if not entry.kind:
            raise HTTPException(410, _FORGOTTEN)
        return Response(entry.data, media_type=entry.kind)

    async def retrieve_many(self, request: Request) -> Response:
        """Which requests of a session of samples ended, once there are some."""
        body = await self._reader.read(types.FuturesRetrieveRequest, request)
        owner, target = owner_of(request), body.target
        for name in body.retrieved_request_ids:
            self._do.futures.drop(owner, name)
        seconds = _PATIENCE if body.timeout is None else min(body.timeout, _PATIENCE)
        if body.timeout != 0:  # else it only reports what it has, maybe behind the session's end
            self._do.samplers.find(owner, target.sampling_session_id)
        name = f"{target.sampling_session_id}:{target.cloned_sampler_id}"
        return JSONResponse(await self._do.futures.ended(owner, name, body.prev_cursor, seconds))


def _whole_pass(data: bytes) -> tuple[Any, Any, int]:
    """A forward pass, its rows and their number of tokens."""
    message = wire.read_pass(data)
    rows: Any
    try:
        rows = wire.rows_of(message)
    except UserError as error:
        rows = error  # the request has its place in the order all the same
    # What comes with a token has about 28 bytes; a body of more waits, too, and counts as more.
    return message, rows, max(wire.tokens_in(message), len(data) // 32)


def _or_error(kind: Any, data: bytes) -> Any:
    if len(data) > _MOST_JSON:
        return UserError(f"the body has {len(data)} bytes, expected at most {_MOST_JSON}")
    try:
        return parsed(kind, data)
    except UserError as error:
        return error


def _later(name: str, model: str) -> Response:
    return JSONResponse({"request_id": name, "model_id": model})


def _ids(data: bytes) -> tuple[str, int] | None:
    """The model and the number in a body that is wrong otherwise."""
    try:
        values = json.loads(data)
        model, number = values["model_id"], values["seq_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = isinstance(model, str) and isinstance(number, int) and not isinstance(number, bool)
    return (model, number) if fits else None
