"""`adapters-jax serve`: one base and many adapters behind one address."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters_jax.errors import HIDDEN, RecipeError, UserError, check_number, check_size
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.serving.adapters import Read
    from adapters_jax.finetune.serving.api import Api
    from adapters_jax.finetune.serving.engine import Engine
    from adapters_jax.finetune.serving.guard import Limits
    from adapters_jax.finetune.serving.labels import Labeller

    _Made = tuple[Api, Engine | Labeller, dict[str, Read]]


KEY = "ADAPTERS_JAX_API_KEY"


@dataclass(frozen=True)
class Serve(Command):
    """Serves a base and many adapters over HTTP, as OpenAI's API: /v1/completions, /v1/chat/...

    An encoder's server labels texts by /predict instead.

    A request names its adapter as `model`. Requests of all adapters are computed together, and
    adapters come and go meanwhile (/v1/adapters); those that come so are in memory alone, and gone
    when the server ends. The address itself shows a page to try them on.
    Elsewhere than on this machine it needs an API key, in the environment variable
    ADAPTERS_JAX_API_KEY. SIGTERM ends it once the answers that run are whole.

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
        places: how many of them are on the device at a time, by default all; the others wait on the
            host until a request names them.
        rows: requests computed at a time.
        context: largest number of tokens of a prompt and its answer together.
        queue: requests that wait; further ones get the status 429.
        seconds: longest time of an answer, in the queue and computed.
        connections: connections at a time; further ones get the status 503.
        stall: longest pause of a client while it sends its request or reads its answer, in seconds.
        dtype: dtype of the base's weights and arithmetic.
        any_base: serve runs, with warnings, whose base had other files in training.
    """

    examples = """\
  adapters-jax serve smollm2-135m runs/reviews runs/e2e
  adapters-jax serve smollm2-135m french=runs/fr-v2 --room "lora --rank 16" \\
    --port 8080
  curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "reviews", "prompt": "A moving film.", "max_tokens": 32}'
  curl -X PUT localhost:8000/v1/adapters/new -F files=@adapter_config.json \\
    -F files=@adapter_model.safetensors"""
    positional = ("base", "runs")

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Adapters": ("name", "room", "adapters", "places"),
        "Address": ("host", "port", "connections", "stall"),
        "Work": ("rows", "context", "queue", "seconds", "dtype"),
    }
    base: str
    runs: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    room: tuple[str, ...] = ()
    adapters: int = 32
    places: int | None = None
    rows: int = 8
    context: int = 1024
    queue: int = 64
    seconds: float = 300.0
    connections: int = 512
    stall: float = 30.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    any_base: bool = False

    @property
    def _on_device(self) -> int:
        """The places for adapters on the device."""
        return self.adapters if self.places is None else self.places

    def prepare(self, console: Console) -> Callable[[], None]:
        """Loads the base and the adapters."""
        from adapters_jax.finetune.pretrained.locate import is_decoder
        from adapters_jax.finetune.report.pages import render
        from adapters_jax.finetune.run_directory import find_run
        from adapters_jax.finetune.serving.api import application
        from adapters_jax.finetune.serving.guard import LOOPBACK, Limits, serve

        for flag in ("adapters", "rows", "context", "queue", "connections"):
            check_size("serve", f"--{flag}", getattr(self, flag))
        check_size("serve", "--places", self._on_device)
        check_number("serve", "--seconds", self.seconds)
        check_number("serve", "--stall", self.stall)
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port {self.port}: expected a number from 0 to {2**16 - 1}")
        key = os.environ.get(KEY) or None
        if self.host not in LOOPBACK and key is None:
            raise UserError(
                f"--host {self.host} lets other machines in; set {KEY} to a key that they need, or "
                "leave --host out"
            )
        runs = {name: find_run(path).path for name, path in self._named().items()}
        called = self.name or (Path(self.base).name if Path(self.base).exists() else self.base)
        if called in runs:
            raise UserError(f"--name {called}: an adapter has this name; give another one")
        limits = Limits(seconds=self.seconds, receiving=self.stall, connections=self.connections)
        make = self._completing if is_decoder(self.base) else self._labelling
        api, engine, read = make(runs, called, limits)
        page = render(
            "serve",
            title="adapters-jax serve",
            base=called,
            key=key is not None,
            hidden=HIDDEN.pattern,
        )

        def listening(port: int) -> None:
            address = f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}"
            count = len(engine.adapters)
            adapters = f"{count} adapter{'s' if count != 1 else ''}"
            console.say(f"{called} with {adapters} at {address}; Ctrl-C ends it")
            console.result({"address": address, "base": called, "adapters": [*engine.adapters]})

        def run() -> None:
            console.say("compiling the programs")
            engine.start()
            try:
                for name, each in read.items():
                    fitted = engine.fit(name, (each.recipe, each.leaves))
                    engine.put(name, fitted, each.about).result()
                app = application(api, page, limits, key)
                serve(app, self.host, self.port, limits, listening)
            finally:
                engine.close()

        return run

    def _completing(self, runs: Mapping[str, Path], called: str, limits: Limits) -> _Made:
        """The server of a decoder."""
        from adapters_jax.finetune.compare.grid import read_candidate
        from adapters_jax.finetune.serving.adapters import DecoderBase, covering
        from adapters_jax.finetune.serving.completions import TextApi
        from adapters_jax.finetune.serving.engine import Engine, Sizes
        from adapters_jax.transforms.bank import Bank

        base = DecoderBase(self.base, self.dtype)
        read = {name: base.read(path, self.any_base) for name, path in runs.items()}
        texts = self.room or (() if runs else ("lora --rank 16",))
        layers = {"num_layers": base.decoder.config.num_layers, "layer": base.decoder.family.layer}
        later = [base.planned(read_candidate(text).method.build(**layers)) for text in texts]
        model = _together(lambda: base.adapted(covering([*read.values(), *later])))
        context = min(self.context, base.decoder.config.longest)
        sizes = Sizes(self.rows, context, queue=self.queue, adapters=self.adapters)
        engine = Engine(Bank(model, capacity=max(self.rows, self._on_device)), sizes)
        return TextApi(base, engine, called, limits), engine, read

    def _labelling(self, runs: Mapping[str, Path], called: str, limits: Limits) -> _Made:
        """The server of an encoder."""
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.finetune.serving.adapters import covering
        from adapters_jax.finetune.serving.labels import BATCH, EncoderBase, LabelApi, Labeller
        from adapters_jax.finetune.tasks import read_run

        if self.room or not runs:
            raise UserError(
                f"{self.base} is an encoder, whose server has room for adapters like its runs; "
                "give at least one run, and leave --room out"
            )
        configs = [read_run(Run(path), "predict")[1] for path in runs.values()]
        base = EncoderBase(self.base, configs[0]["pooling"], self.dtype)
        read = {name: base.read(path, self.any_base) for name, path in runs.items()}
        abouts: list[Any] = [each.about for each in read.values()]
        width = max(about.readout.width for about in abouts)
        places = max(BATCH, self._on_device)
        bank = _together(lambda: base.bank(covering(read.values()), width, places))
        longest = max(about.max_length for about in abouts)
        engine = Labeller(base, bank, longest, self.queue, self.adapters)
        return LabelApi(base, engine, called, limits), engine, read

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


def _together(make: Callable[[], Any]) -> Any:
    """What is made of all adapters; raises UserError if there is no recipe for all of them."""
    try:
        return make()
    except RecipeError as error:
        raise UserError(
            f"these adapters cannot share a server: {error}. Serve them apart; a LoRA of a DoRA is "
            "what adapters-jax convert --to peft --for vllm writes"
        ) from error
