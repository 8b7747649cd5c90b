"""The checks of the contract, one function each; every one raises ContractError."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh

from adapters_jax.distributed.sharding import layout
from adapters_jax.errors import AdapterWarning, RecipeError
from adapters_jax.files.adapter import save_adapter
from adapters_jax.methods import Method
from adapters_jax.placement import in_tree
from adapters_jax.recipe import Recipe
from adapters_jax.testing.subjects import ContractError, bits, expect, ids, shaken
from adapters_jax.training.step import make_train_step
from adapters_jax.transforms.stacking import Stack, stack_layers, unstack_layers
from adapters_jax.trees import flatten, split_adapters, unflatten
from adapters_jax.weights.factors import RANK

STACK = Stack("layer_{}", "layers")


def close(got: Any, expected: Any, atol: float, what: str) -> None:
    """Raises ContractError unless two arrays are close and have one dtype."""
    expect(got.dtype == expected.dtype, f"{what} is {got.dtype}, expected {expected.dtype}")
    away = float(np.abs(np.asarray(got, np.float32) - np.asarray(expected, np.float32)).max())
    expect(away <= atol, f"{what} differs by {away:.3g}, expected at most {atol:.3g}")


def starts_as_the_base(subject: Any, away: float = 0.0) -> None:
    """The output before training is the base's: exactly, or within `away`."""
    atol = max(away, 0.1 if subject.half else 0.0) if away else 0.0
    adapted = subject.output(subject.adapters, subject.frozen)
    close(adapted, subject.base_logits(), atol, "the output at the start")
    subject.trained()  # raises where no leaves change the output


def counts(subject: Any, case: Any = None) -> None:
    """The audit's closed forms equal the numbers of parameters that the arrays hold."""
    audit = subject.audit()  # raises where a closed form differs from its arrays
    held = sum(x.size for x in jax.tree.leaves(subject.training))
    added = sum(x.size for x in jax.tree.leaves(subject.adapters))
    frozen = added - held + sum(x.size for x in jax.tree.leaves(subject.frozen))
    found = (audit.trainable_parameters, audit.frozen_parameters)
    expect(found == (held, frozen), f"the audit counts {found}, expected {held}, {frozen}")
    expect(not audit.unmatched, f"patterns match nothing: {audit.unmatched}")
    if case is not None and case.per_layer is not None:
        added = case.adapter_parameters(subject.layers)
        unfrozen = subject.layers * case.unfrozen
        found = (audit.adapter_parameters, audit.trainable_parameters)
        expected = (added, added + unfrozen)
        expect(found == expected, f"the audit counts {found}, expected {expected} by hand")


def counts_shapes(subject: Any) -> None:
    """The audit of shapes alone equals that of arrays."""
    expect(subject.abstract_audit() == subject.audit(), "the audit of shapes alone differs")


def goes_through_files(subject: Any) -> None:
    """Saving and loading changes no bit; the recipe's JSON restores the recipe."""
    again = Recipe.from_json(subject.recipe.to_json())
    expect(
        again == subject.recipe, f"the recipe's JSON restores {again}, expected {subject.recipe}"
    )
    adapters = shaken(subject.adapters)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "adapter", adapters, subject.recipe)
        loaded = subject.loaded(Path(folder) / "adapter")
    expect(bits(loaded) == bits(adapters), "saved and loaded leaves differ")


def merges(subject: Any) -> None:
    """The merged base computes the adapted output; else an error names the method and why."""
    adapters = subject.trained()
    unable = [m for m in subject.recipe.attached if type(m).merged is Method.merged]
    if not unable:
        trained = subject.output(adapters, subject.frozen)
        atol = subject.tolerance(0.25 if subject.half else 1e-3)
        close(subject.merged_logits(adapters), trained, atol, "the merged output")
        return
    try:
        subject.merged_logits(adapters)
    except RecipeError as error:
        named = any(type(m).__name__ in str(error) and m.unmergeable in str(error) for m in unable)
        expect(named, f"the error lacks the method's name or its `unmergeable`: {error}")
    else:
        raise ContractError("a method without `merged` is merged without an error")


def trains_its_leaves_alone(subject: Any) -> None:
    """Steps change every adapter leaf and no bit of the base, and compile one program."""

    def loss(whole: Any, batch: Any, key: Any) -> Any:
        logits = subject.logits_of(whole, batch).astype(jnp.float32)
        return jnp.square(logits - 1.0).mean()

    # Where the method's output is small, so is what steps of the usual size change in it.
    state = subject.state(optax.adam(subject.noise / 30))
    step: Any = make_train_step(loss)
    base, before = bits(state.base), bits(state.adapters)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)]
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # of a zero gradient, which is found below
        for _ in range(4):
            state, metrics = step(state, ids())
            losses.append(float(metrics["loss"]))
    expect(losses[-1] < losses[0], f"the loss does not fall: {losses}")
    expect(float(metrics["finite"]) == 1.0, "gradients are not finite")
    expect(bits(state.base) == base, "steps change the base's numbers")
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)]
    expect(after == buffers, "steps copy the base's arrays")
    pairs = zip(flatten(state.adapters), bits(state.adapters), before, strict=True)
    unchanged = [path for path, new, old in pairs if new == old]
    expect(not unchanged, f"steps do not change {', '.join(unchanged)}")
    compiled = step.jitted._cache_size()
    expect(compiled == 1, f"four steps compile {compiled} programs, expected 1")
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    held = sum(x.size for x in jax.tree.leaves(state.adapters))
    expect(moments == 2 * held, f"Adam's state has {moments} numbers, expected {2 * held}")


