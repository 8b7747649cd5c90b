"""The interface of a task; the docstring of `finetune.tasks` says what an author provides."""

from __future__ import annotations

import hashlib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from adapters_jax.errors import UserError
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.finetune.data.batches import StepBatches
from adapters_jax.finetune.data.datasets import TaskData, hold_out
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.lazy_rows import mapped
from adapters_jax.finetune.data.mixing import Mixture, sentence
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.readers import title_of
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks.views import Judged, View
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState

Batch = Mapping[str, np.ndarray]
HELD_OUT = ("dev", "test")
PARTS = ("train", *HELD_OUT)
Columns = Mapping[str, str | None]  # the roles of columns, each with its default name
Files = Path | Sequence[Path]
Scores = Mapping[str, Mapping[str, float]]  # metrics of "dev" and "test"


@dataclass(frozen=True)
class Setup:
    """The settings that a task prepares its problem with; most are the flags of the same name.

    Attributes:
        model: the base, as `load_encoder` and `load_pretrained_decoder` take it.
        recipe: makes the recipe that trains, from the base's number of layers.
        seed: the seed of the head, the adapters and the order of rows.
        columns: the columns that the user named, by role.
        progress: shows work of many steps, as `Console.progress` of the application.
        dropout: the dropout of an encoder; None is that of the checkpoint.
        max_length: the largest number of tokens in a row; None is the task's default.
        pack: whether short rows are packed into one sequence.
        accumulate: the number of parts that a batch is computed in, one by one.
        exact_match: the number of rows, of a held-out part, to generate completions for.
        mesh: the mesh of devices to train on; None is one device.
        mix: the weights of the training files, as `--mix`.
        files: their names.
        say: called with messages for the user.
    """

    model: str
    recipe: Callable[..., Recipe]
    batch_size: int
    seed: int
    columns: Mapping[str, str]
    progress: Callable[..., Any]
    pooling: str = "mean"
    dropout: float | None = None
    dtype: str = "float32"
    quantize: str | None = None
    attention: str = "auto"
    max_length: int | None = None
    prompts: Prompts = field(default_factory=Prompts)
    pack: bool = True
    turns: Literal["assistant", "last", "all"] = "assistant"
    loss: Literal["dpo", "ipo", "orpo", "kto"] = "dpo"
    beta: float = 0.1
    augment: tuple[str, ...] = ()
    accumulate: int = 1
    exact_match: int = 0
    mesh: Mesh | None = None
    mix: tuple[float, ...] = ()
    files: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda message: None

    def mixture(self, train: Any, rows: Any = slice(None)) -> Mixture | None:
        """How often training rows are drawn, if the user said; a message tells it.

        Args:
            rows: the row that each row of the batches is of, where some are left out or split.

        Raises:
            DataError: a file has no row left.
        """
        if not self.mix:
            return None
        sources = np.asarray(train.sources)[rows]
        found = Mixture.of(sources, self.mix, self.files)
        self.say(sentence(self.files, self.mix, sources))
        return found


