"""Labels of texts by an encoder with many adapters, each with its own head.

One thread runs the model. The texts of all requests that wait are computed together, in batches of
static shapes whose rows have an adapter each.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters_jax.adapting import adapt
from adapters_jax.errors import UserError
from adapters_jax.finetune import formats
from adapters_jax.finetune.formats.base import MASKED, BaseModel
from adapters_jax.finetune.pretrained.encoder import INPUTS, load_encoder, store_frozen
from adapters_jax.finetune.pretrained.record import record_of
from adapters_jax.finetune.run_directory import Run, check_finished
from adapters_jax.finetune.serving import schemas
from adapters_jax.finetune.serving.adapters import About, Read, shown_of, warn_of_bits
from adapters_jax.finetune.serving.api import Api
from adapters_jax.finetune.serving.guard import refused
from adapters_jax.finetune.serving.requests import (
    CLOSING,
    BusyError,
    Counts,
    FullError,
    Served,
    UnknownModelError,
)
from adapters_jax.finetune.tasks import read_run
from adapters_jax.finetune.tasks.base import in_row_order
from adapters_jax.finetune.tasks.labelled_problem import apply_to_rows
from adapters_jax.finetune.tasks.readout import Readout
from adapters_jax.linen import init_adapters
from adapters_jax.presets import HEAD
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.fitting import Fitted

BATCH = 8
WIDTHS = (32, 128)  # of short texts; others have the width of the longest
_IDS = np.ones((1, 8), np.int32)


@dataclass(frozen=True)
class Labels(About):
    """What an adapter with a head is.

    Attributes:
        readout: maps the head's outputs to labels.
        max_length: the largest number of tokens; longer texts are cut.
        pairs: whether it takes pairs of texts.
    """

    readout: Readout | None = None
    max_length: int = 0
    pairs: bool = False


@dataclass(frozen=True)
class _Wanted:
    """Texts to label, and who waits for it."""

    name: str
    texts: Sequence[tuple[str, str | None]]
    future: Future[list[Any]] = field(default_factory=Future)


class EncoderBase:
    """An encoder on which adapters are served; see `DecoderBase`.

    Args:
        name: the encoder, as `load_encoder` takes it.
        pooling: what the heads read.
        dtype: the computation dtype.

    Raises:
        UserError: it cannot be loaded.
        AssetError: the pinned asset could not be fetched.
    """

    files = frozenset({*formats.every_file(), "config.json"})

    def __init__(self, name: str, pooling: str = "mean", dtype: str = "float32") -> None:
        self._record = record_of(name)
        self.encoder = encoder = load_encoder(name, pooling, dtype)
        if encoder.tokenizer is None or pooling == MASKED:
            what = "masks" if pooling == MASKED else "images"
            raise UserError(f"{name!r}: {what} are not served; write adapters-jax predict")
        self._base = BaseModel(
            name,
            "encoder",
            encoder.architecture.names,
            "",
            encoder.init(1, jax.random.key(0)),
            identity=encoder.identity,
            classifies=True,
            pooling=pooling,
        )

    def read(self, directory: Path, any_base: bool = False) -> Read:
        """Reads a run, or an exported one from anyone.

        Args:
            directory: has the files.
            any_base: accept an adapter of another base, if it fits this one.

        Raises:
            UserError: it is damaged, not a run, or of another base.
        """
        run = Run(directory)
        task, config = read_run(run, "predict")
        check_finished(run, config)
        self._record.check(run, config, any_base)
        if config["pooling"] != self.encoder.pooling:
            raise UserError(
                f"{directory}: its head reads {config['pooling']}, and those of this server "
                f"{self.encoder.pooling}; serve it by itself"
            )
        readout: Readout = task.readout_of(run, config)  # type: ignore[attr-defined]
        if not readout.has_head:
            raise UserError(f"{directory} is a run of the task {task.name}, which is not served")
        warn_of_bits(run, config)
        base = self._base.accepting(any_base)
        recipe, leaves = formats.format_of(run.adapter).read(run.adapter, base)
        width = leaves[f"{HEAD}/bias"].shape[-1] if f"{HEAD}/bias" in leaves else None
        if width != readout.width:
            raise UserError(
                f"{run.config} names {readout.width} outputs, and the adapter's head has {width}"
            )
        self.encoder.encode([("", None)], config["max_length"])  # the model has the positions
        shown, sizes = shown_of("run", recipe, leaves), (config["max_length"], config["pairs"])
        return Read(recipe, leaves, Labels(shown, None, (), readout, *sizes))

    def bank(self, recipe: Recipe, width: int, capacity: int) -> Bank:
        """A bank whose heads have at most `width` outputs."""
        encoder = self.encoder
        model = adapt(encoder.classifier(width), recipe)
        params = encoder.init(width, jax.random.key(0))
        params = init_adapters(model, params, jax.random.key(0), _IDS)
        return Bank(model, store_frozen(params, recipe, encoder.dtype), capacity=capacity)


class Labeller:
    """An encoder with many adapters that labels texts; the counterpart of `Engine`.

    Args:
        bank: the bank of its adapters, which the labeller takes over.
        longest: the largest number of tokens of a text.
        queue: how many requests wait.
        adapters: how many adapters can be named at a time.

    Raises:
        UserError: the bank has fewer places than a batch can name adapters.
    """

    def __init__(
        self, base: EncoderBase, bank: Bank, longest: int, queue: int, adapters: int
    ) -> None:
        if bank.capacity < min(BATCH, adapters):
            raise UserError(
                f"a bank of {bank.capacity} places: expected at least {min(BATCH, adapters)}, one "
                "for each adapter that a batch can name"
            )
        self._most = adapters
        self.adapters: dict[str, Served] = {}
        self.counts = Counts()
        self.running = 0
        self.alive = False
        self._wanted: list[_Wanted] = []
        self._base, self._bank, self._queue = base, bank, queue
        self._lock = threading.Lock()
        self._widths = tuple(sorted({longest, *(width for width in WIDTHS if width < longest)}))
        self._thread = ThreadPoolExecutor(1, "labeller")
        model = bank.model

        @jax.jit
        def outputs(params: Any, inputs: Any, rows: Any) -> Any:
            return apply_to_rows(
                lambda *each: model.apply({"params": params}, *each, adapters=rows), inputs
            )

        self._outputs = outputs

    def start(self, compiled: Callable[[int, int], None] = lambda n, of: None) -> None:
        """Compiles every program; see `Engine.start`."""
        for n, width in enumerate(self._widths, 1):
            inputs = [jnp.zeros((BATCH, width), jnp.int32) for _ in INPUTS]
            self._outputs(self._bank.params, inputs, self._bank.rows([None] * BATCH))
            compiled(n, len(self._widths))
        self.alive = True

    def close(self) -> None:
        """Stops after what it does now."""
        self.alive = False
        self._thread.shutdown(cancel_futures=True)
        for each in self._wanted:
            each.future.cancel()

    def fit(self, name: str, adapter: Any) -> Fitted:
        """See `Engine.fit`."""
        return self._bank.fit(name, adapter)

    def put(self, name: str, fitted: Fitted, about: Any, *, replace: bool = False) -> Future[None]:
        """See `Engine.put`; requests that came before have the old adapter.

        Raises:
            UserError: the adapter reads longer texts than the labeller has programs for.
        """
        if about.max_length > self._widths[-1]:
            raise UserError(
                f"{name} reads texts of {about.max_length} tokens, expected at most "
                f"{self._widths[-1]}, those of the runs that the server began with"
            )

        def work() -> None:
            if name not in self._bank and len(self._bank) >= self._most:
                raise FullError(f"there are {len(self._bank)} adapters, the most; drop one")
            self._bank = self._bank.put(name, fitted, replace=replace)
            self.adapters = {**self.adapters, name: Served(fitted, about)}
            self.counts.changes += 1

        return self._thread.submit(work)

    def drop(self, name: str) -> Future[None]:
        """See `Engine.drop`."""

        def work() -> None:
            self._served(name)
            self._bank = self._bank.drop(name)
            self.adapters = {n: each for n, each in self.adapters.items() if n != name}
            self.counts.changes += 1

        return self._thread.submit(work)

    def predict(self, name: str, texts: Sequence[tuple[str, str | None]]) -> Future[list[Any]]:
        """Labels texts; those that wait together are computed together, whatever their adapters.

        Raises:
            BusyError: too many requests wait, or the server is closed.
            UnknownModelError: no adapter has this name.
        """
        self._served(name)
        wanted = _Wanted(name, texts)
        with self._lock:
            waiting = sum(not each.future.cancelled() for each in self._wanted)
            if not self.alive:
                raise BusyError(CLOSING)
            if waiting >= self._queue:
                raise BusyError(f"{waiting} requests are waiting, the most; try again later")
            self._wanted.append(wanted)
        self._thread.submit(self._turn)
        return wanted.future

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._wanted)

    def _turn(self) -> None:
        """Answers all requests that wait; each adds a turn, which may find none left."""
        with self._lock:
            taken, self._wanted = self._wanted, []
        taken = [each for each in taken if each.future.set_running_or_notify_cancel()]
        self.running = len(taken)
        try:
            self._answer(taken)
        finally:
            self.running = 0
            bug = sys.exception()
            for each in taken:
                if bug and not each.future.done():  # nobody waits for ever, and it is seen
                    each.future.set_exception(bug)

    def _answer(self, taken: Sequence[_Wanted]) -> None:
        """Computes the rows of all requests in one series of batches, and hands them out."""
        asked: list[tuple[_Wanted, Any, Any]] = []
        for each in taken:
            try:
                about: Labels = self._served(each.name).about
                readout: Any = about.readout
                readout.check(each.texts, about.pairs)
                inputs = readout.inputs(self._base.encoder, each.texts, about.max_length)
            except UserError as error:
                each.future.set_exception(error)
            else:
                asked.append((each, readout, inputs))
        if not asked:
            return
        outputs = self._compute(
            asked[0][1], [(each.name, row) for each, _, inputs in asked for row in inputs.rows]
        )
        for each, readout, inputs in asked:
            mine, outputs = np.split(outputs, [len(inputs.rows)])
            mine = mine[..., : readout.width]
            if np.isfinite(mine).all():
                self.counts.ended["labelled"] += 1
                found = readout.predictions(each.texts, mine, inputs.where)
                each.future.set_result([one.to_dict() for one in found])
            else:
                each.future.set_exception(
                    UserError(f"the numbers of {each.name} are not finite; train it again")
                )

    def _compute(self, readout: Any, rows: Sequence[tuple[str, Any]]) -> np.ndarray:
        """The head's outputs for rows, each with the name of its adapter; any readout batches."""
        inputs = [row for _, row in rows]
        batches = readout.batches(self._base.encoder, inputs, None, BATCH, None, self._widths)
        params, bank = self._bank.params, self._bank

        def run(batch: Any) -> Any:
            names = [rows[i][0] if i >= 0 else None for i in batch["index"]]
            self.counts.steps += 1
            return self._outputs(params, [batch[key] for key in INPUTS], bank.rows(names))

        return in_row_order(run, batches)

    def _served(self, name: str) -> Served:
        if name not in self.adapters:
            raise UnknownModelError(f"no adapter is named {name!r}")
        return self.adapters[name]


class LabelApi(Api):
    """What the paths of an encoder's server do."""

    engine: Labeller

    async def predict(self, request: Request) -> Response:
        """Labels texts."""
        body = schemas.parsed(schemas.PredictRequest, await request.body())
        texts = [(t, None) if isinstance(t, str) else (t[0], t[1]) for t in body.texts]
        if body.model == self.name:
            raise UserError(
                f"{self.name} labels nothing without an adapter; name one of /v1/models"
            )
        future = asyncio.wrap_future(self.engine.predict(body.model, texts))
        try:
            found = await asyncio.wait_for(future, self.limits.seconds)
        except TimeoutError:
            return refused(408, "the labels took longer than the server's limit; send fewer texts")
        return JSONResponse({"model": body.model, "predictions": found})
