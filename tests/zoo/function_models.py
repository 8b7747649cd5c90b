"""Functions, Equinox and Haiku: real code with random weights, and short models like known ones.


Of other libraries come ESM2 (esm2quinox), the vision transformer (equimo), the residual net
(Haiku) and the message passing (jraph). The others are written here, in the structure of the
examples of Equinox and Haiku, and of plain `jax.numpy` as books about scaling write it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import adapters_jax as aj
from adapters_jax.linen.functions.function import Signature, arrays_of
from adapters_jax.trace.inputs import Inputs
from adapters_jax.trees import flatten

from .models import FEED_FORWARD, HEADS, LENGTH, VOCAB, D, Model
from .subjects import Pair, drawn

LAYERS = 2
IDS = np.random.default_rng(0).integers(4, VOCAB - 4, (2, LENGTH), np.int32)
PICTURES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


class Functions:
    """A function of parameters, with the functions that the checks call.

    Args:
        fn: the function.
        params: its parameters, whose numbers are drawn anew.
        inputs: its further arguments.
        placed: puts a training state on devices.
    """

    prompt = None  # none of them generates

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        *inputs: Any,
        placed: Callable[[Any], Any] = lambda state: state,
    ):
        self.fn, self.inputs, self.placed = fn, inputs, placed
        self.keeps = Signature(params, Inputs((), {}), [_Keeps()]).tree
        self.base: Pair = (fn, drawn(arrays_of(params)))
        self.params = self.keeps(self.base[1])
        self.run_base = jax.jit(functools.partial(self.run, fn))

    def run(self, model: Any, tree: Any, inputs: Any) -> jax.Array:
        """The output of the function, or of the adapted one."""
        adapted = isinstance(model, aj.linen.Adapted)
        return model(tree if adapted else self.keeps(tree), *inputs)

    def adapt(self, recipe: aj.Recipe, base: Pair) -> Pair:
        """A base with adapters."""
        model = aj.adapt(self.fn, self.params, recipe, example_inputs=self.inputs)
        return self._like(base, model, aj.init_adapters(model, self.params, jax.random.key(1)))

    def _like(self, base: Pair, model: Any, tree: Any) -> Pair:
        """The adapted function; in int8 where the base is another one than the float one."""
        small = base is not self.base
        return model, aj.quantize(model, tree, *self.inputs, dtype="int8") if small else tree

    def quantized(self) -> Pair:
        """The base in int8, which it is once it is adapted."""
        return self.fn, self.base[1]

    def float_again(self, pair: Pair) -> Pair:
        """The same with float weights."""
        return pair[0], aj.dequantize(pair[1])

    def train_state(self, pair: Pair, tx: Any) -> aj.TrainState:
        """The training state before the first step."""
        return self.placed(aj.TrainState.create(*pair, tx=tx, key=jax.random.key(2)))

    def output_of(self, pair: Pair) -> Callable[[Any, Any], jax.Array]:
        """The output by what a loss gets, and the inputs."""
        return functools.partial(self.run, pair[0])

    def trained(self, pair: Pair, recipe: aj.Recipe) -> Any:
        """What trains."""
        return aj.partition(pair[1], recipe)[0]

    def audit(self, pair: Pair) -> aj.Audit:
        """The audit."""
        return aj.audit(*pair)

    def loaded(self, directory: Any, base: Pair) -> Pair:
        """What `load_adapter` makes of a directory and a base."""
        loaded = aj.load_adapter(directory, self.fn, self.params, *self.inputs)
        return self._like(base, *loaded)

    def merged(self, pair: Pair) -> Any:
        """The base's arrays with the adapters folded in."""
        return arrays_of(aj.merge(*pair))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the base's arrays by path, each layer of a stack by itself."""
        found = {}
        for path, x in flatten(self.base[1]).items():
            top, _, rest = path.partition("/")
            if top == "layers" and not rest[0].isdigit():
                found |= {f"layers/{i}/{rest}": x.shape[1:] for i in range(LAYERS)}
            else:
                found[path] = x.shape
        return found


