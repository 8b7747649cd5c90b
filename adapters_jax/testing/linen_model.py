"""A tiny linen model with every kind of layer that methods attach to."""

from typing import Any

from flax import linen as nn

VOCAB, D, HIDDEN, HEADS = 11, 8, 16, 2
KINDS = ("attention", "conv", "gated", "mix", "mlp")


class LinenMlp(nn.Module):
    """Two dense layers."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """Up, ReLU, down."""
        h = nn.Dense(HIDDEN, name="up", dtype=self.dtype)(x)
        return nn.Dense(D, name="output", dtype=self.dtype)(nn.relu(h))


class LinenGated(nn.Module):
    """A dense layer and a gate for each token."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """A dictionary with the gate, (..., 1), and in a tuple the output."""
        gate = nn.sigmoid(nn.Dense(1, name="gate", dtype=self.dtype)(x))
        return {"gate": gate, "out": (nn.Dense(D, name="value", dtype=self.dtype)(x), None)}


class LinenBlock(nn.Module):
    """A layer of one kind with a residual and a norm."""

    kind: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        """The output, and None for the scan."""
        layer = {
            "attention": lambda: nn.MultiHeadDotProductAttention(
                HEADS, name="attention", dtype=self.dtype
            ),
            "conv": lambda: nn.Conv(D, (3,), name="conv", dtype=self.dtype),
            "gated": lambda: LinenGated(self.dtype, name="gated"),
            "mix": lambda: nn.Einsum(
                (D, D), "btd,df->btf", name="mix", use_bias=False, dtype=self.dtype
            ),
            "mlp": lambda: LinenMlp(self.dtype, name="mlp"),
        }[self.kind]()
        y = layer(x)
        y = y["gate"] * y["out"][0] if self.kind == "gated" else y
        return nn.RMSNorm(name="norm", dtype=self.dtype)(x + y), None


class LinenNet(nn.Module):
    """An embedding, blocks, and the embedding as the output layer."""

    kind: str
    layers: int = 1
    scan: bool = False
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, ids):
        """Logits of token ids."""
        embed = nn.Embed(VOCAB, D, name="embed", dtype=self.dtype)
        x = embed(ids)
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        if self.scan:
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = stack(self.kind, self.dtype, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(self.kind, self.dtype, name=f"layer_{i}")(x)
        return embed.attend(x)
