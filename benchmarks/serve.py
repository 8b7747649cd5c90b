"""The server's engine: clients in parallel and one after the other, new adapters, right answers.

Timing clients and adding adapters runs on SmolLM2's shapes with random weights. The test of answers
sends its requests to a toy decoder while the adapters change, and compares every answer with
`generate` of that adapter alone.
"""

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.serving import BusyError, Engine, Request, Sizes
from benchmarks import llama
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

CLIENTS, TIMES, PUT = 16, 3.0, 0.05
TOGETHER, ALONE = "at once", "one after the other"
METHODS = {
    "LoRA r=8 on q, v": aj.LoRA("**/{query,value}", rank=8),
    "Houlsby m=64": aj.Bottleneck("**/{attention,mlp}/output", bottleneck_dim=64),
}


class Collected:
    """A sink that keeps the tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.done: Future[str] = Future()

    def token(self, token: int) -> bool:
        self.ids.append(token)
        return True

    def end(self, why: str) -> None:
        self.done.set_result(why)


def random_adapter(model: nnx.Module, seed: int) -> tuple[Any, Any]:
    """The recipe of a model, and leaves with noise in them."""
    draw = np.random.default_rng(seed).normal
    tree = nnx.state(model, aj.nnx.AdapterParam)
    noisy = jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), x.dtype), tree)
    return aj.nnx.recipe_of(model), noisy


def engine_of(model: nnx.Module, sizes: Sizes, adapters: int, places: int | None = None) -> Engine:
    """A running engine; all adapters have places on the device, or that many have."""
    bank = aj.Bank(model, capacity=places or max(adapters, sizes.rows))
    engine = Engine(bank, replace(sizes, adapters=adapters))
    engine.start()
    return engine


def speed(report: Report, base: Decoder, new: int, rounds: int, sizes: Sizes) -> None:
    """Tokens per second of clients at once, beside one after the other."""
    model = aj.adapt(base, METHODS["LoRA r=8 on q, v"], rngs=nnx.Rngs(1))
    engine = engine_of(model, sizes, CLIENTS)
    names = [str(i) for i in range(CLIENTS)]
    for i, name in enumerate(names):
        fitted = engine.fit(name, random_adapter(model, i))
        engine.put(name, fitted, None).result()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, base.config.vocab_size, 20).tolist() for _ in names]

    def submit(i: int) -> Collected:
        sink = Collected()
        engine.submit(prompts[i], sink, model=names[i], most=new)
        return sink

    def at_once() -> None:
        for sink in [submit(i) for i in range(CLIENTS)]:
            sink.done.result()

    def in_turn() -> None:
        for i in range(CLIENTS):
            submit(i).done.result()

    seconds = interleave({TOGETHER: at_once, ALONE: in_turn}, rounds)
    engine.close()
    tokens = CLIENTS * new
    report.samples("speed", seconds)
    report.add(
        "Tokens per second",
        case=f"{CLIENTS} clients, {new} tokens each",
        **{n: Spread.of(tokens / s for s in seconds[n]) for n in seconds},
    )
    report.claim(
        f"time of {CLIENTS} clients at once / one after the other",
        ratio(seconds, TOGETHER, ALONE),
        1 / TIMES,
    )


def adding(report: Report, base: Decoder, name: str, rounds: int, sizes: Sizes) -> None:
    """The seconds until a new adapter can be named, while a request runs, and what compiles."""
    model = aj.adapt(base, METHODS[name], rngs=nnx.Rngs(1))
    engine = engine_of(model, sizes, 32)
    engine.put("first", engine.fit("first", random_adapter(model, 0)), None).result()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    idle, busy, cpu = list[float](), list[float](), list[float]()
    for took, running in ((idle, False), (busy, True)):
        sink = Collected()
        if running:
            room = sizes.context - 1
            request = engine.submit([1], sink, model="first", most=room)
        for i in range(rounds):
            adapter = jax.block_until_ready(random_adapter(model, i))
            start, of_cpu = time.perf_counter(), time.process_time()
            fitted = engine.fit("new", adapter)
            engine.put("new", fitted, None, replace=True).result()
            took.append(time.perf_counter() - start)
            cpu += [] if running else [time.process_time() - of_cpu]
        if running:
            engine.cancel(request)
            sink.done.result()
    engine.close()
    report.add(
        "Seconds to add an adapter",
        method=name,
        idle=Spread.of(idle),
        busy=Spread.of(busy),
        processor=Spread.of(cpu),
    )
    report.claim(f"seconds to add an adapter, {name}", Spread.of(idle), PUT)
    report.claim(f"programs compiled by adding adapters, {name}", len(compiled), 0)


def equality(report: Report, requests: int, sizes: Sizes) -> None:
    """Requests over 32 adapters that change meanwhile, each compared with its adapter alone."""
    new, adapters, versions = 8, 32, 40
    base = Decoder(llama.TINY, rngs=nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("**/{query,value}", rank=4), rngs=nnx.Rngs(1))
    contents = [random_adapter(model, i) for i in range(versions)]
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, llama.TINY.vocab_size, (8, 12))
    graphdef, _, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    offline = []
    for _, tree in contents:
        made = generate(nnx.merge(graphdef, tree, rest), jnp.asarray(prompts), max_new_tokens=new)
        offline.append(np.asarray(made.ids).tolist())
    engine = engine_of(model, sizes, adapters, sizes.rows)  # the others wait on the host
    fitted = [engine.fit("x", each) for each in contents]
    content_of = {each: i for i, each in enumerate(fitted)}

    def put(name: str, content: int) -> None:
        engine.put(name, fitted[content], content, replace=True).result()

    names = [f"adapter-{i}" for i in range(adapters)]
    for i, name in enumerate(names):
        put(name, i)
    over, changes = threading.Event(), [0]

    def change() -> None:
        lots = random.Random(1)
        while not over.is_set():
            put(lots.choice(names), lots.randrange(versions))
            changes[0] += 1
            time.sleep(0.002)

    changing = threading.Thread(target=change)
    changing.start()
    lots, sent = random.Random(0), list[tuple[Request, int, Collected]]()
    start = time.perf_counter()
    while len(sent) < requests:
        sink, prompt = Collected(), lots.randrange(len(prompts))
        try:
            given = prompts[prompt].tolist()
            request = engine.submit(given, sink, model=lots.choice(names), most=new)
        except BusyError:
            time.sleep(0.001)
            continue
        sent.append((request, prompt, sink))
    lost = wrong = 0
    for request, prompt, sink in sent:
        lost += sink.done.result(60) != "length"
        wrong += sink.ids != offline[content_of[request.adapter]][prompt]
    took = time.perf_counter() - start
    over.set()
    changing.join()
    engine.close()
    distinct = len({str(each) for each in offline})
    report.add(
        "Whose answer it is",
        requests=requests,
        changes=changes[0],
        **{"distinct adapters": distinct, "lost": lost, "wrong": wrong, "seconds": took},
    )
    report.claim(f"lost of {requests:,} requests over {adapters} adapters that change", lost, 0)
    report.claim(f"answers of {requests:,} that are not the adapter's alone", wrong, 0)


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    rounds, pieces = (2 if quick else 5), (1, 16, 64)
    toy, whole = Sizes(16, 64, pieces=(1, 16), queue=64), Sizes(16, 512, pieces, 64)
    sizes = toy if quick else whole
    equality(report, 300 if quick else 10_000, toy)
    config = llama.TINY if quick else llama.Size().config
    base = Decoder(config, rngs=nnx.Rngs(0))
    methods: Sequence[str] = list(METHODS)
    for name in methods:
        adding(report, base, name, 4 * rounds, sizes)
    speed(report, base, 8 if quick else 32, rounds, sizes)