class Task(ABC):
    """A task of the registry; `adapters_jax.finetune.tasks` says what an author provides.

    Attributes:
        name: the value of `--task`.
        kind: the kind of its base.
        pipeline: the tag of the task on the Hugging Face Hub.
        command: the command of adapters-jax that uses a finished run. "predict" reads `text` and
            `pairs` of the run's configuration, and `text_pair` if it has pairs; where a row has
            more than two texts, `texts` names the columns of all.
        head: AdapterHub's name for the kind of its head.
        metrics: the metrics that the user can choose with `--metrics`.
        defaults: the metrics if the user chooses none; empty for all of them.
        columns: the roles of the columns it reads, each with its default name; None is optional.
        grouped: the texts of a row that say which rows are held out together.
        flags: the flags of this task that not every task has, as fields of the options.
        needed: the keys of a run's configuration that `open` reads, with their types.
        epochs: the passes over the training rows, if not those of the method.
        least_steps: the steps that a default run makes at least, within 20 epochs.
        batch_size: the rows of a batch, if not those of the kind.
        example: the flags that give its rows on the command line.

    Example:
        >>> from adapters_jax.finetune.tasks import TASKS
        >>> [isinstance(TASKS["regression"], Task), TASKS["regression"].kind]
        [True, 'encoder']
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["encoder", "decoder", "vision"]]
    pipeline: ClassVar[str]
    command: ClassVar[Literal["predict", "generate"]]
    head: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Columns]
    grouped: ClassVar[slice] = slice(None)
    flags: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[Mapping[str, type]] = {}
    epochs: ClassVar[float | None] = None
    least_steps: ClassVar[int] = 0
    batch_size: ClassVar[int | None] = None
    example: ClassVar[str] = "--train rows.csv"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Any:
        """Reads the rows of one file, such as a `data.tables.Table`.

        Args:
            path: the file, as `data.readers.read_file` takes it.
            columns: the columns of all roles.
            metrics: the metrics of the run.

        Returns:
            The rows, with a method `take`, and `texts` and `labels` made of strings, numbers, lists
            or arrays; the run's configuration has a hash of them. For several training files they
            also have `joined` and `sources`, as `data.tables.Table`.

        Raises:
            DataError: the file or its rows cannot be used.
        """
        raise TypeError(f"the task {self.name!r} defines neither `read` nor `load`")

    def check_alike(self, parts: Sequence[Any]) -> None:
        """Raises DataError if rows of several files cannot be learnt together.

        Args:
            parts: what `read` returned for each training file.
        """
        return None  # for most tasks, all rows that they read are alike

    def groups(self, train: Any) -> Sequence[str]:
        """The key of each training row; rows with one key are held out together."""
        return mapped(train.texts, lambda texts: key_of(*texts[self.grouped]))

    def hold_out(self, name: str, parts: Mapping[str, Any], metrics: Sequence[str]) -> TaskData:
        """Completes the parts: an absent "dev" or "test" is held out of "train", by `groups`.

        Args:
            name: the name of the data.
            parts: what `read` returned for each file.
            metrics: the metrics of the run.

        Raises:
            DataError: the files have rows of different kinds, or too few.
        """
        return hold_out(name, parts, metrics, self.groups(parts["train"]))

    def load(
        self, files: Mapping[str, Files], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads the rows to train on, to select on and to report on: what `read` returns.

        Args:
            files: "train", one or several, whose rows are joined; and maybe "dev" and "test", which
                are otherwise held out of "train".
            columns: the columns that the user named, by role.
            metrics: the metrics that the user chose, the one to select on first; if empty, the
                task's defaults.

        Raises:
            DataError: files or rows cannot be used.
        """
        named, chosen = self.of_columns(columns), tuple(metrics) or self.defaults or self.metrics
        parts = {
            part: [self.read(path, named, chosen) for path in listed(paths)]
            for part, paths in files.items()
        }
        self.check_alike(parts["train"])
        whole = {part: x[0].joined(x[1:]) if len(x) > 1 else x[0] for part, x in parts.items()}
        return self.hold_out(title_of(*listed(files["train"])), whole, chosen)

    @abstractmethod
    def prepare(self, data: TaskData, setup: Setup) -> Prepared:
        """Prepares the problem and its baselines from rows and a base; trains nothing.

        Args:
            data: what `load` returned.
            setup: the settings: the base, the recipe, sizes and the seed.

        Raises:
            UserError: the rows or the base cannot be used.
            AssetError: the pinned model could not be fetched.
        """

    @abstractmethod
    def open(self, run: Run, config: Mapping[str, Any]) -> Any:
        """Opens a finished run for use.

        Args:
            run: the run.
            config: its configuration, with every key in `needed`. The base was compared with it;
                `any_base` says whether the adapter may be of another one.

        Raises:
            RunError: the run is damaged.
            AdapterFileError: the adapter is damaged, or was trained on another base.
            AssetError: the pinned model could not be fetched.
        """

    @abstractmethod
    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """Examples that use a finished run, for its page and its model card.

        Args:
            run: its directory, or its id on the Hugging Face Hub.
            config: its configuration.
            model: the base model's directory or id; by default the one in the configuration.
        """

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """What the page of a run shows of its predictions, in this order.

        Args:
            config: the configuration of the run.
            judged: what `Prepared.judged` returned, as far as the run keeps it; empty for the page
                of a comparison, which shows the notes.
        """
        return []

    def read_texts(self, rows: Rows, columns: Sequence[str]) -> Sequence[Any]:
        """Takes what `Predictor.predict` takes from the rows of a file.

        Args:
            rows: its rows, as `adapters_jax.finetune.data.readers.read_file` returns them.
            columns: the names of the column of texts and, if there is one, of second texts.

        Raises:
            DataError: the file cannot be used.
        """
        pair = columns[1] if len(columns) > 1 else None
        return read_rows(rows, columns[0], pair, label=None).texts

    def of_columns(self, columns: Mapping[str, str]) -> dict[str, str | None]:
        """The columns of all roles: those that the user named, and the defaults of the others."""
        return {**self.columns, **columns}


