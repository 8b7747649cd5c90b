"""The job of a run: trains a recipe, compares it with baselines, and reports the results."""

import errno
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
from filelock import FileLock
from jaxtyping import PRNGKeyArray

from adapters_jax.auditing import Audit, audit
from adapters_jax.files.adapter import save_adapter
from adapters_jax.files.checkpoint import CheckpointError, Checkpoints
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.finetune.console import Console, Progress, Speed, duration
from adapters_jax.finetune.leaving import Way, sentences
from adapters_jax.finetune.options.flags import plain
from adapters_jax.finetune.options.method import HEAD_ONLY
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.report.findings import write_findings
from adapters_jax.finetune.report.run import no_better, notes, results_table, write_report
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.runs.budget import fitted, measured, seconds_of
from adapters_jax.finetune.runs.loop import Record, Saving, Training
from adapters_jax.finetune.runs.phases import Phases
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts, StoppedError
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.base import (
    NotFiniteError,
    Prepared,
    Problem,
    TrainedHead,
    Untrained,
)
from adapters_jax.finetune.tasks.metrics import load_metrics, show_metric
from adapters_jax.finetune.tasks.views import Judged
from adapters_jax.finetune.tracking import TrackingError, tracked
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState

Result = dict[str, Any]  # a row of the table of results