class _Keeps:
    """Lets a tree have leaves that are no arrays."""

    keeps_others = True

    def static(self, tree: Any) -> dict[str, Any]:
        return {}


def esm2() -> Functions:
    import esm2quinox

    model = esm2quinox.ESM2(LAYERS, D, HEADS, token_dropout=True, key=jax.random.key(0))
    return Functions(lambda model, ids: jax.vmap(model)(ids).logits, model, IDS)


def equimo() -> Functions:
    from equimo.models.vit import VisionTransformer

    key = jax.random.key(0)
    sizes = {"img_size": 8, "in_channels": 3, "dim": D, "patch_size": 4, "num_heads": HEADS}
    options = {"depths": [LAYERS], "mlp_ratio": FEED_FORWARD / D, "num_classes": 5, "reg_tokens": 0}
    model = VisionTransformer(**sizes, **options, key=key)
    run = functools.partial(lambda model, x: model(x, key=key, inference=True))
    return Functions(lambda model, x: jax.vmap(functools.partial(run, model))(x), model, PICTURES)


def bert() -> Functions:
    """A text classifier in the structure of Equinox's example: BERT."""
    import equinox as eqx

    class Layer(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        inner: eqx.nn.Linear
        output: eqx.nn.Linear
        norms: list[eqx.nn.LayerNorm]
        dropout: eqx.nn.Dropout

        def __init__(self, key: Any):
            keys = jax.random.split(key, 3)
            biases = {f"use_{x}_bias": True for x in ("query", "key", "value", "output")}
            self.attention = eqx.nn.MultiheadAttention(HEADS, D, **biases, key=keys[0])
            self.inner = eqx.nn.Linear(D, FEED_FORWARD, key=keys[1])
            self.output = eqx.nn.Linear(FEED_FORWARD, D, key=keys[2])
            self.norms = [eqx.nn.LayerNorm(D) for _ in range(2)]
            self.dropout = eqx.nn.Dropout(0.1, inference=True)

        def __call__(self, x: Any, mask: Any) -> Any:
            x = jax.vmap(self.norms[0])(x + self.dropout(self.attention(x, x, x, mask=mask)))
            hidden = jax.nn.gelu(jax.vmap(self.inner)(x))
            return jax.vmap(self.norms[1])(x + self.dropout(jax.vmap(self.output)(hidden)))

    class Classifier(eqx.Module):
        words: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        layers: list[Layer]
        head: eqx.nn.Linear

        def __init__(self, key: Any):
            keys = jax.random.split(key, LAYERS + 3)
            self.words = eqx.nn.Embedding(VOCAB, D, key=keys[0])
            self.positions = eqx.nn.Embedding(LENGTH, D, key=keys[1])
            self.head = eqx.nn.Linear(D, 5, key=keys[2])
            self.layers = [Layer(key) for key in keys[3:]]

        def __call__(self, ids: Any) -> Any:
            x = jax.vmap(self.words)(ids) + jax.vmap(self.positions)(jnp.arange(LENGTH))
            mask = jnp.broadcast_to(ids > 5, (LENGTH, LENGTH)) | jnp.eye(LENGTH, dtype=bool)
            for layer in self.layers:
                x = layer(x, mask)
            return self.head(x[0])

    model = Classifier(jax.random.key(0))
    return Functions(lambda model, ids: jax.vmap(model)(ids), model, IDS)


def score_model() -> Functions:
    """A score of noisy pictures at a time in the structure of Equinox's example: an MLP mixer."""
    import equinox as eqx

    class Block(eqx.Module):
        patches: list[eqx.nn.Linear]
        channels: list[eqx.nn.Linear]
        norm: eqx.nn.LayerNorm

        def __init__(self, key: Any):
            keys = jax.random.split(key, 4)
            self.patches = [eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 4, key=keys[1])]
            self.channels = [
                eqx.nn.Linear(D, FEED_FORWARD, key=keys[2]),
                eqx.nn.Linear(FEED_FORWARD, D, key=keys[3]),
            ]
            self.norm = eqx.nn.LayerNorm(D)

        def __call__(self, x: Any) -> Any:
            mixed = jax.vmap(lambda x: self.patches[1](jax.nn.gelu(self.patches[0](x))))
            x = jax.vmap(self.norm, 1, 1)(x + mixed(x))
            deep = jax.vmap(lambda x: self.channels[1](jax.nn.gelu(self.channels[0](x))))
            return x + deep(x.T).T

    class Score(eqx.Module):
        inner: eqx.nn.Conv2d
        blocks: list[Block]
        outer: eqx.nn.ConvTranspose2d

        def __init__(self, key: Any):
            keys = jax.random.split(key, LAYERS + 2)
            self.inner = eqx.nn.Conv2d(4, D, 4, stride=4, key=keys[0])
            self.outer = eqx.nn.ConvTranspose2d(D, 3, 4, stride=4, key=keys[1])
            self.blocks = [Block(key) for key in keys[2:]]

        def __call__(self, time: Any, x: Any) -> Any:
            y = self.inner(jnp.concatenate([x, jnp.broadcast_to(time, (1, 8, 8))]))
            y = y.reshape(D, 4)
            for block in self.blocks:
                y = block(y)
            return self.outer(y.reshape(D, 2, 2))

    times = np.array([0.2, 0.7], np.float32)
    model = Score(jax.random.key(0))
    return Functions(lambda model, t, x: jax.vmap(model)(t, x), model, times, PICTURES)


