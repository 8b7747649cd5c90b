"""Logs the metrics of steps; they are read from the device late, so that no step waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adapters_jax.finetune.tasks.base import NotFiniteError

Record = dict[str, Any]


class Log:
    """Collects metrics of steps, and reads them one window late, as records of means.

    A mean is over the steps in which a metric is a number; a metric of none is left out.

    A step that is not finite changes nothing. With a loss scale, which starts too high, such steps
    are skipped and counted, as "skipped" of a record, until there are `patience` in a row.

    Args:
        window: the number of steps in a record.
        schedule: the learning rate by step.
        patience: the number of steps in a row that are not finite and stop the training.

    Attributes:
        waiting: windows of `(step, metrics)` that are still on the device.
        in_a_row: the number of steps that were not finite, since the last finite one.
    """

    _OWN = ("loss", "grad_norm", "finite", "loss_scale")

    def __init__(self, window: int, schedule: Callable[[int], Any], patience: int = 1):
        self.window, self.schedule, self.patience = window, schedule, patience
        self.waiting: list[list[tuple[int, Any]]] = [[]]
        self.in_a_row = 0

    def add(self, step: int, metrics: Any) -> list[Record]:
        """Adds the metrics of a step; returns the records that are due."""
        self.waiting[-1].append((step, {k: v for k, v in metrics.items() if k != "loss_scale"}))
        if step % self.window:
            return []
        self.waiting.append([])
        return self._read(self.waiting.pop(0)) if len(self.waiting) > 2 else []

    def flush(self) -> list[Record]:
        """Returns all remaining records."""
        waiting, self.waiting = self.waiting, [[]]
        return [record for window in waiting for record in self._read(window)]

    def _read(self, window: list[tuple[int, Any]]) -> list[Record]:
        if not window:
            return []
        # Python floats, which a checkpoint stores exactly.
        values = [
            {name: float(x) for name, x in metrics.items()}
            for metrics in jax.device_get([metrics for _, metrics in window])
        ]
        steps = [step for step, _ in window]
        for step, metrics in zip(steps, values, strict=True):
            self.in_a_row = 0 if metrics["finite"] else self.in_a_row + 1
            if self.in_a_row == self.patience:
                raise NotFiniteError(step - self.patience + 1, self._cause)
        good = [metrics for metrics in values if metrics["finite"]]
        record: Record = {"step": steps[-1]}
        if good:
            names = ("loss", "grad_norm", *(k for k in good[0] if k not in self._OWN))
            columns = {name: [m[name] for m in good if m[name] == m[name]] for name in names}
            record |= {name: float(np.mean(column)) for name, column in columns.items() if column}
            record["learning_rate"] = float(self.schedule(steps[-1] - 1))
        if len(good) < len(values):
            record["skipped"] = len(values) - len(good)
        return [record]

    @property
    def _cause(self) -> str:
        if self.patience == 1:
            return "the loss or its gradient"
        return (
            f"in this and the next {self.patience - 1} steps, the loss or its gradient, even with "
            "the smallest loss scale,"
        )