def listed(files: Files) -> Sequence[Path]:
    """One file or several, as a sequence."""
    return files if isinstance(files, Sequence) else (files,)


class Usage(NamedTuple):
    """Examples that use a finished run, to copy and paste."""

    shell: str
    python: str

    @classmethod
    def of(cls, shell: Sequence[str], load: str, run: str, model: str | None, call: str) -> Usage:
        """Makes the examples of a task.

        Args:
            shell: the words of the shell command.
            load: the function of `adapters_jax.finetune.inference` that loads the run.
            run: its directory, or its id on the Hugging Face Hub.
            model: the base model's directory or id; None is the one in the run.
            call: the method call whose results are printed.

        Example:
            >>> words = ["adapters-jax", "predict", "my run"]
            >>> lines = Usage.of(words, "load_predictor", "my run", None, "predict(['A text.'])")
            >>> print(lines.shell, lines.python, sep="\\n")
            adapters-jax predict 'my run'
            from adapters_jax.finetune.inference import load_predictor
            predictor = load_predictor('my run')
            print(*predictor.predict(['A text.']))
        """
        arguments = repr(run) if model is None else f"{run!r}, model={model!r}"
        variable = load.removeprefix("load_")
        python = (
            f"from adapters_jax.finetune.inference import {load}",
            f"{variable} = {load}({arguments})",
            f"print(*{variable}.{call})",
        )
        return cls(shlex.join(shell), "\n".join(python))


@dataclass(frozen=True)
class Prepared(ABC):
    """A problem that is ready to be trained, with its configuration and baselines.

    Attributes:
        problem: what is learnt.
        tokens: the tokens in an epoch, to show the speed; 0 if the speed would mean nothing.
        config: the task's part of the run's configuration.
    """

    problem: Problem
    tokens: int
    config: Mapping[str, Any]

    @property
    def new_head(self) -> bool:
        """Whether the base has a head that starts from random values."""
        return False

    @property
    @abstractmethod
    def identity(self) -> BaseIdentity:
        """The identity of the base, for the adapter's file."""

    @property
    def trained(self) -> Problem:
        """The problem to train: `problem`, or an equivalent that costs less."""
        return self.problem

    @abstractmethod
    def baselines(self) -> Sequence[Untrained | TrainedHead]:
        """The baselines that a run is compared with, the simplest first."""

    def begin(self, run: Run, progress: Callable[..., Any]) -> None:
        """Does what a training needs once before its first step, and keeps it with the run.

        A run that is resumed calls it again, and it reads what it kept.

        Args:
            run: the run, whose directory is there.
            progress: shows the work, as `Console.progress` of the application.

        Raises:
            RunError: what was kept is damaged, or belongs to other rows or another base.
        """
        return None  # most trainings need nothing

    def judged(self, problem: Problem, state: TrainState) -> Judged:
        """The predictions of the trained problem on dev and test, for `Task.views`; else none."""
        return Judged()

    def samples(self) -> list[dict[str, str]]:
        """A few outputs of the last scoring on test, for the report: prompt, completion, generated.

        Empty if the outputs are not texts.
        """
        return []


