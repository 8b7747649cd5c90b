"""Fits a run into a time, by its epochs, or into a number of parameters, by its rank or width."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.errors import UserError
from adapters_jax.finetune.options.flags import flag
from adapters_jax.finetune.options.method import SIZES, MethodOptions
from adapters_jax.finetune.options.optimizer import MOST_EPOCHS, OptimizerOptions
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.tasks.base import Problem
from adapters_jax.training.step import make_train_step

_SHARE = 0.9  # of the time; the rest is for what is not measured, such as the report
_UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float:
    """A time that people write, in seconds.

    Raises:
        UserError: the text has another form.

    Example:
        >>> seconds_of("1h30m"), seconds_of("90s"), seconds_of("2.5m")
        (5400.0, 90.0, 150.0)
    """
    number = r"\d+(?:\.\d+)?"
    found = re.fullmatch(rf"(?:({number})h)?(?:({number})m)?(?:({number})s)?", text)
    parts = zip(found.groups() if found else (), _UNITS.values(), strict=False)
    total = sum(float(part or 0) * unit for part, unit in parts)
    if not 0 < total < float("inf"):
        raise UserError(
            f"--budget {text!r}: expected a time such as 90s, 10m or 1h30m, or a number of "
            "parameters, such as 500000 or 1% of the base"
        )
    return total


def sized(method: MethodOptions, model: str, budget: str) -> MethodOptions | None:
    """The method at the largest size whose adapters fit; None if the budget is a time.

    The adapters' parameters grow by the same number with each rank or unit of width, so two counts
    tell all of them. A head, and parameters of the base that train, come on top. The widths of
    compacter are multiples of its phm_dim.

    Args:
        method: the method, without a size.
        budget: the text of --budget: a number of parameters, or a part of the base's, in percent.

    Raises:
        UserError: the method has no size, a size was given, or the smallest one is too large.

    Example:
        >>> chosen = MethodOptions("lora", targets=("**/{query,value}",), alpha=32.0)
        >>> sized(chosen, "smollm2-135m", "500000").rank, sized(chosen, "smollm2-135m", "10m")
        (8, None)
    """
    if not re.fullmatch(r"\d{1,99}(\.\d{1,99})?%|\d{1,99}", budget):
        return None
    name = None if method.recipe else SIZES.get(method.title)
    if name is None or name == "layers":
        known = ", ".join(each for each, size in SIZES.items() if size != "layers")
        raise UserError(
            f"--budget {budget} chooses no size of {method.title}; expected one of {known}, or a "
            "time"
        )
    if method.reduction_factor is not None:
        raise UserError(
            f"--budget {budget} chooses {flag(name)}; leave it or --reduction-factor out"
        )
    unit = (method.phm_dim or 4) if method.title == "compacter" else 1

    def of(size: int) -> MethodOptions:
        fields: dict[str, Any] = {name: size}
        return replace(method, **fields)

    from adapters_jax.finetune.shapes import count_parameters  # which reads all formats' names

    one, two = (count_parameters(model, of(size)) for size in (unit, 2 * unit))
    base = one.frozen_parameters + one.trainable_parameters - one.adapter_parameters
    most = float(budget[:-1]) / 100 * base if budget.endswith("%") else int(budget)
    each = two.adapter_parameters - one.adapter_parameters
    if not each:
        raise UserError(
            f"--budget {budget}: --rank-pattern sets the rank of all targets, so that none is left "
            "to choose; leave one of the two out"
        )
    size = unit + unit * int((most - one.adapter_parameters) // each)
    if size < unit:
        raise UserError(
            f"--budget {budget}: {int(most):,} parameters, but {method.title} with "
            f"{flag(name)} {unit} has {one.adapter_parameters:,}; allow more"
        )
    return of(size)


@dataclass(frozen=True)
class Cost:
    """How long the parts of a run take, in seconds.

    Attributes:
        compile: compiling the step and the score.
        epoch: the batches and the steps of an epoch.
        score: scoring the dev rows.
    """

    compile: float
    epoch: float
    score: float

    def total(self, epochs: float, evaluations: int) -> float:
        """The seconds of a training, with its scores on dev and the one on test."""
        return self.compile + epochs * self.epoch + (epochs * evaluations + 2) * self.score


def fitted(
    options: OptimizerOptions, cost: Cost, left: float, steps: int, budget: str
) -> OptimizerOptions:
    """Options with as many epochs as fit into a time, at most those asked for.

    Args:
        options: the settings of the training; without epochs, there are at most 20.
        cost: what the parts take.
        left: the seconds that are left.
        steps: the steps of an epoch.
        budget: the time as it was asked for.

    Raises:
        UserError: not even one step fits.
    """
    most = options.epochs or MOST_EPOCHS
    room = _SHARE * left - cost.total(0, 0)
    epochs = min(most, room / (cost.epoch + options.evaluations * cost.score))
    if epochs * steps < 1:
        least = cost.total(1 / steps, options.evaluations) / _SHARE - left
        raise UserError(
            f"--budget {budget}: one step needs about {least:.0f} s more than that; allow more "
            "time, or take fewer or shorter rows"
        )
    return replace(options, epochs=max(1, int(epochs * steps)) / steps)


def measured(
    problem: Problem,
    options: OptimizerOptions,
    half: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Makes an epoch's batches, runs two steps of each of their shapes, and scores dev twice."""

    def timed(work: Callable[[], Any]) -> float:
        start = clock()
        jax.block_until_ready(work())
        return clock() - start

    training = Training.begin(problem, options, jax.random.key(0), half)
    step = make_train_step(options.loss_of(problem), accumulate=options.accumulate)
    state = training.state
    counts: Counter[Any] = Counter()
    firsts: dict[Any, Any] = {}  # one batch of each shape: a whole epoch need not fit into memory

    def make(number: int) -> None:
        batch = problem.batch(number)
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        counts[shape] += 1
        firsts.setdefault(shape, batch)

    first = 0.0
    epoch = sum((timed(partial(make, number)) for number in range(len(problem.train))), 0.0)
    for shape, count in counts.items():
        batch: Any = firsts[shape]
        batch = shard_batch(batch, problem.mesh) if problem.mesh else batch

        def advance(batch: Any = batch) -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        # The first step of a shape compiles its program, so the second one tells what a step takes.
        compiled, each = timed(advance), timed(advance)
        first, epoch = first + max(0.0, compiled - each), epoch + count * each
    scored = [timed(lambda: problem.score(state, "dev")) for _ in range(2)]
    return Cost(first, epoch, scored[1])
