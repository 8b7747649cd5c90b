"""Many adapters of one base, so that each row of a batch can have another one.

The adapters are on the host. Those that batches named last are on the device as well, stacked; one
that is not there yet is written in place over the one that was named least recently. A batch then
gets copies of its rows' adapters, and its program is that of a bank of any size.
"""

import difflib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from adapters_jax.errors import UserError, check_size, shown
from adapters_jax.linen import Adapted
from adapters_jax.methods.mixed import Rows
from adapters_jax.nnx import ADAPTERS, copy, modules_of, recipe_of
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.nnx.graph import BY_ROWS, holds
from adapters_jax.placement import Known
from adapters_jax.texts import bytes_text, html_table
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.fitting import Fitted, fitted, is_prompt, neutral, owners_of
from adapters_jax.trees import (
    Adapter,
    Tree,
    adapter_leaves,
    check_params,
    flatten,
    merge_trees,
    split_adapters,
    with_leaves,
)
from adapters_jax.weights.meshes import mesh_of
from adapters_jax.weights.quantized import unboxed

_BASE = 0  # the place of the adapter that changes nothing


class _Places:
    """The places on the device for a bank's adapters; all banks that come from it share them.

    Args:
        idle: the leaves that change nothing, by path.
        capacity: the number of places.
    """

    def __init__(self, idle: dict[str, Array], capacity: int) -> None:
        _check_memory(idle, capacity)
        self._idle, self.capacity = idle, capacity
        self._stacked = _written(_copies(idle, capacity + 1), idle, _BASE)
        self._free = list(range(capacity, _BASE, -1))
        self._taken: dict[Fitted, int] = {}  # in the order that they were named in
        self._lock = threading.Lock()

    def copies(self, adapters: Sequence[Fitted | None]) -> dict[str, Array]:
        """The leaves of some adapters by path, stacked in their order; None is the base."""
        named = dict.fromkeys(each for each in adapters if each is not None)
        if len(named) > self.capacity:
            raise UserError(
                f"Bank.rows: the batch names {len(named)} adapters, and the device has places for "
                f"{self.capacity}; make a bank of a larger capacity, or split the batch"
            )
        # The stack is donated, so that two threads may not write; and the function that asks may
        # be traced, where the next one finds no values.
        with self._lock, jax.ensure_compile_time_eval():
            self._taken |= {each: self._taken.pop(each) for each in named if each in self._taken}
            for each in [each for each in named if each not in self._taken]:
                if not self._free:
                    self._free.append(self._taken.pop(next(iter(self._taken))))
                leaves = {**self._idle, **each.leaves}
                self._stacked = _written(self._stacked, leaves, self._free[-1])
                self._taken[each] = self._free.pop()
            index = [_BASE if each is None else self._taken[each] for each in adapters]
            return _taken(self._stacked, self._idle, np.array(index, np.int32))


