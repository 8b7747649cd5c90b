"""Settings of layers whose attention slides, which several families have."""

from collections.abc import Callable
from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Values
from adapters_jax.finetune.models.parts.rotary import LayerKind


def alternating(values: Values, every: int, others: str = "sliding_attention") -> dict[str, Any]:
    """The layer types of the values, or else full attention in each `every`-th layer."""
    return {"layer_types": _types(values, lambda layer: (layer + 1) % every != 0, others)}


def switched(values: Values, slides: Callable[[int], bool]) -> dict[str, Any]:
    """The window and the layer types where `use_sliding_window` switches them on.

    Args:
        values: those of a `config.json`.
        slides: called with the number of a layer, unless the values have layer types.
    """
    if not values.get("use_sliding_window") or not values.get("sliding_window"):
        return {}
    types = _types(values, slides, "sliding_attention")
    return {"sliding_window": values["sliding_window"], "layer_types": types}


def _types(values: Values, differs: Callable[[int], bool], others: str) -> tuple[str, ...]:
    layers = range(values.get("num_hidden_layers", 0))
    own = (others if differs(layer) else "full_attention" for layer in layers)
    return tuple(values.get("layer_types") or own)


def as_switched(config: Any) -> dict[str, Any]:
    """The values of a `config.json` that `switched` reads."""
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": types_of(config),
    }


def types_of(config: Any) -> list[str]:
    """The type of each layer."""

    def of(kind: LayerKind) -> str:
        if kind.linear:
            return "linear_attention"
        if kind.chunk:
            return "chunked_attention"
        return "full_attention" if kind.window is None else "sliding_attention"

    return [of(kind) for kind in config.layer_kinds]
