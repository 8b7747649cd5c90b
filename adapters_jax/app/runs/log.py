"""Logs the metrics of steps; they are read from the device late, so that no step waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adapters_jax.tasks.base import NotFiniteError

Record = dict[str, Any]


class Log:
    """Collects metrics of steps, and reads them one window late, as records of means.

    Attributes:
        waiting: windows of `(step, metrics)` that are still on the device.
    """

    _NAMES = ("loss", "grad_norm", "finite")

    def __init__(self, window: int, schedule: Callable[[int], Any]):
        self.window, self.schedule = window, schedule
        self.waiting: list[list[tuple[int, Any]]] = [[]]

    def add(self, step: int, metrics: Any) -> list[Record]:
        """Adds the metrics of a step; returns the records that are due."""
        self.waiting[-1].append((step, {name: metrics[name] for name in self._NAMES}))
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
            if not metrics["finite"]:
                raise NotFiniteError(step, "the loss or its gradient")
        means = {name: float(np.mean([m[name] for m in values])) for name in ("loss", "grad_norm")}
        rate = float(self.schedule(steps[-1] - 1))
        return [{"step": steps[-1], **means, "learning_rate": rate}]
