"""Makes a job from the options of the command line; its task prepares it."""

from __future__ import annotations

import logging
from dataclasses import fields, is_dataclass, replace

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.datasets import overlaps
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.leaving import ways_out
from adapters_jax.finetune.models.parts.attention import check_kernel
from adapters_jax.finetune.options.flags import flag, given
from adapters_jax.finetune.options.method import HEAD_ONLY
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.pretrained.locate import kind_of
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.runs.config import shared_config
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.tasks import TASKS, Task, tasks_on
from adapters_jax.finetune.tasks.base import Setup

_LOG = logging.getLogger(__name__)


def build_job(
    options: RunOptions,
    run: Run,
    console: Console,
    began: float,
    before: OptimizerOptions | None,
) -> Job:
    """Reads and checks everything; see `prepare.prepare_run`."""
    check_kernel(options.attention)
    kind = kind_of(options.model)
    if kind == "decoder" and options.method.method == HEAD_ONLY:
        raise UserError(f"--method {HEAD_ONLY} is for encoders; a decoder has no head for a task")
    task = options.data.task_on(kind, options.model)
    _refuse_stray_flags(options, task)
    data = options.data.load(task)
    shared = overlaps(data)
    if "held_out" in task.flags:
        few = {p: getattr(data, p) for p in ("dev", "test")}
        few = {p: rows.take(spread(len(rows), options.held_out)) for p, rows in few.items()}
        data = replace(data, **few)
    training = _training(options, task)
    setup = Setup(
        model=options.model,
        recipe=options.method.build,
        batch_size=training.batch_size or 1,
        seed=options.seed,
        columns=options.data.columns_of(task),
        pooling=options.pooling,
        dropout=training.dropout,
        dtype=options.dtype,
        quantize=options.quantize,
        attention=options.attention,
        max_length=options.max_length,
        prompts=options.prompts,
        pack=options.pack,
        turns=options.turns,
        loss=options.loss or Setup.loss,
        beta=Setup.beta if options.beta is None else options.beta,
        augment=options.augment,
        accumulate=training.accumulate,
        exact_match=options.exact_match,
        mesh=options.make_mesh(training.batch_size),
        say=console.say,
        progress=console.progress,
    )
    prepared = task.prepare(data, setup)
    usual, steps = training, len(prepared.problem.train)
    if before:
        training = replace(training, epochs=before.epochs, learning_rate=before.learning_rate)
    elif not options.optimizer.epochs and not options.budget and options.method.method != HEAD_ONLY:
        training = training.of_few_rows(task.least_steps, steps)
    for sentence in shared:
        _LOG.warning("warning: %s", sentence)
    recipe = prepared.problem.recipe
    config = {
        "kind": kind,
        "task_type": task.name,
        **shared_config(options, prepared.base_sha256, data, recipe, training),
        **prepared.config,
    }
    ways = ways_out(prepared.problem, config, prepared.identity)
    if training != usual and not before:
        rows = f"{len(data.train)} rows make {training.steps(steps)} steps"
        console.say(f"{training.epochs:g} epochs, so that {rows}; --epochs takes another number")
    return Job(
        run=run,
        title=options.method.title,
        prepared=prepared,
        optimizer=training,
        seed=options.seed,
        baselines=options.baselines,
        config={**config, "ways_out": {way.name: str(way) for way in ways}},
        ways=ways,
        console=console,
        began=began,
        every=options.checkpoint_every,
    )


def _training(options: RunOptions, task: Task) -> OptimizerOptions:
    """Fills in the defaults of the training; the movie reviews need fewer epochs."""
    chosen, method = options.optimizer, options.method.method
    epochs = task.epochs if method != HEAD_ONLY else None
    chosen = replace(
        chosen,
        learning_rate=chosen.learning_rate or options.method.learning_rate,
        epochs=chosen.epochs or epochs,
        batch_size=chosen.batch_size or task.batch_size,
    )
    if task.kind == "decoder":
        return chosen.of_decoder(method)
    if options.data.is_demo and chosen.epochs is None and method != HEAD_ONLY:
        chosen = replace(chosen, epochs=1.5)
    return chosen.of(method)


def _refuse_stray_flags(options: RunOptions, task: Task) -> None:
    """Raises UserError for flags that other tasks read and this one does not."""
    nested = [f.name for f in fields(options) if is_dataclass(getattr(options, f.name))]
    found = [name for name in given(options) if name not in nested]
    found = [*(n for part in nested for n in given(getattr(options, part))), *found]
    readers = {
        name: [other.name for other in TASKS.values() if _reads(other, name)] for name in found
    }
    stray = [name for name in found if readers[name] and task.name not in readers[name]]
    if stray:
        others = sorted({other for name in stray for other in readers[name]})
        raise UserError(
            f"{', '.join(map(flag, stray))}: allowed only with --task {' or '.join(others)}; "
            f"{options.model!r}, a base of the kind {task.kind}, learns {task.name}, and can learn "
            f"{' or '.join(other.name for other in tasks_on(task.kind))}"
        )


def _reads(task: Task, name: str) -> bool:
    return name in task.columns or name in task.flags
