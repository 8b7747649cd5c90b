"""A run on an encoder: labelled texts, a head, and baselines to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from adapters_jax.adapt import adapt
from adapters_jax.app.console import Console
from adapters_jax.app.options.data import OF_DECODERS
from adapters_jax.app.options.flags import flag, given
from adapters_jax.app.options.method import HEAD_ONLY
from adapters_jax.app.options.optimizer import OptimizerOptions
from adapters_jax.app.options.settings import RunOptions
from adapters_jax.app.options.stored import plain
from adapters_jax.app.runs.config import shared_config
from adapters_jax.app.runs.job import Job, Result
from adapters_jax.app.runs.loop import Saving, Trained
from adapters_jax.data.batches import Batches, Row, choose_buckets
from adapters_jax.data.datasets import TaskData
from adapters_jax.data.tables import Texts
from adapters_jax.errors import UserError
from adapters_jax.io.identity import BaseIdentity, base_identity
from adapters_jax.io.run_directory import Run
from adapters_jax.linen import init_adapters
from adapters_jax.presets import HEAD, head_only
from adapters_jax.pretrained.encoder import INPUTS, Encoder, load_encoder, store_frozen
from adapters_jax.tasks.classification import Classification
from adapters_jax.tasks.head import head_problem
from adapters_jax.tasks.metrics import compute
from adapters_jax.tasks.outputs import Target

MAX_LENGTH = 128


@dataclass(frozen=True)
class EncoderJob(Job):
    """Trains a classifier, and compares it with a constant and with its frozen base.

    Attributes:
        problem: what is trained.
        task: the rows as text.
        encoder: the base.
        in_order: the training rows in order.
    """

    problem: Classification
    task: TaskData
    encoder: Encoder
    in_order: Batches

    @property
    def identity(self) -> BaseIdentity:
        """The encoder's, with the head on it, also where the head alone is trained."""
        whole = base_identity(self.problem.params, self.problem.recipe)
        return replace(self.encoder.identity, tree_sha256=whole.tree_sha256)

    def train_all(self, saving: Saving) -> tuple[Trained, list[Result]]:
        """The method and then its baselines: what it found, and the rows of the results' table."""
        alone = self.problem.recipe == head_only()
        problem = self._head_only() if alone else self.problem
        tokens = 0 if alone else sum(len(row.input_ids) for row in self.in_order.rows)
        found, row = self.train(self.title, problem, self.optimizer, tokens, saving)
        rows = [row]
        if self.baselines and not alone:
            size = self.optimizer.batch_size
            optimizer = OptimizerOptions(batch_size=size, evaluations=1).of(HEAD_ONLY)
            rows.insert(0, self.train(HEAD_ONLY, self._head_only(), optimizer)[1])
        if self.baselines:
            rows.insert(0, self._constant())
        return found, rows

    def _head_only(self) -> Classification:
        self.output.say("computing the frozen base's features, once for all epochs of its head")
        return head_problem(self.problem, self.encoder, self.in_order, self.seed)

    def _constant(self) -> Result:
        """The row of the best constant prediction."""
        target, train, metrics = self.problem.target, self.task.train, self.problem.metrics
        scores: Mapping[str, Any] = {
            part: compute(metrics, target.constant(train, len(labels)), labels)
            for part, labels in self.problem.labels.items()
        }
        title = "majority class" if target.names else "mean"
        return {"method": title, "trainable_parameters": 0, **scores}


def prepare(options: RunOptions, run: Run, output: Console, began: float) -> EncoderJob:
    """Reads and checks everything; see `prepare_run`."""
    _refuse_flags_of_decoders(options)
    task = options.data.load()
    encoder = load_encoder(options.model, options.pooling, options.dtype, options.quantize)
    training, length = _training(options), options.max_length or MAX_LENGTH
    rows = {
        part: _encode(encoder, getattr(task, part).texts, part, length, output)
        for part in ("train", "dev", "test")
    }
    problem = _problem(options, training, task, encoder, rows, length)
    train: Any = problem.train
    text, text_pair = options.data.columns
    config = {
        "kind": "encoder",
        **shared_config(options, encoder.sha256, task, problem.recipe, training),
        "max_length": length,
        "metrics": list(task.metrics),
        "pooling": options.pooling,
        "target": plain(problem.target),
        "text": text,
        "text_pair": text_pair,
        "pairs": text_pair is not None,
    }
    return EncoderJob(
        run=run,
        every=options.checkpoint_every,
        title=options.method.title,
        problem=problem,
        optimizer=training,
        seed=options.seed,
        baselines=options.baselines,
        config=config,
        output=output,
        began=began,
        task=task,
        encoder=encoder,
        in_order=encoder.in_order(rows["train"], train.labels, train.batch_size, train.buckets),
    )


def _training(options: RunOptions) -> OptimizerOptions:
    """How to train, with nothing left open; the movie reviews need fewer epochs."""
    given_options, method = options.optimizer, options.method.method
    if options.data.is_demo and given_options.epochs is None and method != HEAD_ONLY:
        given_options = replace(given_options, epochs=1.5)
    return given_options.of(method)


def _encode(
    encoder: Encoder, texts: Texts, part: str, max_length: int, output: Console
) -> list[Row]:
    rows, cut = encoder.encode(texts, max_length)
    if cut:
        output.say(f"{cut} of {len(rows)} {part} texts are cut at {max_length} tokens")
    return rows


def _problem(
    options: RunOptions,
    training: OptimizerOptions,
    task: TaskData,
    encoder: Encoder,
    rows: Mapping[str, Sequence[Row]],
    max_length: int,
) -> Classification:
    target, size = Target.of(task.train), training.batch_size or 1
    buckets = choose_buckets(rows["train"], max_length, size)
    labels, pad_id = target.encode(task.train.labels), encoder.config.pad_token_id
    batches = Batches(rows["train"], labels, size, options.seed, buckets, pad_id)
    recipe = options.method.build(head=HEAD, num_layers=encoder.config.num_hidden_layers)
    model = adapt(encoder.classifier(target.width, training.dropout), recipe)
    head_key, adapters_key = jax.random.split(jax.random.key(options.seed))
    params = init_adapters(
        model,
        encoder.init(target.width, head_key),
        adapters_key,
        *(batches[0][name] for name in INPUTS),
    )
    return Classification(
        model,
        store_frozen(params, recipe, options.dtype),
        INPUTS,
        target,
        batches,
        {p: encoder.in_order(rows[p], None, size, buckets) for p in ("dev", "test")},
        {"dev": task.dev.labels, "test": task.test.labels},
        task.metrics,
        options.make_mesh(training.batch_size),
    )


def _refuse_flags_of_decoders(options: RunOptions) -> None:
    """Raises ValueError for flags that would have no effect here."""
    stray = [name for name in given(options.data) if name in OF_DECODERS]
    stray += [*given(options.prompts)]
    stray += [name for name in given(options) if name in ("pack", "held_out", "exact_match")]
    if stray:
        raise UserError(
            f"{', '.join(map(flag, stray))}: for decoders, and {options.model!r} is an encoder; "
            "name a Llama, such as --model smollm2-135m"
        )
