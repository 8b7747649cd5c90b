"""What a run can become, known before it trains: each format of adapters, and a merged checkpoint.

Each answer is that of the writer's own check, on the recipe and shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adapters_jax.errors import UserError, shortened
from adapters_jax.files.base_model import MASKED, BaseModel
from adapters_jax.files.formats import FORMATS, Adapter, AdapterFormat, has_head, stand_ins
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.pretrained.base_model import described, heads_of
from adapters_jax.finetune.pretrained.locate import find_family, read_config
from adapters_jax.finetune.report.card import Source
from adapters_jax.finetune.tasks.base import Problem
from adapters_jax.recipe import checked_before
from adapters_jax.transforms.merge import merge
from adapters_jax.transforms.quantize import dequantize
from adapters_jax.trees import flatten, unflatten
from adapters_jax.weights.quantized import unboxed

MERGED = "merged"


class Way(NamedTuple):
    """One thing that a run can become, or cannot.

    Attributes:
        name: the name of a format, or "merged".
        why_not: why the run cannot become it; empty if it can.
        lacks: what it leaves out then, and why; empty if nothing.
    """

    name: str
    why_not: str = ""
    lacks: str = ""

    def __str__(self) -> str:
        if self.why_not:
            return f"no: {self.why_not}"
        return f"yes, without {self.lacks}" if self.lacks else "yes"


def without_head(source: Source, form: AdapterFormat, head: bool | None) -> tuple[Source, str]:
    """An adapter as a format takes it: without its head, if that is asked for or not supported.

    Args:
        source: the adapter.
        form: the format.
        head: whether to write the head; None writes it where the format's library has such a head.

    Returns:
        The adapter, and why its head is left out; empty if it has none or keeps it.

    Raises:
        UserError: `head` is True, and the library has no such head.
    """
    if not has_head(source.leaves):
        return source, ""
    problem = form.head_problem(source.base)
    if problem and head:
        raise UserError(
            f"{form.owner} does not support the head: {problem}; leave --head out to write the "
            "adapter without it"
        )
    if head is False or problem:
        return source.without_head(), problem or "as asked"
    return source, ""


def ways_out(problem: Problem, config: Mapping[str, Any], identity: BaseIdentity) -> list[Way]:
    """What a run on this problem can become.

    Args:
        problem: the problem, before training.
        config: the run's configuration.
        identity: the identity of the base.
    """
    family = find_family(config["model"])
    base, leaves = _shapes(problem, family, config, identity)
    found = [_in_format(form, base, problem, leaves, config) for form in FORMATS.values()]
    return [*found, _merged(problem, family, config)]


def sentences(ways: Sequence[Way]) -> list[str]:
    """The ways in lines for people: what the run can become, then why it cannot become the rest.

    Example:
        >>> sentences([Way("native"), Way("peft", lacks="its head"), Way("merged", "no weight")])
        ['this run can become: native, peft (without its head)', 'not merged: no weight']
    """
    able = [w.name + (f" (without {w.lacks})" if w.lacks else "") for w in ways if not w.why_not]
    rest = [f"not {way.name}: {way.why_not}" for way in ways if way.why_not]
    return [f"this run can become: {', '.join(able)}", *rest]


def _shapes(
    problem: Problem, family: Family, config: Mapping[str, Any], identity: BaseIdentity
) -> tuple[BaseModel, dict[str, Any]]:
    """The base and the trained leaves of a problem, as stand-ins of their shapes."""
    whole = problem.params
    if whole is None:
        whole = nnx.to_pure_dict(nnx.state(problem.model, nnx.Param))
    shapes = {path: unboxed(leaf) for path, leaf in flatten(whole).items()}
    arrays, recipe = stand_ins(shapes), problem.recipe
    params = unflatten({p: x for p, x in arrays.items() if recipe.owner(p) is None})
    base = described(
        config["model"],
        family,
        read_config(config["model"])["model_type"],
        params,
        heads=heads_of(family, getattr(problem.model, "config", None)),
        identity=identity,
        sha256=config["base_sha256"],
        classifies=family.classifier is not None,
        pooling=config.get("pooling"),
    )
    return base, {path: x for path, x in arrays.items() if recipe.trains(path)}


def _in_format(
    form: AdapterFormat,
    base: BaseModel,
    problem: Problem,
    leaves: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Way:
    source = Source(form, base, problem.recipe, leaves, config)
    source, headless = without_head(source, form, None)
    adapter = Adapter(source.recipe, source.leaves, labels=source.labels)
    try:
        problems = form.problems(adapter, base)
    except UserError as error:
        problems = [str(error)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Way(form.name, f"{shortened(problems[0], 200)}{more}")
    return Way(form.name, lacks=f"its head: {headless}" if headless else "")


def _merged(problem: Problem, family: Family, config: Mapping[str, Any]) -> Way:
    """Whether the run's adapter can be folded into its base, by doing it without arrays."""
    lacks = "the bits of its base: --dequantize" if config.get("quantize") else ""
    try:
        check_writable(family)
        with checked_before():
            if problem.params is None:
                nnx.eval_shape(lambda: merge(dequantize(problem.model)))
                return Way(MERGED, lacks=lacks)
            found = family.config.from_dict(read_config(config["model"]))
            least = family.inputs(found, 1, 8)
            like = jnp.zeros(least.shape, least.dtype)
            jax.eval_shape(lambda p: merge(problem.model, dequantize(p), like), problem.params)
    except UserError as error:
        return Way(MERGED, shortened(str(error), 200))
    if config.get("pooling") not in ("pooler", MASKED) and family.kind != "vision":
        head = f"its head in transformers' format: it reads {config.get('pooling')}"
        lacks = f"{head}; {lacks}" if lacks else head
    return Way(MERGED, lacks=lacks)


def check_writable(family: Family) -> None:
    """Raises UserError if checkpoints of a family cannot be written."""
    if family.save is None and family.classifier is None:
        raise UserError(f"checkpoints of the family {family.name} cannot be written")
