"""What a task is: all that differs from one to another, in one object of a registry.

A task author provides one module with a `Task` and adds one line to `adapters_jax.tasks.TASKS`;
`adapters-jax finetune --task NAME` then trains it, `--resume` goes on with it, and `load_predictor`
opens its runs. The `Task` says what it is called, on which kind of base it works, and which columns
and flags it reads, so that any other flag raises an error. Its three methods do the work:

1. `load` reads one to three files into a `TaskData`. Its parts are sequences of rows with `texts`
   and `labels`, of strings, numbers, lists or arrays, which the run's configuration has a hash of;
   and with `take`. `data.tables.choose_columns` reads columns that `data.tables.Table` has no
   field for.
2. `prepare` loads the base, encodes the rows and returns a `Prepared`: the `Problem` that training
   needs (model, batches, loss, score), what the run's configuration keeps, and baselines.
3. `open` rebuilds the adapted model from a finished run's configuration, and returns an object with
   which the run is used. What it reads of the configuration it names in `needed`.

How three further tasks fit:

- Token classification: `load` reads a column of tags; a row has its tags as a field `labels`, which
  `Batches` pad (as they do those of `data.packing.Packed`); the model has a head on token states,
  and the loss leaves out `NOTHING`. `tests/helpers/tagging.py` is such a task, whole.
- Question answering: `load` reads `question`, `context` and `answers`; `prepare` encodes several
  windows a row and keeps which row each is of; `score` joins the windows of a row again.
- Preferences: `load` reads `prompt`, `chosen` and `rejected`, two completions a row; a batch has
  both, and the loss compares their likelihoods.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from adapters_jax.data.datasets import TaskData
from adapters_jax.data.tables import Texts
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.io.run_directory import Run
from adapters_jax.recipe import Recipe
from adapters_jax.tasks.prompts import Prompts
from adapters_jax.training.state import TrainState

Batch = Mapping[str, np.ndarray]
Scores = Mapping[str, Mapping[str, float]]  # metrics of "dev" and "test"


@dataclass(frozen=True)
class Setup:
    """What a task prepares its problem with, beside the rows.

    Attributes:
        model: the base, as `load_encoder` and `load_decoder` take it.
        recipe: makes the recipe that trains; takes the base's number of layers.
        batch_size: rows a batch.
        seed: of the head, the adapters and the order of rows.
        columns: the columns that the user named, by role.
        pooling: of an encoder.
        dropout: of an encoder; None is the checkpoint's own.
        dtype: what the base computes in.
        quantize: what its weights are kept in; None keeps them as they are.
        max_length: in tokens; None is the task's own.
        prompts: how a decoder is given a prompt.
        pack: whether short rows share sequences.
        exact_match: rows of a held-out part to generate for.
        mesh: of the devices to train on; None is one.
        say: called with messages for the user.
    """

    model: str
    recipe: Callable[..., Recipe]
    batch_size: int
    seed: int
    columns: Mapping[str, str]
    pooling: str = "mean"
    dropout: float | None = None
    dtype: str = "float32"
    quantize: str | None = None
    max_length: int | None = None
    prompts: Prompts = field(default_factory=Prompts)
    pack: bool = True
    exact_match: int = 0
    mesh: Mesh | None = None
    say: Callable[[str], None] = lambda message: None


class Task(ABC):
    """A task of the registry; see the module's docstring for what an author provides.

    Attributes:
        name: the value of `--task`.
        kind: of the base.
        pipeline: the tag of the task on the Hugging Face Hub.
        command: of adapters-jax, that uses a finished run. "predict" reads `text` and `pairs` of
            the run's configuration, and `text_pair` where there are pairs.
        metrics: that the user can choose from with `--metrics`.
        columns: the roles of the columns it reads, each with its default name; None is optional.
        flags: fields of the command line's options that not every task reads, and this one does.
        needed: what `open` reads of a run's configuration, with its type.
        example: how its rows are given on the command line.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["encoder", "decoder"]]
    pipeline: ClassVar[str]
    command: ClassVar[Literal["predict", "generate"]]
    metrics: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Mapping[str, str | None]]
    flags: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[Mapping[str, type]] = {}
    example: ClassVar[str] = "--train rows.csv"

    @abstractmethod
    def load(
        self, files: Mapping[str, Path], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """The rows to train on, to select on and to report on.

        Args:
            files: "train", and maybe "dev" and "test", which are otherwise held out of it.
            columns: that the user named, by role.
            metrics: that the user chose, the one selected on first; empty for the task's own.

        Raises:
            DataError: files or rows that cannot be used.
        """

    @abstractmethod
    def prepare(self, data: TaskData, setup: Setup) -> Prepared:
        """The problem of some rows on a base, with its baselines; nothing is trained yet.

        Raises:
            ValueError: rows or a base that cannot be used.
            AssetError: the pinned model could not be fetched.
        """

    @abstractmethod
    def open(self, run: Run, config: Mapping[str, Any]) -> Any:
        """A finished run, ready to use.

        Args:
            run: where its adapter is.
            config: of the run, with all that is `needed`.

        Raises:
            ValueError: a damaged run, or a base that is not the one it was trained on.
            AssetError: the pinned model could not be fetched.
        """

    @abstractmethod
    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """How a finished run is used, for its page and its model card.

        Args:
            run: its directory, or its id on the Hugging Face Hub.
            config: its configuration.
            model: the base model's directory or id; by default the one in the configuration.
        """

    def of_columns(self, columns: Mapping[str, str]) -> dict[str, str | None]:
        """The columns of all roles: the user's, and the defaults of the others."""
        return {**self.columns, **columns}


class Usage(NamedTuple):
    """Lines to paste that use a finished run.

    Attributes:
        shell: a command.
        python: a few lines of Python.
    """

    shell: str
    python: str

    @classmethod
    def of(cls, shell: Sequence[str], load: str, run: str, model: str | None, call: str) -> Usage:
        """The lines of a task.

        Args:
            shell: the words of the command.
            load: the function of `adapters_jax.inference` that loads the run.
            run: its directory, or its id on the Hugging Face Hub.
            model: the base model's directory or id; None leaves it to the run.
            call: what is printed of the loaded run.

        Example:
            >>> words = ["adapters-jax", "predict", "my run"]
            >>> lines = Usage.of(words, "load_predictor", "my run", None, "predict(['A text.'])")
            >>> print(lines.shell, lines.python, sep="\\n")
            adapters-jax predict 'my run'
            from adapters_jax.inference import load_predictor
            predictor = load_predictor('my run')
            print(*predictor.predict(['A text.']))
        """
        arguments = repr(run) if model is None else f"{run!r}, model={model!r}"
        variable = load.removeprefix("load_")
        python = (
            f"from adapters_jax.inference import {load}",
            f"{variable} = {load}({arguments})",
            f"print(*{variable}.{call})",
        )
        return cls(shlex.join(shell), "\n".join(python))


@dataclass(frozen=True)
class Prepared(ABC):
    """A problem that is ready to be trained, with what a run keeps and compares it with.

    Attributes:
        problem: what is learnt.
        base_sha256: of the base's files.
        tokens: of an epoch, for the speed that is shown; 0 where it means nothing.
        config: what the run's configuration says of the task.
    """

    problem: Problem
    base_sha256: str
    tokens: int
    config: Mapping[str, Any]

    @property
    @abstractmethod
    def identity(self) -> BaseIdentity:
        """What an adapter's file says of the base."""

    @property
    def trained(self) -> Problem:
        """What is trained, where the method makes that simpler than `problem`."""
        return self.problem

    @abstractmethod
    def baselines(self) -> Sequence[Untrained | TrainedHead]:
        """What a run is compared with, the simplest first."""

    def samples(self) -> list[dict[str, str]]:
        """A few outputs of the last scoring on test, for the report: prompt, completion, generated.

        Empty where outputs are no texts.
        """
        return []


@dataclass(frozen=True)
class Untrained:
    """A baseline that needs no training.

    Attributes:
        title: of its row.
        score: computes its metrics.
    """

    title: str
    score: Callable[[], Scores]


@dataclass(frozen=True)
class TrainedHead:
    """A baseline that trains the head alone.

    Attributes:
        problem: makes what it learns.
    """

    problem: Callable[[], Problem]


@dataclass(frozen=True)
class Prediction:
    """What a run says of one text; tasks add fields.

    Attributes:
        text: the text.
        text_pair: the second text, of a pair.
    """

    text: str
    text_pair: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, without a second text where there is none."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def cells(self) -> dict[str, str]:
        """The result as named cells of a table, without the texts."""
        texts = ("text", "text_pair")
        return {name: str(value) for name, value in vars(self).items() if name not in texts}


class Predictor(Protocol):
    """What `Task.open` returns where the task's command is "predict"."""

    @property
    def max_length(self) -> int:
        """In tokens."""

    def count_cut(self, texts: Texts) -> int:
        """How many texts are longer than that."""

    def predict(self, texts: Texts) -> Sequence[Prediction]:
        """What the run says of each text."""


class BatchSource(Protocol):
    """Batches by step, `len(source)` of which are an epoch, such as `data.batches.Batches`."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...


class Problem(Protocol):
    """What is learnt: a model, its rows, a loss and a score."""

    @property
    def model(self) -> Any:
        """Adapted."""

    @property
    def params(self) -> Any:
        """linen: its whole tree; None in NNX."""

    @property
    def recipe(self) -> Recipe:
        """What trains."""

    @property
    def train(self) -> BatchSource:
        """Training batches."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names, the one selected on first."""

    @property
    def mesh(self) -> Mesh | None:
        """Of the devices to train on; None is one."""

    def loss(self, subject: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch under parameters (linen) or a model (NNX)."""

    def batch(self, step: int) -> Batch:
        """The training batch of a step, its weights of mean 1, also where parts accumulate."""

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """Metrics on "dev" or "test"; raises NotFiniteError where an output is not finite."""


def in_row_order(
    run: Callable[[Batch], Any], batches: BatchSource
) -> Float[np.ndarray, "rows width"]:
    """What a function gives for batches in order, each row's at the row's place."""
    index, pending = [], []
    for batch in batches:
        index.append(batch["index"])
        pending.append(run(batch))
    rows, outputs = np.concatenate(index), np.concatenate(jax.device_get(pending))
    ordered = np.zeros((rows.max() + 1, outputs.shape[1]), outputs.dtype)
    ordered[rows[rows >= 0]] = outputs[rows >= 0]
    return ordered


class NotFiniteError(ArithmeticError):
    """A loss, gradient or prediction was not finite.

    Attributes:
        step: where, counted from 1.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step
