"""The tiny model of `linen_model` in NNX, with the same parameter paths."""

from flax import nnx

from adapters_jax.testing.linen_model import HEADS, HIDDEN, VOCAB, D


class NnxMlp(nnx.Module):
    """Two dense layers."""

    def __init__(self, dtype, rngs):
        self.up = nnx.Linear(D, HIDDEN, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        """Up, ReLU, down."""
        return self.output(nnx.relu(self.up(x)))


class NnxGated(nnx.Module):
    """A dense layer and a gate for each token."""

    def __init__(self, dtype, rngs):
        self.gate = nnx.Linear(D, 1, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(D, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        """A dictionary with the gate, (..., 1), and in a tuple the output."""
        return {"gate": nnx.sigmoid(self.gate(x)), "out": (self.value(x), None)}


class NnxBlock(nnx.Module):
    """A layer of one kind with a residual and a norm."""

    def __init__(self, kind, dtype, rngs):
        layer = {
            "attention": lambda: nnx.MultiHeadAttention(
                HEADS, D, dtype=dtype, decode=False, rngs=rngs
            ),
            "conv": lambda: nnx.Conv(D, D, (3,), dtype=dtype, rngs=rngs),
            "gated": lambda: NnxGated(dtype, rngs),
            "mix": lambda: nnx.Einsum("btd,df->btf", (D, D), dtype=dtype, rngs=rngs),
            "mlp": lambda: NnxMlp(dtype, rngs),
        }[kind]()
        setattr(self, kind, layer)
        self.kind = kind
        self.norm = nnx.RMSNorm(D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        """The output."""
        y = getattr(self, self.kind)(x)
        y = y["gate"] * y["out"][0] if self.kind == "gated" else y
        return self.norm(x + y)


class NnxNet(nnx.Module):
    """An embedding, blocks, and the embedding as the output layer."""

    def __init__(self, kind, layers=1, scan=False, remat=False, dtype=None, *, rngs):
        self.layers_, self.scan, self.remat = layers, scan, remat
        self.embed = nnx.Embed(VOCAB, D, dtype=dtype, rngs=rngs)
        if scan:

            @nnx.split_rngs(splits=layers)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stack(rngs):
                return NnxBlock(kind, dtype, rngs)

            self.layers = stack(rngs)
        else:
            for i in range(layers):
                setattr(self, f"layer_{i}", NnxBlock(kind, dtype, rngs))

    def __call__(self, ids):
        """Logits of token ids."""
        x = self.embed(ids)

        def run(block, x):
            return block(x)

        run = nnx.remat(run) if self.remat else run
        if self.scan:
            x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        else:
            for i in range(self.layers_):
                x = run(getattr(self, f"layer_{i}"), x)
        return self.embed.attend(x)
