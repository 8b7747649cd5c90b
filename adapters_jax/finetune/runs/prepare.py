"""Reads and checks a run before its first step, then makes or locks its directory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from adapters_jax.distributed.hosts import PROCESSES
from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.pretrained.locate import pinned
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.runs.budget import seconds_of
from adapters_jax.finetune.runs.build import build_job
from adapters_jax.finetune.runs.config import (
    check_same,
    check_unfinished,
    read_options,
    read_schedule,
)
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.tasks import read_run
from adapters_jax.recipe import checked_before


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
    options = replace(options, model=pinned(options.model))
    return build_job(options, run, console, began, before)


def open_run(job: Job) -> Job:
    """Makes a run's directory, or checks that an existing directory has the same run.

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
        check_same(run, job.config, job.console)
    except RunError:
        run.unlock(lock)
        raise
    return replace(job, lock=lock)


def resume_run(run: Run, console: Console, began: float) -> Job:
    """Makes the job that continues an interrupted run, with the options it was started with.

    Raises:
        RunError: there is no such run, it is finished, or its files have changed.
        UserError: flags, files, rows or a checkpoint cannot be used.
    """
    config = _read_config(run, console)
    options = read_options(run, config)
    check_unfinished(run, config)
    with checked_before():
        job = prepare_run(options, run, console, began, read_schedule(run, config))
    return open_run(job)


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
                f"{why}; but no checkpoint of it has the configuration: remove {run.path} and "
                "train again"
            ) from why
        run.write_config(config)
    finally:
        run.unlock(lock)
    console.say(f"{run.config} was damaged; it was restored from the newest checkpoint")
