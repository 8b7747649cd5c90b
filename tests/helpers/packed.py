"""Models of the contract on a quantised base, and on floats of the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from helpers import contract
from helpers.arrays import double
from helpers.contract import APIS, CASES, VARIANTS, ids, shaken


def with_base(subject, quantized, **options):
    """The subject with its base quantised, or in the floats that stand for that."""
    if isinstance(subject, contract.Linen):
        params = aj.quantize(subject.base, subject.base_params, ids(), **options)
        params = params if quantized else aj.dequantize(params)
        whole = aj.init_adapters(subject.model, params, jax.random.key(1), ids())
        subject.adapters, subject.frozen = aj.partition(whole, subject.recipe)
    else:
        base = aj.quantize(subject.base, **options)
        subject.model = subject.adapted(base if quantized else aj.dequantize(base))
        parts = nnx.split(subject.model, aj.nnx.AdapterParam, ...)
        subject.graphdef, subject.adapters, subject.frozen = parts
    return subject


def check_gradients(api, case, variant, dtype):
    """Outputs and gradients of a model on a quantised base are those on floats."""
    found = []
    for quantized in (True, False):
        subject = APIS[api](CASES[case], **VARIANTS[variant])
        subject = with_base(subject, quantized, dtype=dtype, block=4)

        def loss(adapters, subject=subject):
            logits = subject.run(adapters, subject.frozen)
            return jnp.mean(jnp.square(logits.astype(jnp.float32))), logits

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found.append(run(shaken(subject.adapters)))
    (_, logits), gradient = found[0]
    assert logits.dtype == (jnp.bfloat16 if variant == "bf16" else jnp.float32)
    assert all(np.abs(double(g)).max() > 1e-4 for g in jax.tree.leaves(gradient))
    tolerance = 0.03 if variant == "bf16" else 1e-5
    for mine, expected in zip(*map(jax.tree.leaves, found), strict=True):
        most = np.abs(double(expected)).max()
        np.testing.assert_allclose(double(mine), double(expected), atol=tolerance * most)
