"""What tasks on an encoder with a head share: the model, its rows, training, prediction.

The task's `Readout` has what a label is: a class, a number, the tags of words, an answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax

from adapters_jax.adapting import adapt
from adapters_jax.errors import UserError
from adapters_jax.files.base_model import MASKED
from adapters_jax.files.identity import BaseIdentity, base_identity
from adapters_jax.files.loading import load_adapter
from adapters_jax.finetune.data.annotated import Annotated
from adapters_jax.finetune.data.datasets import TaskData, hold_out_rows, load_labelled
from adapters_jax.finetune.data.readers import title_of
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.models.encoder import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder, load_encoder, store_frozen
from adapters_jax.finetune.run_directory import Run, RunError, check_base
from adapters_jax.finetune.tasks.base import (
    BatchSource,
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
from adapters_jax.finetune.tasks.head import head_problem
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem, apply_to_rows, one_by_one
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Batching, Inputs, Readout
from adapters_jax.finetune.tasks.views import Judged, View, shared
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.presets import HEAD, head_only
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState

BATCH_SIZE = 32  # texts predicted at a time
EPOCHS = 3.0  # of a head that reads all tokens, on the frozen base
LEAST_STEPS = 340  # of a new head and an adapter: `python -m benchmarks defaults`
PARTS = ("train", "dev", "test")


class EncoderTask(Task):
    """A task that an encoder with a head learns.

    Attributes:
        defaults: the metrics if the user chooses none.
        readout: the class of its `Readout`.
    """

    kind: ClassVar[Literal["encoder", "decoder", "vision"]] = "encoder"
    command = "predict"
    least_steps = LEAST_STEPS
    flags: ClassVar[tuple[str, ...]] = ("metrics", "dropout", "head_learning_rate")
    needed: ClassVar[Mapping[str, type]] = {
        "pooling": str,
        "target": dict,
        "text": str,
        "pairs": bool,
    }
    defaults: ClassVar[tuple[str, ...]]
    readout: ClassVar[type[Readout]]

    def texts(self, columns: Mapping[str, Any]) -> list[str]:
        """The columns of the texts that are needed to predict a row."""
        return [columns[role] for role in ("text", "text_pair") if columns.get(role) is not None]

    def prepare(self, data: TaskData, setup: Setup) -> PreparedTexts:
        """Prepares an encoder with a head for the rows; see `Task.prepare`."""
        readout = self.readout.made(data.train, setup)
        readout.check_batch(setup.batch_size // setup.accumulate)
        pooling = readout.pooling or setup.pooling
        encoder = load_encoder(setup.model, pooling, setup.dtype, setup.quantize, setup.attention)
        length = _length(setup, readout, encoder)
        inputs = {
            part: readout.encoded(encoder, getattr(data, part).texts, length) for part in PARTS
        }
        for part, found in inputs.items():
            if found.cut:
                count = len(getattr(data, part))
                setup.say(f"{found.cut} of {count} {part} texts are cut at {length} tokens")
        rows, labels = readout.targets(inputs["train"], data.train.labels)
        size, buckets = setup.batch_size, readout.buckets(rows, length, setup.batch_size)
        batches = readout.batches(encoder, rows, labels, Batching(size, setup.seed, buckets))
        problem = self._problem(data, setup, encoder, readout, batches, inputs, buckets)
        columns = self.texts(self.of_columns(setup.columns))
        tokens = readout.tokens(rows)
        return PreparedTexts(
            problem,
            encoder.sha256,
            0 if problem.recipe == head_only() else tokens,
            {
                "max_length": length,
                "metrics": list(data.metrics),
                "pooling": encoder.pooling,
                "target": readout.to_config(),
                "text": columns[0],
                "text_pair": columns[1] if len(columns) == 2 else None,
                "pairs": len(columns) == 2,
                **({"texts": columns} if len(columns) > 2 else {}),
                **readout.checksums(inputs),
            },
            data,
            setup,
            encoder,
            readout.batches(encoder, rows, labels, Batching(size, None, buckets)),
            self.least_steps,
        )

    def _problem(
        self,
        data: TaskData,
        setup: Setup,
        encoder: Encoder,
        readout: Readout,
        batches: BatchSource,
        inputs: Mapping[str, Inputs],
        buckets: Sequence[int],
    ) -> LabelledProblem:
        trains_head = readout.has_head and encoder.head is None
        recipe = setup.recipe(
            head=HEAD if trains_head else None, num_layers=encoder.config.num_layers
        )
        if not readout.has_head and recipe == head_only():
            raise UserError(f"--task {self.name} has no head to train; give another --method")
        if setup.augment and recipe == head_only():
            raise UserError(
                "--augment: a head that trains alone reads features that are computed once, of "
                "images as they are; leave it out, or give another --method"
            )
        model = adapt(encoder.classifier(_width(encoder, readout), setup.dropout), recipe)
        head_key, adapters_key = jax.random.split(jax.random.key(setup.seed))
        example = [batches[0][name] for name in readout.arrays]
        params = init_adapters(
            model,
            encoder.init(readout.width, head_key) if readout.has_head else encoder.bare[1],
            adapters_key,
            *map(one_by_one, example),
        )
        held_out = {part: inputs[part] for part in ("dev", "test")}
        in_order = Batching(setup.batch_size, None, buckets)
        return LabelledProblem(
            model,
            store_frozen(params, recipe, setup.dtype),
            readout.arrays,
            readout,
            batches,
            {
                part: readout.batches(encoder, found.rows, None, in_order)
                for part, found in held_out.items()
            },
            {part: getattr(data, part).labels for part in held_out},
            data.metrics,
            setup.mesh,
            {part: found.where for part, found in held_out.items()},
        )

    def open(self, run: Run, config: Mapping[str, Any]) -> TextPredictor:
        """Opens a run as a predictor; see `Task.open`."""
        try:
            readout = self.readout.from_config(config["target"])
            readout = readout.restored(config.get("summary", {}).get("dev", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{run.config} is damaged: its target is {config['target']!r}: {error}"
            ) from error
        encoder = load_encoder(
            config["model"], config["pooling"], config["dtype"], config.get("quantize")
        )
        params = encoder.bare[1]
        if readout.has_head:
            params = encoder.init(readout.width, jax.random.key(0))
        ids = encoder.example
        classifier, base = encoder.classifier(_width(encoder, readout)), encoder.identity
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

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """Those of the readout, and those of every task; see `Task.views`."""
        readout = self.readout.from_config(config["target"])
        return [*readout.views(judged, config["metrics"]), *shared(judged)]


class AnnotatedTask(EncoderTask):
    """A task whose rows have annotations of their own, such as a tag for each word."""

    def load(
        self, files: Mapping[str, Path], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads the rows by `read`; rows with the same `grouped` are held out together."""
        chosen = tuple(metrics) or self.defaults
        named = self.of_columns(columns)
        parts = {part: self.read(path, named, chosen) for part, path in files.items()}
        keys = [key_of(*self.grouped(texts)) for texts in parts["train"].texts]
        return hold_out_rows(title_of(files["train"]), parts, keys, chosen)

    @abstractmethod
    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Annotated:
        """Reads the rows of one file, by the columns of the task's roles."""

    def grouped(self, texts: Sequence[Any]) -> Sequence[Any]:
        """The texts of a row by which rows count as the same."""
        return texts


