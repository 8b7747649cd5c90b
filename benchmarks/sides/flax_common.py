"""What the sides on JAX share: loading the base model, and compiling and counting a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adapters_jax as aj
from adapters_jax.files.adapter import read_adapter
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.bert import FAMILY, BertClassifier, BertConfig
from adapters_jax.finetune.tensors import from_tensors
from adapters_jax.trees import flatten
from benchmarks.by_hand import Sizes
from benchmarks.llama_by_hand import next_token_loss
from benchmarks.sides.job import DECAY, LABELS, RATE, Job, Step, versions

TX = optax.adamw(RATE, weight_decay=DECAY)
PACKAGES = ("jax", "jaxlib", "flax", "optax")


class FlaxStep(Step):
    """A training step with its state.

    Args:
        advance: the step, `carry -> (carry, loss, trained)`.
        carry: the first state.
        trained: the trained arrays.
        lower: returns the lowered computation of the step.
        *packages: the libraries whose versions are reported.
    """

    def __init__(
        self,
        advance: Callable[[Any], Any],
        carry: Any,
        trained: Any,
        lower: Callable[[], Any],
        *packages: str,
    ):
        self.advance, self.carry, self.lower = advance, carry, lower
        count = sum(x.size for x in jax.tree.leaves(trained))
        self.about = {"trainable": count, "versions": versions(*packages, *PACKAGES)}

    def run(self) -> None:
        self.carry, self.loss, trained = self.advance(self.carry)
        jax.block_until_ready((self.loss, trained))

    def analysis(self) -> dict[str, float]:
        """XLA's counts of the step. It compiles again, so call it after memory was measured."""
        compiled = self.lower().compile()
        memory = compiled.memory_analysis()
        live = memory.argument_size_in_bytes + memory.output_size_in_bytes
        live += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        counted = {"temporary": memory.temp_size_in_bytes, "live": live}
        cost = compiled.cost_analysis()
        return {"flops": cost["flops"], "bytes": cost["bytes accessed"], **counted}


def step_of(step: Any, adapters: Any, base: Any, batch: Any, *packages: str) -> FlaxStep:
    """Makes a side of `step(adapters, opt_state, base, batch) -> adapters, opt_state, loss`."""
    adapters = jax.tree.map(jnp.copy, adapters)  # copies, since a step donates them
    opt_state = TX.init(adapters)

    def advance(carry: Any) -> Any:
        adapters, opt_state, loss = step(*carry, base, batch)
        return (adapters, opt_state), loss, adapters

    def lower() -> Any:
        return step.lower(*jax.eval_shape(lambda *x: x, adapters, opt_state), base, batch)

    return FlaxStep(advance, (adapters, opt_state), adapters, lower, *packages)


def batch_of(job: Job) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in job.data().items()}


def decoder_loss(job: Job) -> Callable[[Any, jax.Array], jax.Array]:
    """The loss of a model's next tokens, `loss(model, ids)`."""

    def chunked(model: Any, ids: jax.Array) -> jax.Array:
        labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return aj.losses.cross_entropy(model.hidden(ids), model.logits, labels)

    return chunked if job.chunked else lambda model, ids: next_token_loss(model(ids), ids)


def load_classifier(base: Path) -> tuple[BertClassifier, Any]:
    """Loads a classifier that reads the pooler, as Hugging Face's does, and its weights."""
    model = BertClassifier(BertConfig.from_json(base / "config.json"), LABELS, pooling="pooler")
    ids = jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return model, from_tensors(huggingface.read_tensors(base), FAMILY.classifier.names, like)


def sizes_of(config: BertConfig, **more: Any) -> Sizes:
    """The sizes of the models written by hand."""
    return Sizes(
        layers=config.num_hidden_layers,
        d=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        labels=LABELS,
        pooler=True,
        **more,
    )


def only(job: Job, library: str, *methods: str) -> None:
    """Raises ValueError if a library does not have the method of a job."""
    if job.method not in methods:
        raise ValueError(f"{library} does not support {job.method}, only {', '.join(methods)}")


def factors_of(job: Job) -> dict[str, jax.Array]:
    """The arrays of our adapter file, by path."""
    return {
        path: jnp.asarray(x) for path, x in flatten(read_adapter(job.adapter("ours"))[1]).items()
    }