@dataclass(frozen=True)
class Untrained:
    """A baseline that needs no training; tables have its title.

    Attributes:
        computes: whether the model computes the rows for it.
    """

    title: str
    score: Callable[[], Scores]
    computes: bool = True


@dataclass(frozen=True)
class TrainedHead:
    """A baseline that trains the head alone.

    Attributes:
        epochs: the passes over the training rows; None is the default of head-only.
        least_steps: the steps that it makes at least, within 20 epochs.
    """

    title: ClassVar[str] = "frozen base, trained head"
    problem: Callable[[], Problem]
    epochs: float | None = None
    least_steps: int = 0


class Problem(Protocol):
    """What is learnt: a model, its rows, a loss and a score."""

    @property
    def model(self) -> Any:
        """The adapted model."""

    @property
    def params(self) -> Any:
        """linen: the whole parameter tree; None in NNX."""

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""

    @property
    def train(self) -> StepBatches:
        """Training batches; an epoch has `len(train)` steps."""

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the metrics, the one to select on first."""

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices to train on; None is one device."""

    def loss(self, subject: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch under parameters (linen) or a model (NNX)."""

    def batch(self, step: int) -> Batch:
        """The training batch of a step; the mean of its weights is 1."""

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if an output is not finite."""


def check_continues(recipe: Recipe, continues: bool, model: str) -> None:
    """Raises UserError where an adapter is invoked in a text, and the base does not continue it."""
    if not continues and any(method.gated for method in recipe):
        raise UserError(
            f"--invocation, or an ActivatedLoRA in --recipe: its tokens are found in the text that "
            f"a decoder continues, and {model!r} does not continue it here; leave it out"
        )


def rows_sha256(rows: Iterable[Iterable[Any]]) -> str:
    """The checksum of encoded rows, each a tuple of arrays of integers.

    Example:
        >>> one, other = ([(np.array([1, 2]),)], [(np.array([2, 1]),)])
        >>> rows_sha256(one) == rows_sha256(one), rows_sha256(one) == rows_sha256(other)
        (True, False)
    """
    digest = hashlib.sha256()
    for row in rows:
        for each in row:
            array = np.asarray(each, np.int64)
            digest.update(f"{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def in_row_order(
    run: Callable[[Batch], Any], batches: Iterable[Batch]
) -> Float[np.ndarray, "rows ..."]:
    """Runs a function on batches and puts its outputs into the order of the rows.

    Outputs for each token are `(rows, length, ...)`; those of shorter batches end in zeros.
    """
    index, pending = [], []
    for batch in batches:
        index.append(batch["index"])
        pending.append(run(batch))
    # One transfer at the end: jax computes a batch while the next one is made.
    found = jax.device_get(pending)
    # Buckets differ in length, so outputs for each token do as well.
    shape = np.max([outputs.shape[1:] for outputs in found], axis=0).tolist()
    ordered: Any = np.zeros((np.concatenate(index).max() + 1, *shape), found[0].dtype)
    for rows, outputs in zip(index, found, strict=True):
        inside = tuple(slice(n) for n in outputs.shape[1:])
        ordered[(rows[rows >= 0], *inside)] = outputs[rows >= 0]
    return ordered


class NotFiniteError(ArithmeticError):
    """A loss, gradient or prediction was not finite.

    Attributes:
        step: the step, counted from 1.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step
