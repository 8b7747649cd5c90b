"""A batch with a different adapter for each row, against the same batch with one adapter.

Both run the same model on the same rows, in turn. PEFT can mix LoRA adapters in a batch, too; it
runs the same comparison in its own process. Then banks of more and more places run in turn.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models import generation
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.trees import Tree, merge_trees, partition
from benchmarks import llama
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report
from benchmarks.shapes import HOULSBY, LORA, Subject
from benchmarks.workers import PeerError, Worker

ONE, MIXED = "one adapter", "an adapter each"
FORWARD, DECODE, STEP, PUT = 1.05, 1.10, 1.05, 0.05  # the limits that are wanted
MANY = {"forward": 1.05, "put": 1.5}  # of a bank of the most places, over one of the fewest


def several(tree: Tree, n: int) -> list[Tree]:
    """Trees of one form with other numbers."""
    return [jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), tree) for i in range(n)]


def costs(compiled: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs and bytes of the mixed program, as multiples of those of the other."""
    mixed, one = (compiled[name].cost_analysis() for name in (MIXED, ONE))
    return {key: mixed[key] / one[key] for key in ("flops", "bytes accessed")}


def compare(
    report: Report,
    case: str,
    compiled: Mapping[str, Any],
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    limit: float,
) -> None:
    """Times both programs in turn."""
    seconds = interleave(runs, rounds)
    report.samples(case, seconds)
    took = ratio(seconds, MIXED, ONE)
    report.add(
        "Mixed batches",
        case=case,
        **{name: Spread.of(1e3 * s for s in seconds[name]) for name in (ONE, MIXED)},
        **{"ms, mixed / one": took, **{f"{k}, mixed / one": v for k, v in costs(compiled).items()}},
    )
    report.claim(f"time of a mixed batch, {case}, / one adapter's", took, limit)


def forward(report: Report, subject: Subject, name: str, rounds: int) -> None:
    """A forward pass of rows with an adapter each."""
    base, recipe, ids = subject.weights(), subject.recipe(name), subject.ids()
    model, params = subject.adapted(recipe, base)
    own, frozen = partition(params, model.recipe)
    bank = aj.Bank(model, params, capacity=subject.batch)
    took, names = [], [str(i) for i in range(subject.batch)]
    for name, tree in zip(names, several(own, subject.batch), strict=True):
        start = time.perf_counter()
        bank = bank.put(name, (model.recipe, tree))
        jax.block_until_ready(bank.rows([name]).adapters)
        took.append(time.perf_counter() - start)

    def one(own: Tree, frozen: Tree, ids: jax.Array) -> jax.Array:
        return model.apply({"params": merge_trees(own, frozen)}, ids)

    def mixed(params: Tree, rows: Any, ids: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids, adapters=rows)

    given: dict[str, Callable[[], tuple[Any, ...]]] = {
        ONE: lambda: (own, frozen, ids),
        MIXED: lambda: (bank.params, bank.rows(names), ids),
    }
    functions = {ONE: one, MIXED: mixed}
    compiled = {n: jax.jit(f).lower(*given[n]()).compile() for n, f in functions.items()}
    first = [np.asarray(compiled[n](*given[n]()))[0] for n in (ONE, MIXED)]
    apart = float(np.abs(first[0] - first[1]).max() / np.abs(first[0]).max())
    report.claim(f"logits of the first row apart, {subject}, {name}", apart, 1e-5)

    def run(n: str) -> Callable[[], None]:
        def go() -> None:
            jax.block_until_ready(compiled[n](*given[n]()))

        return go

    runs = {n: run(n) for n in functions}
    compare(report, f"forward, {subject}, {name}", compiled, runs, rounds, FORWARD)
    report.claim(
        f"seconds to add an adapter and fetch it, {subject}, {name}", Spread.of(took[1:]), PUT
    )


def peft(report: Report, subject: Subject, rounds: int) -> None:
    """The same of PEFT: LoRA adapters of rank 8 on the queries and values of a BERT."""
    case = f"forward, {subject}, {LORA}, PEFT"
    config = subject.base.config
    job = {
        "batch": subject.batch,
        "length": subject.length,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
        },
    }
    try:
        worker = Worker("torch", "sides.mixed_peft", job)
    except PeerError as error:
        report.add("Not done", job=case, contender="PEFT", why=str(error))
        return
    try:
        runs = {n: lambda n=n: worker.ask("timed", mixed=n == MIXED) for n in (ONE, MIXED)}
        seconds = interleave(runs, rounds)
    finally:
        worker.close()
    report.samples(case, seconds)
    report.add(
        "Mixed batches",
        case=case,
        **{name: Spread.of(1e3 * s for s in seconds[name]) for name in (ONE, MIXED)},
        **{"ms, mixed / one": ratio(seconds, MIXED, ONE)},
    )


def step(report: Report, subject: Subject, name: str, trainings: int, rounds: int) -> None:
    """A training step of several adapters, beside one of one adapter with all rows."""
    base, recipe = subject.weights(), subject.recipe(name)
    model, params = subject.adapted(recipe, base)
    tx = optax.adamw(1e-4)
    new = lambda i: aj.TrainState.create(model, params, tx=tx, key=jax.random.key(i))  # noqa: E731
    states = {ONE: new(0), MIXED: aj.stack_states([new(i) for i in range(trainings)])}
    whole = subject.data()
    parts = jax.tree.map(lambda x: x.reshape(trainings, -1, *x.shape[1:]), whole)
    data = {ONE: whole, MIXED: parts}
    update: Any = aj.make_train_step(subject.loss(model))
    frozen = states[ONE].base
    rest = {n: replace(state, base=None) for n, state in states.items()}
    compiled = {n: update.jitted.lower(rest[n], frozen, data[n], None).compile() for n in rest}

    def run(n: str) -> Callable[[], None]:
        def advance() -> None:
            rest[n], _ = compiled[n](rest[n], frozen, data[n], None)
            jax.block_until_ready(rest[n])

        return advance

    case = f"step, {subject}, {name}, {trainings} trainings"
    compare(report, case, compiled, {n: run(n) for n in rest}, rounds, STEP)


