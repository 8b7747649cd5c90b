"""Times our training step and one written by hand, adapting and auditing BERT-large, and importing.

Where tunix is installed, its Llama is adapted by us and by qwix, see `benchmarks.tunix_llama`.

The four sides of a case (linen and NNX, ours and by hand) start from the same weights. They must
have equal losses and trainable counts before they are timed. XLA counts the FLOPs of the compiled
step. The rate of the machine is that of a 2048^3 float32 matmul, timed in the same rounds.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.bert import BERT_LARGE, BertClassifier, BertConfig
from adapters_jax.trees import flatten, path_of, unflatten
from benchmarks import by_hand, tunix_llama
from benchmarks.by_hand import NnxBert, Sizes, cross_entropy
from benchmarks.harness import Spread, fresh, interleave, ratio
from benchmarks.report import Report

TINY = Sizes(layers=2, d=64, heads=4, ffn=128, vocab=99, positions=32, batch=2, length=16)
TX = optax.adamw(1e-3)
TOLERANCE = 1e-5
SLACK, AUDIT_SECONDS, IMPORT_SECONDS = 1.03, 2.0, 0.3
MATMUL = 2048
Weights = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Case:
    """One method, as a recipe and as the sizes of the models written by hand."""

    name: str
    recipe: aj.Recipe
    sizes: Sizes

    @property
    def plain(self) -> Sizes:
        return replace(self.sizes, rank=0, bottleneck=0)

    @property
    def base(self) -> BertClassifier:
        s = self.sizes
        config = BertConfig(
            s.vocab, s.d, s.layers, s.heads, s.ffn, max_position_embeddings=s.positions
        )
        return BertClassifier(config, s.labels)


def cases(sizes: Sizes, rank: int = 8, m: int = 64) -> list[Case]:
    lora, houlsby = aj.lora(rank, head="head"), aj.houlsby(m, head="head")
    return [
        Case(f"LoRA r={rank} on q, v", lora, replace(sizes, rank=rank)),
        Case(f"Houlsby m={m}", houlsby, replace(sizes, bottleneck=m)),
    ]


def batch_of(sizes: Sizes, seed: int = 0) -> by_hand.Batch:
    """A batch of random tokens and labels; a quarter of the last row is padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((sizes.batch, sizes.length), np.int32)
    mask[-1, -sizes.length // 4 :] = 0
    return {
        "ids": jnp.asarray(rng.integers(0, sizes.vocab, mask.shape), jnp.int32),
        "mask": jnp.asarray(mask),
        "labels": jnp.asarray(rng.integers(0, sizes.labels, sizes.batch), jnp.int32),
    }


def weights_of(case: Case, seed: int = 1) -> Weights:
    """Every parameter by path; all have noise, so that a wrong scale shows."""
    ids = jax.ShapeDtypeStruct((1, case.sizes.length), jnp.int32)
    base = jax.eval_shape(case.base.init, jax.random.key(0), ids)["params"]
    whole = aj.init_adapters(aj.adapt(case.base, case.recipe), base, jax.random.key(0), ids)
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        size = np.float32(0.1 if case.recipe.trains(path) else 0.02)
        noise = size * rng.standard_normal(shape, np.float32)
        return jnp.asarray(noise + path.endswith("norm/scale"))

    return {path: draw(path, x.shape) for path, x in flatten(whole).items()}


def filled(new: Callable[[], nnx.Module], weights: Weights) -> Any:
    """Makes an NNX model whose arrays come from the weights, by path."""
    graphdef, state = nnx.split(nnx.eval_shape(new))
    state = jax.tree_util.tree_map_with_path(lambda path, _: weights[path_of(path)], state)
    return nnx.merge(graphdef, state)


class Side:
    """A training step with its state; each call continues from the state of the last one.

    Args:
        advance: the step, `carry -> (carry, loss, trained)`.
        carry: the first state.
        trained: the trained arrays.
        lower: returns the lowered computation of the step.
    """

    def __init__(self, advance: Callable[[Any], Any], carry: Any, trained: Any, lower: Any):
        self.advance, self.carry, self.loss = advance, carry, float("nan")
        self.trainable = sum(x.size for x in jax.tree.leaves(trained))
        compiled = lower().compile()
        self.flops = float(compiled.cost_analysis()["flops"])
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> None:
        self.carry, self.loss, trained = self.advance(self.carry)
        jax.block_until_ready((self.loss, trained))


def _ours(state: aj.TrainState, run: Callable[..., jax.Array], batch: by_hand.Batch) -> Side:
    def loss(model: Any, batch: by_hand.Batch, key: Any) -> jax.Array:
        return cross_entropy(run(model, batch["ids"], batch["mask"]), batch["labels"])

    step: Any = aj.make_train_step(loss)

    def advance(state: aj.TrainState) -> Any:
        state, metrics = step(state, batch)
        return state, metrics["loss"], state.adapters

    def lower() -> Any:
        return step.jitted.lower(replace(state, base=None), state.base, batch)

    return Side(advance, state, state.adapters, lower)


def _hand(side: tuple[Any, Any, Any], batch: by_hand.Batch) -> Side:
    step, adapters, base = side
    adapters = jax.tree.map(jnp.copy, adapters)  # copies, since a step donates them
    opt_state = TX.init(adapters)

    def advance(carry: Any) -> Any:
        adapters, opt_state, loss = step(*carry, base, batch)
        return (adapters, opt_state), loss, adapters

    def lower() -> Any:
        return step.lower(adapters, opt_state, base, batch)

    return Side(advance, (adapters, opt_state), adapters, lower)


def sides(case: Case) -> dict[tuple[str, str], Side]:
    """The sides by API and author, all with the same weights."""
    batch, weights, key = batch_of(case.sizes), weights_of(case), jax.random.key(2)
    renamed = {path.replace("/lora/", "/lora_"): x for path, x in weights.items()}
    inputs = tuple(jax.ShapeDtypeStruct(batch["ids"].shape, jnp.int32) for _ in range(2))

    model = aj.adapt(case.base, case.recipe)
    state = aj.TrainState.create(model, unflatten(weights), tx=TX, key=key)

    def adapted() -> nnx.Module:
        base = NnxBert(case.plain, nnx.Rngs(0))
        return aj.adapt(base, case.recipe, rngs=nnx.Rngs(1), example_inputs=inputs)

    nnx_state = aj.TrainState.create(filled(adapted, weights), tx=TX, key=key)
    paths = {tuple(path.split("/")): x for path, x in renamed.items()}
    other = filled(lambda: NnxBert(case.sizes, nnx.Rngs(0)), renamed)
    return {
        ("linen", "ours"): _ours(state, lambda p, *x: model.apply({"params": p}, *x), batch),
        ("linen", "by hand"): _hand(by_hand.linen_side(case.sizes, paths, TX), batch),
        ("NNX", "ours"): _ours(nnx_state, lambda model, *x: model(*x), batch),
        ("NNX", "by hand"): _hand(by_hand.nnx_side(case.sizes, other, TX), batch),
    }


def check_equal(found: Mapping[Any, Side], steps: int = 3) -> None:
    """Runs a few steps of every side.

    Adam's first update is the sign of the gradient, so only the third loss depends on its size.

    Raises:
        ValueError: losses or trainable counts differ, so timings could not be compared.
    """
    counts = {name: side.trainable for name, side in found.items()}
    problems = [f"trainable parameters {counts}"] if len(set(counts.values())) > 1 else []
    for i in range(steps):
        for side in found.values():
            side()
        losses = {name: float(side.loss) for name, side in found.items()}
        if not np.ptp(list(losses.values())) <= TOLERANCE * max(map(abs, losses.values())):
            problems.append(f"losses at step {i} {losses}")
    if problems:
        raise ValueError(f"the sides do not do the same work: {'; '.join(problems)}")


def _matmul(n: int) -> Callable[[], None]:
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32))
    product = jax.jit(jnp.matmul)

    def run() -> None:
        jax.block_until_ready(product(a, a))

    return run


