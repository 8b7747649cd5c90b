"""Tasks: what a model learns from rows; a registry has them by name.

A task author provides one module with a `Task` and adds one line to `TASKS`;
`adapters-jax finetune --task NAME` then trains it, `--resume` resumes it, and `load_predictor`
opens its runs. The `Task` names itself, its kind of base, and the columns and flags that it reads;
any other flag raises an error. Its three methods do the work:

1. `read` reads a file into rows, mostly a `data.tables.Table`; the rows to select on and to report
   on are held out of them, those of one of `groups` together.
2. `prepare` loads the base, encodes the rows and returns a `Prepared`: the `Problem` that training
   needs (model, batches, loss, score), the task's part of the run's configuration, and baselines.
3. `open` rebuilds the adapted model from a finished run's configuration, and returns an object that
   uses the run. `needed` names the keys of the configuration that it reads.

The page of a run shows what `views` makes of what `Prepared.judged` returns, by default nothing.

A task on an encoder with a head derives from `labelled.EncoderTask`, which has `prepare` and
`open`; its `Readout` says what differs. One on a decoder derives from `decoder.DecoderTask`, which
has `open`. `tests/helpers/tagging.py` is a whole task without them.

- `base`: the interface of a task.
- `classification`, `regression`, `multilabel`, `token_classification`, `question_answering` and
  `multiple_choice`: an encoder with a head; `sentence_embedding`: one without;
  `masked_language_modelling`: one with the checkpoint's own; `image_classification`: one of
  images. `labelled` and `labelled_problem` have what all share, `readout` what differs.
- `completion`: completions of prompts; `completion_problem`.
- `conversation`: the assistant's turns of conversations; `conversation_rows` has their tokens.
- `preference`: which of two completions is better; `preference_problem`.
- `decoder` has what these three share, and `generator` uses their runs.
- `views`: what the page of a run shows of its predictions.
- `metrics`: accuracy, F1, correlations, perplexity, exact match; F1 of spans, answers and sets;
  retrieval.
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax.finetune.run_directory import Run, RunError, check_keys
from adapters_jax.finetune.tasks.base import Task
from adapters_jax.finetune.tasks.classification import Classification
from adapters_jax.finetune.tasks.completion import Completion
from adapters_jax.finetune.tasks.conversation import ConversationTask
from adapters_jax.finetune.tasks.image_classification import ImageClassification
from adapters_jax.finetune.tasks.masked_language_modelling import MaskedLanguageModelling
from adapters_jax.finetune.tasks.multilabel import MultiLabel
from adapters_jax.finetune.tasks.multiple_choice import MultipleChoice
from adapters_jax.finetune.tasks.preference import PreferenceTask
from adapters_jax.finetune.tasks.question_answering import QuestionAnswering
from adapters_jax.finetune.tasks.regression import Regression
from adapters_jax.finetune.tasks.sentence_embedding import SentenceEmbedding
from adapters_jax.finetune.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task", "read_run", "task_of", "tasks_on"]

#: The tasks by name. A task of your own is a further entry, made before a run of it is read.
#:
#: :meta hide-value:
TASKS: dict[str, Task] = {
    Classification.name: Classification(),
    Regression.name: Regression(),
    MultiLabel.name: MultiLabel(),
    TokenClassification.name: TokenClassification(),
    QuestionAnswering.name: QuestionAnswering(),
    MultipleChoice.name: MultipleChoice(),
    SentenceEmbedding.name: SentenceEmbedding(),
    MaskedLanguageModelling.name: MaskedLanguageModelling(),
    ImageClassification.name: ImageClassification(),
    Completion.name: Completion(),
    ConversationTask.name: ConversationTask(),
    PreferenceTask.name: PreferenceTask(),
}


def tasks_on(kind: str) -> list[Task]:
    """The tasks on a kind of base, as `Task.kind`; the first is the default.

    Args:
        kind: "encoder", "decoder" or "vision"; another one has no tasks.

    Example:
        >>> [task.name for task in tasks_on("decoder")]
        ['completion', 'conversation', 'preference']
    """
    return [task for task in TASKS.values() if task.kind == kind]


def task_of(config: Mapping[str, Any]) -> Task:
    """Finds the task of a run by its configuration.

    Args:
        config: the configuration, as `read_run` returns it; that of an old run has no `task_type`.

    Raises:
        KeyError: the registry has no task of that name.
        TypeError: the name is not a text.

    Example:
        >>> task_of({"task_type": "regression"}).name
        'regression'
        >>> task_of({"kind": "encoder", "target": {"names": ["no", "yes"]}}).name
        'classification'
    """
    if "task_type" in config:
        return TASKS[config["task_type"]]
    if config.get("kind") == "decoder":
        return TASKS["completion"]
    # Old runs have no task_type, but a target: the names of classes, or the scale of numbers.
    target = config.get("target")
    named = isinstance(target, dict) and target.get("names")
    return TASKS["classification" if named else "regression"]


def read_run(run: Run, command: str | None = None) -> tuple[Task, dict[str, Any]]:
    """Reads the task and the configuration of a run.

    Args:
        run: the run.
        command: the command that uses the run, "predict" or "generate"; None is any command.

    Returns:
        The task, and the configuration, which has every key in `needed` of the task.

    Raises:
        RunError: the run is absent or damaged, its task is not registered, or another command uses
            it.

    Example:
        >>> from pathlib import Path
        >>> read_run(Run(Path("no-run")))
        Traceback (most recent call last):
        adapters_jax.finetune.run_directory.RunConfigError: no run at no-run: it has no ...
    """
    config = run.read_config()
    try:
        task = task_of(config)
    except (KeyError, TypeError):
        raise RunError(
            f"{run.path}: task_type={config['task_type']!r}, expected one of {', '.join(TASKS)}"
        ) from None
    if command not in (None, task.command):
        raise RunError(
            f"{run.path} is a run of the task {task.name}; use adapters-jax {task.command}"
        )
    check_keys(run, config, task.needed)
    return task, config
