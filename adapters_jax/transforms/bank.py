"""Many adapters of one base, stacked, so that each row of a batch can have another one."""

import difflib
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from adapters_jax.errors import UserError, check_size, shown
from adapters_jax.linen import Adapted
from adapters_jax.methods.mixed import Rows
from adapters_jax.nnx import AdapterParam, copy, modules_of, recipe_of
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.nnx.graph import STACKED, holds
from adapters_jax.placement import Known
from adapters_jax.texts import html_table
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.fitting import Fitted, fitted, is_prompt, neutral, owners_of
from adapters_jax.trees import (
    Adapter,
    Tree,
    adapter_leaves,
    check_params,
    flatten,
    merge_trees,
    partition,
    with_leaves,
)

_BASE = 0  # the place of the adapter that changes nothing


class Bank:
    """Adapters of one base, each row of a batch with its own, in one program.

    The bank's model is adapted with a recipe that holds the largest of everything: ranks, widths,
    prompts, targets. An adapter that goes in has methods of that recipe, or some of them; smaller
    ranks, widths and prompts are padded so that it computes what it does alone, and its scale goes
    into its factors. Rows without an adapter are the base's. All arrays are made at once: adding,
    changing and dropping adapters compiles nothing.

    A head that trains may have fewer outputs than the bank's: its further logits are then -1e9.

    A bank does not change; `put` and `drop` return another one, which shares the base's arrays.

    Args:
        model: an adapted model, linen or NNX, with a recipe that holds the largest of everything.
        params: linen only: its parameter tree, as `init_adapters` gives it. What its recipe
            unfreezes is the base's.
        capacity: the number of adapters that there is room for.

    Attributes:
        recipe: the model's recipe.
        capacity: the number of adapters that there is room for.

    Raises:
        TypeError: the model has no adapters, or params are missing or given to an NNX model.
        UserError: `capacity` is not a positive whole number.
        RecipeError: a method of the recipe cannot leave the base as it is: PiSSA, which changes the
            base, and methods of other packages without `neutral`.

    Example:
        >>> import adapters_jax as aj
        >>> base = nn.Dense(3)
        >>> x = jnp.ones((3, 4))
        >>> model = aj.adapt(base, aj.LoRA("**", rank=2))
        >>> frozen = base.init(jax.random.key(0), x)["params"]
        >>> params = aj.init_adapters(model, frozen, jax.random.key(1), x)
        >>> bank = Bank(model, params, capacity=2)
        >>> small = {"lora": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 3))}}
        >>> bank = bank.put("reviews", (aj.LoRA("**", rank=1), small))
        >>> rows = bank.rows(["reviews", None, None])
        >>> y = bank.model.apply({"params": bank.params}, x, adapters=rows)
        >>> (y - base.apply({"params": frozen}, x))[:, 0].round(3).tolist()
        [4.0, 0.0, 0.0]
    """

    def __init__(
        self, model: Adapted | nnx.Module, params: Tree = None, *, capacity: int = 32
    ) -> None:
        # The capacity is an axis of every array, so that it is fixed: another one would be another
        # program.
        check_size("Bank", "capacity", capacity)
        self.capacity = capacity
        self._places: dict[str, int] = {}
        self._model: Any
        if isinstance(model, Adapted):
            check_params("Bank", params, "aj.Bank(model, params)")
            self.recipe = model.recipe
            self._trained, self._rest = partition(params, model.recipe)
            self._model = model.clone(adapters_stacked=True)
            known = model.adapter_placements
            whole = flatten(params)
        elif isinstance(model, nnx.Module):
            if params is not None:
                raise TypeError("Bank: an NNX model holds its parameters; pass no params")
            self.recipe = recipe_of(model)
            marked = copy(model)
            for path, module in modules_of(marked).items():
                acts = callable(module) and (not path or holds(module))
                if acts and not isinstance(module, bridge.ToNNX):  # its attributes are variables
                    setattr(module, STACKED, True)
            parts: Any = nnx.split(marked, AdapterParam, ...)
            self._model, self._trained, self._rest = parts
            whole = flatten(nnx.state(model, nnx.Param))
            known = Known(placements_of(model))
        else:
            raise TypeError(
                f"Bank: {type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
            )
        whole = {path: nn.meta.unbox(leaf) for path, leaf in whole.items()}
        self._idle = neutral(self.recipe, whole, known)
        stacked = {p: jnp.broadcast_to(x, (capacity + 1, *x.shape)) for p, x in self._idle.items()}
        self._stacked = _written(stacked, self._idle, _BASE)  # so that `put` compiles nothing
        prompts = filter(is_prompt, owners_of(self.recipe, list(self._idle)))
        self._lengths = {each.path: np.zeros(capacity + 1, np.int32) for each in prompts}

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._places)) or "no adapters"
        return f"Bank({names}; {len(self._places)} of {self.capacity} places)"

    def _repr_html_(self) -> str:
        rows = [[name, str(place)] for name, place in self._places.items()]
        holds = f"{len(self)} of {self.capacity} places are taken; each has room for:"
        return html_table(["adapter", "place"], rows, notes=[holds]) + self.recipe._repr_html_()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of their arrival."""
        return tuple(self._places)

    @property
    def params(self) -> Tree:
        """linen: the parameter tree with stacked adapters, for `bank.model.apply`."""
        if not isinstance(self._model, Adapted):
            raise TypeError("this bank is of an NNX model; use bank.model")
        return merge_trees(with_leaves(nn.meta.unbox(self._trained), self._stacked), self._rest)

    @property
    def model(self) -> Any:
        """The model, to call with `adapters=bank.rows([...])`; in NNX with the stacked adapters.

        Called without them, it raises UserError.
        """
        if isinstance(self._model, Adapted):
            return self._model
        # A new model each time, as NNX models are mutable and a bank is not.
        return nnx.merge(*self.split)

    @property
    def split(self) -> tuple[Any, Any, Any]:
        """NNX: what `nnx.split(bank.model, AdapterParam, ...)` gives, without making the model."""
        if isinstance(self._model, Adapted):
            raise TypeError("this bank is of a linen model; use bank.params")
        return self._model, with_leaves(self._trained, self._stacked), self._rest

    def put(
        self,
        name: str,
        adapter: Adapter | TrainState | Fitted,
        *,
        replace: bool = False,
        donate: bool = False,
    ) -> Self:
        """The bank with one more adapter.

        Args:
            name: what `rows` calls it.
            adapter: its recipe and its trained tree, as `read_adapter` returns them, or a state; or
                what `fit` made of it.
            replace: whether an adapter of that name may be replaced.
            donate: whether the new bank may take over the stacked arrays of this one, so that only
                the adapter is written. No other bank that shares them can be used afterwards.

        Raises:
            UserError: the bank is full, the name is taken, or it is not a text.
            RecipeError: the bank's recipe lacks a method of the adapter, or the method differs in
                more than sizes and scales.
            MismatchError: arrays do not fit, or are larger than there is room for.
            TypeError: `adapter` is not a pair of a recipe and a tree.
        """
        place = self._free_place(name, replace)
        made = adapter if isinstance(adapter, Fitted) else self.fit(name, adapter)
        # Banks that were made from this one share its arrays and may be in use.
        lengths = {path: x.copy() for path, x in self._lengths.items()}
        for path, counts in lengths.items():
            counts[place] = made.lengths.get(path, 0)
        write = _written_in_place if donate else _written
        stacked = write(self._stacked, {**self._idle, **made.leaves}, place)
        return self._with({**self._places, name: place}, _stacked=stacked, _lengths=lengths)

    def fit(self, name: str, adapter: Adapter | TrainState) -> Fitted:
        """An adapter in the bank's shapes, for `put`; it holds for every bank made from this one.

        Args:
            name: what error messages call it.
            adapter: as for `put`.

        Raises:
            RecipeError, MismatchError, TypeError: as for `put`.
        """
        if isinstance(adapter, TrainState):
            adapter = adapter.recipe, adapter.trained
        recipe, flat = adapter_leaves(adapter, "Bank.put")
        return fitted(f"Bank.put({name!r})", recipe, flat, self.recipe, self._idle)

    def drop(self, name: str) -> Self:
        """The bank without an adapter.

        Raises:
            UserError: it has none of that name.
        """
        self._place(name)
        return self._with({other: i for other, i in self._places.items() if other != name})

    def rows(self, names: Sequence[str | None], *, each: int = 1) -> Rows:
        """Which adapter each row of a batch has, for `adapters=`.

        Args:
            names: the adapters' names, None for the base.
            each: how many consecutive rows each of them is for.

        Returns:
            A tree of small arrays; other names compile nothing.

        Raises:
            UserError: the bank has no adapter of one of the names, or there are no names.
        """
        check_size("Bank.rows", "each", each)
        if isinstance(names, str) or not len(names):
            raise UserError(
                f"Bank.rows: names={shown(names)}, expected a list with a name or None for each row"
            )
        # numpy until the end: each jnp operation on a new length would be compiled.
        index = np.array([_BASE if n is None else self._place(n) for n in names], np.int32)
        lengths = {path: jnp.asarray(x[index]) for path, x in self._lengths.items()}
        return Rows(jnp.asarray(index), lengths, each)

    def _with(self, places: dict[str, int], **changed: Any) -> Self:
        """A bank with these adapters, which shares what is not changed."""
        bank = object.__new__(type(self))
        # Without `__init__`, which makes all arrays anew.
        vars(bank).update(vars(self), _places=places, **changed)
        return bank

    def _free_place(self, name: Any, replace: bool) -> int:
        """The place for an adapter of a name."""
        if not isinstance(name, str) or not name:
            raise UserError(f"Bank.put: name={shown(name)}, expected a text such as 'reviews'")
        if name in self._places:
            if not replace:
                raise UserError(
                    f"Bank.put: the name {name!r} is taken; give another one, or replace=True"
                )
            return self._places[name]
        taken = set(self._places.values())
        free = [i for i in range(1, self.capacity + 1) if i not in taken]
        if not free:
            raise UserError(
                f"Bank.put: all {self.capacity} places are taken; drop an adapter, or make a bank "
                "of a larger capacity"
            )
        return free[0]

    def _place(self, name: Any) -> int:
        """The place of an adapter."""
        if name in self._places:
            return self._places[name]
        near = difflib.get_close_matches(str(name), self._places, 1)
        hint = f"expected one of {', '.join(map(repr, self._places))}, or None"
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif not self._places:
            hint = "it is empty; `put` returns a new bank: bank = bank.put(name, adapter)"
        raise UserError(f"Bank: no adapter is named {shown(name)}; {hint}")


def _with_adapter(stacked: dict[str, Any], leaves: dict[str, Any], place: Any) -> dict[str, Any]:
    """Stacked leaves with one adapter's in a place."""
    return {path: x.at[place].set(leaves[path]) for path, x in stacked.items()}


# The place is a traced number, so one program writes all of them.
_written = jax.jit(_with_adapter)
_written_in_place = jax.jit(_with_adapter, donate_argnums=0)
