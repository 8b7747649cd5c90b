"""`adapters-jax serve`: one base and many adapters behind one address."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters_jax.errors import HIDDEN, RecipeError, UserError, check_number, check_size
from adapters_jax.finetune.addresses import LOOPBACK, bind
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from adapters_jax.finetune.serving.adapters import Read
    from adapters_jax.finetune.serving.api import Api
    from adapters_jax.finetune.serving.engine import Engine
    from adapters_jax.finetune.serving.guard import Limits
    from adapters_jax.finetune.serving.kept import Kept
    from adapters_jax.finetune.serving.labels import Labeller
    from adapters_jax.finetune.serving.listening import Says
    from adapters_jax.recipe import Recipe

    # The paths, what computes, the adapters of the start, and what models may train.
    _Made = tuple[Api, Engine | Labeller, dict[str, Read], Any]


KEY = "ADAPTERS_JAX_API_KEY"
_TRAINING = 8  # models on the device at a time, each with gradients and an optimiser's state
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serve(Command):
    """Serves a base and many adapters over HTTP, as OpenAI's API: /v1/completions, /v1/chat/...

    An encoder's server labels texts by /predict instead.

    A request names its adapter as `model`. Requests of all adapters are computed together, and
    adapters come and go meanwhile (/v1/adapters); those that come so are in memory alone, and gone
    when the server ends, unless --keep names a directory for them. The address itself shows a page
    to try them on, once the base is loaded and compiled; until then /healthz says so.
    Elsewhere than on this machine it needs an API key, in the environment variable
    ADAPTERS_JAX_API_KEY, or several with spaces between them. With --train it trains adapters as
    well, for the client of the package tinker (Tinker's protocol, /api/v1/...): each key has its
    own models and checkpoints. SIGTERM ends it once the answers that run are whole.

    Args:
        base: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hugging Face Hub.
        runs: directories of runs or of adapters of adapters_jax, PEFT or AdapterHub, optionally as
            NAME=DIRECTORY, or ids of runs on the Hub.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        name: what requests call the base; by default its own name.
        room: adapters that may be added later, each a method and its flags as for finetune, such as
            "lora --rank 16"; without runs, that one.
        adapters: how many adapters can be named at a time.
        keep: directory for adapters that are added later; the next server that has it serves them
            again, also in place of runs of the same name.
        places: how many of them are on the device at a time, by default all; the others wait on the
            host until a request names them.
        rows: requests computed at a time.
        context: largest number of tokens of a prompt and its answer together.
        queue: requests that wait; further ones get the status 429.
        seconds: longest time of an answer, in the queue and computed.
        connections: connections at a time; further ones get the status 503.
        train: train adapters for clients of Tinker's protocol, on a decoder; what they save is in
            --keep, or else gone when the server ends.
        rank: largest rank of the LoRA that clients train; other methods need a --room.
        stall: longest pause of a client while it sends its request or reads its answer, in seconds.
        dtype: dtype of the base's weights and arithmetic.
        mesh: devices of this machine, as data=4,model=2; --rows are split over data and fsdp, the
            base over fsdp and model; by default one device. For decoders.
        any_base: serve runs, with warnings, whose base had other files in training; with --train,
            also load such checkpoints.
    """

    examples = """\
  adapters-jax serve smollm2-135m runs/reviews runs/e2e
  adapters-jax serve smollm2-135m french=runs/fr-v2 --room "lora --rank 16" \\
    --port 8080
  curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "reviews", "prompt": "A moving film.", "max_tokens": 32}'
  adapters-jax serve smollm2-135m --train --keep checkpoints --rank 16
  curl -X PUT localhost:8000/v1/adapters/new -F files=@adapter_config.json \\
    -F files=@adapter_model.safetensors"""
    positional = ("base", "runs")

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Adapters": ("name", "room", "adapters", "keep", "places"),
        "Training": ("train", "rank"),
        "Address": ("host", "port", "connections", "stall"),
        "Work": ("rows", "context", "queue", "seconds", "dtype", "mesh"),
    }
    base: str
    runs: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    room: tuple[str, ...] = ()
    adapters: int = 32
    keep: Path | None = None
    places: int | None = None
    train: bool = False
    rank: int = 32
    rows: int = 8
    context: int = 1024
    queue: int = 64
    seconds: float = 300.0
    connections: int = 512
    stall: float = 30.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None
    any_base: bool = False

    @property
    def _on_device(self) -> int:
        """The places for adapters on the device."""
        return self.adapters if self.places is None else self.places

    def prepare(self, console: Console) -> Callable[[], None]:
        """Listens, so that a taken port is found before anything is loaded or compiled."""
        for flag in ("adapters", "rows", "context", "queue", "connections", "rank"):
            check_size("serve", f"--{flag}", getattr(self, flag))
        check_size("serve", "--places", self._on_device)
        check_number("serve", "--seconds", self.seconds)
        check_number("serve", "--stall", self.stall)
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port {self.port}: expected a number from 0 to {2**16 - 1}")
        keys = os.environ.get(KEY, "").split()
        if self.host not in LOOPBACK and not keys:
            raise UserError(
                f"--host {self.host} lets other machines in; set {KEY} to a key that they need, or "
                "leave --host out"
            )
        sockets = bind(self.host, self.port)
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{sockets[0].getsockname()[1]}"

        def run() -> None:
            with contextlib.ExitStack() as stack:
                for each in sockets:
                    stack.enter_context(each)
                from adapters_jax.finetune.serving.guard import Limits
                from adapters_jax.finetune.serving.kept import Kept
                from adapters_jax.finetune.serving.listening import serve

                limits = Limits(
                    seconds=self.seconds, receiving=self.stall, connections=self.connections
                )
                kept = None if self.keep is None else Kept(self.keep)
                if kept is not None:
                    stack.callback(kept.close)
                named = self._named()
                called = self._called([*named, *(kept.paths() if kept else ())])

                def make(says: Says) -> tuple[Any, Callable[[], None]]:
                    says("loading", f"{address} answers 503 until {called} is loaded and compiled")
                    api = self._api(named, called, limits, kept, says, console.say, stack)

                    def ready() -> None:
                        names = [*api.engine.adapters]
                        adapters = f"{len(names)} adapter{'s' if len(names) != 1 else ''}"
                        console.say(f"{called} with {adapters} at {address}; Ctrl-C ends it")
                        console.result({"address": address, "base": called, "adapters": names})

                    return self._application(api, called, limits, keys), ready

                serve(sockets, limits, make, console.say)

        return run

    def _called(self, named: Sequence[str]) -> str:
        """What requests call the base."""
        called = self.name or (Path(self.base).name if Path(self.base).exists() else self.base)
        if called in named:
            raise UserError(f"--name {called}: an adapter has this name; give another one")
        return called

    def _api(
        self,
        named: Mapping[str, str],
        called: str,
        limits: Limits,
        kept: Kept | None,
        says: Says,
        say: Callable[[str], None],
        stack: contextlib.ExitStack,
    ) -> Api:
        """Loads the base and the adapters, and compiles; `stack` closes the engine.

        What a decoder can do without is compiled when it answers already, which `say` tells.
        """
        from adapters_jax.finetune.pretrained.locate import kind_of
        from adapters_jax.finetune.run_directory import find_run

        runs = {name: find_run(path).path for name, path in named.items()}
        completes = kind_of(self.base) == "decoder"
        make = self._completing if completes else self._labelling
        if self.train:
            # Before anything is loaded, so that a package that is absent is said at once.
            from adapters_jax.finetune.tinker.api import TrainingApi as TrainingApi
        api, engine, read, room = make(runs, called, limits, kept)
        stack.callback(engine.close)
        says("compiling", "compiling the programs")
        told = "compiled {} of {} programs".format
        later = {"later": lambda n, of: say(f"{told(n, of)}, beside requests")}
        beside = completes and not self.train  # trainings wait for all of their programs
        engine.start(lambda n, of: says("compiling", told(n, of)), **(later if beside else {}))
        for name, each in read.items():
            fitted = engine.fit(name, (each.recipe, each.leaves))
            engine.put(name, fitted, each.about).result()
        if self.train:
            api.training = self._training(api, room, called, limits, says, stack)
        return api

    def _training(
        self,
        api: Any,
        room: Any,
        called: str,
        limits: Limits,
        says: Says,
        stack: contextlib.ExitStack,
    ) -> Any:
        """Tinker's protocol; `stack` closes what trains."""
        from adapters_jax.distributed.mesh import mesh_of_flag
        from adapters_jax.finetune.tenants.engine import Tenants
        from adapters_jax.finetune.tinker.api import TrainingApi
        from adapters_jax.finetune.tinker.checkpoints import Checkpoints
        from adapters_jax.finetune.tinker.futures import Bounds
        from adapters_jax.finetune.tinker.service import Service

        folder = self.keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapters-jax-")))
        context, (recipes, largest) = api.engine.sizes.context, room
        tenants = Tenants(
            api.decoder.model,
            largest,
            places=min(self._on_device, _TRAINING),
            rows=self.rows,
            group=_group(self.rows, mesh_of_flag(self.mesh, self.rows, "--rows")),
            lengths=sorted({max(1, context // n) for n in (8, 4, 2, 1)}),
        )
        stack.callback(tenants.close)
        says("compiling", "compiling the programs that train")
        tenants.start(lambda n, of: says("compiling", f"compiled {n} of {of} programs that train"))
        saved = Checkpoints(folder / "training")
        bounds = Bounds(models=self.adapters, polls=max(1, self.connections // 2))
        made = (api.reader, api.engine, tenants, saved, recipes, bounds, limits.seconds)
        service = Service(*made, any_base=self.any_base)
        names = tuple(dict.fromkeys((called, self.base)))
        return TrainingApi(service, names, context, limits)

    def _application(self, api: Api, called: str, limits: Limits, keys: Sequence[str]) -> Any:
        from adapters_jax.finetune.report.pages import render
        from adapters_jax.finetune.serving.api import application

        decoder = getattr(api, "decoder", None)  # an encoder's server has none
        chat = decoder is not None and decoder.chat_template is not None
        about = {"title": "adapters-jax serve", "base": called, "key": bool(keys), "chat": chat}
        page = render("serve", **about, hidden=HIDDEN.pattern)
        return application(api, page, limits, keys)

    def _completing(
        self, runs: Mapping[str, Path], called: str, limits: Limits, kept: Kept | None
    ) -> _Made:
        from adapters_jax.distributed.mesh import mesh_of_flag
        from adapters_jax.finetune.compare.grid import read_candidate
        from adapters_jax.finetune.serving.adapters import DecoderBase, covering
        from adapters_jax.finetune.serving.completions import TextApi
        from adapters_jax.finetune.serving.engine import Engine, Sizes
        from adapters_jax.transforms.bank import Bank

        mesh = mesh_of_flag(self.mesh, self.rows, "--rows")
        base = DecoderBase(self.base, self.dtype, mesh)
        read = self._read(base, runs, kept)
        texts = self.room or (() if runs else ("lora --rank 16",))
        layers = base.decoder.family.layers(base.decoder.config)

        def build(text: str) -> Recipe:
            return read_candidate(text).method.on("decoder").build(layers=layers)

        recipes, built = None, [build(text) for text in texts]
        if self.train:
            from adapters_jax.finetune.tinker.recipes import Recipes

            recipes = Recipes(base, self.rank)
            built = [recipes.largest, *map(build, self.room)]
        later = [base.planned(each) for each in built]
        room = (recipes, covering(later)) if self.train else None
        model = _together(lambda: base.adapted(covering([*read.values(), *later])))
        context = min(self.context, base.decoder.config.longest)
        sizes = Sizes(self.rows, context, queue=self.queue, adapters=self.adapters)
        engine = Engine(Bank(model, capacity=max(self.rows, self._on_device)), sizes)
        return TextApi(base, engine, called, limits, kept), engine, read, room

    def _labelling(
        self, runs: Mapping[str, Path], called: str, limits: Limits, kept: Kept | None
    ) -> _Made:
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.finetune.serving.adapters import covering
        from adapters_jax.finetune.serving.labels import BATCH, EncoderBase, LabelApi, Labeller
        from adapters_jax.finetune.tasks import read_run

        if self.train:
            raise UserError(f"--train: {self.base} is an encoder; train adapters of a decoder")
        if self.mesh is not None:
            raise UserError(f"--mesh: {self.base} is an encoder, which one device serves")
        if self.room or not runs:
            raise UserError(
                f"{self.base} is an encoder, whose server has room for adapters like its runs; "
                "give at least one run, and leave --room out"
            )
        configs = [read_run(Run(path), "predict")[1] for path in runs.values()]
        base = EncoderBase(self.base, configs[0]["pooling"], self.dtype)
        read = self._read(base, runs, kept)
        abouts: list[Any] = [each.about for each in read.values()]
        width = max(about.readout.width for about in abouts)
        places = max(BATCH, self._on_device)
        bank = _together(lambda: base.bank(covering(read.values()), width, places))
        longest = max(about.max_length for about in abouts)
        engine = Labeller(base, bank, longest, self.queue, self.adapters)
        return LabelApi(base, engine, called, limits, kept), engine, read, None

    def _read(self, base: Any, runs: Mapping[str, Path], kept: Kept | None) -> dict[str, Read]:
        """The adapters of the command line and those that are kept, but for damaged ones."""
        read: dict[str, Read] = {n: base.read(path, self.any_base) for n, path in runs.items()}
        for name, path in (kept.paths() if kept else {}).items():
            if read.pop(name, None):
                _log.warning("%s is what --keep has, in place of %s", name, runs[name])
            try:
                read[name] = base.read(path)
            except UserError as error:
                _log.warning("%s is not served: %s", name, error)
        if len(read) > self.adapters:
            raise UserError(
                f"--adapters {self.adapters}: there are {len(read)}, with those in {self.keep}; "
                "raise it"
            )
        return read

    def _named(self) -> dict[str, str]:
        """The directories of the runs, by the names of their adapters."""
        from adapters_jax.finetune.serving.schemas import NAME, matches_name

        named: dict[str, str] = {}
        for text in self.runs:
            name, sign, path = text.partition("=")
            name, path = (name, path) if sign else (Path(text).name.partition("@")[0], text)
            if not matches_name(name) or name in named:
                raise UserError(
                    f"the adapter of {path} would be named {name!r}; write NAME={text} with "
                    f"another name like {NAME}"
                )
            named[name] = path
        if len(named) > self.adapters:
            raise UserError(f"--adapters {self.adapters}: there are {len(named)} runs; raise it")
        return named


def _group(rows: int, mesh: Mesh | None) -> int:
    """The rows of a group of the programs that train, so that a mesh splits them.

    Groups are split over one axis of rows; over two, the rows of each group are.
    """
    from adapters_jax.weights.meshes import BATCH

    split = [mesh.shape[name] for name in BATCH if mesh.shape.get(name, 1) > 1] if mesh else []
    if len(split) == 1:
        return math.gcd(rows // split[0], 4)
    return math.gcd(rows, max(4, math.prod(split)))


def _together(make: Callable[[], Any]) -> Any:
    """What is made of all adapters; raises UserError if there is no recipe for all of them."""
    try:
        return make()
    except RecipeError as error:
        raise UserError(
            f"these adapters cannot share a server: {error}. Serve them apart; a LoRA of a DoRA is "
            "what adapters-jax convert --to peft --for vllm writes"
        ) from error
