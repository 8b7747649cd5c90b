"""The step in plain Flax and optax, with adapters in the code of the model."""

from typing import Any

from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.trees import flatten
from benchmarks import by_hand, llama_by_hand
from benchmarks.sides import flax_common as common
from benchmarks.sides.job import Job


def make(settings: dict[str, Any]) -> common.FlaxStep:
    job = Job(**settings)
    return bert_step(job) if job.model == "bert" else llama_step(job)


def bert_step(job: Job) -> common.FlaxStep:
    batch, (model, params) = common.batch_of(job), common.load_classifier(job.base)
    inputs = batch["ids"], batch["mask"]
    _, params = aj.load_adapter(job.adapter("ours"), model, params, *inputs)
    width = {"lora": {"rank": job.rank}, "houlsby": {"bottleneck": job.bottleneck}}[job.method]
    sizes = common.sizes_of(model.config, **width)
    renamed = {path.replace("/lora/", "/lora_"): x for path, x in flatten(params).items()}
    paths = {tuple(path.split("/")): x for path, x in renamed.items()}
    return common.step_of(*by_hand.linen_side(sizes, paths, common.TX), batch)


def llama_step(job: Job) -> common.FlaxStep:
    config, model = load_decoder(job.base)
    model = aj.load_adapter(job.adapter("ours"), model)
    _, trained, frozen = nnx.split(model, aj.nnx.AdapterParam, ...)

    step, ids = llama_by_hand.step_of(config, common.TX), common.batch_of(job)["ids"]
    return common.step_of(step, flatten(trained), flatten(frozen), ids)
