"""A run on a decoder: prompts and completions, compared with the base as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from adapters_jax.adapt import adapt
from adapters_jax.app.console import Console
from adapters_jax.app.options.data import OF_ENCODERS
from adapters_jax.app.options.flags import flag, given
from adapters_jax.app.options.method import HEAD_ONLY
from adapters_jax.app.options.settings import RunOptions
from adapters_jax.app.options.stored import plain
from adapters_jax.app.runs.config import shared_config
from adapters_jax.app.runs.job import Job, Result
from adapters_jax.app.runs.loop import Saving, Trained
from adapters_jax.data.datasets import spread
from adapters_jax.errors import UserError
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.io.run_directory import Run
from adapters_jax.pretrained.decoder import Decoder, load_decoder
from adapters_jax.tasks.generation import Generation
from adapters_jax.tasks.generation_data import HELD_OUT, Layout
from adapters_jax.tasks.prompts import Prompts

MAX_LENGTH = 256
SAMPLES = 3  # generated texts that a run shows


@dataclass(frozen=True)
class DecoderJob(Job):
    """Trains a decoder, and compares it with its base.

    Attributes:
        problem: what is trained.
        tokens: of an epoch.
    """

    problem: Generation
    tokens: int

    @property
    def identity(self) -> BaseIdentity:
        """The decoder's."""
        return self.problem.decoder.identity

    def train_all(self, saving: Saving) -> tuple[Trained, list[Result]]:
        """The method and its base: what was found, and the rows of the results' table."""
        found, row = self.train(self.title, self.problem, self.optimizer, self.tokens, saving)
        row["samples"] = self._samples()
        return found, [*([self._base()] if self.baselines else []), row]

    def _samples(self) -> list[dict[str, str]]:
        """A few of the texts that were generated last, on test."""
        rows, said = self.problem.held_out["test"], self.problem.said.get("test", [])
        triples = list(zip(rows.asked, rows.references, said, strict=bool(said)))[:SAMPLES]
        return [{"prompt": p, "completion": r[0], "generated": text} for p, r, text in triples]

    def _base(self) -> Result:
        """The row of the base as it was."""
        self.output.say("the base as it was:")
        model, problem = self.problem.decoder.model, self.problem
        scores: dict[str, Any] = {part: problem.score_model(model, part) for part in HELD_OUT}
        self.run.log({"method": "base", **scores})
        return {"method": "base", "trainable_parameters": 0, **scores}


def prepare(options: RunOptions, run: Run, output: Console, began: float) -> DecoderJob:
    """Reads and checks everything; see `prepare_run`."""
    _refuse_flags_of_encoders(options)
    task = options.data.load_completions()
    held = {part: _few(getattr(task, part), options.held_out) for part in HELD_OUT}
    task = replace(task, **held)
    decoder = load_decoder(options.model, options.dtype, options.quantize)
    prompts = _prompts(options, decoder, output)
    training = options.optimizer.of_decoder(options.method.method)
    length = options.max_length or MAX_LENGTH
    layout = Layout(
        decoder,
        prompts,
        length,
        options.pack,
        training.batch_size or 1,
        options.seed,
        options.exact_match,
    )
    rows = layout.build(task, output.say)
    metrics = task.metrics if rows.held_out["dev"].asked else task.metrics[:1]
    model = _adapted(options, decoder)
    mesh = options.make_mesh(training.batch_size)
    problem = Generation(
        model=model,
        decoder=decoder,
        train=rows.train,
        held_out=rows.held_out,
        most=rows.most,
        metrics=metrics,
        say=output.say,
        mesh=mesh,
    )
    text_alone = options.data.text is not None
    config = {
        "kind": "decoder",
        **shared_config(options, decoder.sha256, task, problem.recipe, training),
        "max_length": length,
        "metrics": list(metrics),
        "prompts": plain(prompts),
        "pack": options.pack,
        "prompt": None if text_alone else options.data.prompt,
        "completion": options.data.text if text_alone else options.data.completion,
    }
    return DecoderJob(
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
        tokens=rows.tokens,
    )


def _few(table: Any, most: int) -> Any:
    return table.take(spread(len(table), most))


def _adapted(options: RunOptions, decoder: Decoder) -> nnx.Module:
    layers = decoder.config.num_hidden_layers
    recipe = options.method.build(num_layers=layers, layer="layers/{}")
    example = (np.zeros((1, 8), np.int32),)
    return adapt(decoder.model, recipe, rngs=nnx.Rngs(options.seed), example_inputs=example)


def _prompts(options: RunOptions, decoder: Decoder, output: Console) -> Prompts:
    """How prompts are put: as they are where the texts are alone or the model does not chat."""
    if options.data.text is not None:
        if given(options.prompts):
            raise UserError("--text is of texts alone, which have no --template and no chat")
        return Prompts(chat=False)
    if options.prompts.chat and decoder.chat_template is None:
        output.say(f"{options.model} has no chat template: prompts are given as they are")
        return replace(options.prompts, chat=False)
    return options.prompts


def _refuse_flags_of_encoders(options: RunOptions) -> None:
    """Raises ValueError for flags that would have no effect here."""
    stray = [name for name in given(options.data) if name in OF_ENCODERS]
    stray += [n for n in given(options.optimizer) if n in ("dropout", "head_learning_rate")]
    stray += [name for name in given(options) if name == "pooling"]
    if stray:
        raise UserError(
            f"{', '.join(map(flag, stray))}: for encoders, and {options.model!r} is a decoder"
        )
    if options.method.method == HEAD_ONLY:
        raise UserError(f"--method {HEAD_ONLY}: of encoders; a decoder has no head for a task")
