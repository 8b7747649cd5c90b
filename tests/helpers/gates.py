"""Steps of tiny models, compiled for accelerators, and what their programs write.

The models are narrow, but scanned ones have so many layers that their stacked weights fit no memory
on a chip. Heads are 128 wide: a TPU lays the stacks of narrower ones out anew, once a step.
"""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.distributed.program import Hlo, Program
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.weights.quantized import bits_of
from helpers.floor import floor

D, HIDDEN, VOCAB, TOKENS = 384, 1024, 640, 192  # no two are equal, so that shapes tell arrays apart
LAYERS = {False: 2, True: 1000}  # by whether they are scanned
HEADS, WIDTH = 3, 128
MATRICES = {(D, D), (D, WIDTH), (D, HIDDEN), (HIDDEN, D)}
FLOATS = ("bf16", "f32")
TX = optax.adamw(1e-3)
_WRITTEN = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
_EXCHANGE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAMES = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional")


def invoked(recipe, ids):
    """Where activated methods act, for a call on ids."""
    acting = [method.invocation for method in recipe if method.kind == "activated_lora"]
    return {"invoked": aj.invoked(ids, acting[0])} if acting else {}


def decoder(recipe, scan, dtype, layers=None):
    """A decoder (NNX) with a recipe: the abstract state of its training, and its loss."""
    options = {"param_dtype": jnp.bfloat16, "scan": scan, "remat": scan}
    sizes = {
        "num_hidden_layers": layers or LAYERS[scan],
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
    }
    config = DecoderConfig(VOCAB, D, HIDDEN, **sizes)
    base = nnx.eval_shape(lambda: Decoder(config, **options, rngs=nnx.Rngs(0)))
    base = base if dtype == "bf16" else aj.quantize(base, dtype=dtype)
    ids = jnp.zeros((1, 8), jnp.int32)
    model = nnx.eval_shape(lambda: aj.adapt(base, recipe, rngs=nnx.Rngs(1), example_inputs=(ids,)))

    def loss(model, ids, key):
        logits = model(ids[:, :-1], **invoked(recipe, ids[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return aj.abstract_state(model, tx=TX), loss


def encoder(recipe, scan, dtype, layers=None):
    """The same of an encoder (linen)."""
    config = BertConfig(VOCAB, D, layers or LAYERS[scan], HEADS, HIDDEN)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = aj.adapt(Bert(config, **types, scan=scan, remat=scan), recipe)
    ids = jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(model.inner.init, jax.random.key(0), ids)["params"]
    if dtype != "bf16":
        params = aj.quantize(model.inner, params, ids, dtype=dtype)
    params = aj.init_adapters(model, params, jax.random.key(1), ids)

    def loss(params, ids, key):
        hidden = model.apply({"params": params}, ids[:, 1:], **invoked(recipe, ids[:, 1:]))
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    return aj.abstract_state(model, params, tx=TX), loss


MODELS = {"NNX": decoder, "linen": encoder}


@dataclass(frozen=True)
class Step:
    """A compiled step: the state that it takes, what its compiler says, and its text."""

    state: aj.TrainState
    program: Program
    text: str


def compiled(state, loss, device="v5e", mesh="data=1", rows=1):
    """A step compiled for devices."""
    there = aj.make_mesh(mesh, aj.devices(device))
    ids = jax.ShapeDtypeStruct((rows, TOKENS + 1), jnp.int32)
    state, ids = aj.shard(state, there), aj.shard_batch(ids, there)
    step = aj.make_train_step(loss)
    done = step.jitted.lower(state.replace(base=None), state.base, ids).compile()
    return Step(state, Program.of(done), done.as_text())


def floor_of(state, loss):
    """The operations of products that a step cannot do without, and those of recomputed blocks."""

    def whole(adapters, base, ids):
        found = replace(state, adapters=adapters, base=base)
        subject = found.params if state.graphdef is None else found.model
        return loss(subject, ids, jax.random.key(0))

    ids = jax.ShapeDtypeStruct((1, TOKENS + 1), jnp.int32)
    return floor(whole, state.adapters, state.base, ids)


def stored(tree):
    """The bytes of abstract arrays."""
    return sum(x.size * bits_of(x.dtype) // 8 for x in jax.tree.leaves(tree))


def written(text):
    """The arrays that a program writes, those inside fusions left out: (dtype, shape, whether in
    the memory of the device, rather than on the chip).

    What only starts names the array that it reads as well, and is left out; its end is counted.
    """
    module = Hlo(text)
    for name in (module.entry, *module.loops):
        for line in module.lines[name]:
            found = _WRITTEN.match(line)
            if found and found[2] not in _NAMES and not found[2].endswith("-start"):
                for dtype, dims, layout in _ARRAY.findall(found[1]):
                    shape = tuple(int(n) for n in dims.split(",") if n and n != "1")
                    yield dtype, shape, "S(1)" not in layout


def copies(text, scan, floats):
    """What a program writes of the base that it should not, as sorted texts.

    These are float32 matrices; stacks of all layers' matrices, in floats where the base is
    quantised, and else in the memory of the device; and there, single matrices of a base in floats.
    """
    stacks = {(LAYERS[True], *shape) for shape in MATRICES} if scan else set()
    turned = {shape[:-2] + shape[:-3:-1] for shape in stacks | MATRICES}
    found = set()
    for dtype, shape, outside in written(text):
        if shape in stacks | MATRICES | turned:
            widened = dtype == "f32" or (dtype == "bf16" and len(shape) > 2 and not floats)
            if widened or (outside and (floats or len(shape) > 2)):
                found.add(f"{dtype}{list(shape)}{' in memory' if outside else ''}")
    return sorted(found)


def exchanged(text):
    """The arrays that a program exchanges between devices: (rounds, kind, shape).

    TPUs split an operation into parts, which share the number of its channel.
    """
    module, seen = Hlo(text), set()
    times = module.times()
    for name, lines in module.lines.items():
        for line in lines:
            if not (found := _EXCHANGE.search(line)):
                continue
            channel = _CHANNEL.search(line)
            key = (found[2], channel[1]) if channel else object()
            if key not in seen:
                seen.add(key)
                for _, dims, _ in _ARRAY.findall(found[1]):
                    shape = tuple(int(n) for n in dims.split(",") if n and n != "1")
                    yield times.get(name, 1), found[2], shape
