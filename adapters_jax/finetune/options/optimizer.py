"""The flags of the optimiser, and the schedule and optax chain that they become."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.options.flags import flag
from adapters_jax.finetune.options.method import PRESETS

if TYPE_CHECKING:
    import optax

    from adapters_jax.recipe import Recipe

_LIMITS = dict.fromkeys(
    ("learning_rate", "head_learning_rate", "lora_plus", "epochs", "weight_decay", "clip"), math.inf
) | {"orthogonality": math.inf, "warmup": 1.0, "dropout": 1.0}
_SIZES = ("batch_size", "accumulate", "evaluations", "max_steps", "patience", "target_rank")
_ZERO = ("weight_decay", "clip", "warmup", "dropout", "orthogonality")  # may be 0
MOST_EPOCHS = 20.0  # of a run that nobody asks for more of; those of the head's baseline


@dataclass(frozen=True)
class OptimizerOptions:
    """How to train: by default AdamW, with a linear warm-up and a linear decay to zero.

    Args:
        learning_rate: the highest learning rate; by default the method's own, of lora on a decoder
            5e-4 (2000 / width)^0.781, and for an m of --bottleneck-dim above 64 that times
            sqrt(64 / m).
        head_learning_rate: learning rate of an encoder's head, which starts from random values; by
            default 0.01, for full and last-layers 0.001, for head-only and for a masked language
            model's own head --learning-rate.
        lora_plus: factor on the learning rate of LoRA's B (LoRA+); 16 in the paper's code, by
            default none.
        optimizer: an optimiser of optax by its name there, such as lion, adafactor or sgd; the
            default learning rates are for adamw.
        schedule: how the learning rate goes on after the warm-up: linear and cosine fall to 0,
            constant stays.
        target_rank: for adalora, the mean rank in the end, which is reached when 30 % of the steps
            are left; by default two thirds of that at the start.
        orthogonality: for adalora, the factor on the penalty of factors that are not orthogonal.
        epochs: passes over the training rows, also a fraction; by default 3, for head-only 20, for
            question-answering 4, on the movie reviews 1.5; where these are fewer than 340 steps of
            a new head on an encoder, as many as make 340, at most 20 (`python -m benchmarks
            defaults` is the source).
        max_steps: steps of the training, in place of --epochs.
        dropout: dropout of an encoder; by default none, for full and last-layers the checkpoint's.
        batch_size: rows in a step, or packed sequences of a decoder; by default 32, for
            question-answering 8, for a decoder 4.
        accumulate: number of parts that a batch is computed in, one by one, to save memory.
        weight_decay: weight decay of trained parameters other than biases and layer norms, for
            optimisers that take both, such as adamw and lion.
        warmup: fraction of the steps while the learning rate rises.
        clip: largest global norm of a gradient; 0 for no clipping.
        evaluations: number of times in an epoch that the dev rows are scored.
        patience: end training when this many evaluations in a row bring no better dev score; by
            default it goes on to the last step. The learning rate falls as if it did.
    """

    learning_rate: float | None = None
    head_learning_rate: float | None = None
    lora_plus: float | None = None
    optimizer: str = "adamw"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    target_rank: int | None = None
    orthogonality: float = 0.5
    epochs: float | None = None
    max_steps: int | None = None
    dropout: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    evaluations: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, high in _LIMITS.items():
            value = getattr(self, name)
            if value is not None:
                check_number("the optimizer", flag(name), value, high=high, closed=name in _ZERO)
        for name in _SIZES:
            if getattr(self, name) is not None:
                check_size("the optimizer", flag(name), getattr(self, name))
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise UserError(
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}"
            )

    def of(self, method: str) -> OptimizerOptions:
        """Fills in a method's defaults for training an encoder."""
        preset = PRESETS[method]
        rate = self.learning_rate or preset.learning_rate
        return dataclasses.replace(
            self.of_decoder(method, batch_size=32),
            head_learning_rate=self.head_learning_rate or preset.head_learning_rate or rate,
            dropout=preset.dropout if self.dropout is None else self.dropout,
        )

    def of_decoder(self, method: str, batch_size: int = 4) -> OptimizerOptions:
        """Fills in a method's defaults for training a decoder, which has no head or dropout."""
        preset = PRESETS[method]
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate or preset.learning_rate,
            epochs=self.epochs or preset.epochs,
            batch_size=self.batch_size or batch_size,
        )

    def of_few_rows(self, least: int, epoch: int) -> OptimizerOptions:
        """Raises the epochs until they make a number of steps, or are 20.

        Args:
            least: the number of steps.
            epoch: the steps of an epoch.

        Example:
            >>> OptimizerOptions(epochs=3.0).of_few_rows(340, 29).epochs
            12.0
            >>> OptimizerOptions(epochs=3.0).of_few_rows(340, 200).epochs
            3.0
        """
        enough = min(-(-least // epoch), MOST_EPOCHS)
        if self.steps(epoch) >= least or enough <= (self.epochs or 1):
            return self
        return dataclasses.replace(self, epochs=float(enough))

    def steps(self, epoch: int) -> int:
        """The number of steps of a training, for epochs of `epoch` steps."""
        return max(1, round((self.epochs or 1) * epoch))

    def marks(self, epoch: int, recipe: Recipe) -> set[int]:
        """The steps after which dev is scored: evenly spread, with the last step."""
        steps = self.steps(epoch)
        count = max(1, round((self.epochs or 1) * self.evaluations))
        found = {-(-steps * n // count) for n in range(1, count + 1)}
        # What is best on dev is kept, and before AdaLoRA is settled it would have more ranks than
        # asked for.
        return {mark for mark in found if mark >= self.settled(steps, recipe)}

    def rates(self, steps: int, peak: float) -> optax.Schedule:
        """The learning rate by step, for a training of `steps` steps."""
        import optax

        warm = int(steps * self.warmup)
        rise = optax.linear_schedule(0.0, peak, warm + 1)
        left = max(steps - warm, 1)
        after = {
            "linear": lambda: optax.linear_schedule(peak, 0.0, left),
            "cosine": lambda: optax.cosine_decay_schedule(peak, left),
            "constant": lambda: optax.constant_schedule(peak),
        }
        # optax counts steps from 0, and the first step is to have a rate above 0.
        return optax.join_schedules([lambda step: rise(step + 1), after[self.schedule]()], [warm])

    def make(self, steps: int, recipe: Recipe) -> optax.GradientTransformation:
        """Makes the optimiser of what a recipe trains, for a training of `steps` steps."""
        import optax

        from adapters_jax.methods import LoRA
        from adapters_jax.presets import HEAD
        from adapters_jax.training.optimizers import freeze_base

        def of(peak: float | None) -> optax.GradientTransformation:
            return self._of_optax()(self.rates(steps, peak or 0.0))

        rate = self.head_learning_rate if recipe.trains(f"{HEAD}/kernel") else None
        groups = {f"{HEAD}/**": of(rate)} if rate else {}
        if self.lora_plus not in (None, 1.0):  # older runs store 1.0 for none
            faster = of((self.learning_rate or 0.0) * self.lora_plus)
            lora = [m for m in recipe.attached if isinstance(m, LoRA) and m.train]
            # Of a module with several weights, such as experts, each has a node below the slot.
            groups |= dict.fromkeys((f"**/{method.slot}/**/b" for method in lora), faster)
        tx = freeze_base(of(self.learning_rate), recipe, groups)
        tx = optax.chain(optax.clip_by_global_norm(self.clip), tx) if self.clip else tx
        return self._with_budget(tx, steps, recipe)

    def _of_optax(self) -> Callable[[optax.Schedule], optax.GradientTransformation]:
        """The optimiser of optax, with the weight decay, as a function of the learning rate.

        Raises:
            UserError: optax has none of this name, or it has no weight decay, which was asked for.
        """
        found = _optimizers()
        if self.optimizer not in found:
            near = difflib.get_close_matches(self.optimizer, found, 1)
            raise UserError(
                f"--optimizer {self.optimizer} is no optimiser of optax"
                + (f". Did you mean {near[0]}?" if near else f"; there are {', '.join(found)}")
            )
        make = found[self.optimizer]
        takes = inspect.signature(make).parameters
        mask = next((name for name in ("mask", "weight_decay_mask") if name in takes), "")
        if mask and "weight_decay" in takes:
            return partial(make, weight_decay=self.weight_decay, **{mask: _decays})
        if self.weight_decay not in (0.0, OptimizerOptions.weight_decay):
            raise UserError(
                f"--weight-decay: optax's {self.optimizer} has none that leaves out biases and "
                "layer norms; leave it out"
            )
        return make

    def check(self) -> None:
        """Raises UserError for --epochs beside --max-steps, and for optimisers that do not fit.

        Those that optax does not have, and those that need more than gradients.
        """
        import jax
        import jax.numpy as jnp

        if self.max_steps is not None and self.epochs is not None:
            raise UserError(
                f"--max-steps {self.max_steps} is in place of --epochs {self.epochs:g}; write one"
            )
        make, like = self._of_optax(), {"kernel": jnp.ones((2, 2))}
        try:
            tx = make(self.rates(2, 1.0))
            jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), like)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--optimizer {self.optimizer}: optax's needs more than gradients and a learning "
                f"rate by step: {error}; write adamw, lion or another one"
            ) from error

    def _with_budget(
        self, tx: optax.GradientTransformation, steps: int, recipe: Recipe
    ) -> optax.GradientTransformation:
        """The optimiser with the budget of AdaLoRA, where the recipe trains one."""
        from adapters_jax.training.adalora import adalora_budget

        if not _adaptive(recipe):
            return tx
        final = steps - self.settled(steps, recipe)
        stages = {"initial_steps": int(steps * self.warmup), "final_steps": final}
        return adalora_budget(tx, recipe, total_steps=steps, target_rank=self.target_rank, **stages)

    def settled(self, steps: int, recipe: Recipe) -> int:
        """The step from which the ranks of AdaLoRA stay; 0 where the recipe trains none."""
        return steps - int(0.3 * steps) if _adaptive(recipe) else 0

    def loss_of(self, problem: Any) -> Callable[..., Any]:
        """The loss of a problem, with the penalty of AdaLoRA where its recipe trains one."""
        if not _adaptive(problem.recipe) or not self.orthogonality:
            return problem.loss

        def loss(subject: Any, batch: Any, key: Any) -> Any:
            from adapters_jax.training.adalora import orthogonality

            found = problem.loss(subject, batch, key)
            value, *rest = found if isinstance(found, tuple) else (found,)
            return value + self.orthogonality * orthogonality(subject, problem.recipe), *rest

        return loss


def _optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The optimisers of optax by name: the functions whose first argument is the learning rate."""
    import optax

    public = {k: v for k, v in vars(optax).items() if not k.startswith(("_", "scale_by_"))}
    made = {k: v for k, v in public.items() if inspect.isfunction(v) or isinstance(v, partial)}
    first = {k: next(iter(inspect.signature(v).parameters), "") for k, v in made.items()}
    return {name: made[name] for name in sorted(made) if first[name] == "learning_rate"}


def _adaptive(recipe: Recipe) -> list[Any]:
    return [method for method in recipe.attached if method.kind == "adalora" and method.train]


def _decays(params: Any) -> Any:
    """True for each parameter that decays: all but biases and the scales of layer norms."""
    import jax

    from adapters_jax.trees import path_of

    def decays(key_path: Any, _: Any) -> bool:
        name = path_of(key_path).rpartition("/")[2]
        return name != "scale" and not name.endswith("bias")  # Compacter has a down_bias

    return jax.tree_util.tree_map_with_path(decays, params)
