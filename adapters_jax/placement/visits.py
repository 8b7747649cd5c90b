"""What a run of a model shows of one module, and what each method adapts there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import linen, nnx

from adapters_jax.methods.base import AttachmentPoint, Method
from adapters_jax.trace.calls import Returned
from adapters_jax.trace.registry import Attention


@dataclass(frozen=True)
class Visit:
    """One module, as a run showed it.

    Attributes:
        own: the shapes of the module's leaves by name, as its code sees them.
        precision: its matmul precision.
        attention: the sizes of its attention; None where it has none for a prompt.
        no_attention: why it has none, as the end of a sentence; empty where that is not known.
        returned: what its `__call__` returned, as shapes; None where it did not run.
    """

    path: str
    own: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    precision: Any = None
    attention: Attention | None = None
    no_attention: str = ""
    returned: Returned | None = None

    def at(self, method: Method, **fields: Any) -> AttachmentPoint:
        """The attachment point of a method, with further fields."""
        fields = {"own": self.own, "precision": self.precision, **fields}
        return AttachmentPoint(method.acts_on, self.path, **fields)

    def point(self, method: Method) -> AttachmentPoint | None:
        """What a method on outputs or in attention adapts there; None where it does not fit."""
        point = None
        if method.acts_on == "attention" and self.attention:
            point = self.at(method, attention=self.attention)
        elif method.acts_on == "output" and self.returned:
            where = self.returned.chosen(method.output)
            width = 0 if where is None else self.returned.parts[where].shape[-1]
            point = self.at(method, width=width) if width else None
        return point if point and method.fits(point) else None


def why_not(method: Method, module: Any, visit: Visit | None) -> str:
    """Why a method cannot attach to a module.

    Args:
        visit: what a run showed of it; None where its `__call__` did not run.
    """
    if method.acts_on == "attention" and visit is not None and visit.no_attention:
        return f"{type(module).__name__} {visit.no_attention}"
    if method.acts_on != "output":
        return method.why_not(module)
    name, owner = type(module).__name__, type(method).__name__
    if visit is None or visit.returned is None:
        own = _functions(module)
        others = f"; {name} has the functions {', '.join(own)}" if own else ""
        if not callable(module):
            return f"{name} has no `__call__`, on whose output {owner} acts{others}"
        return (
            f"{name} did not run its `__call__`, on whose output {owner} acts; pass inputs that "
            f"run it, in NNX as example_inputs=(...){others}"
        )
    if visit.returned.chosen(method.output) is None:
        return f"{name} {visit.returned.why_not(method.output)}"
    return method.why_not(module)


def _functions(module: Any) -> list[str]:
    """The names of the public functions of a module's own class; none of flax's own layers."""
    if type(module).__module__.startswith("flax."):
        return []
    known = {*dir(linen.Module), *dir(nnx.Module), "setup"}
    own = [name for name in dir(type(module)) if not name.startswith("_") and name not in known]
    return [name for name in own if callable(getattr(type(module), name))]