def recurrent() -> Functions:
    """A classifier of sequences in the structure of Equinox's example: a GRU."""
    import equinox as eqx

    class Classifier(eqx.Module):
        words: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        norm: eqx.nn.RMSNorm
        head: eqx.nn.Linear

        def __init__(self, key: Any):
            keys = jax.random.split(key, 3)
            self.words = eqx.nn.Embedding(VOCAB, D, key=keys[0])
            self.cell = eqx.nn.GRUCell(D, D, key=keys[1])
            self.norm = eqx.nn.RMSNorm(D)
            self.head = eqx.nn.Linear(D, 5, key=keys[2])

        def __call__(self, ids: Any) -> Any:
            def step(state: Any, x: Any) -> Any:
                return self.cell(x, state), None

            state, _ = jax.lax.scan(step, jnp.zeros(D), jax.vmap(self.words)(ids))
            return self.head(self.norm(state))

    model = Classifier(jax.random.key(0))
    return Functions(lambda model, ids: jax.vmap(model)(ids), model, IDS)


def haiku_transformer() -> Functions:
    """A language model in the structure of Haiku's example: a causal transformer."""
    import haiku as hk

    def run(ids: Any) -> Any:
        positions = hk.get_parameter("positions", (LENGTH, D), init=jnp.zeros)
        x = hk.Embed(VOCAB, D)(ids) + positions
        mask = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH)))
        norm = functools.partial(hk.LayerNorm, -1, True, True)
        for i in range(LAYERS):
            attention = hk.MultiHeadAttention(
                HEADS, D // HEADS, w_init=jnp.zeros, model_size=D, name=f"attention_{i}"
            )
            h = norm(name=f"norm_{i}")(x)
            x = x + attention(h, h, h, mask=mask)
            h = hk.Linear(FEED_FORWARD, name=f"inner_{i}")(norm(name=f"norm_{i}_b")(x))
            x = x + hk.Linear(D, name=f"output_{i}")(jax.nn.gelu(h))
        return hk.Linear(VOCAB, name="head")(norm(name="norm")(x))

    fn = hk.without_apply_rng(hk.transform(run))
    return Functions(fn.apply, jax.eval_shape(fn.init, jax.random.key(0), IDS), IDS)


def resnet() -> Functions:
    """Haiku's residual net, with the state of its batch norms."""
    import haiku as hk

    def run(x: Any, is_training: bool) -> Any:
        first = {"output_channels": D, "kernel_shape": 3, "stride": 1}
        sizes = {"channels_per_group": (D,) * 4, "use_projection": (True,) * 4}
        net = hk.nets.ResNet([1] * 4, 5, bottleneck=False, initial_conv_config=first, **sizes)
        return net(x, is_training)

    fn, x = hk.without_apply_rng(hk.transform_with_state(run)), np.moveaxis(PICTURES, 1, -1)
    params, state = fn.init(jax.random.key(0), x, True)
    read = lambda params, state, x: fn.apply(params, state, x, False)[0]  # noqa: E731
    return Functions(read, params, state, x)


