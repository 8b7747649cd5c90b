"""`Through`: a trace on top of the one that is current, which sees each operation that runs.

`jax.core.Trace` is what `jax.grad` and `jax.vmap` are made of. jax documents it for transformations
of one's own, and changes it without notice: the names of the `process_...` methods and their
arguments are those of jax 0.7 to 0.12. A live trace is needed because the code in between is a
module's: it creates parameters, changes Variables and asks for concrete numbers, none of which a
jaxpr that is traced first and evaluated later would do. What only asks walks a `Graph` instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex


class Through(jax.core.Trace):
    """A trace that lets the one below it compute.

    Args:
        parent: the trace below.
    """

    def __init__(self, parent: Any):
        super().__init__()
        self.parent = parent
        # flax refuses parameters and Variables of another "trace level", which it compares by this
        # reference, and jax keys caches by it. For both this is the parent: the values are its own.
        self._weakref = parent._weakref

    def __getattr__(self, name: str) -> Any:
        # jax finds methods by name: `process_shard_map`, `cur_qdd`, what it adds next.
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