class LabelledTexts(EncoderTask):
    """A task on texts, or pairs of texts, with one label each."""

    pipeline = "text-classification"
    columns: ClassVar[Mapping[str, str | None]] = {
        "text": "text",
        "text_pair": None,
        "label": "label",
    }
    flags = (*EncoderTask.flags, "glue", "data", "pooling")

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


def _width(encoder: Encoder, readout: Readout) -> int:
    """The number of outputs of the model."""
    return readout.width if readout.has_head else encoder.config.hidden_size


def _length(setup: Setup, readout: Readout, encoder: Encoder) -> int:
    """The largest number of tokens; the default is at most what the model has positions for."""
    return setup.max_length or min(readout.max_length, encoder.longest)


@dataclass(frozen=True)
class PreparedTexts(Prepared):
    """Texts prepared for an encoder with a head.

    Attributes:
        data: the rows as text.
        setup: the settings that they were prepared with.
        encoder: the base.
        in_order: the training rows, in order.
        least_steps: the steps that a head which reads all tokens makes at least.
    """

    problem: LabelledProblem
    data: TaskData
    setup: Setup
    encoder: Encoder
    in_order: BatchSource
    least_steps: int

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
        cached = self._head_alone and not self._reads_tokens
        return self._head_problem() if cached else self.problem

    def baselines(self) -> Sequence[Untrained | TrainedHead]:
        """The best constant prediction, and the frozen base, with a trained head if it is new."""
        constant = Untrained(self.problem.readout.constant_title, self._constant)
        if not self.problem.readout.has_head or self.encoder.head is not None:
            return [constant, Untrained("frozen base", self._frozen)]
        passes = (EPOCHS, self.least_steps) if self._reads_tokens else ()
        trained = TrainedHead(self._head_problem, *passes)
        return [constant] if self._head_alone else [constant, trained]

    def judged(self, problem: Any, state: TrainState) -> Judged:
        """The predictions of dev and test, and the lengths of all rows; see `Prepared.judged`."""
        parts: dict[str, Any] = {"train": self.in_order, **self.problem.held_out}
        lengths = {
            part: found
            for part, batches in parts.items()
            if (found := self.problem.readout.lengths(batches))
        }
        data = {part: getattr(self.data, part) for part in self.problem.held_out}
        rows = {part: problem.judged(state, part, found) for part, found in data.items()}
        return Judged.of(lengths, **rows)

    @property
    def _reads_tokens(self) -> bool:
        return self.encoder.pooling in (TOKENS, MASKED)

    def _head_problem(self) -> LabelledProblem:
        if not self._reads_tokens:
            self.setup.say("computing the frozen base's features, once for all epochs of its head")
        return head_problem(self.problem, self.encoder, self.in_order, self.setup)

    def _frozen(self) -> Scores:
        model, params = self.encoder.bare
        problem = replace(self.problem, model=adapt(model, Recipe()))
        return {part: problem.score_params(params, part) for part in problem.held_out}

    def _constant(self) -> Scores:
        problem = self.problem
        return {
            part: problem.readout.score(
                problem.metrics,
                problem.readout.untrained(problem, self.data, part),
                labels,
            )
            for part, labels in problem.labels.items()
        }


