"""`Through`: a trace on top of the one that is current, which sees each operation that runs.

`jax.core.Trace` is what `jax.grad` and `jax.vmap` are made of. It is no public interface: the names
and arguments of its `process_...` methods are those of jax 0.10. A live trace is needed because the
code that runs is a module's: it creates parameters, writes Variables and asks for concrete numbers,
and a jaxpr that is traced first and evaluated later does none of this. What only asks walks a
`Graph`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.core
import jax.extend.core as jex

T = TypeVar("T")


@contextlib.contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Gives a variable a value for the time of the body."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class Through(jax.core.Trace):
    """A trace that lets the one below it compute."""

    def __init__(self, parent: Any):
        super().__init__()
        self.parent = parent
        # NNX refuses writes to a Variable from another trace than the one that made it. It asks
        # `jax.extend.core.get_opaque_trace_state`, which is this reference, and jax keys its caches
        # by it. For both, this trace is its parent, whose values the code works with.
        self._weakref = parent._weakref

    def __getattr__(self, name: str) -> Any:
        # jax calls further methods where a trace has them, such as `process_shard_map`.
        return getattr(self.parent, name)

    def stage_value(self, val: Any) -> Any:
        """A constant as a value."""
        # `jax.core.Trace` has this one, so `__getattr__` is not asked for it.
        return self.parent.stage_value(val)

    def inlined(self, params: Any, values: Sequence[Any]) -> list[Any]:
        """The body of a jitted function, in place of its call."""
        with jex.set_current_trace(self):
            return jex.jaxpr_as_fun(params["jaxpr"])(*values)

    def checkpointed(self, body: Callable[..., Any], params: Any) -> Callable[..., Any]:
        """A body as `jax.checkpoint` has it, by the parameters of the call that it replaces."""
        return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
