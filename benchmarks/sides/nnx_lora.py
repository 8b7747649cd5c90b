"""Flax's `nnx.LoRA`, which replaces each Linear that gets factors."""

from typing import Any

import jax
from flax import nnx

from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.trees import flatten, path_of
from benchmarks.by_hand import NnxBert, make_step, nnx_side
from benchmarks.llama_by_hand import next_token_loss
from benchmarks.sides import flax_common as common
from benchmarks.sides.job import Job, Works, versions

NAME = "flax's nnx.LoRA"


def make(settings: dict[str, Any]) -> Any:
    job = Job(**settings)
    common.only(job, NAME, "lora")
    if job.task == "uses":
        return uses(job)
    return bert_step(job) if job.model == "bert" else llama_step(job)


def replace_linears(model: nnx.Module, rank: int) -> None:
    """Puts `nnx.LoRA` around every query and value."""
    rngs, found = nnx.Rngs(0), list(nnx.iter_modules(model))
    for _, module in found:
        for name in ("query", "value"):
            old = getattr(module, name, None)
            if isinstance(old, nnx.Linear):
                size = old.in_features, rank, old.out_features
                setattr(module, name, nnx.LoRA(*size, base_module=old, rngs=rngs))


def fill(model: nnx.Module, factors: dict[str, jax.Array]) -> None:
    """Fills in the factors of our file; both scales are 1."""
    state = nnx.state(model, nnx.LoRAParam)

    def factor(path: Any, _: Any) -> jax.Array:
        return factors[path_of(path).replace("/lora_", "/lora/")]

    nnx.update(model, jax.tree_util.tree_map_with_path(factor, state))


def bert(job: Job) -> Any:
    """The model written by hand, with the weights of the checkpoint."""
    base, params = common.load_classifier(job.base)
    weights = flatten(params)
    sizes = common.sizes_of(base.config)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxBert(sizes, nnx.Rngs(0))))
    state = jax.tree_util.tree_map_with_path(lambda path, _: weights[path_of(path)], state)
    return sizes, nnx.merge(graphdef, state)


def bert_step(job: Job) -> common.FlaxStep:
    sizes, model = bert(job)
    replace_linears(model, job.rank)
    fill(model, common.factors_of(job))
    return common.step_of(*nnx_side(sizes, model, common.TX), common.batch_of(job))


def llama_step(job: Job) -> common.FlaxStep:
    _, model = load_decoder(job.base)
    replace_linears(model, job.rank)
    fill(model, common.factors_of(job))
    graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters: Any, base: Any, ids: jax.Array) -> jax.Array:
        return next_token_loss(nnx.merge(graphdef, adapters, base)(ids), ids)

    ids = common.batch_of(job)["ids"]
    return common.step_of(make_step(loss, common.TX), adapters, base, ids)


def uses(job: Job) -> Works:
    _, model = bert(job)

    def adapt() -> None:
        adapted = nnx.clone(model, variables=False)
        replace_linears(adapted, job.rank)
        jax.block_until_ready(nnx.state(adapted, nnx.LoRAParam))

    return Works(NAME, {"adapt": adapt}, {"versions": versions(*common.PACKAGES)})