class Bank:
    """Adapters of one base, each row of a batch with its own, in one program.

    The bank's model is adapted with a recipe that holds the largest of everything: ranks, widths,
    prompts, targets. An adapter that goes in has methods of that recipe, or some of them; smaller
    ranks, widths and prompts are padded so that it computes what it does alone, and its scale goes
    into its factors. Rows without an adapter are the base's. All arrays are made at once: adding,
    changing and dropping adapters compiles nothing.

    A head that trains may have fewer outputs than the bank's: its further logits are then -1e9.

    A bank does not change; `put` and `drop` return another one, and both can be used. An adapter
    waits on the host until `rows` names it, then takes the place on the device of the one that was
    named least recently. So a bank has any number of adapters, and none of `put`, `drop` and the
    programs that run depends on how many.

    Args:
        model: an adapted model, linen or NNX, with a recipe that holds the largest of everything.
        params: linen only: its parameter tree, as `init_adapters` gives it. What its recipe
            unfreezes is the base's.
        capacity: the number of adapters that are on the device, the most that a batch can name.

    Attributes:
        recipe: the model's recipe.
        capacity: the number of adapters that are on the device, the most that a batch can name.

    Raises:
        TypeError: the model has no adapters, or params are missing or given to an NNX model.
        UserError: `capacity` is not a positive whole number, or more than the memory has room for.
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
        check_size("Bank", "capacity", capacity)
        self.capacity = capacity
        self._adapters: dict[str, Fitted] = {}
        self._model: Any
        if isinstance(model, Adapted):
            check_params("Bank", params, "aj.Bank(model, params)")
            self.recipe = model.recipe
            self._trained, self._rest = split_adapters(params, model.recipe)
            self._model = model.clone(adapters_by_rows=True)
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
                    setattr(module, BY_ROWS, path)
            parts: Any = nnx.split(marked, ADAPTERS, ...)
            self._model, self._trained, self._rest = parts
            whole = flatten(nnx.state(model, nnx.Param))
            known = Known(placements_of(model))
        else:
            raise TypeError(
                f"Bank: {type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
            )
        whole = {path: unboxed(leaf) for path, leaf in whole.items()}
        self._idle = neutral(self.recipe, whole, known)
        if mesh := mesh_of(whole):  # the adapters are whole on every device
            self._idle = jax.device_put(self._idle, NamedSharding(mesh, P()))
        self._places = _Places(self._idle, capacity)
        self._prompts = [
            each.path for each in owners_of(self.recipe, list(self._idle)) if is_prompt(each)
        ]

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._adapters)) or "no adapters"
        return f"Bank({names}; {self.capacity} at a time on the device)"

    def _repr_html_(self) -> str:
        rows = [[name] for name in self._adapters]
        holds = f"{self.capacity} at a time are on the device; each has room for:"
        return html_table(["adapter"], rows, notes=[holds]) + self.recipe._repr_html_()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of their arrival."""
        return tuple(self._adapters)

    @property
    def params(self) -> Tree:
        """linen: the parameter tree for `bank.model.apply`; the same for any adapters."""
        if not isinstance(self._model, Adapted):
            raise TypeError("this bank is of an NNX model; use bank.model")
        return merge_trees(with_leaves(nn.meta.unbox(self._trained), self._idle), self._rest)

    @property
    def model(self) -> Any:
        """The model, to call with `adapters=bank.rows([...])`; the same for any adapters.

        Called without them, it raises UserError.
        """
        if isinstance(self._model, Adapted):
            return self._model
        # A new model each time, as NNX models are mutable and a bank is not.
        return nnx.merge(*self.split)

    @property
    def split(self) -> tuple[Any, Any, Any]:
        """NNX: what `nnx.split(bank.model, aj.nnx.ADAPTERS, ...)` gives; no model is made."""
        if isinstance(self._model, Adapted):
            raise TypeError("this bank is of a linen model; use bank.params")
        return self._model, with_leaves(self._trained, self._idle), self._rest

    def put(
        self,
        name: str,
        adapter: Adapter | TrainState | Fitted,
        *,
        replace: bool = False,
    ) -> Self:
        """The bank with one more adapter.

        Args:
            name: what `rows` calls it.
            adapter: its recipe and its trained tree, as `read_adapter` returns them, or a state; or
                what `fit` made of it.
            replace: whether an adapter of that name may be replaced.

        Raises:
            UserError: the name is taken, or it is not a text.
            RecipeError: the bank's recipe lacks a method of the adapter, or the method differs in
                more than sizes and scales.
            MismatchError: arrays do not fit, or are larger than there is room for.
            TypeError: `adapter` is not a pair of a recipe and a tree.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"Bank.put: name={shown(name)}, expected a text such as 'reviews'")
        if name in self._adapters and not replace:
            raise UserError(
                f"Bank.put: the name {name!r} is taken; give another one, or replace=True"
            )
        made = adapter if isinstance(adapter, Fitted) else self.fit(name, adapter)
        return self._with({**self._adapters, name: made})

    def fit(self, name: str, adapter: Adapter | TrainState) -> Fitted:
        """An adapter in the bank's shapes, for `put`; it holds for every bank made from this one.

        Args:
            name: what error messages call it.
            adapter: as for `put`.

        Raises:
            RecipeError, MismatchError, TypeError: as for `put`.
        """
        if isinstance(adapter, TrainState):
            adapter = adapter.recipe, adapter.kept
        recipe, flat = adapter_leaves(adapter, "Bank.put")
        return fitted(f"Bank.put({name!r})", recipe, flat, self.recipe, self._idle)

    def drop(self, name: str) -> Self:
        """The bank without an adapter.

        Raises:
            UserError: it has none of that name.
        """
        self._adapter(name)
        return self._with({other: x for other, x in self._adapters.items() if other != name})

    def rows(self, names: Sequence[str | Fitted | None], *, each: int = 1) -> Rows:
        """The adapter of each row of a batch, for `adapters=`; those not there go to the device.

        Args:
            names: the adapters' names, None for the base. What `fit` made of an adapter stands for
                itself, and need not be in the bank.
            each: how many consecutive rows each of them is for.

        Returns:
            Copies of the rows' adapters, which hold whatever comes to the bank later; other names
            compile nothing.

        Raises:
            UserError: the bank has no adapter of one of the names, there are no names, or more
                different ones than the device has places for.
        """
        check_size("Bank.rows", "each", each)
        if isinstance(names, str) or not len(names):
            raise UserError(
                f"Bank.rows: names={shown(names)}, expected a list with a name or None for each row"
            )
        adapters = [x if x is None or isinstance(x, Fitted) else self._adapter(x) for x in names]
        lengths = {
            path: [x.lengths.get(path, 0) if x else 0 for x in adapters] for path in self._prompts
        }
        # numpy first: each jnp operation on a new length would be compiled.
        counts = {path: jnp.asarray(np.array(x, np.int32)) for path, x in lengths.items()}
        return Rows(self._places.copies(adapters), counts, each)

    def _with(self, adapters: dict[str, Fitted]) -> Self:
        """A bank with these adapters, which shares all else."""
        bank = object.__new__(type(self))
        # Without `__init__`, which makes all arrays anew.
        vars(bank).update(vars(self), _adapters=adapters)
        return bank

    def _adapter(self, name: Any) -> Fitted:
        """The adapter of a name."""
        if name in self._adapters:
            return self._adapters[name]
        near = difflib.get_close_matches(str(name), self._adapters, 1)
        hint = f"expected one of {', '.join(map(repr, self._adapters))}, or None"
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif not self._adapters:
            hint = "it is empty; `put` returns a new bank: bank = bank.put(name, adapter)"
        raise UserError(f"Bank: no adapter is named {shown(name)}; {hint}")


def _check_memory(idle: Mapping[str, Array], capacity: int) -> None:
    """Raises UserError if a device has no room for that many adapters and the base's."""
    device: Any = next(iter(next(iter(idle.values())).sharding.addressable_devices))
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in idle.values()]
    each = sum(math.prod(shape) * size for shape, size in shapes)
    stats = device.memory_stats() or {}
    room = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if room and (capacity + 1) * each > room:
        fit = max(0, room // each - 1)
        raise UserError(
            f"Bank: capacity={capacity} takes {bytes_text((capacity + 1) * each)}, and "
            f"{device.device_kind} has {bytes_text(room)}: {fit} adapters of this recipe fit at a "
            "time; any number more can be in the bank, and wait on the host"
        )


def _bits(x: Any, dtype: Any = None) -> Any:
    """Short floats as integers of their bits; with a dtype, the numbers of these bits."""
    # XLA computes in float32 where a CPU has no shorter floats, and would convert the whole stack
    # for the sake of a row. Integers are moved as they are.
    if dtype is None and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
        dtype = f"uint{8 * x.dtype.itemsize}"
    return x if dtype is None else jax.lax.bitcast_convert_type(x, dtype)


@partial(jax.jit, static_argnums=1)
def _copies(leaves: dict[str, Array], n: int) -> dict[str, Array]:
    """Leaves n times, on a first axis."""
    return {path: jnp.broadcast_to(_bits(x), (n, *x.shape)) for path, x in leaves.items()}


# In place, and the place is a traced number: one program writes all of them.
@partial(jax.jit, donate_argnums=0)
def _written(stacked: dict[str, Array], leaves: dict[str, Any], place: Any) -> dict[str, Array]:
    """A stack with one adapter's leaves in a place."""
    put = jax.lax.dynamic_update_index_in_dim
    return {path: put(x, _bits(leaves[path]), place, 0) for path, x in stacked.items()}


@jax.jit
def _taken(stacked: dict[str, Array], idle: dict[str, Array], index: Any) -> dict[str, Array]:
    """The leaves of some places of a stack in their order, in the dtypes of those that are idle."""
    # All places are there; for a check of the bounds, TPUs write and read the copies once more.
    take = lambda x: x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)  # noqa: E731
    return {path: _bits(take(x), idle[path].dtype) for path, x in stacked.items()}
