"""What tasks on texts with one label share: an encoder with a head learns the labels.

The task's `Readout` has what a label is: a class or a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from adapters_jax.adapt import adapt
from adapters_jax.data.batches import Batches, Row, choose_buckets
from adapters_jax.data.datasets import TaskData, load_labelled
from adapters_jax.data.readers import DataError
from adapters_jax.data.tables import Texts
from adapters_jax.io.identity import BaseIdentity, base_identity
from adapters_jax.io.loading import load_adapter
from adapters_jax.io.run_directory import Run, RunError, check_base
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.presets import HEAD, head_only
from adapters_jax.pretrained.encoder import INPUTS, Encoder, load_encoder, store_frozen
from adapters_jax.tasks.base import (
    Prediction,
    Prepared,
    Problem,
    Scores,
    Setup,
    Task,
    TrainedHead,
    Untrained,
    Usage,
    in_row_order,
)
from adapters_jax.tasks.head import head_problem
from adapters_jax.tasks.labelled_problem import LabelledProblem
from adapters_jax.tasks.metrics import compute
from adapters_jax.tasks.readout import Readout

MAX_LENGTH = 128
BATCH_SIZE = 32  # texts predicted at a time


class LabelledTexts(Task):
    """A task on texts with one label each.

    Attributes:
        defaults: the metrics if the user chooses none.
        readout: the class of its `Readout`.
    """

    kind = "encoder"
    pipeline = "text-classification"
    command = "predict"
    columns: ClassVar[Mapping[str, str | None]] = {
        "text": "text",
        "text_pair": None,
        "label": "label",
    }
    flags = ("metrics", "glue", "data", "pooling", "dropout", "head_learning_rate")
    needed: ClassVar[Mapping[str, type]] = {
        "pooling": str,
        "target": dict,
        "text": str,
        "pairs": bool,
    }
    defaults: ClassVar[tuple[str, ...]]
    readout: ClassVar[type[Readout]]

    def load(
        self, files: Mapping[str, Path], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads texts or pairs of texts, and their labels; see `Task.load`."""
        named: Any = self.of_columns(columns)
        return load_labelled(
            files["train"],
            files.get("dev"),
            files.get("test"),
            **named,
            task=self.name,
            metrics=metrics or self.defaults,
        )

    def prepare(self, data: TaskData, setup: Setup) -> PreparedTexts:
        """Prepares an encoder with a head for the rows; see `Task.prepare`."""
        encoder = load_encoder(
            setup.model, setup.pooling, setup.dtype, setup.quantize, setup.attention
        )
        length = setup.max_length or MAX_LENGTH
        rows = {
            part: _encode(encoder, getattr(data, part).texts, part, length, setup)
            for part in ("train", "dev", "test")
        }
        buckets = choose_buckets(rows["train"], length, setup.batch_size)
        problem = self._problem(data, setup, encoder, rows, buckets)
        labels = problem.readout.encode(data.train.labels)
        columns = self.of_columns(setup.columns)
        tokens = sum(len(row.input_ids) for row in rows["train"])
        return PreparedTexts(
            problem,
            encoder.sha256,
            0 if problem.recipe == head_only() else tokens,
            {
                "max_length": length,
                "metrics": list(data.metrics),
                "pooling": setup.pooling,
                "target": problem.readout.to_config(),
                "text": columns["text"],
                "text_pair": columns["text_pair"],
                "pairs": columns["text_pair"] is not None,
            },
            data,
            setup,
            encoder,
            encoder.in_order(rows["train"], labels, setup.batch_size, buckets),
        )

    def _problem(
        self,
        data: TaskData,
        setup: Setup,
        encoder: Encoder,
        rows: Mapping[str, Sequence[Row]],
        buckets: tuple[int, ...],
    ) -> LabelledProblem:
        readout, size = self.readout.of(data.train), setup.batch_size
        labels, pad_id = readout.encode(data.train.labels), encoder.config.pad_token_id
        batches = Batches(rows["train"], labels, size, setup.seed, buckets, pad_id)
        recipe = setup.recipe(head=HEAD, num_layers=encoder.config.num_layers)
        model = adapt(encoder.classifier(readout.width, setup.dropout), recipe)
        head_key, adapters_key = jax.random.split(jax.random.key(setup.seed))
        params = init_adapters(
            model,
            encoder.init(readout.width, head_key),
            adapters_key,
            *(batches[0][name] for name in INPUTS),
        )
        return LabelledProblem(
            model,
            store_frozen(params, recipe, setup.dtype),
            INPUTS,
            readout,
            batches,
            {p: encoder.in_order(rows[p], None, size, buckets) for p in ("dev", "test")},
            {"dev": data.dev.labels, "test": data.test.labels},
            data.metrics,
            setup.mesh,
        )

    def open(self, run: Run, config: Mapping[str, Any]) -> TextPredictor:
        """Opens a run as a predictor; see `Task.open`."""
        try:
            readout = self.readout.from_config(config["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{run.config} is damaged: its target is {config['target']!r}: {error}"
            ) from error
        encoder = load_encoder(
            config["model"], config["pooling"], config["dtype"], config.get("quantize")
        )
        params = encoder.init(readout.width, jax.random.key(0))
        ids = np.zeros((1, 8), np.int32)
        classifier, base = encoder.classifier(readout.width), encoder.identity
        adapted, params = load_adapter(run.adapter, classifier, params, ids, base=base)
        check_base(run, dict(config), encoder.sha256)
        params = store_frozen(params, adapted.recipe, config["dtype"])
        return TextPredictor(
            encoder, adapted, params, readout, config["max_length"], config["pairs"]
        )

    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """Examples with two texts, or with one pair of texts; see `Task.usage`."""
        first, second = "A text of your own.", "Another one."
        row = (first, second if config.get("pairs") else None)
        words = ["adapters-jax", "predict", run, first, second]
        return Usage.of(words, "load_predictor", run, model, f"predict([{row!r}])")


def _encode(encoder: Encoder, texts: Texts, part: str, max_length: int, setup: Setup) -> list[Row]:
    rows, cut = encoder.encode(texts, max_length)
    if cut:
        setup.say(f"{cut} of {len(rows)} {part} texts are cut at {max_length} tokens")
    return rows


@dataclass(frozen=True)
class PreparedTexts(Prepared):
    """Texts prepared for an encoder with a head.

    Attributes:
        data: the rows as text.
        setup: the settings that they were prepared with.
        encoder: the base.
        in_order: the training rows, in order.
    """

    problem: LabelledProblem
    data: TaskData
    setup: Setup
    encoder: Encoder
    in_order: Batches

    @cached_property
    def identity(self) -> BaseIdentity:
        """The identity of the encoder with its head, even if the head alone is trained."""
        whole = base_identity(self.problem.params, self.problem.recipe)
        return replace(self.encoder.identity, tree_sha256=whole.tree_sha256)

    @property
    def _head_alone(self) -> bool:
        return self.problem.recipe == head_only()

    @property
    def trained(self) -> Problem:
        """The problem; a head that trains alone trains on cached features."""
        return self._head_problem() if self._head_alone else self.problem

    def baselines(self) -> Sequence[Untrained | TrainedHead]:
        """The best constant prediction, and a trained head on the frozen base."""
        constant = Untrained(self.problem.readout.constant_title, self._constant)
        return [constant] if self._head_alone else [constant, TrainedHead(self._head_problem)]

    def _head_problem(self) -> LabelledProblem:
        self.setup.say("computing the frozen base's features, once for all epochs of its head")
        return head_problem(self.problem, self.encoder, self.in_order, self.setup.seed)

    def _constant(self) -> Scores:
        problem = self.problem
        return {
            part: compute(
                problem.metrics, problem.readout.constant(self.data.train, len(labels)), labels
            )
            for part, labels in problem.labels.items()
        }


@dataclass(frozen=True)
class TextPredictor:
    """A run that is ready to predict; `adapters_jax.inference.load_predictor` makes it.

    Attributes:
        encoder: the base.
        model: the adapted model.
        params: its whole parameter tree.
        readout: maps the outputs to predictions.
        max_length: the largest number of tokens; longer texts are cut.
        pairs: whether it takes pairs of texts.
    """

    encoder: Encoder
    model: Adapted
    params: Any
    readout: Readout
    max_length: int
    pairs: bool

    def count_cut(self, texts: Texts) -> int:
        """The number of texts longer than `max_length` tokens."""
        return self.encoder.encode(texts, self.max_length)[1]

    def predict(self, texts: Texts) -> list[Prediction]:
        """Predicts each text.

        Args:
            texts: `(text, None)`, or `(text, second text)` for a run on pairs.

        Raises:
            DataError: there are no texts, one is no `(text, second)`, or they are pairs for a run
                on single texts, or the other way round.
        """
        if not texts or any(isinstance(row, str) or len(row) != 2 for row in texts):
            raise DataError(
                "predict: expected at least one text, each as (text, None) or (text, second text): "
                'predict([("A text.", None)])'
            )
        if any((pair is not None) != self.pairs for _, pair in texts):
            expected = "pairs of texts" if self.pairs else "single texts"
            raise DataError(f"the run was trained on {expected}; give it {expected}")
        rows, _ = self.encoder.encode(texts, self.max_length)
        buckets = choose_buckets(rows, self.max_length, BATCH_SIZE)
        batches = self.encoder.in_order(rows, None, BATCH_SIZE, buckets)
        apply = jax.jit(lambda params, arrays: self.model.apply({"params": params}, *arrays))
        outputs = in_row_order(
            lambda batch: apply(self.params, [batch[name] for name in INPUTS]), batches
        )
        return [self.readout.predict(*pair, row) for pair, row in zip(texts, outputs, strict=True)]
