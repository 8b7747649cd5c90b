"""A training step in a process of its own, where its memory can be told; see `workers`."""

import ctypes
import gc
from typing import Any

from benchmarks.shapes import Step, Subject
from benchmarks.workers import peak_bytes


class Training:
    """The step of a job's subject and recipe, compiled; `run` makes it.

    What the compiler leaves in the process is given back, so that a peak counted anew is a step's.
    """

    def __init__(self, job: dict[str, Any]):
        interpreter = peak_bytes()
        subject = Subject(**job["subject"])
        self.step = Step(subject, subject.recipe(job["recipe"]), subject.weights())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.about = {
            "interpreter": interpreter,
            "trainable": self.step.trainable,
            "parameters": self.step.parameters,
            "flops": self.step.flops,
            "planned": self.step.planned,
        }

    def run(self) -> None:
        """Makes a step."""
        self.step()

    def loss(self) -> float:
        """Of the last step."""
        return self.step.loss


make = Training
