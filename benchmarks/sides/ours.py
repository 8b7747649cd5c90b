"""adapters_jax, with linen for BERT and NNX for Llama."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.models.generation import generate
from benchmarks.by_hand import cross_entropy
from benchmarks.sides import flax_common as common
from benchmarks.sides.job import Job, Works, seconds, versions


def make(settings: dict[str, Any]) -> Any:
    job = Job(**settings)
    if job.task == "step":
        return bert_step(job) if job.model == "bert" else llama_step(job)
    return {"forward": forward, "generate": generation, "uses": uses}[job.task](job)


def _step(state: aj.TrainState, loss: Any, batch: Any) -> common.FlaxStep:
    step: Any = aj.make_train_step(loss)

    def advance(state: aj.TrainState) -> Any:
        state, metrics = step(state, batch)
        return state, metrics["loss"], state.adapters

    def lower() -> Any:
        rest, base = jax.eval_shape(lambda *x: x, replace(state, base=None), state.base)
        return step.jitted.lower(rest, base, batch)

    return common.FlaxStep(advance, state, state.adapters, lower, "adapters-jax")


def bert_step(job: Job) -> common.FlaxStep:
    batch, (base, params) = common.batch_of(job), common.load_classifier(job.base)
    model, params = aj.load_adapter(job.adapter("ours"), base, params, batch["ids"], batch["mask"])

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["ids"], batch["mask"])
        return cross_entropy(logits, batch["labels"])

    return _step(
        aj.TrainState.create(model, params, tx=common.TX, key=jax.random.key(0)), loss, batch
    )


def llama_step(job: Job) -> common.FlaxStep:
    """A step of one adapter, or of several on their own rows."""
    model, loss = load_adapted(job), common.decoder_loss(job)
    # `nnx.state` has the model's own variables, which `nnx.update` changes.
    adapters = nnx.to_pure_dict(nnx.state(model, aj.nnx.AdapterParam))
    ids = common.batch_of(job)["ids"]
    states = []
    for i in range(job.tenants):
        nnx.update(model, jax.tree.map(lambda x, i=i: job.factor(i) * x, adapters))
        states.append(aj.TrainState.create(model, tx=common.TX, key=jax.random.key(i)))
    if job.tenants > 1:
        ids = ids.reshape(job.tenants, -1, job.length)
    state = aj.stack_states(states) if job.tenants > 1 else states[0]
    return _step(state, lambda model, ids, key: loss(model, ids), ids)


def load_adapted(job: Job) -> Any:
    return aj.load_adapter(job.adapter("ours"), load_decoder(job.base)[1])


def generation(job: Job) -> Works:
    """The likeliest tokens after each prompt, by the base and with LoRA that is not merged."""
    ids, models = common.batch_of(job)["ids"], {"base": load_decoder(job.base)[1]}
    models["LoRA"] = load_adapted(job)

    def run(model: Any) -> Any:
        return lambda: np.asarray(generate(model, ids, max_new_tokens=job.tokens).ids)

    works = {name: run(model) for name, model in models.items()}
    return Works("adapters_jax", works, {"versions": versions("adapters-jax", *common.PACKAGES)})


def forward(job: Job) -> Works:
    """The passes of the base, of LoRA, of merged LoRA, and of Houlsby's adapters."""
    batch, (base, params) = common.batch_of(job), common.load_classifier(job.base)
    inputs = batch["ids"], batch["mask"]

    def load(method: str) -> Any:
        return aj.load_adapter(job.adapter("ours", method=method), base, params, *inputs)

    lora, houlsby = load("lora"), load("houlsby")
    whole = {
        "base": (base, params),
        "LoRA": lora,
        "LoRA, merged": (base, aj.merge(*lora, *inputs)),
        "Houlsby": houlsby,
    }

    def compiled(model: Any, params: Any) -> Any:
        return (
            jax.jit(lambda p, *x: model.apply({"params": p}, *x)).lower(params, *inputs).compile()
        )

    jax.config.update("jax_traceback_in_locations_limit", 0)  # texts without lines of Python
    programs = {name: compiled(*pair) for name, pair in whole.items()}

    def run(name: str) -> Any:
        return lambda: jax.block_until_ready(programs[name](whole[name][1], *inputs))

    same = programs["LoRA, merged"].as_text() == programs["base"].as_text()
    about = {"same": same, "versions": versions("adapters-jax", *common.PACKAGES)}
    return Works("adapters_jax", {name: run(name) for name in whole}, about)


def uses(job: Job) -> Works:
    """Adapting, saving, loading and switching."""
    batch, (base, params) = common.batch_of(job), common.load_classifier(job.base)
    inputs, directory = (batch["ids"], batch["mask"]), Path(tempfile.mkdtemp(dir=job.directory))
    lora = job.method == "lora"
    recipe = aj.lora(job.rank, head="head") if lora else aj.houlsby(job.bottleneck, head="head")

    def adapt() -> None:
        model = aj.adapt(base, recipe)
        jax.block_until_ready(aj.init_adapters(model, params, jax.random.key(0), *inputs))

    def load(which: str) -> Any:
        model, whole = aj.load_adapter(job.adapter("ours", which), base, params, *inputs)
        return model, jax.block_until_ready(whole)

    model, whole = load("first")
    states = [
        aj.TrainState.create(model, params, tx=common.TX, key=jax.random.key(0))
        for params in (whole, load("second")[1])
    ]
    traces: list[None] = []

    def apply(params: Any, inputs: Any) -> jax.Array:
        traces.append(None)
        return model.apply({"params": params}, *inputs)

    evaluate, warm = aj.make_eval_step(apply), [states[0], states[1].adapters]

    def switch() -> float:
        before = warm[0]
        took = seconds(lambda: warm.__setitem__(0, replace(before, adapters=warm[1])))
        warm[1] = before.adapters
        return took

    works = {
        "adapt": adapt,
        "save": lambda: aj.save_adapter(directory / "saved", states[0]),
        "load": lambda: load("first"),
        "switch": switch,
        "forward": lambda: evaluate(warm[0], inputs),
        "traces": lambda: len(traces),
    }
    return Works("adapters_jax", works, {"versions": versions("adapters-jax", *common.PACKAGES)})
