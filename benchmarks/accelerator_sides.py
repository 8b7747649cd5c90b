"""Training steps on shapes alone, to compile for accelerators: ours and those of others.

Every side returns a lowered step. Sides that are compared have the same dtype and the same layers,
unrolled and recomputed in the same way, and, unless the losses are compared, the same loss.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import adapters_jax as aj
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.shapes import adapted_shape, find_shape
from adapters_jax.training.losses import cross_entropy
from benchmarks.by_hand import NnxBert, Sizes, make_step, nnx_side
from benchmarks.llama_by_hand import next_token_loss, step_of
from benchmarks.tunix_llama import Size, loss_of

TX = optax.adamw(1e-3)
RANK, ALPHA = 4, 8
LINEAR = ("**/attention/*", "**/mlp/*")  # all linear layers of a decoder


def ours(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """Our step on our model.

    Args:
        mesh: of the devices.
        model: a published name.
        layers: how many of its layers.
        rows: sequences in the batch.
        length: tokens in a sequence.
        **how: `method` ("lora", "houlsby", "full"), `targets` of LoRA, `dtype`, `quantize`,
            `remat`, `chunk`, the positions whose logits are held at once (None holds all), and
            `trainings`, each with its own adapter; they divide the batch among them.
    """
    method, dtype = how.get("method", "lora"), jnp.dtype(how.get("dtype", "bfloat16"))
    lora = {"rank": RANK, "targets": how.get("targets", ())}
    options = MethodOptions(method, **lora if method == "lora" else {})
    types = {"dtype": dtype, "param_dtype": dtype, "remat": how.get("remat", False)}
    adapted, params = adapted_shape(model, options, how.get("quantize"), layers, **types)
    family, config = find_shape(model)
    inputs = config.inputs(rows, length)

    def of_decoder(model: Any, ids: Any, key: Any) -> Any:
        hidden, chunk = model.hidden(ids)[:, :-1], how.get("chunk") or length
        return cross_entropy(hidden, model.logits, ids[:, 1:], chunk=chunk)

    def of_encoder(params: Any, ids: Any, key: Any) -> Any:
        return jnp.mean(jnp.square(adapted.apply({"params": params}, ids).astype(jnp.float32)))

    loss = of_decoder if family.kind == "decoder" else of_encoder
    state = aj.abstract_state(adapted, params, tx=TX)
    if (trainings := how.get("trainings")) is None:
        return _ours(state, loss, inputs, mesh)
    parts = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((trainings, len(x) // trainings, *x.shape[1:]), x.dtype),
        inputs,
    )
    return _several(state, loss, parts, mesh)


def ours_on_tunix(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """Our step on tunix's model, which we adapt without a registration."""
    size = _size(model, layers, rows, length)
    base, inputs = _tunix(size, **how), _inputs(size)
    recipe = aj.Recipe(aj.LoRA("**/{q_proj,v_proj}", RANK, alpha=ALPHA))
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _inputs(replace(size, length=8)))
    adapted = nnx.eval_shape(
        lambda: aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    )
    state = aj.abstract_state(adapted, tx=TX)
    return _ours(state, lambda model, inputs, key: loss_of(model, inputs), inputs, mesh)


