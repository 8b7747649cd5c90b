"""What holds for every method, through both front doors, on every kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.contract import CASES, DOORS, SUBJECTS, VARIANTS, bits, ids, shaken

import adapters_jax as aj
from adapters_jax.trees import flatten, unflatten


@functools.cache
def build(door, case, variant="plain"):
    return DOORS[door](CASES[case], **VARIANTS[variant])


@pytest.fixture(params=map("-".join, SUBJECTS))
def subject(request):
    """A model of one door, with one method, in one form; and the case it is made from."""
    door, case, variant = request.param.split("-")
    made = build(door, case, variant)
    made.case, made.variant, made.half = CASES[case], variant, variant == "bf16"
    made.layers = VARIANTS[variant].get("layers", 1)
    return made


def as_float(x):
    return np.asarray(x, np.float32)


def test_init_count_file_and_merge(subject, tmp_path):
    """At init the output is the base's; counts are the formulas; files and merging lose nothing."""
    run = subject.call(subject.run)
    base, adapted = subject.base_logits(), run(subject.adapters, subject.frozen)
    assert adapted.dtype == base.dtype
    if subject.case.away:
        away = max(subject.case.away, 0.1 if subject.half else 0.0)
        np.testing.assert_allclose(as_float(adapted), as_float(base), atol=away)
    else:
        np.testing.assert_array_equal(adapted, base)

    audit = subject.audit()
    held = sum(x.size for x in jax.tree.leaves(subject.adapters))
    unfrozen = subject.layers * subject.case.unfrozen
    assert audit.adapter_parameters == subject.case.adapter_parameters(subject.layers)
    assert audit.trainable_parameters == held == audit.adapter_parameters + unfrozen
    assert audit.frozen_parameters == sum(x.size for x in jax.tree.leaves(subject.frozen))
    assert audit.unmatched == ()
    if subject.variant in ("plain", "scan"):
        assert subject.abstract_audit() == audit

    adapters = shaken(subject.adapters)
    trained = run(adapters, subject.frozen)
    assert np.abs(as_float(trained) - as_float(base)).max() > 0.05

    aj.save_adapter(tmp_path / "adapter", adapters, subject.recipe)
    assert bits(subject.loaded(tmp_path / "adapter")) == bits(adapters)

    if not subject.case.unmergeable:
        merged = subject.merged_logits(adapters)
        assert merged.dtype == trained.dtype
        np.testing.assert_allclose(
            as_float(merged), as_float(trained), atol=0.2 if subject.half else 1e-4
        )
    else:
        message = f"{subject.case.unmergeable} cannot be folded into a weight"
        with pytest.raises(aj.RecipeError, match=message):
            subject.merged_logits(adapters)


def test_steps_move_adapters_and_nothing_else(subject):
    def loss(whole, batch, key):
        logits = subject.logits_of(whole, batch).astype(jnp.float32)
        return jnp.square(logits - 1.0).mean()

    state = subject.state(optax.adam(1e-2))
    step = aj.make_train_step(loss)
    base_bits, adapter_bits = bits(state.base), bits(state.adapters)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)]
    losses = []
    for _ in range(4):
        state, metrics = step(state, ids())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert float(metrics["finite"]) == 1.0
    assert int(state.step) == 4
    assert bits(state.base) == base_bits
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)] == buffers
    assert all(a != b for a, b in zip(bits(state.adapters), adapter_bits, strict=True))
    assert step.jitted._cache_size() == 1
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.adapters))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("door", DOORS)
def test_adapters_vmap_over_one_base(door, case):
    subject = build(door, case)
    several = [shaken(subject.adapters, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    outputs = jax.jit(jax.vmap(subject.run, in_axes=(0, None)))(stacked, subject.frozen)
    run = subject.call(subject.run)
    for one, output in zip(several, outputs, strict=True):
        np.testing.assert_allclose(output, run(one, subject.frozen), atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "scan"])
@pytest.mark.parametrize("case", CASES)
def test_both_doors_compute_the_same(case, variant):
    linen, other = build("linen", case, variant), build("nnx", case, variant)
    adapters = shaken(other.adapters)
    params = unflatten(flatten(adapters) | flatten(other.frozen))
    mine, _ = aj.partition(params, linen.recipe)
    shapes = {path: x.shape for path, x in flatten(linen.whole(linen.adapters)).items()}
    assert {path: x.shape for path, x in flatten(params).items()} == shapes
    np.testing.assert_allclose(
        linen.call(linen.model.apply)({"params": params}, ids()),
        other.call(other.run)(adapters, other.frozen),
        atol=1e-5,
    )
    assert set(flatten(mine)) == set(flatten(adapters))


@pytest.mark.parametrize("door", DOORS)
def test_without_jit_the_output_is_the_same(door):
    subject = build(door, "together")
    adapters = shaken(subject.adapters)
    np.testing.assert_allclose(
        subject.run(adapters, subject.frozen),
        jax.jit(subject.run)(adapters, subject.frozen),
        atol=1e-5,
    )
