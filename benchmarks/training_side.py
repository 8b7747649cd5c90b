"""A training step in its own process, so that its memory can be measured; see `workers`."""

import ctypes
import gc
from typing import Any

from benchmarks.shapes import Step, Subject
from benchmarks.workers import peak_bytes


class Training:
    """The compiled training step of a job's subject and recipe; `run` runs it.

    The memory that the compiler leaves is returned to the system, so that a later peak is a step's.
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
        """Runs one step."""
        self.step()

    def loss(self) -> float:
        """The loss of the last step."""
        return self.step.loss


make = Training
