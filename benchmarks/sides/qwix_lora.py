"""qwix, whose LoRA intercepts the products of a model; only its factors are differentiated."""

from typing import Any

import jax
import qwix
from flax import nnx, traverse_util

from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.trees import path_of
from benchmarks.by_hand import cross_entropy, make_step
from benchmarks.sides import flax_common as common
from benchmarks.sides.job import Job, Works, versions

NAME = "qwix"


def make(settings: dict[str, Any]) -> Any:
    job = Job(**settings)
    common.only(job, NAME, "lora", "lora-all")
    if job.task == "uses":
        return uses(job)
    return bert_step(job) if job.model == "bert" else llama_step(job)


def rule_of(job: Job) -> qwix.LoraRule:
    names = "(query|key|value|output|gate|up)" if job.method == "lora-all" else "(query|value)"
    return qwix.LoraRule(module_path=f".*/{names}", rank=job.rank, alpha=job.rank)


def provider(job: Job) -> qwix.LoraProvider:
    return qwix.LoraProvider([rule_of(job)])


def ours(path: str) -> str:
    """The path of a factor in our file: kernel_lora_a becomes lora/a."""
    return path.replace("/kernel_lora_", "/lora/")


def bert_step(job: Job) -> common.FlaxStep:
    batch, (base, params) = common.batch_of(job), common.load_classifier(job.base)
    model = qwix.apply_lora_to_model(base, provider(job))
    like = jax.eval_shape(model.init, jax.random.key(0), batch["ids"], batch["mask"])["params"]
    weights, factors = traverse_util.flatten_dict(params, sep="/"), common.factors_of(job)
    whole = {
        path: weights[path] if path in weights else factors[ours(path)]
        for path in traverse_util.flatten_dict(like, sep="/")
    }
    adapters = {p: x for p, x in whole.items() if "_lora_" in p or p.startswith("head/")}
    frozen = {path: x for path, x in whole.items() if path not in adapters}

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        params = traverse_util.unflatten_dict({**adapters, **frozen}, sep="/")
        logits: Any = model.apply({"params": params}, batch["ids"], batch["mask"])
        return cross_entropy(logits, batch["labels"])

    return common.step_of(make_step(loss, common.TX), adapters, frozen, batch, NAME)


def llama_step(job: Job) -> common.FlaxStep:
    ids, factors = common.batch_of(job)["ids"], common.factors_of(job)
    model, loss_of = load_decoder(job.base)[1], common.decoder_loss(job)
    called = "hidden" if job.chunked else "__call__"  # qwix changes the method that is called
    model = qwix.apply_lora_to_model(
        model, provider(job), ids[:, :1], rngs=nnx.Rngs(0), methods=(called,)
    )
    graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, _: factors[ours(path_of(path))], adapters
    )

    def loss(adapters: Any, base: Any, ids: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graphdef, adapters, base), ids)

    return common.step_of(make_step(loss, common.TX), adapters, base, ids, NAME)


def uses(job: Job) -> Works:
    """Adapting: draws only the factors, as their rule says, since `init` would draw the base."""
    batch, (base, params) = common.batch_of(job), common.load_classifier(job.base)
    inputs, rule = (batch["ids"], batch["mask"]), rule_of(job)
    loaded = traverse_util.flatten_dict(params, sep="/")

    def adapt() -> None:
        model = qwix.apply_lora_to_model(base, provider(job))
        like = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        whole, key = dict(loaded), jax.random.key(0)
        for i, (path, x) in enumerate(traverse_util.flatten_dict(like, sep="/").items()):
            if path not in loaded:
                first = path.endswith("_lora_a")
                draw = rule.lora_a_initializer if first else rule.lora_b_initializer
                whole[path] = draw(jax.random.fold_in(key, i), x.shape, x.dtype)
        jax.block_until_ready(traverse_util.unflatten_dict(whole, sep="/"))

    return Works(NAME, {"adapt": adapt}, {"versions": versions(NAME, *common.PACKAGES)})
