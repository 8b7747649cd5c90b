"""How a run is optimised: the flags, the schedule and the optax chain they become."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import optax

from adapters_jax.finetune.flags import flag
from adapters_jax.finetune.recipes import PRESETS
from adapters_jax.methods.base import check_number, check_size
from adapters_jax.partition import path_of


@dataclass(frozen=True)
class OptimizerOptions:
    """How to train: AdamW, with a linear warm-up and a linear decay to zero.

    Args:
        learning_rate: the highest one; by default the method's own.
        epochs: passes over the training rows; by default the method's own.
        batch_size: rows a step.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        weight_decay: on everything trained but biases and layer norms.
        warmup: fraction of the steps that the learning rate rises over.
        clip: largest global norm of a gradient; 0 never clips.
        evaluations: how often an epoch the dev rows are scored.
    """

    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    evaluations: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluations"):
            if getattr(self, name) is not None:
                check_size("the optimizer", flag(name), getattr(self, name))
        if self.learning_rate is not None:
            check_number("the optimizer", "--learning-rate", self.learning_rate)
        for name, high in (("weight_decay", float("inf")), ("warmup", 1.0), ("clip", float("inf"))):
            check_number("the optimizer", flag(name), getattr(self, name), high=high, closed=True)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}"
            )

    def of(self, method: str) -> "OptimizerOptions":
        """With the method's own learning rate and epochs where none are given."""
        preset = PRESETS[method]
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate or preset.learning_rate,
            epochs=self.epochs or preset.epochs,
        )

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate of each step, for a training of so many."""
        warm, peak = int(steps * self.warmup), self.learning_rate or 0.0
        rise = optax.linear_schedule(0.0, peak, warm + 1)
        fall = optax.linear_schedule(peak, 0.0, max(steps - warm, 1))
        return optax.join_schedules([lambda step: rise(step + 1), fall], [warm])

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a training of so many steps."""
        adamw = optax.adamw(self.schedule(steps), weight_decay=self.weight_decay, mask=_decays)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw) if self.clip else adamw


def _decays(params: Any) -> Any:
    """True where weight decay acts: everywhere but on biases and layer norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: path_of(key_path).rpartition("/")[2] not in ("bias", "scale"), params
    )