@dataclass(frozen=True)
class Job:
    """A run that is ready to start; `prepare_run` makes it.

    Attributes:
        run: the directory of the run.
        options: the options of the run.
        prepared: the problem and baselines that the task prepared.
        optimizer: the settings of the training, with a learning rate and epochs.
        config: the content of `config.json`.
        console: the console to print to.
        began: the time at which the command began, in seconds of `time.perf_counter`.
        lock: the lock of this process on the run; None before `open_run`.
        ways: what the run can become.
        track: writes a record to the run's trackers, while they are open.
        widest: the recipe in whose shapes it trains, so that it shares a program; None is its own.
    """

    run: Run
    options: RunOptions
    prepared: Prepared
    optimizer: OptimizerOptions
    config: dict[str, Any]
    console: Console
    began: float
    lock: FileLock | None = None
    ways: Sequence[Way] = ()
    track: Callable[[Record], None] = lambda record: None
    widest: Recipe | None = None

    @property
    def title(self) -> str:
        """The name of the method in tables."""
        return self.options.title

    @property
    def problem(self) -> Problem:
        """The problem to learn."""
        return self.prepared.problem

    def __call__(self) -> None:
        """Trains, compares, reports.

        Raises:
            StoppedError: a loss was not finite, a signal arrived, or the disk is full; the trained
                adapter is saved.
        """
        try:
            with Interrupts() as interrupts:
                self._work(interrupts)
        except NotFiniteError as error:
            raise self._stopped(error) from error
        except InterruptedRunError as error:
            raise StoppedError(f"{error}; {self._again}", error.status) from error
        except (CheckpointError, TrackingError) as error:
            raise StoppedError(f"{error}; {self._again}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise StoppedError(f"{error}; make room, and {self._again}") from error
        finally:
            self.unlock()
            self.run.leave()

    def unlock(self) -> None:
        """Gives the run back, for another process or a continuation."""
        if self.lock is not None:
            self.run.unlock(self.lock)

    @property
    def _again(self) -> str:
        return f"go on with: adapters-jax finetune --resume {shlex.quote(self.run.where)}"

    def _work(self, interrupts: Interrupts) -> None:
        steps = self.optimizer.steps(len(self.problem.train))
        tx = self.optimizer.make(steps, self.problem.recipe)
        counts = audit(self.problem.model, self.problem.params, tx)
        self.console.show(counts)
        for line in sentences(self.ways):
            self.console.say(line)
        self.prepared.begin(self.run, self.console.progress)
        self._in_budget()._train_and_report(counts, interrupts)

    def _in_budget(self) -> Self:
        """The job with as many epochs as fit into the time that was asked for, if one was."""
        budget = self.options.budget
        if budget is None:
            return self
        self.console.say("measuring the steps; they are compiled for it")
        cost = measured(self.problem, self.optimizer, self.half)
        rows = self.config["rows"]
        baselines = self.prepared.baselines() if self.options.baselines else []
        passes = sum(self._passes(each) for each in baselines)
        beside = passes * cost.score * sum(rows.values()) / rows["dev"]
        left = seconds_of(budget) - (time.perf_counter() - self.began) - beside
        steps = len(self.problem.train)
        asked = replace(self.optimizer, epochs=self.options.optimizer.epochs)
        optimizer = fitted(asked, cost, left, steps, budget)
        self.console.say(
            f"{optimizer.steps(steps)} steps, {optimizer.epochs:.3g} epochs, fit into {budget}"
        )
        options = self.config["options"]
        own = {**options["optimizer"], "epochs": optimizer.epochs}
        config = {
            **self.config,
            "optimizer": plain(optimizer),
            "options": {**options, "budget": None, "optimizer": own},
        }
        self.run.write_config(config)  # what continues the run has the same epochs
        return replace(self, optimizer=optimizer, config=config)

    def _train_and_report(self, counts: Audit, interrupts: Interrupts) -> None:
        trackers = tracked(self.options.track, self.run.path, config=self.config)
        opened = Checkpoints(self.run.checkpoints, on_saved=self.run.push)
        with opened as checkpoints, trackers as track:
            every = self.options.checkpoint_every
            saving = Saving(checkpoints, every, interrupts, self._resumed, self.config)
            found, results, judged = replace(self, track=track).train_all(saving)
        interrupts.check()
        summary: dict[str, Any] = {
            "run": self.run.where,
            "seconds": round(time.perf_counter() - self.began + found.seconds, 1),
            "trainable_parameters": counts.trainable_parameters,
            "best_step": found.best_step,
            "dev": found.dev,
            "results": results,
        }
        if found.impatient:
            summary["ended_after_step"] = found.step
        if found.skipped:
            summary["skipped_steps"] = found.skipped
        config = {**self.config, "summary": summary}
        write_findings(self.run, counts, judged)
        with self.console.waiting("writing the report"):
            write_report(self.run, config)
        for note in (*no_better(config), *notes(task_of(config).views(config, judged))):
            self.console.say(note)
        # A run with a summary counts as finished, so this is written after its page and before its
        # checkpoints go.
        self.run.write_config(config)  # the run is finished
        shutil.rmtree(self.run.checkpoints)
        table = results_table(results, self.problem.metrics)
        metric, steps = self.problem.metrics[0], self.optimizer.steps(len(self.problem.train))
        score = f"{metric} {show_metric(metric, found.dev[metric])}"
        kept = f"step {found.best_step} of {steps} is kept, the best on dev ({score})"
        if found.impatient:
            kept = f"ended after step {found.step}, since --patience ran out; {kept}"
        page = self.run.named(self.run.report)
        took = f"finished in {duration(summary['seconds'])}; {kept}: see {page}"
        self.console.finish(*table, took, summary)

    def _resumed(self, found: Training) -> None:
        """Rewrites the log of metrics up to the checkpoint, and prints the step."""
        self.run.write_log({"method": self.title, **record} for record in found.records)
        self.console.say(f"going on after step {found.step} of {found.steps}")

    def _stopped(self, error: NotFiniteError) -> StoppedError:
        """Records in the run that the training stopped; returns the error to raise."""
        fix = f"try a --learning-rate below {self.optimizer.learning_rate:g}"
        if self.config["dtype"] == "float16":
            fix += ", or --dtype bfloat16, which has the range of float32"
        place = self.run.named(self.run.adapter)
        message = f"{error}, so training stopped; the last good adapter is in {place}; {fix}"
        self.run.write_config({**self.config, "stopped": message})
        return StoppedError(message)

    @property
    def key(self) -> PRNGKeyArray:
        """The seed of dropout."""
        return jax.random.fold_in(jax.random.key(self.options.seed), 1)

    @property
    def half(self) -> bool:
        """Whether the model computes in float16."""
        return bool(self.config["dtype"] == "float16")

    @property
    def identity(self) -> BaseIdentity:
        """The identity of the base model, for the adapter's file."""
        return self.prepared.identity

    def train_all(self, saving: Saving) -> tuple[Training, list[Result], Judged]:
        """Trains the method, then its baselines.

        Returns:
            The training, the table of results, and the predictions.
        """
        prepared, problem = self.prepared, self.prepared.trained
        baselines = prepared.baselines() if self.options.baselines else []
        phases = self._phases(problem, baselines)
        found, best, row = self.train(
            self.title, problem, self.optimizer, prepared.tokens, saving, phases
        )
        phases.done |= {"training", "test"}
        if samples := prepared.samples():
            row["samples"] = samples
        with self.console.waiting("predicting the rows of the report"):
            judged = prepared.judged(found.problem, best)
        if baselines:
            self.console.announce(f"left: about {phases}")
        return found, [*map(self._compare, baselines), row], judged

    def _phases(self, problem: Problem, baselines: Sequence[Untrained | TrainedHead]) -> Phases:
        """The phases that are left, which are announced."""
        epoch, options = len(problem.train), self.optimizer
        phases = Phases(
            steps=options.steps(epoch),
            batch=options.batch_size or 1,
            shapes=problem.train.shapes,
            marks=options.marks(epoch, problem.recipe),
            rows=self.config["rows"],
            passes=sum(map(self._passes, baselines)),
        )
        titles = ", ".join(each.title for each in baselines)
        parts = ["compiling", f"training ({phases.steps} steps, dev scored {len(phases.marks)} x)"]
        parts += ["test", *([f"baselines ({titles})"] if titles else []), "report"]
        read = duration(time.perf_counter() - self.began)
        self.console.announce(f"read in {read}; left: {', '.join(parts)}; times follow")
        return phases

    def _compare(self, baseline: Untrained | TrainedHead) -> Result:
        """Trains or scores a baseline; returns its row."""
        if isinstance(baseline, TrainedHead):
            return self.train(HEAD_ONLY, baseline.problem(), self._of_head(baseline))[-1]
        with self.console.waiting(f"scoring the {baseline.title}"):
            scores: dict[str, Any] = {**baseline.score()}
        self._log(baseline.title, scores)
        return {"method": baseline.title, "trainable_parameters": 0, **scores}

    def _passes(self, baseline: Untrained | TrainedHead) -> float:
        """The passes of a baseline over the rows; cached features need one."""
        if isinstance(baseline, Untrained):
            return 1.0 if baseline.computes else 0.0
        if baseline.epochs is None:
            return 1.0
        return self._of_head(baseline).epochs or 1.0

    def _of_head(self, baseline: TrainedHead) -> OptimizerOptions:
        """The settings of the training of a head alone."""
        size, epochs = self.optimizer.batch_size, baseline.epochs
        own = OptimizerOptions(batch_size=size, evaluations=1, epochs=epochs).of(HEAD_ONLY)
        return own.of_few_rows(baseline.least_steps, len(self.problem.train))

    def save(self, state: TrainState) -> None:
        """Saves the adapter of a state as the adapter of the run."""
        with self.run.writing():
            save_adapter(self.run.adapter, state.kept, state.recipe, base=self.identity)

    def train(
        self,
        title: str,
        problem: Problem,
        optimizer: OptimizerOptions,
        tokens: int = 0,
        saving: Saving | None = None,
        phases: Phases | None = None,
    ) -> tuple[Training, TrainState, Result]:
        """Trains and logs one problem, and tests its best adapters once.

        Args:
            title: the title of the row.
            problem: the problem to learn.
            optimizer: the settings of the training.
            tokens: the tokens of an epoch.
            saving: how to save the run's own training; None for a baseline, which is not saved.
            phases: what is left of the run, which is announced once its steps are measured.

        Returns:
            The training, its best state, and its row of results.
        """
        if saving and not saving.checkpoints.steps:
            self.run.write_log([])
        steps = optimizer.steps(len(problem.train))
        with self.console.progress(title, steps, first="compiling") as progress:
            load_metrics(problem.metrics)  # the first scoring is to take no longer than others
            speed = Speed(tokens / len(problem.train))
            calls: dict[str, Any] = {"on_best": self.save} if saving else {}
            calls["on_record"] = self._logger(title, problem.metrics[0], progress, speed, phases)

            def first(step: int) -> None:
                if phases is not None:
                    phases.first(step)
                progress.update(step, "")

            calls["on_first"] = first
            widest = self.widest if saving else None
            found = Training.begin(problem, optimizer, self.key, self.half, widest, **calls)
            found.train(saving)
        best = found.best()
        with self.console.waiting("scoring the test rows"):
            test = found.problem.score(best, "test")
        self._log(title, {"step": found.best_step, "test": test})
        size = sum(x.size for x in jax.tree.leaves(found.cut(best).adapters))
        row = {"method": title, "trainable_parameters": size, "dev": found.dev, "test": test}
        return found, best, row

    def _log(self, title: str, record: Record) -> None:
        """Writes a record to the metrics and the trackers; there, baselines have their titles."""
        self.run.log({"method": title, **record})
        metrics = {**record}
        step = metrics.pop("step", 0)
        self.track({"step": step, **(metrics if title == self.title else {title: metrics})})

    def _logger(
        self,
        title: str,
        metric: str,
        progress: Progress,
        speed: Speed,
        phases: Phases | None = None,
    ) -> Callable[[Record], None]:
        """Returns a function that writes records to the run's log and shows the progress."""
        notes = {"loss": "", "speed": "", "dev": "", "skipped": "", "run": ""}
        skipped = 0

        def follow(record: Record, phases: Phases) -> None:
            known = phases.pace is not None
            phases.scored() if "dev" in record else phases.stepped(record["step"])
            if phases.pace is not None:
                notes["run"] = f"run: {duration(sum(phases.left().values()))} left"
                if not known or "dev" in record:
                    self.console.announce(f"left: about {phases}")

        def log(record: Record) -> None:
            nonlocal skipped
            self._log(title, record)
            if phases is not None:
                follow(record, phases)
            if "dev" in record:
                notes["dev"] = f"dev {metric} {record['dev'][metric]:.3f}"
                speed.pause()
            if "skipped" in record:
                skipped += record["skipped"]
                notes["skipped"] = f"{skipped} steps skipped"
            if "loss" in record:
                notes["loss"] = f"loss {record['loss']:.3f}"
                notes["speed"] = speed.at(record["step"]) or notes["speed"]
            words = "  ".join(filter(None, notes.values()))
            progress.update(record["step"], words, news="dev" in record)

        return log
