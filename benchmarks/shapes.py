"""GPT-2 and BERT in published shapes, with published recipes, for benchmarks of claims.

Weights are random, with noise on every leaf, since a factor of zeros hides a wrong scale. There is
no dropout, and the optimiser is AdamW.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adapters_jax as aj
from adapters_jax.finetune.models.bert import BERT_BASE, BERT_LARGE, BertClassifier, BertConfig
from adapters_jax.trees import Tree, flatten, unflatten
from benchmarks.gpt2 import GPT2, GPT2_MEDIUM, GPT2Config
from benchmarks.report import Verdict

TX = optax.adamw(1e-4)
MODELS: dict[str, nn.Module] = {
    "BERT-base": BertClassifier(BERT_BASE, 2),
    "BERT-large": BertClassifier(BERT_LARGE, 2),
    "GPT-2 medium": GPT2(GPT2_MEDIUM),
    "toy BERT": BertClassifier(BertConfig(99, 64, 1, 4, 128, max_position_embeddings=32), 2),
    "toy GPT-2": GPT2(GPT2Config(99, 32, 64, 1, 4)),
}
FULL, LORA, HOULSBY = "full", "LoRA r=8", "Houlsby m=64"
RECIPES: dict[str, aj.Recipe] = {
    FULL: aj.full(),
    LORA: aj.lora(8),
    HOULSBY: aj.houlsby(64),
    "prefix K=20": aj.Recipe(aj.PrefixTuning("**/attention", 20)),
    "LLaMA-Adapter K=10": aj.Recipe(aj.LlamaAdapter("**/attention", 10)),
}


@dataclass(frozen=True)
class Subject:
    """A model of a published shape, and the size of its batches.

    Attributes:
        model: a name in `MODELS`.
        batch: the number of sequences in a batch.
        length: the number of tokens in a sequence.
        remat: whether blocks are recomputed in the backward pass instead of stored. The blocks are
            scanned then, since XLA undoes the recomputation of unrolled blocks on a CPU.
    """

    model: str
    batch: int
    length: int
    remat: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x {self.length}{', recomputed' * self.remat}"

    @property
    def base(self) -> Any:
        """The base model, without weights."""
        return MODELS[self.model].clone(remat=self.remat, scan=self.remat)

    @property
    def classifies(self) -> bool:
        """Whether it is an encoder with a head, which every recipe trains."""
        return isinstance(self.base, BertClassifier)

    @property
    def job(self) -> dict[str, Any]:
        """The fields as JSON values, for another process."""
        return asdict(self)

    def ids(self, seed: int = 0) -> jax.Array:
        """Random tokens."""
        rng = np.random.default_rng(seed)
        shape = (self.batch, self.length)
        return jnp.asarray(rng.integers(0, self.base.config.vocab_size, shape), jnp.int32)

    def recipe(self, name: str) -> aj.Recipe:
        """The recipe of a name in `RECIPES`, which also trains the head of a classifier."""
        found = RECIPES[name]
        if not self.classifies or name == FULL:
            return found
        return found + aj.Recipe(aj.Unfreeze("head/**"))

    def weights(self, seed: int = 0) -> Tree:
        """Random parameters of the base."""
        shapes = jax.eval_shape(self.base.init, jax.random.key(0), self.ids())["params"]
        return unflatten(drawn(flatten(shapes), seed))

    def adapted(self, recipe: aj.Recipe, base: Tree, seed: int = 1) -> tuple[Any, Tree]:
        """The adapted model, and its parameters: the arrays of the base and random ones."""
        model = aj.adapt(self.base, recipe)
        shapes = jax.eval_shape(lambda base: base, base)
        whole = flatten(aj.init_adapters(model, shapes, jax.random.key(0), self.ids()))
        held = flatten(base)
        added = {path: x for path, x in whole.items() if path not in held}
        return model, unflatten({**held, **drawn(added, seed)})

    def state(self, recipe: aj.Recipe, base: Tree, seed: int = 1) -> tuple[Any, aj.TrainState]:
        """The adapted model, and its training state, which starts from random adapters."""
        model, params = self.adapted(recipe, base, seed)
        return model, aj.TrainState.create(model, params, tx=TX, key=jax.random.key(2))

    def loss(self, model: Any) -> Callable[[Tree, Any, Any], jax.Array]:
        """The cross-entropy of a sentence's label, or of the next tokens."""

        def loss(params: Tree, batch: Any, key: Any) -> jax.Array:
            logits = model.apply({"params": params}, batch["ids"])
            if not self.classifies:
                logits = logits[:, :-1]
            entropy = optax.softmax_cross_entropy_with_integer_labels
            return entropy(logits, batch["labels"]).mean()

        return loss

    def data(self, seed: int = 0) -> dict[str, jax.Array]:
        """A batch for `loss`."""
        ids = self.ids(seed)
        return {"ids": ids, "labels": ids[:, 0] % 2 if self.classifies else ids[:, 1:]}


def drawn(shapes: Mapping[str, Any], seed: int) -> dict[str, jax.Array]:
    """Random arrays by path, with deviation 0.02; the scale of a norm has mean 1."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        noise = np.float32(0.02) * rng.standard_normal(shape, np.float32)
        *_, owner, name = ["", *path.split("/")]
        return jnp.asarray(noise + (name == "scale" and "norm" in owner))

    return {path: draw(path, x.shape) for path, x in shapes.items()}


class Step:
    """A compiled training step; each call continues from the state of the last one.

    Attributes:
        trainable: the number of trainable parameters.
        parameters: the number of all parameters.
        flops: the FLOPs of a step, counted by XLA.
        planned: the bytes that XLA plans for a step: inputs, outputs and working memory.
        loss: the loss of the last step.
    """

    def __init__(self, subject: Subject, recipe: aj.Recipe, base: Tree):
        model, state = subject.state(recipe, base)
        self.batch, self.loss = subject.data(), float("nan")
        self.trainable, held = (
            sum(x.size for x in jax.tree.leaves(t)) for t in (state.adapters, state.base)
        )
        self.parameters = self.trainable + held
        step: Any = aj.make_train_step(subject.loss(model))
        self.frozen, self.rest = state.base, replace(state, base=None)
        self.compiled = step.jitted.lower(self.rest, self.frozen, self.batch).compile()
        self.flops = float(self.compiled.cost_analysis()["flops"])
        memory = self.compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.planned = held - memory.alias_size_in_bytes + memory.temp_size_in_bytes

    def __call__(self) -> None:
        self.rest, metrics = self.compiled(self.rest, self.frozen, self.batch)
        jax.block_until_ready(self.rest)
        self.loss = float(metrics["loss"])


def agreement(ours: float, published: float, more_is_fine: bool = False) -> Verdict:
    """Compares a figure with the published one.

    Args:
        ours: our figure.
        published: the published figure, above 0.
        more_is_fine: whether a larger figure also reproduces the claim, as it does if the claim is
            an advantage.

    Returns:
        "reproduced" within a tenth of the published figure, "in part" within a factor of two.

    Example:
        >>> agreement(9251, 10_000), agreement(4625, 8000), agreement(4, 3)
        ('reproduced', 'in part', 'in part')
        >>> agreement(4, 3, more_is_fine=True), agreement(1, 3)
        ('reproduced', 'not reproduced')
    """
    ratio = ours / published
    if ratio >= 0.9 and (ratio <= 1.1 or more_is_fine):
        return "reproduced"
    return "in part" if 0.5 <= ratio <= 2 else "not reproduced"