@dataclass(frozen=True)
class TextPredictor:
    """A run that is ready to predict; `adapters_jax.finetune.inference.load_predictor` makes it.

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

    def count_cut(self, texts: Sequence[Any]) -> int:
        """The number of texts longer than `max_length` tokens."""
        self.readout.check(texts, self.pairs)
        return self.readout.inputs(self.encoder, texts, self.max_length).cut

    def predict(self, texts: Sequence[Any]) -> list[Prediction]:
        """Predicts each text.

        Args:
            texts: texts, or `(text, second text)` for a run on pairs; for a run on more columns,
                all of them. A text may also be `(text, None)`.

        Raises:
            DataError: there are no texts, or they are pairs for a run on single texts, or the other
                way round.
        """
        if not isinstance(texts, str):
            texts = [(row, None) if isinstance(row, str) else row for row in texts]
        self.readout.check(texts, self.pairs)
        inputs = self.readout.inputs(self.encoder, texts, self.max_length)
        readout = self.readout
        buckets = readout.buckets(inputs.rows, self.max_length, BATCH_SIZE)
        in_order = Batching(BATCH_SIZE, None, buckets)
        batches = readout.batches(self.encoder, inputs.rows, None, in_order)

        @jax.jit
        def apply(params: Any, arrays: Sequence[Any]) -> Any:
            run = partial(self.model.apply, {"params": params})
            return readout.shown(apply_to_rows(run, arrays))

        outputs = in_row_order(
            lambda batch: apply(self.params, [batch[name] for name in readout.arrays]), batches
        )
        return self.readout.predictions(texts, outputs, inputs)