def decode(report: Report, size: llama.Size, base: Decoder, rounds: int, batch: int) -> None:
    """Decoding of rows with an adapter each."""
    ids = size.ids(size.prompt, batch)
    model = llama.adapted(base, size.recipes["LoRA r=8 on q, v"])
    own = nnx.state(model, aj.nnx.AdapterParam)
    bank = aj.Bank(model, capacity=batch)
    for i, tree in enumerate(several(own, batch)):
        bank = bank.put(str(i), (aj.nnx.recipe_of(model), tree))
    rows, stacked = bank.rows([str(i) for i in range(batch)]), bank.model
    given: dict[str, tuple[Any, Any]] = {ONE: (model, None), MIXED: (stacked, rows)}

    def run(n: str, tokens: int) -> Callable[[], None]:
        which, adapters = given[n]

        def go() -> None:
            made = generation.generate(which, ids, max_new_tokens=tokens, adapters=adapters)
            jax.block_until_ready(made.ids)

        return go

    seconds = interleave({(n, t): run(n, t) for n in given for t in (1, size.tokens)}, rounds)
    each = {
        n: [
            (long - short) / (size.tokens - 1)
            for short, long in zip(seconds[n, 1], seconds[n, size.tokens], strict=True)
        ]
        for n in given
    }
    case = f"decode, SmolLM2's shapes, {batch} rows"
    took = ratio(each, MIXED, ONE)
    report.samples(case, each)
    report.add(
        "Mixed batches",
        case=case,
        **{name: Spread.of(1e3 * s for s in each[name]) for name in given},
        **{"ms, mixed / one": took},
    )
    report.claim(f"time of a token, {case}, / one adapter's", took, DECODE)


def places(report: Report, quick: bool, rounds: int) -> None:
    """Full banks of more and more places: a forward pass, and a put until it is on the device."""
    sizes = (4, 16) if quick else (32, 1024, 4096)
    (batch, length), d = ((4, 8), 32) if quick else ((16, 64), 512)
    config = DecoderConfig(1024, d, 2 * d, 8, 8, 8)
    model = aj.adapt(Decoder(config, rngs=nnx.Rngs(0)), aj.lora(8), rngs=nnx.Rngs(1))
    recipe, tree = aj.nnx.recipe_of(model), nnx.state(model, aj.nnx.AdapterParam)
    ids, names = jnp.ones((batch, length), jnp.int32), [str(i) for i in range(batch)]
    forward = nnx.jit(lambda model, ids, rows: model(ids, adapters=rows))
    texts = dict[int, str]()
    runs: dict[tuple[str, int], Callable[[], None]] = {}
    for n in sizes:
        bank = aj.Bank(model, capacity=n)
        fitted = [bank.fit("", (recipe, own)) for own in several(tree, batch)]
        for i in range(n):
            bank = bank.put(str(i), fitted[i % batch])

        texts[n] = forward.lower(bank.model, ids, bank.rows(names)).as_text()

        def call(bank: aj.Bank = bank, model: Any = bank.model) -> None:
            jax.block_until_ready(forward(model, ids, bank.rows(names)))

        def put(bank: aj.Bank = bank) -> None:
            new = bank.put("0", (recipe, tree), replace=True)
            jax.block_until_ready(new.rows(["0"]).adapters)

        runs |= {("forward", n): call, ("put", n): put}
    differ = float(texts[sizes[0]] != texts[sizes[-1]])
    what = f"programs of a forward pass that differ, banks of {sizes[-1]:,} and of {sizes[0]:,}"
    report.claim(what, differ, 0.0)
    seconds = interleave(runs, rounds)
    for what, limit in MANY.items():
        case = f"{what}, 8 layers, {batch} x {length}"
        report.samples(case, {str(n): seconds[what, n] for n in sizes})
        each = {f"{n:,}": Spread.of(1e3 * s for s in seconds[what, n]) for n in sizes}
        report.add("Milliseconds by places", case=case, **each)
        took = ratio(seconds, (what, sizes[-1]), (what, sizes[0]))
        report.claim(f"time, {case}, a bank of {sizes[-1]:,} / of {sizes[0]:,}", took, limit)


def run(report: Report, quick: bool, part: str = "") -> None:
    """Runs the whole benchmark, or only its part `places`; at toy sizes if quick."""
    if part:
        places(report, quick, rounds=2 if quick else 21)
        return
    subject = Subject("toy BERT", 4, 16) if quick else Subject("BERT-base", 32, 128)
    rounds = 2 if quick else 10
    for name in (LORA, HOULSBY):
        forward(report, subject, name, rounds)
    peft(report, subject, rounds)
    for name in (LORA, HOULSBY):
        step(report, subject, name, 2 if quick else 8, max(2, rounds // 2))
    toy = llama.Size(llama.TINY, batch=2, length=8, prompt=4, tokens=3)
    size = toy if quick else llama.Size()
    base = Decoder(size.config, rngs=nnx.Rngs(0))
    decode(report, size, base, rounds, 4 if quick else 16)
    places(report, quick, rounds)
