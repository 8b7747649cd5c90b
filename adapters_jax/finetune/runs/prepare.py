"""Reads and checks a run before its first step, then makes or locks its directory."""

import logging
import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

from adapters_jax.distributed.hosts import PROCESSES
from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.datasets import overlaps
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.data.streaming import in_memory
from adapters_jax.finetune.leaving import ways_out
from adapters_jax.finetune.models.parts.attention import check_kernel
from adapters_jax.finetune.options.flags import flag, given
from adapters_jax.finetune.options.method import DEFAULT, HEAD_ONLY, SIZES, MethodOptions
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.pretrained.locate import kind_of, pinned, shape_of
from adapters_jax.finetune.pretrained.record import CHANGES, record_of
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.runs.budget import seconds_of, sized
from adapters_jax.finetune.runs.config import (
    check_same,
    check_unfinished,
    read_options,
    read_schedule,
    shared_config,
)
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.starting import Start, usual
from adapters_jax.finetune.tasks import TASKS, Task, read_run, tasks_on
from adapters_jax.finetune.tasks.base import Setup
from adapters_jax.finetune.tracking import check_trackers
from adapters_jax.methods import AdaLoRA, LoRA
from adapters_jax.placement.patterns import checked_before

_LOG = logging.getLogger(__name__)


def on_base(options: RunOptions) -> RunOptions:
    """Fills in the method, its size and the learning rate that are the defaults on the base.

    A run keeps them: a resumed one has the defaults of the version that started it.
    """
    asked, budget = options.method, options.budget
    taken = options.init_from is not None and not given(asked)  # the adapter's recipe
    method = asked.on(kind_of(options.model))
    if budget is not None and (chosen := sized(method, options.model, budget)) is not None:
        size = SIZES[method.title]
        if taken or size in given(asked):
            other = "--init-from" if taken else flag(size)
            raise UserError(f"--budget {budget} chooses {flag(size)}; leave it or {other} out")
        method, budget = chosen, None
    rate, like = options.optimizer.learning_rate, method
    if taken:
        like = usual(options).on(kind_of(options.model))
    if rate is None and (own := default_rate(like, options.model)) != asked.learning_rate:
        rate = own
    training = replace(options.optimizer, learning_rate=rate)
    return replace(options, method=asked if taken else method, optimizer=training, budget=budget)


def default_rate(method: MethodOptions, model: str) -> float:
    """The default learning rate of a method on a base."""
    kind = kind_of(model)
    if kind == "decoder" and method.recipe is not None:
        added = method.build().attached
        if added and all(isinstance(m, LoRA) and not isinstance(m, AdaLoRA) for m in added):
            method = MethodOptions("lora")
    return method.rate_on(kind, shape_of(model)[1].hidden_size if kind == "decoder" else 0)


def prepare_run(
    options: RunOptions,
    run: Run,
    console: Console,
    began: float,
    before: OptimizerOptions | None = None,
) -> Job:
    """Reads and checks everything, so that an error is found before training.

    Nothing is written; `open_run` makes the directory.

    Args:
        options: the options of the run.
        run: the directory of the run.
        console: the console to print to.
        began: the time at which the command began, in seconds of `time.perf_counter`.
        before: the optimizer of a run that goes on, whose defaults may have been others.

    Raises:
        UserError: flags, files, rows or a checkpoint cannot be used.
        AssetError: the pinned model or the movie reviews could not be fetched.
    """
    _check_numbers(options)
    options = replace(options, model=pinned(options.model))
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
    asked = training = _training(options, task)
    if before:
        kept = ["epochs", "learning_rate", "head_learning_rate"]
        if options.init_from is not None:  # whose other defaults come from another run
            kept += ["dropout"]
        training = replace(training, **{name: getattr(before, name) for name in kept})
    if (start := Start.of(options)) is not None:
        options = replace(options, init_from=start.name)  # of the Hub: with its commit
    prepared = task.prepare(data, _setup(options, training, task, console, start))
    if start is not None:
        prepared = start.begin(prepared, task.name, console.say)
    if not prepared.new_head and training.head_learning_rate and not before:
        # That of a preset is for a head that starts from random values.
        own = options.optimizer.head_learning_rate or training.learning_rate
        asked = training = replace(training, head_learning_rate=own)
    problem, steps = prepared.problem, len(prepared.problem.train)
    if options.optimizer.max_steps is not None:
        passes: dict[str, Any] = {"epochs": options.optimizer.max_steps / steps, "max_steps": None}
        training = asked = replace(training, **passes)
        options = replace(options, optimizer=replace(options.optimizer, **passes))
    chosen = before or options.optimizer.epochs or options.budget
    if not chosen and options.method.method != HEAD_ONLY:
        training = training.of_few_rows(task.least_steps, steps)
    for sentence in shared:
        _LOG.warning("warning: %s", sentence)
    config = {
        "kind": kind,
        "task_type": task.name,
        **shared_config(options, record_of(options.model), data, problem.recipe, training),
        **prepared.config,
        **({} if start is None else {"init_sha256": start.sha256()}),
    }
    ways = ways_out(problem, config, prepared.identity)
    given_rate, default = options.optimizer.learning_rate, usual(options).on(kind)
    default_rates = (None, default_rate(default, options.model))  # `on_base` fills it in
    if options.optimizer.optimizer != "adamw" and given_rate in default_rates:
        rate = f"the default learning rate {training.learning_rate:g} is one for adamw"
        console.say(f"{rate}; --learning-rate takes one for {options.optimizer.optimizer}")
    if training != asked and not before:
        rows = f"{len(data.train)} rows make {training.steps(steps)} steps"
        console.say(f"{training.epochs:g} epochs, so that {rows}; --epochs takes another number")
    return Job(
        run=run,
        options=options,
        prepared=prepared,
        optimizer=training,
        config={**config, "ways_out": {way.name: str(way) for way in ways}},
        ways=ways,
        console=console,
        began=began,
    )


