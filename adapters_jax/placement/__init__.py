"""Where the adapters of a recipe are in a model, and how many parameters they have.

- `placed`: `Placement`, one method on one module or weight, as models and files keep it; and how it
  is read off a tree that says no more.
- `visits`: what a run shows of a module, and what each method adapts there.
- `finding`: the placements of a recipe in a model that ran, and checks of its patterns.
- `counting`: the adapters of a tree, each against the closed form of its method.
"""

from adapters_jax.placement.counting import Counted, counted, left_over, without_adapter
from adapters_jax.placement.finding import (
    checked,
    chosen,
    named_node,
    on_outputs,
    taken,
)
from adapters_jax.placement.placed import (
    Known,
    Placement,
    Placements,
    Shape,
    Shapes,
    in_tree,
    own_leaves,
)
from adapters_jax.placement.visits import Visit

__all__ = [
    "Counted",
    "Known",
    "Placement",
    "Placements",
    "Shape",
    "Shapes",
    "Visit",
    "checked",
    "chosen",
    "counted",
    "in_tree",
    "left_over",
    "named_node",
    "on_outputs",
    "own_leaves",
    "taken",
    "without_adapter",
]
