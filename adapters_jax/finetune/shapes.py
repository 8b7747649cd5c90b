"""Models by their names, without weights: as shapes, and what their families support."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import jax
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.auditing import Audit, audit
from adapters_jax.errors import TargetError, UserError
from adapters_jax.files.adapterhub.architectures import MODEL_TYPES
from adapters_jax.finetune.gguf import architectures as gguf
from adapters_jax.finetune.models.family import Family, quantized_targets
from adapters_jax.finetune.models.known import find_known, near_known
from adapters_jax.finetune.models.registry import FAMILIES
from adapters_jax.finetune.options.method import PRESETS, MethodOptions
from adapters_jax.finetune.pretrained.assets import ASSETS
from adapters_jax.finetune.pretrained.locate import shape_of
from adapters_jax.linen import init_adapters
from adapters_jax.placement.patterns import require_points
from adapters_jax.presets import HEAD
from adapters_jax.transforms.quantize import quantize as quantized
from adapters_jax.trees import flatten


def count_parameters(name: str, method: MethodOptions) -> Audit:
    """Audits a model by its name, without its weights.

    Args:
        name: a published name (see `find_known`), a pinned asset, a directory with `config.json`,
            a GGUF file, or an id on the Hub.
        method: the recipe; an encoder is audited without a head.

    Raises:
        UserError: the model or the recipe cannot be used.

    Example:
        >>> count_parameters("roberta-base", MethodOptions("lora", rank=8)).adapter_parameters
        294912
    """
    adapted, params = adapted_shape(name, method)
    return audit(adapted, params)


def adapted_shape(
    name: str,
    method: MethodOptions,
    quantize: str | None = None,
    layers: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Makes an adapted model without arrays, and in linen the shapes of its parameters.

    Args:
        name: as for `count_parameters`.
        quantize: the quantised dtype of the frozen weights; None does not quantise.
        layers: the number of layers, instead of the model's own.
        **options: options of the model's class, such as `param_dtype`.

    Returns:
        The adapted model, and its parameters as shapes; None instead of them for an NNX model.
    """
    family, config = find_shape(name)
    config = config if layers is None else config.with_layers(layers)
    model, inputs = family.shape(config, **options)
    recipe = method.build(layers=family.layers(config))
    if isinstance(model, nnx.Module):
        model = quantized(model, *inputs, dtype=quantize) if quantize else model
        return adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=inputs), None
    adapted = adapt(model, recipe)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    if quantize:
        targets = quantized_targets(family.kind, quantize)
        params = quantized(model, params, *inputs, dtype=quantize, targets=targets)
    return adapted, init_adapters(adapted, params, jax.random.key(0), *inputs)


def find_shape(name: str) -> tuple[Family, Any]:
    """Finds the family and the configuration of a published shape or of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or no family reads it; or the name is nearly that of a
            published shape, and then the Hub is not asked for it.
    """
    local = name in ASSETS or os.path.exists(name)
    if not local and (known := find_known(name)):
        return known
    if not local and (near := near_known(name)):
        raise UserError(
            f"{name!r} is no known shape; did you mean {' or '.join(near)}? For a model of this "
            f"name on the Hub, write {name}@main"
        )
    return shape_of(name)


def on_shape(name: str, method: MethodOptions) -> MethodOptions:
    """A command's method with the defaults of a shape's kind; see `MethodOptions.on`."""
    kind = find_shape(name)[0].kind
    return method.on("decoder" if kind == "encoder-decoder" else kind)


