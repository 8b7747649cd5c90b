"""The main job: train a recipe, compare it with baselines, and write all of it down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from adapters_jax.audit import audit
from adapters_jax.files import save_adapter
from adapters_jax.finetune.batches import Batches
from adapters_jax.finetune.encoders import Encoder
from adapters_jax.finetune.head import head_problem
from adapters_jax.finetune.metrics import compute
from adapters_jax.finetune.optimizers import OptimizerOptions
from adapters_jax.finetune.output import Meter, Output, duration
from adapters_jax.finetune.recipes import HEAD_ONLY, head_only
from adapters_jax.finetune.report import draw_curves, results_table, write_report
from adapters_jax.finetune.runs import Run
from adapters_jax.finetune.tasks import TaskData
from adapters_jax.finetune.training import (
    NotFiniteError,
    Problem,
    Record,
    Scorer,
    StoppedError,
    Trained,
    train,
)
from adapters_jax.state import TrainState


@dataclass(frozen=True)
class Job:
    """A run that is ready to start, in its directory; `Finetune.prepare` makes it.

    Attributes:
        run: where it goes.
        title: the method's name in tables.
        problem: what is trained.
        optimizer: how, with a learning rate and epochs.
        seed: of dropout and of the baseline's order.
        baselines: whether to compare.
        task: the rows as text.
        encoder: the base.
        in_order: the training rows in order.
        config: what `config.json` says.
        output: where words go.
        began: when, in seconds of `time.perf_counter`.
    """

    run: Run
    title: str
    problem: Problem
    optimizer: OptimizerOptions
    seed: int
    baselines: bool
    task: TaskData
    encoder: Encoder
    in_order: Batches
    config: dict[str, Any]
    output: Output
    began: float

    def __call__(self) -> None:
        """Trains, compares, reports.

        Raises:
            StoppedError: a loss was not finite; the last good adapter is on disk.
        """
        model, steps = self.problem.model, self.optimizer.steps(len(self.problem.train))
        counts = audit(model, self.problem.params, self.optimizer.make(steps, model.recipe))
        self.output.show(counts)
        try:
            found, results = self._train_all()
        except NotFiniteError as error:
            raise self._stopped(error) from error
        summary: dict[str, Any] = {
            "run": self.run.path.as_posix(),
            "seconds": round(time.perf_counter() - self.began, 1),
            "trainable_parameters": counts.trainable_parameters,
            "best_step": found.step,
            "dev": found.dev,
            "results": results,
        }
        config = {**self.config, "summary": summary}
        self.run.write_config(config)
        metric = self.problem.metrics[0]
        levels = {row["method"]: row["dev"][metric] for row in results[:-1]}
        draw_curves(self.run.curves, self.title, found.records, metric, levels)
        write_report(self.run, config, counts)
        self.output.table(*results_table(results, self.problem.metrics))
        self.output.say(f"finished in {duration(summary['seconds'])}: see {self.run.report}")
        self.output.result(summary)

    def _stopped(self, error: NotFiniteError) -> StoppedError:
        """Notes in the run that it broke off, and says so."""
        message = (
            f"{error}, so training stopped; the last good adapter is in {self.run.adapter}; try a "
            f"--learning-rate below {self.optimizer.learning_rate:g}"
        )
        self.run.write_config({**self.config, "stopped": message})
        return StoppedError(message)

    def _train_all(self) -> tuple[Trained, list[dict[str, Any]]]:
        """The method and then its baselines: what it found, and the rows of the results' table."""

        def save(state: TrainState) -> None:
            save_adapter(self.run.adapter, state)

        alone = self.problem.model.recipe == head_only()
        problem = self._head_only() if alone else self.problem
        found, row = self._train(self.title, problem, self.optimizer, save)
        rows = [row]
        if self.baselines and not alone:
            size = self.optimizer.batch_size
            optimizer = OptimizerOptions(batch_size=size, evaluations=1).of(HEAD_ONLY)
            rows.insert(0, self._train(HEAD_ONLY, self._head_only(), optimizer)[1])
        if self.baselines:
            rows.insert(0, self._constant())
        return found, rows

    def _head_only(self) -> Problem:
        self.output.say("computing the frozen base's features, once for all epochs of its head")
        return head_problem(self.problem, self.encoder, self.in_order, self.seed)

    def _train(
        self,
        title: str,
        problem: Problem,
        optimizer: OptimizerOptions,
        on_best: Callable[[TrainState], None] = lambda state: None,
    ) -> tuple[Trained, dict[str, Any]]:
        """One training, logged, and tested once with its best adapters."""
        scorer, key = Scorer(problem), jax.random.fold_in(jax.random.key(self.seed), 1)
        with self.output.progress(title, optimizer.steps(len(problem.train))) as meter:
            log = self._logger(title, problem.metrics[0], meter)
            found = train(problem, optimizer, key, scorer=scorer, on_record=log, on_best=on_best)
        test = scorer.score(found.best, "test")
        self.run.log({"method": title, "step": found.step, "test": test})
        size = sum(x.size for x in jax.tree.leaves(found.best.adapters))
        row = {"method": title, "trainable_parameters": size, "dev": found.dev, "test": test}
        return found, row

    def _logger(self, title: str, metric: str, meter: Meter) -> Callable[[Record], None]:
        """Takes records to the run's metrics and to the progress that is shown."""
        notes = {"loss": "", "dev": ""}

        def log(record: Record) -> None:
            self.run.log({"method": title, **record})
            if "dev" in record:
                notes["dev"] = f"dev {metric} {record['dev'][metric]:.3f}"
            else:
                notes["loss"] = f"loss {record['loss']:.3f}"
            words = "  ".join(filter(None, notes.values()))
            meter.update(record["step"], words, news="dev" in record)

        return log

    def _constant(self) -> dict[str, Any]:
        """The row of the best constant prediction."""
        target, train, metrics = self.problem.target, self.task.train, self.problem.metrics
        scores: Mapping[str, Any] = {
            part: compute(metrics, target.constant(train, len(labels)), labels)
            for part, labels in self.problem.labels.items()
        }
        title = "majority class" if target.names else "mean"
        return {"method": title, "trainable_parameters": 0, **scores}