def qwix(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """A step by hand on tunix's model, which qwix adapts."""
    return _qwix(mesh, _size(model, layers, rows, length), loss_of, **how)


def tunix(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """The step of tunix's own trainer: its model by qwix, and its default loss."""
    from tunix.sft.peft_trainer import _default_loss_fn

    def loss(model: Any, inputs: Any) -> Any:
        ids, positions, _, mask = inputs
        return _default_loss_fn(model, ids, jnp.ones(ids.shape), positions, mask)

    return _qwix(mesh, _size(model, layers, rows, length), loss, **how)


def by_hand(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """A step of a model with LoRA in its code, in float32."""
    if model == "bert-large":
        return _bert_by_hand(mesh, layers, rows, length)
    config = find_shape(model)[1].with_layers(layers)
    adapted, _ = adapted_shape(model, MethodOptions("lora", rank=RANK), None, layers)
    split: Any = nnx.split(adapted, aj.nnx.AdapterParam, ...)
    adapters, base = (_on(mesh, aj.trees.flatten(part)) for part in split[1:])
    ids = _on(mesh, config.inputs(rows, length))
    opt_state = _on(mesh, jax.eval_shape(TX.init, adapters))
    return step_of(config, TX).lower(adapters, opt_state, base, ids)


def ours_beside_by_hand(
    mesh: Mesh, model: str, layers: int, rows: int, length: int, **how: Any
) -> jax.stages.Lowered:
    """Our step with the loss of `by_hand`."""
    if model == "bert-large":
        return _bert(mesh, layers, rows, length)
    adapted, _ = adapted_shape(model, MethodOptions("lora", rank=RANK), None, layers)
    config = find_shape(model)[1]
    state = aj.abstract_state(adapted, tx=TX)
    ids = config.inputs(rows, length)
    return _ours(state, lambda model, ids, key: next_token_loss(model(ids), ids), ids, mesh)


SIDES: dict[str, Callable[..., jax.stages.Lowered]] = {
    "ours": ours,
    "ours, tunix's model": ours_on_tunix,
    "qwix, tunix's model": qwix,
    "tunix": tunix,
    "ours, float32": ours_beside_by_hand,
    "by hand, float32": by_hand,
    "ours, all linear layers": partial(ours, targets=LINEAR),
    "full fine-tuning": partial(ours, method="full"),
    "ours, an adapter for each 4 rows": partial(ours, trainings=8),
}


def _ours(state: aj.TrainState, loss: Any, batch: Any, mesh: Mesh) -> jax.stages.Lowered:
    state, batch = aj.shard(state, mesh), aj.shard_batch(batch, mesh)
    step: Any = aj.make_train_step(loss)
    return step.jitted.lower(replace(state, base=None), state.base, batch)


def _several(state: aj.TrainState, loss: Any, batch: Any, mesh: Mesh) -> jax.stages.Lowered:
    """A step of several trainings of one base, one for each entry of the batch's first axis."""
    n = len(jax.tree.leaves(batch)[0])
    alone = replace(state, base=None)
    stacked = jax.eval_shape(lambda state: aj.stack_states([state] * n), alone)
    step: Any = aj.make_train_step(loss)
    return step.jitted.lower(*(_on(mesh, part) for part in (stacked, state.base, batch)))


def _on(mesh: Mesh, tree: Any) -> Any:
    """Abstract arrays, whole on every device of a mesh."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


def _size(model: str, layers: int, rows: int, length: int) -> Size:
    """A published Llama as tunix's configuration has it."""
    _, config = find_shape(model)
    heads = config.num_attention_heads, config.kv_heads
    sizes = config.hidden_size, config.intermediate_size, *heads, config.vocab_size
    return Size(layers, *sizes, rows, length, tied=config.tie_word_embeddings)


def _inputs(size: Size) -> Any:
    """Abstract tokens, positions, no cache, and a causal mask for each row."""
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    mask = jax.ShapeDtypeStruct((size.batch, size.length, size.length), jnp.bool_)
    return tokens, tokens, None, mask


def _tunix(size: Size, dtype: str = "bfloat16", remat: bool = False, **_: Any) -> Any:
    """tunix's model, abstract, with float parameters of a dtype."""
    model = nnx.eval_shape(lambda: replace(size, remat=remat).base)
    graphdef, state = nnx.split(model)
    kind = jnp.dtype(dtype)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), state), copy=True
    )


def _qwix(mesh: Mesh, size: Size, loss_of: Any, **how: Any) -> jax.stages.Lowered:
    import qwix

    base, inputs = _tunix(size, **how), _inputs(size)
    provider = qwix.LoraProvider(module_path=".*(q_proj|v_proj)", rank=RANK, alpha=float(ALPHA))
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _inputs(replace(size, length=8)))
    graph, weights = nnx.split(base)

    def adapted(weights: Any) -> Any:  # qwix runs the model, so its weights are traced
        model = nnx.merge(graph, weights, copy=True)
        return qwix.apply_lora_to_model(model, provider, *example, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(adapted, weights)
    split: Any = nnx.split(model, nnx.LoRAParam, ...)
    graphdef, adapters, frozen = split
    adapters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), adapters)
    adapters, frozen, inputs = (_on(mesh, x) for x in (adapters, frozen, inputs))
    opt_state = _on(mesh, jax.eval_shape(TX.init, adapters))

    def loss(adapters: Any, frozen: Any, inputs: Any) -> jax.Array:
        kind = jnp.dtype(how.get("dtype", "bfloat16"))
        cast = jax.tree.map(lambda x: x.astype(kind), adapters)
        return loss_of(nnx.merge(graphdef, cast, frozen, copy=True), inputs)

    return make_step(loss, TX).lower(adapters, opt_state, frozen, inputs)


def _sizes(layers: int, rows: int, length: int) -> Sizes:
    return Sizes(layers, 1024, 16, 4096, batch=rows, length=length)


def _batch(rows: int, length: int) -> Any:
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return {"ids": tokens, "mask": tokens, "labels": labels}


def _bert_by_hand(mesh: Mesh, layers: int, rows: int, length: int) -> jax.stages.Lowered:
    sizes = replace(_sizes(layers, rows, length), rank=RANK)
    step, *parts = nnx_side(sizes, nnx.eval_shape(lambda: NnxBert(sizes, nnx.Rngs(0))), TX)
    adapters, base, batch = (_on(mesh, x) for x in (*parts, _batch(rows, length)))
    return step.lower(adapters, _on(mesh, jax.eval_shape(TX.init, adapters)), base, batch)


def _bert(mesh: Mesh, layers: int, rows: int, length: int) -> jax.stages.Lowered:
    from benchmarks.by_hand import cross_entropy as of_labels
    from benchmarks.step import cases

    (case, *_) = cases(_sizes(layers, rows, length), rank=RANK)
    model, batch = aj.adapt(case.base, case.recipe), _batch(rows, length)
    params = jax.eval_shape(case.base.init, jax.random.key(0), batch["ids"])["params"]
    params = aj.init_adapters(model, params, jax.random.key(0), batch["ids"])

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["ids"], batch["mask"])
        return of_labels(logits, batch["labels"])

    return _ours(aj.abstract_state(model, params, tx=TX), loss, batch, mesh)
