"""A task that the library does not have: a tag for each word of a text, by a head on its tokens.

A task's author writes no more than this: one module, and one line in the registry.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adapters_jax as aj
from adapters_jax.files.identity import base_identity
from adapters_jax.files.loading import load_adapter
from adapters_jax.finetune.data.batches import NOTHING, Batches
from adapters_jax.finetune.data.tables import Table, read_rows
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.pretrained.encoder import INPUTS, load_encoder
from adapters_jax.finetune.tasks.base import Prepared, Task, Untrained, Usage, in_row_order
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.linen import init_adapters
from adapters_jax.training.step import make_eval_step

LENGTH = 8


class Tagger(nn.Module):
    """A BERT with a head on the state of each token."""

    config: BertConfig
    tags: int

    @nn.compact
    def __call__(self, *inputs):
        return nn.Dense(self.tags, name="head")(Bert(self.config, name="bert")(*inputs))


class TaggedRow(NamedTuple):
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray  # NOTHING on special tokens and padding


@dataclass(frozen=True)
class TaggingProblem:
    """A `Problem`."""

    model: Any
    params: Any
    train: Batches
    held_out: dict[str, Batches]
    labels: dict[str, np.ndarray]
    metrics: tuple[str, ...] = ("accuracy",)
    mesh: None = None

    @property
    def recipe(self):
        return self.model.recipe

    @cached_property
    def _evaluate(self):
        return make_eval_step(self._logits)

    def _logits(self, params, batch):
        return self.model.apply({"params": params}, *(batch[name] for name in INPUTS))

    def loss(self, params, batch, key):
        labels = jnp.asarray(batch["labels"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self._logits(params, batch), jnp.maximum(labels, 0)
        )
        return jnp.mean(batch["weight"][:, None] * jnp.where(labels == NOTHING, 0.0, losses))

    def batch(self, step):
        return self.train[step]

    def score(self, state, part):
        def run(batch):
            logits = self._evaluate(state, {name: batch[name] for name in INPUTS})
            return jnp.argmax(logits, axis=-1)

        found, right = in_row_order(run, self.held_out[part]), self.labels[part]
        return {"accuracy": float(np.mean((found == right)[right != NOTHING]))}


@dataclass(frozen=True)
class PreparedTagging(Prepared):
    @property
    def identity(self):
        return base_identity(self.problem.params, self.problem.recipe)

    def baselines(self):
        shares = {
            part: {"accuracy": float(np.mean(labels[labels != NOTHING] == 0))}
            for part, labels in self.problem.labels.items()
        }
        return [Untrained("the first tag", lambda: shares)]


@dataclass(frozen=True)
class TagPrediction(Prediction):
    tags: list[str]


@dataclass(frozen=True)
class TagPredictor:
    encoder: Any
    model: Any
    params: Any
    tags: tuple[str, ...]
    max_length: int = LENGTH

    def count_cut(self, texts):
        return self.encoder.encode(texts, self.max_length)[1]

    def predict(self, texts):
        rows, _ = self.encoder.encode(texts, self.max_length)
        pad_id = self.encoder.config.pad_token_id
        batches = Batches(rows, None, 4, None, (self.max_length,), pad_id)
        tag = jax.jit(lambda *arrays: self.model.apply({"params": self.params}, *arrays).argmax(-1))
        found = in_row_order(lambda batch: tag(*(batch[name] for name in INPUTS)), batches)
        ends = [len(row.input_ids) - 1 for row in rows]
        return [
            TagPrediction(*pair, [self.tags[i] for i in ids[1:end]])
            for pair, ids, end in zip(texts, found, ends, strict=True)
        ]


class Tagging(Task):
    name = "tagging"
    kind = "encoder"
    pipeline = "token-classification"
    command = "predict"
    metrics = ("accuracy",)
    columns = {"text": "text", "tags": "tags"}  # noqa: RUF012
    needed = {"tag_names": list, "text": str, "pairs": bool}  # noqa: RUF012

    def read(self, path, columns, metrics):
        return read_rows(path, columns["text"], None, columns["tags"])

    def prepare(self, data, setup):
        encoder = load_encoder(setup.model)
        names = sorted({tag for tags in data.train.labels for tag in tags.split()})
        rows = {p: _rows(encoder, getattr(data, p), names, setup) for p in ("train", "dev", "test")}
        batches = Batches(rows["train"], None, setup.batch_size, setup.seed, (LENGTH,))
        tagger = Tagger(encoder.config, len(names))
        model = aj.adapt(tagger, setup.recipe(head="head", layers={"**/layer_{}": 1}))
        params = init_adapters(
            model,
            _params(tagger, encoder, setup.seed),
            jax.random.key(setup.seed),
            *(batches[0][name] for name in INPUTS),
        )
        held_out = {
            p: Batches(rows[p], None, setup.batch_size, None, (LENGTH,)) for p in ("dev", "test")
        }
        labels = {p: np.stack([_whole(row.labels) for row in rows[p]]) for p in held_out}
        problem = TaggingProblem(model, params, batches, held_out, labels)
        columns = self.of_columns(setup.columns)
        config = {
            "max_length": LENGTH,
            "metrics": list(data.metrics),
            "tag_names": names,
            "text": columns["text"],
            "pairs": False,
        }
        return PreparedTagging(problem, 0, config)

    def open(self, run, config):
        encoder, names = load_encoder(config["model"]), tuple(config["tag_names"])
        tagger = Tagger(encoder.config, len(names))
        ids = np.zeros((1, 8), np.int32)
        model, params = load_adapter(run.adapter, tagger, _params(tagger, encoder, 0), ids)
        return TagPredictor(encoder, model, params, names)

    def usage(self, run, config, model=None):
        words = ["adapters-jax", "predict", run, "tag these words"]
        return Usage.of(words, "load_predictor", run, model, "predict([('tag these words', None)])")


def _rows(encoder, table: Table, names, setup):
    rows, _ = encoder.encode(table.texts, setup.max_length or LENGTH)
    ids = [[names.index(tag) for tag in tags.split()] for tags in table.labels]
    return [
        TaggedRow(*row, np.array([NOTHING, *tags, NOTHING], np.int32)[: len(row.input_ids)])
        for row, tags in zip(rows, ids, strict=True)
    ]


def _whole(labels):
    return np.pad(labels, (0, LENGTH - len(labels)), constant_values=NOTHING)


def _params(tagger, encoder, seed):
    init = jax.jit(tagger.init)
    head = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]["head"]
    return {"bert": encoder.params, "head": head}