@dataclass(frozen=True)
class Entry:
    """A family, and the parameters of those of its published shapes that are asked for."""

    family: Family
    known: dict[str, int]

    @property
    def commands(self) -> list[str]:
        """The commands that need more than the shapes and the adapters of a model.

        Example:
            >>> Entry(FAMILIES["bert"], {}).commands, Entry(FAMILIES["llama"], {}).commands
            (['finetune', 'predict', 'merge'], ['finetune', 'generate', 'merge'])
        """
        family, found = self.family, []
        if family.classifier is not None:
            found += ["finetune", "predict", "merge"]
        if family.generates:
            found += ["finetune", "generate", *(["merge"] if family.save else [])]
        return found

    @property
    def files(self) -> list[str]:
        """The files of models and adapters, read and written unless it says otherwise.

        Example:
            >>> Entry(FAMILIES["vit"], {}).files
            ['safetensors', 'PEFT', 'AdapterHub']
        """
        types = self.family.prefixes.keys()
        written = self.family.save or self.family.classifier
        found = ["safetensors" if written else "safetensors (read)", "PEFT"]
        found += ["AdapterHub"] if types & MODEL_TYPES else []
        return found + (["GGUF (LoRA; models read)"] if types & gguf.MODEL_TYPES else [])

    @property
    def methods(self) -> list[str]:
        """The values of `--method` whose own targets the family has; `--targets` names others.

        The shapes of one model are traced for it.
        """
        if not self.family.known:
            return []
        paths = _paths(self.family, next(iter(self.family.known.values())))
        return [name for name in PRESETS if _fits(name, self.family, paths)]

    @property
    def sizes(self) -> str:
        """The numbers of parameters of the smallest and of the largest shape.

        Example:
            >>> Entry(FAMILIES["bert"], {"small": 11_200_000, "large": 3_400_000_000}).sizes
            '11.2 M to 3.4 B'
        """
        ends = [short(pick(self.known.values())) for pick in (min, max)] if self.known else []
        return " to ".join(dict.fromkeys(ends))

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values, without its methods."""
        return {
            "family": self.family.name,
            "kind": self.family.kind,
            "model_types": list(self.family.prefixes),
            "commands": self.commands,
            "files": self.files,
            "scan": self.family.scans,
            "parameters": self.known,
        }


def short(number: int) -> str:
    """A number of parameters in millions or billions.

    Example:
        >>> short(124_439_808), short(6_738_415_616)
        ('124 M', '6.74 B')
    """
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.3g} {name}"


_LAYERS = 2  # as many as any method needs by default


def _paths(family: Family, config: Any) -> list[str]:
    """The paths of the parameters and modules of a model of few layers, and of a head."""
    found, stack = {f"{HEAD}/kernel"} if family.classifier else set(), family.names.stack
    for path in flatten(family.shapes(config, scan=family.scans)):
        layers = [stack.layer(path, i) for i in range(_LAYERS)] if stack else []
        found |= {each for each in layers if each} or {path}
    parts = [path.split("/") for path in found]
    return sorted({"/".join(each[:i]) for each in parts for i in range(1, len(each) + 1)})


def _fits(method: Any, family: Family, paths: list[str]) -> bool:
    """Whether every target of a method is among the paths."""
    recipe = MethodOptions(method).build(layers={family.layer: _LAYERS})
    # The gated delta rule has no softmax, and latent attention no keys that a prompt could join.
    others = {p.rpartition("/")[0] for p in paths if p.endswith(("/log_rate", "/latent"))}
    # A layer with a separate input returns those of later layers, too: only a recipe says that
    # LoReFT means `output="hidden"`.
    if method == "loreft" and any(path.endswith("/per_layer") for path in paths):
        return False
    if method == "prompt-tuning" and family.kind == "vision":
        return False  # its embeddings are of patches, which have no placeholders
    softmax = [path for path in paths if path not in others]
    try:
        for each in recipe.methods:
            require_points(each, softmax if each.acts_on == "attention" else paths, {})
    except TargetError:
        return False
    return True


def catalog(text: str = "") -> list[Entry]:
    """The families whose name, or one of whose published names, has a text in it.

    Args:
        text: a part of a name, in upper or lower case; or a name by which a command finds a
            published shape.

    Raises:
        UserError: no name has it.

    Example:
        >>> [(entry.family.name, entry.known) for entry in catalog("qwen2.5-0.5b")]
        [('qwen2', {'Qwen/Qwen2.5-0.5B': 494032768})]
    """
    found = list(_entries(text.lower()))
    if not found and (known := find_known(text)):
        family, config = known
        found = [Entry(family, {text: family.parameters(config)})]
    if not found:
        near = near_known(text) or get_close_matches(text.lower(), FAMILIES, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "without it, all are listed"
        raise UserError(f"{text!r} is in no name of a family or of a published shape; {hint}")
    return found


def _entries(text: str) -> Iterator[Entry]:
    for family in FAMILIES.values():
        whole = any(text in name for name in (family.name, *family.prefixes))
        known = {
            name: family.parameters(config)
            for name, config in family.known.items()
            if whole or text in name.lower()
        }
        if whole or known:
            yield Entry(family, known)