def runs_under_vmap(subject: Any) -> None:
    """Stacked adapters under vmap over one base compute what each one computes."""
    several = [subject.trained(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *several)
    outputs = jax.jit(jax.vmap(subject.run, in_axes=(0, None)))(stacked, subject.frozen)
    for one, output in zip(several, outputs, strict=True):
        alone, atol = subject.output(one, subject.frozen), subject.tolerance(1e-4)
        close(output, alone, atol, "the output under vmap")


def fills_a_bank(subject: Any) -> None:
    """Rows of a bank compute what their adapters compute alone; rows without one, the base."""
    try:
        bank = subject.bank(2)
    except RecipeError as error:
        unable = [
            m
            for m in subject.recipe.attached
            if type(m).neutral is Method.neutral or m.from_weight == "changes"
        ]
        expect(any(type(m).__name__ in str(error) for m in unable), f"no bank: {error}")
        return
    several = [subject.trained(seed) for seed in range(2)]
    for name, adapters in zip("ab", several, strict=True):
        bank = bank.put(name, (subject.recipe, adapters))
    alone = [*(subject.output(x, subject.frozen) for x in several), subject.base_logits()]
    mixed = subject.in_bank(bank, ["b", None, "a", "a"])
    for i, which in enumerate([1, 2, 0, 0]):
        atol = subject.tolerance(1e-3)
        close(mixed[i], alone[which][i], atol, f"row {i} of a bank's batch")


def computes_the_same(linen: Any, other: Any) -> None:
    """Both APIs have the same leaves and compute the same output."""
    adapters = other.trained()
    params = unflatten(flatten(adapters) | flatten(other.frozen))
    shapes = {path: x.shape for path, x in flatten(linen.whole(linen.adapters)).items()}
    theirs = {path: x.shape for path, x in flatten(params).items()}
    expect(theirs == shapes, f"NNX has the leaves {theirs}, expected linen's {shapes}")
    mine, frozen = split_adapters(params, linen.recipe)
    theirs = other.output(adapters, other.frozen)
    close(linen.output(mine, frozen), theirs, other.tolerance(1e-4), "linen's output")
    expect(set(flatten(mine)) == set(flatten(adapters)), "the recipe has other leaves in NNX")


def stacks(unrolled: Any, scanned: Any) -> None:
    """Stacking makes an adapter of scanned layers, and unstacking restores every bit."""
    adapters = unrolled.trained()
    recipe, stacked = stack_layers((unrolled.recipe, adapters), STACK)
    expect(
        jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scanned.adapters),
        "stacked leaves have other shapes than a scanned model's",
    )
    strays = [path for path in flatten(stacked) if not recipe.keeps(path)]
    expect(not strays, f"the stacked recipe does not have {', '.join(strays)}")
    again, back = unstack_layers((recipe, stacked), STACK)
    expect(bits(back) == bits(adapters), "stacked and unstacked leaves differ")
    expect(all(again.keeps(path) for path in flatten(back)), "the unstacked recipe lacks targets")
    frozen = stack_layers(unrolled.frozen, STACK)
    expected = unrolled.output(adapters, unrolled.frozen)
    close(scanned.output(stacked, frozen), expected, unrolled.tolerance(1e-4), "the stacked output")


def shards(linen: Any) -> None:
    """Every leaf has a layout; leaves with axes of the weight are split like the weight."""
    mesh: Any = AbstractMesh((1, 2), ("data", "model"))
    params = linen.whole(linen.adapters)
    where = layout(params, mesh, None, linen.recipe, small=1)
    leaves = flatten(nn.meta.unbox(params))
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    placements = in_tree(linen.recipe, shapes)
    for each, name, path in ((x, *item) for x in placements for item in x.paths().items()):
        axes = each.method.weight_axes(each.axes, each.path).get(name) if each.axes else None
        spec = [*where[path].spec, *[None] * leaves[path].ndim][: leaves[path].ndim]
        if axes is None:
            expect(
                not any(spec),
                f"{path} is split as {spec}, expected a leaf without axes of the weight whole",
            )
            continue
        weight = each.weight_path
        whole = [*where[weight].spec, *[None] * leaves[weight].ndim][: leaves[weight].ndim]
        for i, axis in enumerate(axes):
            # slices of a fused projection have fewer outputs than the weight
            if axis != RANK and leaves[path].shape[i] == leaves[weight].shape[axis]:
                alike = spec[i] == whole[axis]
                expect(alike, f"{path} is split as {spec}, expected {whole} like {weight}")