def _check_numbers(options: RunOptions) -> None:
    """Raises UserError for numbers out of their range, and for several processes."""
    if int(os.environ.get(PROCESSES) or 1) > 1:
        raise UserError(
            f"{PROCESSES} is {os.environ[PROCESSES]}, and this command is for one process; for "
            "several, write a script, such as examples/finetune_llama_sharded.py"
        )
    check_size("saving", "--checkpoint-every", options.checkpoint_every)
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: expected a number from 0 to 2**32 - 1")
    check_size("scoring", "--held-out", options.held_out)
    if options.exact_match < 0:
        raise UserError(f"--exact-match {options.exact_match}: expected a number of rows, or 0")
    if options.beta is not None:
        check_number("the loss of preferences", "--beta", options.beta)
    if options.budget is not None:
        seconds_of(options.budget)
    check_trackers(options.track)
    options.optimizer.check()


def _setup(
    options: RunOptions,
    training: OptimizerOptions,
    task: Task,
    console: Console,
    start: Start | None,
) -> Setup:
    """The settings of a task; most are options of the same name."""
    names = {field.name for field in fields(options)} & {field.name for field in fields(Setup)}
    own: dict[str, Any] = {name: getattr(options, name) for name in names}
    # Where an option has no value, the task's default counts.
    own = {name: value for name, value in own.items() if value is not None}
    own |= {
        "recipe": options.method.build if start is None else start.recipe,
        "batch_size": training.batch_size or 1,
        "columns": options.data.columns_of(task),
        "mix": options.data.mix,
        "files": tuple(path.name for path in options.data.train),
        "dropout": training.dropout,
        "accumulate": training.accumulate,
        "mesh": options.make_mesh(training.batch_size),
    }
    return Setup(**own, say=console.say, progress=console.progress)


def _training(options: RunOptions, task: Task) -> OptimizerOptions:
    """Fills in the defaults of the training; the movie reviews need fewer epochs."""
    chosen, own = options.optimizer, usual(options)
    method = own.method or DEFAULT
    epochs = task.epochs if method != HEAD_ONLY else None
    chosen = replace(
        chosen,
        learning_rate=chosen.learning_rate or own.learning_rate,
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
        name: [each.name for each in TASKS.values() if name in (*each.columns, *each.flags)]
        for name in found
    }
    stray = [name for name in found if readers[name] and task.name not in readers[name]]
    if stray:
        others = sorted({other for name in stray for other in readers[name]})
        raise UserError(
            f"{', '.join(map(flag, stray))}: allowed only with --task {' or '.join(others)}; "
            f"{options.model!r}, a base of the kind {task.kind}, learns {task.name}, and can learn "
            f"{' or '.join(other.name for other in tasks_on(task.kind))}"
        )


def open_run(job: Job, any_base: bool = False) -> Job:
    """Makes a run's directory, or checks that an existing directory has the same run.

    Args:
        job: the job.
        any_base: go on if files of the base changed since the run was started, and record that.

    Returns:
        The job, with the run locked for this process.

    Raises:
        RunError: another process has locked the run, it was started with other settings, or it is
            finished.
        FileSystemError: the directory cannot be made.
    """
    run = job.run
    if not run.path.exists():
        run.create(job.config)
        return replace(job, lock=run.lock())
    lock = run.lock()
    try:
        config = check_same(run, job.config, job.console, any_base)
        if config.get(CHANGES) != run.read_config().get(CHANGES):
            run.reference.unlink(missing_ok=True)  # it is of the base as it was
            run.write_config(config)
    except UserError:
        run.unlock(lock)
        raise
    return replace(job, config=config, lock=lock)


def resume_run(run: Run, console: Console, began: float, any_base: bool = False) -> Job:
    """Makes the job that continues an interrupted run, with the options it was started with.

    Args:
        run: the run.
        console: the console to print to.
        began: as for `prepare_run`.
        any_base: as for `open_run`.

    Raises:
        RunError: the run does not exist, is finished, or its files have changed.
        UserError: flags, files, rows or a checkpoint cannot be used.
    """
    config = _read_config(run, console)
    options = read_options(run, config)
    check_unfinished(run, config)
    # Before the base is loaded, where what changed is less plain.
    record_of(options.model).check(run, config, any_base)
    # A run that another version accepted goes on, also where a check of recipes is new.
    # One of before large files were streamed has the split of rows in memory.
    with checked_before(), in_memory("streamed" not in config):
        job = prepare_run(options, run, console, began, read_schedule(run, config))
    return open_run(job, any_base)


def _read_config(run: Run, console: Console) -> dict[str, Any]:
    """Reads a run's configuration; if it is damaged, it is restored from the newest checkpoint."""
    try:
        return read_run(run)[1]
    except RunConfigError as error:
        if not run.checkpoints.is_dir():
            raise
        _restore_config(run, error, console)
    return read_run(run)[1]


def _restore_config(run: Run, why: RunConfigError, console: Console) -> None:
    """Writes a run's configuration as its newest checkpoint has it."""
    lock = run.lock()
    try:
        with Checkpoints(run.checkpoints) as checkpoints:
            config = checkpoints.progress().get("config") if checkpoints.steps else None
        if config is None:
            raise RunError(
                f"{why}; but no checkpoint of it has the configuration: remove {run.where} and "
                "train again"
            ) from why
        run.write_config(config)
    finally:
        run.unlock(lock)
    console.say(f"{run.config} was damaged; it was restored from the newest checkpoint")
