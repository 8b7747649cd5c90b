"""Compositions: how named adapters on the output of one module act together.

MAD-X stacks adapters of languages and tasks; AdapterHub has the others, too
(https://docs.adapterhub.ml/adapter_composition.html).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError, check_number, check_size, shown
from adapters_jax.methods.arrays import Key
from adapters_jax.methods.base import AttachmentPoint, Leaves, Method
from adapters_jax.methods.outputs import State
from adapters_jax.methods.places import known_part

Runner = Callable[[str, State], State | None]


@dataclass(frozen=True)
class Composition(Method):
    """The base class of compositions: entries of a recipe that run others, by their names.

    A composition is where its members are, so it needs no targets.

    Args:
        targets: all modules.
        members: the names of the entries, in order.

    Raises:
        UserError: there are no members, or one stands there twice.

    Example:
        >>> issubclass(Stacked, Composition), Stacked(members=("sw", "ner")).members
        (True, ('sw', 'ner'))
    """

    stated: ClassVar[tuple[str, ...]] = ("members",)
    unmergeable: ClassVar[str] = "it runs adapters one beside the other"

    targets: str | tuple[str, ...] = field(default=("**",), repr=False)
    members: tuple[str, ...] = ()  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.leaf_names:  # nothing of it can be frozen, as where a whole recipe is
            object.__setattr__(self, "train", True)
        members = self.members
        if not (
            isinstance(members, tuple) and members and all(isinstance(m, str) for m in members)
        ):
            raise UserError(
                f"{self.kind}: members={shown(members)}, expected the names of adapters, such as "
                f"aj.{self.kind}('first', 'second')"
            )
        if len(set(members)) < len(members):
            twice = max(members, key=members.count)
            raise UserError(f"{self.kind}: {twice!r} stands there twice; name each adapter once")

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """No arrays: with members that leave the base as it is, a composition does."""
        return {}

    def _each(self, point: AttachmentPoint, run: Runner, state: State) -> tuple[list[State], bool]:
        """The states after each member alone, and whether members change the module's input.

        Raises:
            RecipeError: the module lacks one, or some change its input and others its output.
        """
        found = {name: run(name, state) for name in self.members}
        for name, after in found.items():
            if after is None:
                there = [name for name, x in found.items() if x is not None]
                raise RecipeError(
                    f"{self.kind}: {name!r} has no adapter on the output of {point.path!r}, where "
                    f"{' and '.join(there)} have one; give all members the same targets"
                )
        states = [after for after in found.values() if after is not None]
        return states, self._of_input(point, [(state, each) for each in states])

    def _of_input(self, point: AttachmentPoint, pairs: Iterable[tuple[State, State]]) -> bool:
        """Whether members change the module's input, by the states before and after each.

        Raises:
            RecipeError: some do, and others change its output.
        """
        moved = {after.x is not before.x for before, after in pairs}
        if len(moved) > 1:
            raise RecipeError(
                f"{self.kind}: at {point.path!r} some of {', '.join(self.members)} change the "
                "module's input (placement='norm') and others its output; give all one placement"
            )
        return True in moved


@dataclass(frozen=True)
class Stacked(Composition):
    """Adapters one after the other; modules that lack one skip it.

    Args:
        targets, members: as in `Composition`.

    Example:
        >>> Stacked(members=("sw", "ner"))
        Stacked(members=('sw', 'ner'))
    """

    kind: ClassVar[str] = "stack"
    slot: ClassVar[str] = "stack"

    def compose(
        self, leaves: Leaves, point: AttachmentPoint, run: Runner, state: State, key: Key = None
    ) -> State:
        """The state after all members."""
        for name in self.members:
            state = run(name, state) or state
        return state


@dataclass(frozen=True)
class Averaged(Composition):
    """The weighted mean of what the module returns with each adapter alone.

    Args:
        targets, members: as in `Composition`.
        weights: a number for each member; they are divided by their sum. Empty for equal ones.

    Raises:
        UserError: there is another number of weights than of members, or they add to 0.

    Example:
        >>> Averaged(members=("a", "b"), weights=(3.0, 1.0)).shares
        (0.75, 0.25)
    """

    kind: ClassVar[str] = "average"
    slot: ClassVar[str] = "average"

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in self.weights:
            check_number("average", "weights", weight, low=-math.inf)
        if self.weights and (len(self.weights) != len(self.members) or not sum(self.weights)):
            raise UserError(
                f"average: weights={self.weights} for {', '.join(self.members)}, expected a number "
                "for each, with a sum that is not 0"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, with a sum of 1."""
        weights = self.weights or (1.0,) * len(self.members)
        return tuple(weight / sum(weights) for weight in weights)

    def compose(
        self, leaves: Leaves, point: AttachmentPoint, run: Runner, state: State, key: Key = None
    ) -> State:
        """The state with the mean of all members."""
        states, of_input = self._each(point, run, state)
        parts = jnp.stack([each.x if of_input else each.y for each in states], -1)
        # A product rounds once; by itself it would round float32 to bfloat16 on a TPU.
        shares = jnp.asarray(self.shares, parts.dtype)
        return state.moved(jnp.matmul(parts, shares, precision="highest"), of_input)