def run_steps(report: Report, sizes: Sizes, rounds: int, matmul: int) -> None:
    """Times the sides of every case."""
    for case in cases(sizes):
        found: dict[Any, Side] = sides(case)
        check_equal(found)
        contenders: dict[Any, Callable[[], None]] = {**found, "matmul": _matmul(matmul)}
        seconds = interleave(contenders, rounds)
        report.samples(case.name, {str(k): v for k, v in seconds.items()})
        rate = 2 * matmul**3 / 1e9 / Spread.of(seconds["matmul"]).median
        for (api, who), side in found.items():
            took = Spread.of(seconds[api, who])
            achieved = side.flops / 1e9 / took.median
            report.add(
                "Step",
                case=case.name,
                api=api,
                step=who,
                trainable=side.trainable,
                **{
                    "seconds": took,
                    "GFLOP": side.flops / 1e9,
                    "GFLOP/s": achieved,
                    f"{matmul}^3 matmul, GFLOP/s": rate,
                    "% of it": 100 * achieved / rate,
                    "temporary MiB": side.temporary_bytes / 2**20,
                },
            )
        for api in ("linen", "NNX"):
            what = f"{case.name}, {api}, ours / by hand"
            took = ratio(seconds, (api, "ours"), (api, "by hand"))
            report.claim(f"time of a step, {what}", took, SLACK)
            flops = found[api, "ours"].flops / found[api, "by hand"].flops
            report.claim(f"FLOPs of a step, {what}", flops, 1.001)