def graphcast() -> Functions:
    """Messages along the edges of a mesh, as GraphCast sends them: jraph's nets of Haiku's MLPs."""
    import haiku as hk
    import jraph

    rng = np.random.default_rng(0)
    nodes, senders, receivers = 6, *rng.integers(0, 6, (2, 12))
    graph = jraph.GraphsTuple(
        nodes=rng.standard_normal((nodes, 4)).astype(np.float32),
        edges=rng.standard_normal((12, 3)).astype(np.float32),
        senders=senders,
        receivers=receivers,
        globals=None,
        n_node=np.array([nodes]),
        n_edge=np.array([12]),
    )

    def net(name: str, outputs: int = D) -> Any:
        def run(*parts: Any) -> Any:
            x = jnp.concatenate([x for x in parts if x is not None], -1)
            x = hk.nets.MLP([D, outputs], activation=jax.nn.silu, name=name)(x)
            return hk.LayerNorm(-1, True, True, name=f"{name}_norm")(x) if outputs == D else x

        return run

    def run(graph: Any) -> Any:
        graph = jraph.GraphMapFeatures(net("edge_encoder"), net("node_encoder"))(graph)
        for i in range(LAYERS):
            edges, own = net(f"edges_{i}"), net(f"nodes_{i}")
            new = jraph.InteractionNetwork(
                lambda edge, sent, received, edges=edges: edges(edge, sent, received),
                lambda node, received, own=own: own(node, received),
            )(graph)
            add = {"nodes": graph.nodes + new.nodes, "edges": graph.edges + new.edges}
            graph = graph._replace(**add)
        return net("decoder", 4)(graph.nodes)

    fn = hk.without_apply_rng(hk.transform(run))
    return Functions(fn.apply, jax.eval_shape(fn.init, jax.random.key(0), graph), graph)


