"""Switches from one task's adapter to another, under a jitted function and by merging.

Nothing is compiled again, and the outputs of each adapter are the same bits every time. A switch
replaces only the adapter; without adapters it replaces a whole model.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from benchmarks import llama
from benchmarks.harness import Spread
from benchmarks.report import Report
from benchmarks.shapes import HOULSBY, LORA, Subject

SECONDS = 1e-3
BERT, GPT = Subject("BERT-base", 1, 128), Subject("GPT-2 medium", 1, 128)
CASES = ((BERT, LORA), (BERT, HOULSBY), (GPT, LORA))
TOYS = ((Subject("toy BERT", 1, 16), HOULSBY), (Subject("toy GPT-2", 1, 16), LORA))


@dataclass(frozen=True)
class Case:
    """Two trainings on one base.

    Attributes:
        name: the names of the model and the recipe.
        first, second: the states of the two trainings.
        forward: the function to jit; its arguments are those of `make_eval_step`'s function.
        batch: the batch for `forward` and `plain`.
        merge: returns the base with a state's adapter merged; None for a recipe without a merge.
        plain: the function of the base to jit; its arguments are a merged base and a batch.
    """

    name: str
    first: aj.TrainState
    second: aj.TrainState
    forward: Callable[[Any, Any], jax.Array]
    batch: jax.Array
    merge: Callable[[aj.TrainState], Any] | None = None
    plain: Callable[[Any, Any], jax.Array] | None = None

    @property
    def base_bytes(self) -> int:
        """The bytes of the base."""
        return sum(x.nbytes for x in jax.tree.leaves(self.first.base))


def linen_case(subject: Subject, name: str) -> Case:
    """Makes the case of a GPT-2 or BERT in linen."""
    recipe, base, ids = subject.recipe(name), subject.weights(), subject.ids()
    model, first = subject.state(recipe, base, seed=1)
    second = subject.state(recipe, base, seed=2)[1]
    if recipe.unfrozen:  # so that unfrozen parameters differ as well
        second = second.replace(adapters=jax.tree.map(lambda x: x * 1.01, second.adapters))
    case = Case(
        f"{subject}, {name}",
        first,
        second,
        lambda params, ids: model.apply({"params": params}, ids)[:, -1],
        ids,
    )
    if name != LORA:
        return case
    return replace(
        case,
        merge=lambda state: aj.merge(model, state.params, ids),
        plain=lambda params, ids: subject.base.apply({"params": params}, ids)[:, -1],
    )


def llama_case(size: llama.Size) -> Case:
    """Makes the case of a decoder in NNX."""
    base, name = llama.Decoder(size.config, rngs=nnx.Rngs(0)), "LoRA r=8 on q, v"
    first, second = (
        aj.TrainState.create(
            llama.adapted(base, size.recipes[name], seed), tx=llama.TX, key=jax.random.key(0)
        )
        for seed in (1, 2)
    )
    return Case(
        f"SmolLM2's shapes, 1 x {size.prompt}, {name}",
        first,
        second,
        lambda model, ids: model(ids)[:, -1],
        size.ids(size.prompt, batch=1),
    )


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    for case in _cases(quick):
        traces, took = switched(case, 6 if quick else 40)
        merges, merged_traces = (None, None) if case.merge is None else merged(case, 5)
        held = sum(x.nbytes for x in jax.tree.leaves(case.first.trained))
        size, read = _file(case.first)
        report.add(
            "Switch",
            case=case.name,
            **{
                "adapter's bytes": held,
                "of its files": size,
                "base's bytes": case.base_bytes,
                "% of the base": 100 * held / case.base_bytes,
                "ms to switch": Spread.of(1e3 * s for s in took),
                "programs": traces,
                "ms to read the files": 1e3 * read,
                "ms to copy the base": 1e3 * _copied(case.first.base),
                "ms to merge the other": merges and Spread.of(1e3 * s for s in merges),
                "programs, merged": merged_traces,
            },
        )
        report.claim(f"seconds to switch, {case.name}", Spread.of(took), SECONDS)
        good = traces == 1 and merged_traces in (1, None) and held < case.base_bytes
        report.verdict(
            f"tasks switch by swapping the adapter alone, {case.name}",
            "at a much lower cost than all parameters",
            f"{1e3 * Spread.of(took).median:.3f} ms, {held / 1e6:.2f} MB beside "
            f"{case.base_bytes / 1e6:,.0f} MB, {traces} program",
            "outputs of either adapter come back bit for bit",
            "reproduced" if good else "not reproduced",
        )


def _cases(quick: bool) -> Iterator[Case]:
    """Yields the cases one by one, so that only one model is in memory."""
    for subject, name in TOYS if quick else CASES:
        yield linen_case(subject, name)
    toy = llama.Size(llama.TINY, batch=2, length=8, prompt=4, tokens=3, rounds=2)
    yield llama_case(toy if quick else llama.Size())


def switched(case: Case, times: int) -> tuple[int, list[float]]:
    """Switches between the adapters while a jitted function is in use.

    Returns:
        The number of times that the function was traced, and the seconds of each switch.

    Raises:
        ValueError: the outputs do not alternate between those of the two adapters.
    """
    evaluate, traces = _traced(case.forward, aj.make_eval_step)
    states, took = (case.first, case.second), []

    def switch(i: int) -> aj.TrainState:
        start = time.perf_counter()
        state = replace(case.first, adapters=states[i % 2].adapters)
        took.append(time.perf_counter() - start)
        return state

    check(np.asarray(evaluate(switch(i), case.batch)) for i in range(times))
    return len(traces), took


def merged(case: Case, times: int) -> tuple[list[float], int]:
    """Merges the adapters in turn into the base; returns the seconds and the traces."""
    run, traces = _traced(case.plain, jax.jit)
    states, took = (case.first, case.second), []

    def merge(i: int) -> Any:
        start = time.perf_counter()
        found = jax.block_until_ready(case.merge(states[i % 2]))
        took.append(time.perf_counter() - start)
        return found

    check(np.asarray(run(merge(i), case.batch)) for i in range(times))
    return took[1:], len(traces)


def _traced(function: Any, jitted: Callable[[Any], Any]) -> tuple[Any, list[None]]:
    """Jits a function; the list gets an item each time the function is traced."""
    traces: list[None] = []

    def counted(subject: Any, batch: Any) -> jax.Array:
        traces.append(None)
        return function(subject, batch)

    return jitted(counted), traces


def check(outputs: Iterator[np.ndarray]) -> None:
    """Raises ValueError unless the outputs alternate between two different values."""
    found = list(outputs)
    back = all(a.tobytes() == b.tobytes() for a, b in zip(found, found[2:], strict=False))
    if not back or found[0].tobytes() == found[1].tobytes():
        raise ValueError("the outputs do not alternate between those of the two adapters")


def _file(state: aj.TrainState) -> tuple[int, float]:
    """The bytes of an adapter's files, and the seconds to read them with all checks."""
    with tempfile.TemporaryDirectory(prefix="adapters-jax-benchmark-") as directory:
        saved = aj.save_adapter(Path(directory) / "adapter", state)
        start = time.perf_counter()
        jax.block_until_ready(aj.read_adapter(saved)[1])
        return sum(p.stat().st_size for p in saved.iterdir()), time.perf_counter() - start


def _copied(base: Any) -> float:
    """The seconds to copy the base in memory, the least that switching the base would take."""
    start = time.perf_counter()
    jax.block_until_ready(jax.tree.map(jnp.copy, base))
    return time.perf_counter() - start