LARGE = {"LoRA r=8": aj.lora(8, head="head"), "Houlsby m=64": aj.houlsby(64, head="head")}


def audit_large(name: str) -> tuple[float, int]:
    """Adapts and audits an abstract BERT-large; returns the seconds and the trainable count."""
    start = time.perf_counter()
    base, ids = BertClassifier(BERT_LARGE, 2), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(base.init, jax.random.key(0), ids)["params"]
    model = aj.adapt(base, LARGE[name])
    audit = aj.audit(model, aj.init_adapters(model, params, jax.random.key(1), ids))
    return time.perf_counter() - start, audit.trainable_parameters


def _audit_warm(name: str) -> float:
    return audit_large(name)[0]


def _audit_fresh(name: str) -> float:
    code = f"from benchmarks.step import audit_large; print(audit_large({name!r})[0])"
    return float(fresh(code).stdout)


def run_audit(report: Report, rounds: int) -> None:
    """Times adapting and auditing, in this process and in fresh ones after their imports."""
    for name in LARGE:
        _, trainable = audit_large(name)
        seconds = interleave(
            {"warm": partial(_audit_warm, name), "fresh": partial(_audit_fresh, name)}, rounds
        )
        report.samples(f"audit {name}", seconds)
        for process, values in seconds.items():
            took = Spread.of(values)
            row = {"recipe": name, "process": process, "trainable": trainable, "seconds": took}
            report.add("Adapting and auditing BERT-large, abstract", **row)
            report.claim(
                f"seconds to adapt and audit BERT-large, {name}, {process}", took, AUDIT_SECONDS
            )


IMPORTS = {
    "flax": "import flax",
    "flax, linen, nnx": "import flax, flax.linen, flax.nnx",
    "adapters_jax": "import adapters_jax",
}


def _import_seconds(statement: str) -> float:
    clock = "time.perf_counter()"
    return float(fresh(f"import time; t = {clock}; {statement}; print({clock} - t)").stdout)


def _import_times(statement: str) -> dict[str, float]:
    """The milliseconds of each module that a statement imports, without its own imports."""
    lines = fresh(statement, "-X", "importtime").stderr.splitlines()
    fields = [line.removeprefix("import time:").split("|") for line in lines if "|" in line]
    return {name.strip(): int(own) / 1e3 for own, _, name in fields if own.strip().isdigit()}


def run_imports(report: Report, rounds: int) -> None:
    """Times imports in fresh interpreters, and reports what adapters_jax adds to flax."""
    seconds = interleave(
        {name: partial(_import_seconds, text) for name, text in IMPORTS.items()}, rounds
    )
    report.samples("imports", seconds)
    for name, values in seconds.items():
        report.add("Import", **{"import": name, "seconds": Spread.of(values)})
    for other in ("flax", "flax, linen, nnx"):
        pairs = zip(seconds["adapters_jax"], seconds[other], strict=True)
        added = Spread.of(a - b for a, b in pairs)
        report.claim(f"seconds that import adapters_jax adds to {other}", added, IMPORT_SECONDS)
    base, ours = _import_times(IMPORTS["flax"]), _import_times(IMPORTS["adapters_jax"])
    added_by: dict[str, list[float]] = defaultdict(list)
    for name in ours.keys() - base.keys():
        added_by[name.partition(".")[0]].append(ours[name])
    for name, took in sorted(added_by.items(), key=lambda item: -sum(item[1]))[:12]:
        row = {"package": name, "modules": len(took), "ms": sum(took)}
        report.add("What import adapters_jax adds to import flax (one run of -X importtime)", **row)


def run(report: Report, quick: bool, part: str = "") -> None:
    """Runs the whole benchmark, or its part on tunix's Llama; at toy sizes if quick."""
    tunix_llama.run_steps(report, {"toy": tunix_llama.TOY} if quick else tunix_llama.CASES)
    if part == "tunix":
        return
    run_steps(
        report,
        TINY if quick else Sizes(),
        rounds=3 if quick else 21,
        matmul=256 if quick else MATMUL,
    )
    run_audit(report, rounds=1 if quick else 7)
    run_imports(report, rounds=1 if quick else 11)
