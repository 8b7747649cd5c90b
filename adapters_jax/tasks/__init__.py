"""Tasks: what a model learns from rows; a registry has them by name.

- `base`: the interface of a task, and what its author provides.
- `classification`, `regression`, `multilabel`, `token_classification`, `question_answering` and
  `multiple_choice`: an encoder with a head; `sentence_embedding`: one without;
  `masked_language_modelling`: one with the checkpoint's own; `image_classification`: one of
  images. `labelled` and `labelled_problem` have what all share, `readout` what differs, `head` the
  baseline.
- `completion`: completions of prompts; `completion_problem`, `completion_rows`, `prompts`.
- `conversation`: the assistant's turns of conversations; `conversation_rows` has their tokens.
- `preference`: which of two completions is better; `preference_problem`, `preference_rows`.
- `views`: what the page of a run shows of its predictions.
- `metrics`: accuracy, F1, correlations, perplexity, exact match; F1 of spans, answers and sets;
  retrieval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters_jax.io.run_directory import Run, RunError, check_keys
from adapters_jax.tasks.base import Task
from adapters_jax.tasks.classification import Classification
from adapters_jax.tasks.completion import Completion
from adapters_jax.tasks.conversation import ConversationTask
from adapters_jax.tasks.image_classification import ImageClassification
from adapters_jax.tasks.masked_language_modelling import MaskedLanguageModelling
from adapters_jax.tasks.multilabel import MultiLabel
from adapters_jax.tasks.multiple_choice import MultipleChoice
from adapters_jax.tasks.preference import PreferenceTask
from adapters_jax.tasks.question_answering import QuestionAnswering
from adapters_jax.tasks.regression import Regression
from adapters_jax.tasks.sentence_embedding import SentenceEmbedding
from adapters_jax.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task", "read_run", "task_of", "tasks_on"]

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

    Example:
        >>> [task.name for task in tasks_on("decoder")]
        ['completion', 'conversation', 'preference']
    """
    return [task for task in TASKS.values() if task.kind == kind]


def task_of(config: Mapping[str, Any]) -> Task:
    """Finds the task of a run by its configuration.

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

    Raises:
        RunError: the run is absent or damaged, its task is not registered, or another command uses
            it.
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
