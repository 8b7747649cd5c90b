"""What tasks on an encoder with a head share: the model, its rows, training, prediction.

The task's `Readout` has what a label is: a class, a number, the tags of words, an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax

from adapters_jax.adapting import adapt
from adapters_jax.errors import UserError, shown
from adapters_jax.files.identity import BaseIdentity, base_identity
from adapters_jax.files.loading import load_adapter
from adapters_jax.finetune.data.batches import StepBatches
from adapters_jax.finetune.data.datasets import TaskData, check_classes, make_datasets
from adapters_jax.finetune.data.tables import Table, read_rows
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.models.encoder.heads import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder, load_encoder, store_frozen
from adapters_jax.finetune.pretrained.record import ANY_BASE
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.tasks.base import (
    HELD_OUT,
    PARTS,
    Batch,
    Columns,
    Prepared,
    Problem,
    Scores,
    Setup,
    Task,
    TrainedHead,
    Untrained,
    Usage,
    check_continues,
    in_row_order,
)
from adapters_jax.finetune.tasks.labelled_problem import (
    LabelledProblem,
    apply_to_rows,
    head_problem,
    one_by_one,
)
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, Readout
from adapters_jax.finetune.tasks.views import Judged, View, lengths_of, shared
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.presets import HEAD, head_only
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState

BATCH_SIZE = 32  # texts predicted at a time
EPOCHS = 3.0  # of a head that reads all tokens, on the frozen base
LEAST_STEPS = 340  # of a new head and an adapter: `python -m benchmarks defaults`


class EncoderTask(Task):
    """A task that an encoder with a head learns.

    Attributes:
        inputs: the roles of the columns that are needed to predict a row.
        readout: the class of its `Readout`.
        sample: the texts that the examples of a run predict.
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
    inputs: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    readout: ClassVar[type[Readout]]
    sample: ClassVar[tuple[str, ...]] = ("A text of your own.", "Another one.")

    def texts(self, columns: Mapping[str, Any]) -> list[str]:
        """The columns of the texts that are needed to predict a row."""
        return [columns[role] for role in self.inputs if columns.get(role) is not None]

    def prepare(self, data: TaskData, setup: Setup) -> PreparedTexts:
        """Prepares an encoder with a head for the rows; see `Task.prepare`."""
        readout = self.readout.of(data.train, setup)
        readout.check_batch(setup.batch_size // setup.accumulate)
        pooling = readout.pooling or setup.pooling
        encoder = load_encoder(setup.model, pooling, setup.dtype, setup.quantize, setup.attention)
        if self.kind == "encoder":
            encoder = encoder.prompted(setup.recipe(layers=encoder.layers))
        # The default length is at most what the model has positions for.
        length = setup.max_length or min(readout.max_length, encoder.longest)
        inputs: dict[str, Inputs] = {}
        for part in PARTS:
            texts = getattr(data, part).texts
            inputs[part] = readout.encoded(encoder, texts, length)
            if inputs[part].cut:
                said = f"{inputs[part].cut} of {len(texts)} {part} texts"
                setup.say(f"{said} are cut at {length} tokens")
        rows, labels = readout.targets(inputs["train"], data.train.labels)
        size, owners = setup.batch_size, readout.owners(inputs["train"]) if setup.mix else None
        mix = setup.mixture(data.train, owners)
        buckets = readout.buckets(rows, length, size)
        batches = readout.batches(encoder, rows, labels, size, setup.seed, buckets, mix=mix)
        model, params = self._adapted(setup, encoder, readout, batches[0])
        held_out = {part: inputs[part] for part in HELD_OUT}
        problem = LabelledProblem(
            model,
            params,
            readout.arrays,
            readout,
            batches,
            {
                part: readout.batches(encoder, found.rows, None, size, None, buckets)
                for part, found in held_out.items()
            },
            {part: getattr(data, part) for part in held_out},
            data.metrics,
            setup.mesh,
            {part: found.where for part, found in held_out.items()},
        )
        columns = self.texts(self.of_columns(setup.columns))
        config = {
            "max_length": length,
            "metrics": list(data.metrics),
            "pooling": encoder.pooling,
            "target": readout.to_config(),
            "text": columns[0],
            "text_pair": columns[1] if len(columns) == 2 else None,
            "pairs": len(columns) == 2,
            **({"texts": columns} if len(columns) > 2 else {}),
            **readout.checksums(inputs),
        }
        tokens = 0 if model.recipe == head_only() else readout.tokens(rows, mix)
        in_order = readout.batches(encoder, rows, labels, size, None, buckets)
        more = data, setup, encoder, in_order, self.least_steps
        return PreparedTexts(problem, tokens, config, *more)

    def _adapted(
        self, setup: Setup, encoder: Encoder, readout: Readout, batch: Batch
    ) -> tuple[Adapted, Any]:
        """The encoder with its head and the adapters of the recipe, and all parameters."""
        trains_head = readout.has_head and encoder.head is None
        recipe = setup.recipe(head=HEAD if trains_head else None, layers=encoder.layers)
        if not readout.has_head and recipe == head_only():
            raise UserError(f"--task {self.name} has no head to train; give another --method")
        if not readout.has_head:
            recipe = _without_head(recipe)
        if setup.augment and recipe == head_only():
            raise UserError(
                "--augment: a head that trains alone reads features that are computed once, of "
                "images as they are; leave it out, or give another --method"
            )
        check_continues(recipe, False, setup.model)
        model = adapt(encoder.classifier(_width(encoder, readout), setup.dropout), recipe)
        # A separate key for the head: it starts equal with every method.
        head_key, adapters_key = jax.random.split(jax.random.key(setup.seed))
        params = init_adapters(
            model,
            encoder.init(readout.width, head_key) if readout.has_head else encoder.bare[1],
            adapters_key,
            *(one_by_one(batch[name]) for name in readout.arrays),
        )
        return model, store_frozen(params, recipe, setup.dtype)

    def readout_of(self, run: Run, config: Mapping[str, Any]) -> Readout:
        """The readout of a run; RunError if its target is damaged."""
        try:
            readout = self.readout.from_config(config["target"])
            return readout.restored(config.get("summary", {}).get("dev", {}))
        except (KeyError, TypeError, ValueError) as error:
            found = shown(config["target"])
            raise RunError(f"{run.config} is damaged: its target is {found}: {error}") from error

    def open(self, run: Run, config: Mapping[str, Any]) -> TextPredictor:
        """Opens a run as a predictor; see `Task.open`."""
        readout = self.readout_of(run, config)
        encoder = load_encoder(
            config["model"], config["pooling"], config["dtype"], config.get("quantize")
        )
        params = encoder.bare[1]
        if readout.has_head:
            params = encoder.init(readout.width, jax.random.key(0))
        ids = encoder.example
        classifier, base = encoder.classifier(_width(encoder, readout)), encoder.identity
        any_base = config.get(ANY_BASE, False)
        adapted, params = load_adapter(
            run.adapter, classifier, params, ids, base=base, any_base=any_base
        )
        params = store_frozen(params, adapted.recipe, config["dtype"])
        encoder = encoder.prompted(adapted.recipe)
        if encoder.prompt:
            adapted = adapt(encoder.classifier(_width(encoder, readout)), adapted.recipe)
        return TextPredictor(
            encoder, adapted, params, readout, config["max_length"], config["pairs"]
        )

    def samples(self, config: Mapping[str, Any]) -> list[tuple[str | None, ...]]:
        """Rows that the examples of a run predict: a few texts, or one pair of texts."""
        return [self.sample] if config.get("pairs") else [(text, None) for text in self.sample]

    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """Examples with a few rows; see `Task.usage`."""
        rows = self.samples(config)
        texts = [text for row in rows for text in row if text is not None]
        words = ["adapters-jax", "predict", run, *texts]
        return Usage.of(words, "load_predictor", run, model, f"predict([{rows[0]!r}])")

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """Those of the readout, and those of every task; see `Task.views`."""
        readout = self.readout.from_config(config["target"])
        return [*readout.views(judged, config["metrics"]), *shared(judged)]


class LabelledTask(EncoderTask):
    """A task on rows with one label each, a class or a number.

    Attributes:
        learns: what `data.datasets.make_dataset` makes of the labels.
    """

    learns: ClassVar[str] = "classification"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads rows and their labels."""
        return read_rows(path, columns[self.inputs[0]], columns.get("text_pair"), columns["label"])

    def check_alike(self, parts: Sequence[Table]) -> None:
        """Raises DataError if one file has classes that another lacks."""
        if self.learns == "classification":
            check_classes(parts)

    def hold_out(self, name: str, parts: Mapping[str, Table], metrics: Sequence[str]) -> TaskData:
        """Makes the labels ids or numbers; classes keep their proportions. See `Task.hold_out`."""
        return super().hold_out(name, make_datasets(parts, self.learns), metrics)


class LabelledTexts(LabelledTask):
    """A task on texts, or pairs of texts, with one label each."""

    pipeline = "text-classification"
    columns: ClassVar[Columns] = {"text": "text", "text_pair": None, "label": "label"}
    flags = (*LabelledTask.flags, "glue", "data", "pooling")


def _without_head(recipe: Recipe) -> Recipe:
    """A recipe that leaves the head alone: the identity in its place is in no merged checkpoint."""

    def reaches(each: Recipe) -> bool:
        leaves = (f"{HEAD}/kernel", f"{HEAD}/bias")
        return bool(each.at(HEAD)) or any(map(each.trains, leaves))

    kept = [each for each in recipe if Recipe(each) != head_only()]
    own = [f"!{HEAD}/**"]
    return Recipe(
        [replace(e, targets=(*e.targets, *own)) if reaches(Recipe(e)) else e for e in kept]
    )


def _width(encoder: Encoder, readout: Readout) -> int:
    """The number of outputs of the model."""
    return readout.width if readout.has_head else encoder.config.hidden_size


@dataclass(frozen=True)
class PreparedTexts(Prepared):
    """Texts prepared for an encoder with a head.

    Attributes:
        in_order: the training rows, in order.
        least_steps: the steps that a head which reads all tokens makes at least.
    """

    problem: LabelledProblem
    data: TaskData
    setup: Setup
    encoder: Encoder
    in_order: StepBatches
    least_steps: int

    @property
    def new_head(self) -> bool:
        """Whether the head is not one of the checkpoint."""
        return self.encoder.head is None

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
        constant = Untrained(self.problem.readout.constant_title, self._constant, computes=False)
        if not self.problem.readout.has_head or self.encoder.head is not None:
            return [constant, Untrained("frozen base", self._frozen)]
        passes = (EPOCHS, self.least_steps) if self._reads_tokens else ()
        trained = TrainedHead(self._head_problem, *passes)
        return [constant] if self._head_alone else [constant, trained]

    def judged(self, problem: Any, state: TrainState) -> Judged:
        """The predictions of dev and test, and the lengths of all rows; see `Prepared.judged`."""
        parts: dict[str, Any] = {"train": self.in_order, **self.problem.held_out}
        counts = {part: lengths_of(batches.rows) for part, batches in parts.items()}
        lengths = {part: found for part, found in counts.items() if found}
        rows = {part: problem.judged(state, part) for part in self.problem.held_out}
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
        found = {p: problem.readout.untrained(problem, self.data, p) for p in problem.rows}
        return {
            part: problem.readout.score(problem.metrics, found[part], rows.labels)
            for part, rows in problem.rows.items()
        }


@dataclass(frozen=True)
class TextPredictor:
    """A run that is ready to predict; `adapters_jax.finetune.inference.load_predictor` makes it.

    Attributes:
        encoder: the base.
        params: its whole parameter tree.
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
        batches = readout.batches(self.encoder, inputs.rows, None, BATCH_SIZE, None, buckets)

        @jax.jit
        def apply(params: Any, arrays: Sequence[Any]) -> Any:
            run = partial(self.model.apply, {"params": params})
            return readout.shown(apply_to_rows(run, arrays))

        outputs = in_row_order(
            lambda batch: apply(self.params, [batch[name] for name in readout.arrays]), batches
        )
        return self.readout.predictions(texts, outputs, inputs.where)
