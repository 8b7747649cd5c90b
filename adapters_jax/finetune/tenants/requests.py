"""What tenants ask for, what they get, and the checks of both."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError, check_number, shown
from adapters_jax.finetune.tenants.losses import LOSSES, THRESHOLDS, Loss
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree, unflatten


class ClosedError(UserError):
    """The engine takes no more requests."""


class UnknownTenantError(UserError):
    """No tenant has that name, or it was dropped meanwhile."""


class Row(NamedTuple):
    """One text, with what the loss needs for each of its tokens.

    Attributes:
        tokens: the ids that the model reads, int32 (n,).
        targets: the id after each of them, int32 (n,).
        values: further numbers of each target by name, float32 (n,): "weights" for cross_entropy;
            "logprobs" and "advantages" for the others; see `losses.LOSSES`.
    """

    tokens: Any
    targets: Any
    values: Mapping[str, Any]


class Adam(NamedTuple):
    """The numbers of one AdamW step, with Tinker's defaults.

    Attributes:
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        eps: is added to the root of the latter.
        weight_decay: is decoupled, so that a leaf loses `learning_rate * weight_decay` of itself.
        grad_clip_norm: the largest global norm of the gradients; 0 clips nothing.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def checked(self) -> "Adam":
        """These numbers; raises UserError where one is out of its range."""
        for name, value in zip(self._fields, self, strict=True):
            high = 1.0 if name.startswith("beta") else float("inf")
            check_number("Adam", name, value, high=high, closed=name != "eps")
        return self


class Passed(NamedTuple):
    """The result of a forward pass, with or without gradients.

    Attributes:
        logprobs: of each row, the log-probabilities of its targets, float32 (n,).
        losses: of each row, the losses of its tokens, float32 (n,).
        metrics: `loss:sum`, the sum of all of these.
    """

    logprobs: list[np.ndarray]
    losses: list[np.ndarray]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A tenant at one moment, on the host, in its own shapes.

    Attributes:
        leaves: its adapter's leaves by path, numpy.
        mean: Adam's mean of the gradients, by path, of the leaves that train.
        square: its mean of their squares.
        step: the number of steps made.
    """

    recipe: Recipe
    leaves: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    square: dict[str, np.ndarray]
    step: int

    @property
    def adapter(self) -> tuple[Recipe, Tree]:
        """The adapter, as `aj.Bank.put` and `Engine.fit` take it."""
        return self.recipe, unflatten(self.leaves)


class Checked(NamedTuple):
    """A row that was checked; `length` of its arrays are read, the values by the loss's roles."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reference: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float
    sequence: np.ndarray | float
    beta: float


def checked_rows(
    rows: Sequence[Row],
    loss: str,
    config: Mapping[str, float] | None,
    *,
    vocabulary: int,
    longest: int,
) -> list[Checked]:
    """Rows as the programs take them.

    Raises:
        UserError: there are no rows, the loss or one of its settings is unknown, or a row does not
            have what the loss needs.
    """
    if not isinstance(loss, str) or loss not in LOSSES:
        raise UserError(f"loss={shown(loss)}, expected one of {', '.join(LOSSES)}")
    kind, settings = LOSSES[loss], dict(config or {})
    unknown = sorted(map(str, settings.keys() - kind.config.keys()))
    if unknown:
        known = ", ".join(kind.config) or "none"
        raise UserError(f"{loss} has no setting {unknown[0]!r}; expected: {known}")
    for name, value in settings.items():
        check_number(loss, name, value, closed=True)
    settings = kind.config | settings
    if isinstance(rows, Row) or not len(rows):
        raise UserError(f"rows={shown(rows)}, expected a list of one or more rows")
    return [
        _checked(f"row {i}", row, loss, kind, settings, vocabulary, longest)
        for i, row in enumerate(rows)
    ]


def _checked(
    name: str,
    row: Row,
    loss: str,
    kind: Loss,
    settings: Mapping[str, float],
    vocabulary: int,
    longest: int,
) -> Checked:
    tokens = _ids(f"{name}: tokens", row.tokens, vocabulary)
    if tokens.size > longest:
        raise UserError(f"{name} has {tokens.size} tokens, expected at most {longest}; shorten it")
    targets = _ids(f"{name}: targets", row.targets, vocabulary)
    thresholds = [each for each in THRESHOLDS if each in kind.config]
    lacking = [each for each in kind.values if each not in row.values]
    unknown = [str(each) for each in row.values if each not in (*kind.values, *thresholds)]
    if lacking or unknown:
        wrong = f"lacks {lacking[0]!r}" if lacking else f"has {unknown[0]!r}"
        raise UserError(f"{name} {wrong}; {loss} takes {', '.join((*kind.values, *thresholds))}")
    values = {key: _floats(f"{name}: {key}", x) for key, x in row.values.items()}
    for key, x in {"targets": targets, **values}.items():
        if x.size != tokens.size:
            raise UserError(
                f"{name} has {tokens.size} tokens and {x.size} {key}, expected one for each token"
            )
    low, high = (values.get(each, settings.get(each, 0.0)) for each in THRESHOLDS)
    if np.any(np.asarray(low) < 0) or np.any(np.asarray(low) > high):
        raise UserError(
            f"{name}: {THRESHOLDS[0]} is {shown(low)} and {THRESHOLDS[1]} {shown(high)}, expected "
            "0 <= low <= high"
        )
    sequence = values.get("sequence_ratio_mask", 0.0)
    if loss == "gspo" and not np.any(sequence):
        raise UserError(f"{name}: sequence_ratio_mask is 0 everywhere, expected 1 for some tokens")
    weights = values[kind.values[0] if loss == "cross_entropy" else "advantages"]
    reference = values.get("logprobs", 0.0)
    beta = settings.get("beta", 0.0)
    return Checked(tokens, targets, weights, reference, low, high, sequence, beta)


def _ids(name: str, value: Any, vocabulary: int) -> np.ndarray:
    """A list of tokens; raises UserError where there is none, or one that the model lacks."""
    ids = _array(name, value, "whole numbers", "iu")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise UserError(f"{name} has {wrong[0]}, expected 0 to {vocabulary - 1}")
    return ids.astype(np.int32)


def _floats(name: str, value: Any) -> np.ndarray:
    """A list of finite numbers, float32; raises UserError for others."""
    with np.errstate(over="ignore"):  # of numbers that float32 cannot hold
        floats = _array(name, value, "numbers", "fiub").astype(np.float32)
    if not np.isfinite(floats).all():
        raise UserError(f"{name} has {floats[~np.isfinite(floats)][0]}, expected finite numbers")
    return floats


def _array(name: str, value: Any, what: str, kinds: str) -> np.ndarray:
    """An array of one axis; raises UserError for anything else, and for an empty one."""
    try:
        array = np.asarray(value)
    except ValueError:  # of unequal lists
        array = np.empty((0, 0))
    if array.ndim != 1 or not array.size or array.dtype.kind not in kinds:
        raise UserError(
            f"{name}: {array.dtype} of shape {list(array.shape)}, expected {what} of shape [n], "
            "at least one"
        )
    return array