@dataclass(frozen=True)
class Split(Composition):
    """Each adapter on its own part of an axis: of a sequence's positions, or of a batch's rows.

    Args:
        targets, members: as in `Composition`.
        sizes: the size of each part; one of them may be None, for the rest of the axis. Empty for
            parts of one size.

    Raises:
        UserError: there is another number of sizes than of members, or several are None.

    Example:
        >>> Split(members=("a", "b"), sizes=(2, None)).bounds(5, "x")
        [(0, 2), (2, 5)]
    """

    kind: ClassVar[str] = "split"
    slot: ClassVar[str] = "split"
    axis: ClassVar[int] = -2

    sizes: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in [size for size in self.sizes if size is not None]:
            check_size(self.kind, "sizes", size)
        if self.sizes and (len(self.sizes) != len(self.members) or self.sizes.count(None) > 1):
            raise UserError(
                f"{self.kind}: sizes={self.sizes} for {', '.join(self.members)}, expected a size "
                "for each, one of them None at most"
            )

    def bounds(self, length: int, path: str) -> list[tuple[int, int]]:
        """Where each part starts and ends.

        Args:
            length: the size of the axis.
            path: the path of the module, for messages.

        Raises:
            RecipeError: the parts do not fill the axis.
        """
        equal = (length // len(self.members),) * len(self.members)
        sizes = self.sizes or equal
        rest = length - sum(size or 0 for size in sizes)
        found = [rest if size is None else size for size in sizes]
        if sum(found) != length or min(found) < 0:
            what = ", ".join(map(str, sizes)) if self.sizes else f"{len(self.members)} equal parts"
            raise RecipeError(
                f"{self.kind}: the output of {path!r} has {length} along axis {self.axis}, which "
                f"parts of {what} do not fill; give other sizes, or None for one"
            )
        ends = list(itertools.accumulate(found))
        return list(zip([0, *ends], ends, strict=False))

    def compose(
        self, leaves: Leaves, point: AttachmentPoint, run: Runner, state: State, key: Key = None
    ) -> State:
        """The state with each part after its member; a part of a member that is not there stays."""
        y, before, after = state.y, list[State](), list[State | None]()
        if y.ndim < (3 if self.axis == -2 else 2):
            raise RecipeError(
                f"{self.kind}: the output of {point.path!r} has the shape {y.shape}, expected "
                "(batch, length, width)"
            )
        axis = self.axis % y.ndim
        bounds = self.bounds(y.shape[axis], point.path)
        for name, (start, end) in zip(self.members, bounds, strict=True):
            at = (*(slice(None),) * axis, slice(start, end))
            x = state.x[at] if getattr(state.x, "ndim", 0) == y.ndim else state.x
            before.append(State(x, y[at], state.again))
            with known_part(min(axis, 1), start, end, y.shape[axis]):
                after.append(run(name, before[-1]))
        pairs = list(zip(before, after, strict=True))
        of_input = self._of_input(point, [(old, new) for old, new in pairs if new])
        ends = [new or old for old, new in pairs]
        parts = [each.x if of_input else each.y for each in ends]
        return state.moved(jnp.concatenate(parts, axis), of_input)


@dataclass(frozen=True)
class BatchSplit(Split):
    """Each adapter on its own rows of a batch.

    Args:
        targets, members: as in `Composition`.
        sizes: as in `Split`, of rows.

    Example:
        >>> BatchSplit(members=("a", "b")).bounds(6, "x")
        [(0, 3), (3, 6)]
    """

    kind: ClassVar[str] = "batch_split"
    slot: ClassVar[str] = "batch_split"
    axis: ClassVar[int] = 0

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Raises RecipeError: a bank chooses the adapter of each row by itself."""
        raise RecipeError(
            "Bank: batch_split chooses adapters by rows, as a bank does by names; leave it out of "
            "the bank's recipe"
        )