def plain() -> Functions:
    """A language model of `jax.numpy` with a loop over layers and weights that lie on a mesh."""
    count = jax.device_count()
    mesh = jax.make_mesh(
        (count, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    placed = lambda x, *axes: jax.lax.with_sharding_constraint(  # noqa: E731
        x, NamedSharding(mesh, PartitionSpec(*axes))
    )

    def norm(x: Any, scale: Any) -> Any:
        return x * scale * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def layer(x: Any, own: Mapping[str, Any]) -> Any:
        attention, mlp = own["attention"], own["mlp"]
        h = norm(x, attention["norm"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, attention[name]) for name in ("wq", "wk", "wv"))
        scores = jnp.einsum("bqhk,bthk->bhqt", q, k) * (D // HEADS) ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -1e9)
        mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), v)
        x = placed(x + jnp.einsum("bqhk,hkd->bqd", mixed, attention["wo"]), "data")
        h = norm(x, mlp["norm"])
        gated = placed(jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"]), "data", None, "model")
        return placed(x + gated @ mlp["down"], "data"), None

    def fn(params: Any, ids: Any) -> Any:
        x = placed(params["embed"][ids], "data")
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        return norm(x, params["norm"]) @ params["unembed"]

    heads, wide = (D, HEADS, D // HEADS), (D, FEED_FORWARD)
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)  # noqa: E731
    attention = {"wq": heads, "wk": heads, "wv": heads, "wo": (*heads[1:], D), "norm": (D,)}
    mlp = {"gate": wide, "up": wide, "down": wide[::-1], "norm": (D,)}
    layers = {
        part: {name: shape(LAYERS, *size) for name, size in sizes.items()}
        for part, sizes in {"attention": attention, "mlp": mlp}.items()
    }
    others = {"embed": shape(VOCAB, D), "norm": shape(D), "unembed": shape(D, VOCAB)}
    rules = {"layers/*/{wq,wk,wv,gate,up}": PartitionSpec(None, None, "model")}
    state = functools.partial(aj.shard, mesh=mesh, rules=rules)
    ids = np.resize(IDS, (2 * count, LENGTH))
    return Functions(fn, {"layers": layers, **others}, ids, placed=state)


model = functools.partial(Model, library="functions")
EQUINOX_ATTENTION = {
    "query_value": ("**/{query_proj,value_proj}",),
    "key_value": ("**/{key_proj,value_proj}",),
}
FUNCTIONS = (
    model(
        "ESM2 (esm2quinox)",
        build=esm2,
        inner=("layers/{**/,}linear2",),
        outputs=("layers/{**/,}{attn,linear2}",),
        attention=("**/attn",),
        embedding=("logit_head/linear2",),
        norms=("**/layer_norm*/{weight,bias}",),
        axes={"**/weight": "oi"},
        **EQUINOX_ATTENTION,
    ),
    model(
        "ViT (equimo)",
        build=equimo,
        query_value=("**/qkv",),
        slices=((0, D), (2 * D, 3 * D)),
        key_value=("**/qkv",),
        inner=("**/fc2",),
        outputs=("**/attn/proj", "**/fc2"),
        attention=("**/attn",),
        embedding=("patch_embed/proj",),
        norms=("**/{norm,prenorm}/{weight,bias}",),
        axes={"patch_embed/proj/weight": "oiii", "**/weight": "oi"},
        skipped=("global_pos_embed/weight",),
    ),
    model(
        "like BERT (Equinox)",
        build=bert,
        inner=("layers/*/output",),
        outputs=("layers/*/{attention,output}",),
        attention=("layers/*/attention",),
        embedding=("words",),
        norms=("**/norms/**",),
        axes={"{words,positions}/weight": "io", "**/weight": "oi"},
        **EQUINOX_ATTENTION,
    ),
    model(
        "like a score model (Equinox)",
        build=score_model,
        query_value=("**/channels/0",),
        key_value=("**/channels/0",),
        inner=("**/channels/1",),
        outputs=("**/channels/1",),
        attention=(),
        embedding=("inner",),
        norms=("**/norm/*",),
        axes={"{inner,outer}/weight": "oiii", "**/weight": "oi"},
    ),
    model(
        "like a GRU (Equinox)",
        build=recurrent,
        query_value=("cell/weight_*",),
        key_value=("cell/weight_ih",),
        inner=("head",),
        outputs=("cell",),
        attention=(),
        embedding=("words",),
        norms=("norm/*",),
        axes={"words/weight": "io", "**/weight*": "oi"},
    ),
    model(
        "like a transformer (Haiku)",
        build=haiku_transformer,
        query_value=("**/{query,value}",),
        key_value=("**/{key,value}",),
        inner=("output_*",),
        outputs=("attention_*/linear", "output_*"),
        attention=("attention_*",),
        embedding=("embed",),
        norms=("norm*/*",),
        skipped=("~/positions",),
    ),
    model(
        "ResNet (Haiku)",
        build=resnet,
        query_value=("**/conv_0",),
        key_value=("**/conv_0",),
        inner=("**/logits",),
        outputs=("**/conv_1",),
        attention=(),
        embedding=("**/initial_conv",),
        norms=("**/batchnorm*/*",),
    ),
    model(
        "like GraphCast (jraph, Haiku)",
        build=graphcast,
        query_value=("{edges,nodes}_*/**/linear_0",),
        key_value=("{edges,nodes}_*/**/linear_0",),
        inner=("{edges,nodes}_*/**/linear_1",),
        outputs=("{edges,nodes}_*/**/linear_1",),
        attention=(),
        embedding=("*_encoder/**/linear_0",),
        norms=("*_norm/*",),
    ),
    model(
        "plain, sharded, scanned (jax.numpy)",
        build=plain,
        query_value=("**/{wq,wv}",),
        key_value=("**/{wk,wv}",),
        inner=("**/down",),
        outputs=(),
        attention=("**/attention",),
        embedding=("embed",),
        norms=("**/norm",),
        axes={"**/{wq,wk,wv}": "ioo", "**/wo": "iio"},
    ),
)
