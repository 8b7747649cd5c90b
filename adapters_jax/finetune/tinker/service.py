"""Sessions, models that train, and what clients ask of them, for the keys that they belong to.

All of it runs in the event loop's thread; arrays and files are other threads' work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adapters_jax.errors import FileSystemError, UserError, shown
from adapters_jax.finetune.serving.adapters import DecoderBase, Read
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.requests import UnknownModelError
from adapters_jax.finetune.tenants.engine import Tenants
from adapters_jax.finetune.tenants.requests import Adam, ClosedError, Snapshot, UnknownTenantError
from adapters_jax.finetune.tinker import wire
from adapters_jax.finetune.tinker.checkpoints import Checkpoint, Checkpoints, until
from adapters_jax.finetune.tinker.futures import JSON, Bounds, Entry, Futures, Turns, background
from adapters_jax.finetune.tinker.recipes import Recipes
from adapters_jax.finetune.tinker.sampling import Asked, Sampler, Samplers, Weights
from adapters_jax.recipe import Recipe

_log = logging.getLogger(__name__)
_SILENT = 900.0  # seconds without a heartbeat, after which a session is over


@dataclass(eq=False)
class Model:
    """A model that trains.

    Attributes:
        id: what clients call it.
        owner: the key that it belongs to.
        about: what a checkpoint says of it: its recipe, its rank, what the client says.
        turns: its requests in their order.
        asked: when it was last asked for something, in seconds since 1970.
        inflight: what its inflight sampling sessions share.
    """

    id: str
    owner: str
    session: str
    recipe: Recipe
    about: dict[str, Any]
    turns: Turns
    asked: float = field(default_factory=time.time)
    inflight: Weights = field(default_factory=lambda: Weights(None))


@dataclass
class _Session:
    owner: str
    seen: float = field(default_factory=time.monotonic)


class Service:
    """What the paths do.

    Args:
        engine: samples; it has been started.
        tenants: trains; it has been started.
        bounds: what one key may have at a time.
        seconds: how long a request that is missing in a model's order is waited for, and how long
            a sample may be computed.
        any_base: load checkpoints of another base, with a warning.
    """

    def __init__(
        self,
        base: DecoderBase,
        engine: Engine,
        tenants: Tenants,
        checkpoints: Checkpoints,
        recipes: Recipes,
        bounds: Bounds = Bounds(),
        seconds: float = 300.0,
        any_base: bool = False,
    ) -> None:
        self.base, self.checkpoints, self.futures = base, checkpoints, Futures(bounds)
        self.models: dict[str, Model] = {}
        self._engine, self._tenants, self._recipes = engine, tenants, recipes
        self._bounds, self._seconds, self._any_base = bounds, seconds, any_base
        # Samples have the control tokens, so that a stop text may be one.
        decode = partial(base.decoder.tokenizer.decode, skip_special_tokens=False)
        self._sampler = Sampler(engine, decode, seconds)
        self._sessions: dict[str, _Session] = {}
        self.samplers = Samplers(bounds.samplers, self.futures.forget)
        # So that threads are left for what reads requests, whatever many clients create or save.
        self._heavy = asyncio.Semaphore(2)

    async def aside(self, work: Callable[..., Any], *args: Any) -> Any:
        """Does something long in another thread, at most two at a time."""
        async with self._heavy:
            return await asyncio.to_thread(work, *args)

    @property
    def alive(self) -> bool:
        """Whether it samples and trains."""
        return self._engine.alive and self._tenants.alive

    # Sessions

    def begin_session(self, owner: str) -> str:
        """Begins a session."""
        self._end_silent()
        own = [name for name, each in self._sessions.items() if each.owner == owner]
        if len(own) >= self._bounds.sessions:
            self.end_session(owner, min(own, key=lambda name: self._sessions[name].seen))
        name = secrets.token_hex(16)
        self._sessions[name] = _Session(owner)
        return name

    def session(self, owner: str, name: str) -> str:
        """A session of a key, which shows that its client is there; those that are silent end.

        Raises:
            UnknownModelError: the key does not have this session.
        """
        found = self._sessions.get(name)
        if found is None or found.owner != owner:
            raise UnknownModelError(f"there is no session {shown(name)}; begin a new one")
        found.seen = time.monotonic()
        self._end_silent()
        return name

    def _end_silent(self) -> None:
        last = time.monotonic() - _SILENT
        for name in [n for n, each in self._sessions.items() if each.seen < last]:
            self._end(name)

    def end_session(self, owner: str, name: str) -> None:
        """Ends a session with its models and sampling sessions."""
        self._end(self.session(owner, name))

    def _end(self, name: str) -> None:
        owner = self._sessions.pop(name).owner
        for model in [each for each in self.models.values() if each.session == name]:
            self.unload(model)
        self.samplers.end(owner, f"{name}:")

    # Models

    def model(self, owner: str, name: str) -> Model:
        """A model of a key.

        Raises:
            UnknownModelError: the key does not have this model.
        """
        found = self.models.get(name)
        if found is None or found.owner != owner:
            raise UnknownModelError(
                f"there is no model {shown(name)}; if the server was started anew, create one from "
                "its last checkpoint"
            )
        found.asked = time.time()
        self._sessions[found.session].seen = time.monotonic()
        return found

    def create(self, owner: str, request: Any) -> tuple[str, str]:
        """Begins to create a model; returns the names of the model and of the answer."""
        metadata = {str(k): str(v) for k, v in (request.user_metadata or {}).items()}
        _check_adamw(request.optimizer_config)
        recipe, about = self._recipes.of(request.lora_config, metadata)
        seed = getattr(request.lora_config, "seed", None)
        seed = secrets.randbits(31) if seed is None else seed

        async def make(model: Model) -> dict[str, Any]:
            await self.aside(self._begin, model, recipe, seed)
            return {"model_id": model.id, "type": "create_model"}

        return self._made(owner, request, recipe, about, metadata, make)

    def create_from(self, owner: str, request: Any) -> tuple[str, str]:
        """Begins to create a model from a checkpoint; returns both names."""
        _check_adamw(request.optimizer_config)
        found = self.checkpoints.find(owner, request.path)
        metadata = {str(k): str(v) for k, v in (request.user_metadata or {}).items()}
        recipe = Recipe.from_json(found.about["recipe"])

        async def make(model: Model) -> dict[str, Any]:
            snapshot = await self.aside(self._loaded, found, request.optimizer)
            await self.aside(self._begin, model, recipe, 0)
            return await self._restored(model, found, snapshot, request.optimizer)

        return self._made(owner, request, recipe, found.about, metadata, make)

    def _begin(self, model: Model, recipe: Recipe, seed: int) -> None:
        """Creates a model's tenant; another thread calls it."""
        self._tenants.create(model.id, recipe, seed)
        if self.models.get(model.id) is not model:  # it was unloaded meanwhile
            self._drop(model)

    def _drop(self, model: Model) -> None:
        with contextlib.suppress(UnknownTenantError):
            self._tenants.drop(model.id)

    def _made(
        self,
        owner: str,
        request: Any,
        recipe: Recipe,
        about: Mapping[str, Any],
        metadata: Mapping[str, str],
        make: Callable[[Model], Awaitable[dict[str, Any]]],
    ) -> tuple[str, str]:
        session = self.session(owner, request.session_id)
        name = f"{session}:train:{request.model_seq_id}"  # as the client derives it, too
        if name not in self.models:
            own = sum(each.owner == owner for each in self.models.values())
            if own >= self._bounds.models:
                raise UserError(f"this key has {own} models, the most; unload one")
            kept = {key: about[key] for key in ("lora", "recipe")}
            turns = Turns(self._seconds)
            model = Model(name, owner, session, recipe, {**kept, "metadata": metadata}, turns)
            self.models[name] = model

            async def create() -> dict[str, Any]:
                try:
                    return await make(model)
                except BaseException:  # also a cancellation: a model that is half made has to go
                    self.unload(model)
                    raise

            try:
                self.ordered(model, 0, create)
            except UserError:  # as much as may be is on its way; the client asks again
                self.unload(model)
                raise
        return name, f"{name}:0"

    def unload(self, model: Model) -> None:
        """Forgets a model; what it was yet to do fails."""
        if self.models.pop(model.id, None) is None:
            return
        for entry in model.turns.close():
            self.futures.fail(model.owner, entry, "the model is gone")
        self._drop(model)  # which may not be there yet, and then goes once it is

    # Their requests

    def ordered(
        self,
        model: Model,
        number: int,
        work: Callable[[], Awaitable[Any]],
        tokens: int = 0,
        whole: bool = True,
    ) -> str:
        """Does something once all earlier requests of a model are begun; returns the answer's name.

        Args:
            number: the request's number; one that came before is not done again.
            work: begins it at its call, and is awaited for the answer.
            tokens: how many tokens it has.
            whole: whether the next request begins only after its end.
        """
        name = f"{model.id}:{number}"
        if model.turns.has(number):
            return name
        entry = self.futures.make(model.owner, name, tokens)
        try:
            model.turns.check(number)
        except UserError as error:
            self.futures.fail(model.owner, entry, str(error))
            return name

        async def start() -> None:
            try:
                answer = work()
            except Exception as error:
                answer = _raised(error)
            settled = self._settled(model.owner, entry, answer)
            if whole:
                await settled
            else:
                background(settled)

        model.turns.add(number, entry, start)
        return name

    async def _settled(self, owner: str, entry: Entry, answer: Awaitable[Any]) -> None:
        """Puts an answer, or its error, where the client asks for it."""
        try:
            made = await answer
        except (FileSystemError, ClosedError) as error:
            self.futures.fail(owner, entry, str(error), "server")
        except UserError as error:
            self.futures.fail(owner, entry, str(error))
        except asyncio.CancelledError:
            self.futures.fail(owner, entry, "the request was cancelled")
            raise
        except Exception:
            _log.exception("a request failed: %s", entry.id)
            self.futures.fail(owner, entry, "the server failed; its log says why", "server")
        else:
            if isinstance(made, bytes):
                self.futures.end(owner, entry, made, wire.PROTOBUF)
            else:
                self.futures.end(owner, entry, json.dumps(made).encode(), JSON)

    def passed(self, model: Model, message: Any, rows: Any, tokens: int) -> str:
        """Begins a forward pass, with gradients unless it is one alone.

        Args:
            message: the protobuf.
            rows: its rows, or the UserError that they are.
        """

        def work() -> Awaitable[bytes]:
            if isinstance(rows, UserError):
                raise rows
            future = self._tenants.forward_backward(
                model.id,
                rows,
                message.loss_fn,
                wire.config_of(message),
                backward=not message.forward_only,
            )
            return _then(future, wire.passed)

        return self.ordered(model, message.seq_id, work, tokens, whole=False)

    def step(self, model: Model, request: Any) -> str:
        """Begins a step of the optimiser."""

        def work() -> Awaitable[dict[str, Any]]:
            given = request.optim_params
            _check_adamw(given)
            adam = Adam(*(getattr(given, name) for name in Adam._fields))
            future = self._tenants.optim_step(model.id, adam)
            return _then(future, lambda metrics: {"metrics": metrics})

        return self.ordered(model, request.seq_id, work, whole=False)

    def save(self, model: Model, request: Any, kind: str) -> str:
        """Begins to save a model."""
        name = f"{request.seq_id:06d}" if request.path is None else request.path
        ttl = request.ttl_seconds
        said = getattr(request, "user_metadata", None) or {}
        about = {**model.about, "metadata": {**model.about["metadata"], **said}}
        about["base_sha256"] = self.base.sha256

        async def save() -> dict[str, Any]:
            expires = {} if ttl is None else {"expires": until(ttl)}
            snapshot = await asyncio.wrap_future(self._tenants.snapshot(model.id))
            files = {}
            if kind == "external_weights":
                if request.age_encryption_recipients:
                    raise UserError("age_encryption_recipients is not supported; leave it out")
                files = await self.aside(self._exported, snapshot)
            overwrite = getattr(request, "overwrite", False)
            place = model.owner, model.id, kind, name
            known = {**about, **expires}
            saved = await self.aside(
                self.checkpoints.save, *place, snapshot, files, known, overwrite
            )
            return {"path": saved.path, "size_bytes": saved.about["size"], "type": request.type}

        return self.ordered(model, request.seq_id, save)

    def _exported(self, snapshot: Snapshot) -> dict[str, bytes]:
        """PEFT's files of an adapter."""
        with tempfile.TemporaryDirectory(prefix="adapters-jax-") as folder:
            self.base.export(Path(folder, "a"), Read(snapshot.recipe, snapshot.leaves))
            return {path.name: path.read_bytes() for path in Path(folder, "a").iterdir()}

    def exported(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """PEFT's files of a checkpoint; another thread may call it."""
        if checkpoint.kind == "external_weights":
            return {path.name: path.read_bytes() for path in checkpoint.files()}
        return self._exported(self._loaded(checkpoint, False))

    def _loaded(self, checkpoint: Checkpoint, optimizer: bool) -> Snapshot:
        """What a checkpoint has; another thread may call it.

        Raises:
            UserError: it lacks the optimiser that is asked for, or is of another base.
        """
        if optimizer and checkpoint.kind != "weights":
            raise UserError(
                f"{checkpoint.path} has no optimiser's state; load it without, or weights"
            )
        here = self.base.sha256
        there = checkpoint.about.get("base_sha256", here)  # absent in older ones
        if there != here:
            other = f"{checkpoint.path} was trained on another base: weights {there[:12]}..., here "
            other += f"{here[:12]}..."
            if not self._any_base:
                raise UserError(f"{other}; start the server with that base, or with --any-base")
            _log.warning("warning: %s", other)
        return self.checkpoints.load(checkpoint)

    def load(self, model: Model, request: Any) -> str:
        """Begins to load a checkpoint into a model that is there."""

        async def load() -> dict[str, Any]:
            found = self.checkpoints.find(model.owner, request.path)
            snapshot = await self.aside(self._loaded, found, request.optimizer)
            return await self._restored(model, found, snapshot, request.optimizer)

        return self.ordered(model, request.seq_id, load)

    async def _restored(
        self, model: Model, found: Checkpoint, snapshot: Snapshot, optimizer: bool
    ) -> dict[str, Any]:
        future = self._tenants.restore(model.id, snapshot, optimizer=optimizer)
        await asyncio.wrap_future(future)
        return {"path": found.path, "model_id": model.id, "type": "load_weights"}

    # Samples

    def save_for_sampler(self, model: Model, request: Any) -> str:
        """Begins to save a model for samples: by a name, or only for a session of them."""
        if request.sampling_session_seq_id is None:
            return self.save(model, request, "sampler_weights")
        name = f"{model.session}:sample:{request.sampling_session_seq_id}"

        async def save() -> dict[str, Any]:
            snapshot = await asyncio.wrap_future(self._tenants.snapshot(model.id))
            fitted = await self.aside(self._engine.fit, model.id, snapshot.adapter)
            weights = Weights(fitted)
            if request.kind == "inflight":
                model.inflight.fitted, weights = fitted, model.inflight
            self.samplers.add(model.owner, name, weights)
            return {"sampling_session_id": name, "type": request.type}

        return self.ordered(model, request.seq_id, save)

    async def begin_sampling(self, owner: str, request: Any) -> str:
        """Begins a session of samples of the base or of a checkpoint."""
        session = self.session(owner, request.session_id)
        weights = await self.weights(owner, request.model_path)
        name = f"{session}:sample:{request.sampling_session_seq_id}"
        self.samplers.add(owner, name, weights)
        return name

    async def weights(self, owner: str, path: str | None) -> Weights:
        """The weights of a checkpoint, or the base."""
        if path is None:
            return Weights(None)
        snapshot = await self.aside(self._loaded, self.checkpoints.find(owner, path), False)
        return Weights(await self.aside(self._engine.fit, path, snapshot.adapter))

    def sample(
        self, owner: str, name: str, target: str | None, weights: Weights, asked: Asked
    ) -> None:
        """Begins to sample; `name` is that of the answer, `target` that of the session."""
        if self.futures.find(owner, name) is None:
            entry = self.futures.make(owner, name, asked.tokens, target)
            background(self._settled(owner, entry, self._sampler.sample(owner, weights, asked)))


async def _then(future: Future[Any], shown: Callable[[Any], Any]) -> Any:
    return shown(await asyncio.wrap_future(future))


async def _raised(error: Exception) -> Any:
    raise error


def _check_adamw(given: Any) -> None:
    """Raises UserError for the settings of another optimiser."""
    kind = getattr(given, "type", "adamw")  # the numbers of AdamW have no type
    if kind != "adamw":
        raise UserError(f"the optimizer is {kind!r}, expected 'adamw', the only one here")
