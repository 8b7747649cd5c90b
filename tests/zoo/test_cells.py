"""Every model of the zoo with every method; needs the extra `zoo-test`."""

import dataclasses
import importlib.util

import jax.numpy as jnp
import pytest

from .cells import MODELS, adapted, away, check, subject
from .methods import METHODS, OFTEN
from .subjects import shaken

PARTS = {
    "transformers": ("transformers", "transformers.modeling_flax_utils"),
    "tunix": ("tunix", "tunix.models"),
    "others": ("mamba2_jax", "recurrentgemma"),
}


LIBRARIES = [name for name, parts in PARTS.items() if all(map(importlib.util.find_spec, parts))]
if not LIBRARIES:
    pytest.skip(
        "needs tunix, or transformers with Flax models: pip install 'adapters-jax[zoo-test]'",
        allow_module_level=True,
    )
CELLS = [
    (name, method)
    for name, model in MODELS.items()
    if model.library in LIBRARIES
    for method in METHODS
]
OLD = (  # what tunix uses
    "ignore:jax.experimental.shard_map is deprecated:DeprecationWarning",
    "ignore:jax.interpreters.pxla.thread_resources is deprecated:DeprecationWarning:tunix",
    "ignore:'.value' access is now deprecated:DeprecationWarning:tunix",
    "ignore:'sharding' is deprecated, use 'out_sharding':DeprecationWarning",
    "ignore:Using deprecated _init_cache in Tunix sampler:DeprecationWarning:tunix",
)
pytestmark = [pytest.mark.slow, *map(pytest.mark.filterwarnings, OLD)]


@pytest.mark.witness(*(f"{name}-{method}" for name, method in CELLS if method in OFTEN))
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_cell(name, method, tmp_path, record_property):
    cell = dataclasses.asdict(check(name, method, tmp_path / "a"))
    record_property("cell", (name, method, cell))


@pytest.mark.skipif("transformers" not in LIBRARIES, reason="needs transformers with Flax models")
def test_functions_given_as_method_run_with_adapters():
    """CLIP's `get_text_features` calls its module by a function, `apply(..., method=function)`."""
    clip = subject("CLIP")
    recipe, _, (module, tree) = adapted("CLIP", "lora q, v")
    tree = shaken(tree, recipe)
    ids = clip.inputs["input_ids"]
    features = clip.around(module).get_text_features(ids, params=tree)
    whole = clip.around(module)(**clip.inputs, params=tree).text_embeds
    plain = clip.around(clip.base[0]).get_text_features(ids, params=clip.base[1])
    assert away(features / jnp.linalg.norm(features, axis=-1, keepdims=True), whole) < 1e-6
    assert away(features, plain) > 0.01
