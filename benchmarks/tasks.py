"""Measures whether training another task changes the outputs of the first one.

Three tasks are trained one after the other on one base. With adapters, each task has its own, and
the outputs of the first task and the base stay the same to the last bit. In full fine-tuning, all
tasks share the weights, and the first task keeps only its head. Houlsby et al. 2019: new tasks are
added "without revisiting previous ones", with "perfect memory" of them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import adapters_jax as aj
from adapters_jax.trees import Tree, flatten, unflatten
from benchmarks.report import Report
from benchmarks.shapes import FULL, HOULSBY, LORA, Subject

SUBJECT, TOY = Subject("BERT-base", 8, 128), Subject("toy BERT", 4, 16)
SIDES = (LORA, HOULSBY, FULL)
TASKS, HEAD = 3, "head/"


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    subject, steps = (TOY, 3) if quick else (SUBJECT, 5)
    for name in SIDES:
        found = sequence(subject, name, steps)
        moved = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in found.outputs]
        same = [a.tobytes() == b.tobytes() for a, b in found.outputs]
        for task in range(TASKS):
            a, b = found.outputs[task]
            report.add(
                f"Outputs after training a task, and after all {TASKS}",
                subject=str(subject),
                recipe=name,
                task=task + 1,
                **{
                    "the same bits": same[task],
                    "moved, part of the largest": moved[task],
                    "labels that changed": int((a.argmax(-1) != b.argmax(-1)).sum()),
                    "loss, first step": found.losses[task][0],
                    "loss, last step": found.losses[task][-1],
                },
            )
        report.add(
            "Stored",
            recipe=name,
            **{
                "MB of each task": found.task_bytes / 1e6,
                "MB of the base": found.base_bytes / 1e6,
                "base's bits the same": found.base_same,
            },
        )
        _verdict(report, subject, name, found.base_same, same, moved)


def _verdict(
    report: Report, subject: Subject, name: str, base: bool, same: list[bool], moved: list[float]
) -> None:
    how = f"{TASKS} tasks one after the other, {subject}, bytes compared"
    if name == FULL:
        report.verdict(
            "full fine-tuning on further tasks changes the first one",
            "it does",
            f"its outputs move by {100 * moved[0]:.2g} % of the largest",
            f"{how}; the first task keeps its head",
            "not reproduced" if same[0] else "reproduced",
        )
        return
    kept = base and all(same)
    report.verdict(
        f"{name}: tasks are added without changing earlier ones",
        "perfect memory of previous tasks",
        "outputs and base the same to the bit" if kept else "they change",
        how,
        "reproduced" if kept else "not reproduced",
    )


class Sequence:
    """The results of a sequence of trainings.

    Attributes:
        outputs: for each task, its outputs right after its training and after all trainings.
        losses: for each task, the loss of each step.
        base_same: whether the frozen base has the same bits as before; None if nothing is frozen.
        task_bytes, base_bytes: the bytes to store for each task, and once for all.
    """

    def __init__(self, task_bytes: int, base_bytes: int):
        self.outputs: list[tuple[np.ndarray, np.ndarray]] = []
        self.losses: list[list[float]] = []
        self.base_same: bool | None = None
        self.task_bytes, self.base_bytes = task_bytes, base_bytes


def sequence(subject: Subject, name: str, steps: int) -> Sequence:
    """Trains the tasks in turn, each with its own adapters, or all of them in full."""
    recipe, base = subject.recipe(name), subject.weights()
    model, state = subject.state(recipe, base)
    step: Any = aj.make_train_step(subject.loss(model))
    evaluate: Any = aj.make_eval_step(lambda params, ids: model.apply({"params": params}, ids))
    size = sum(x.nbytes for x in jax.tree.leaves(state.adapters))
    found = Sequence(size, sum(x.nbytes for x in jax.tree.leaves(state.base)))
    before, kept, first = digest(state.base), [], []
    for task in range(TASKS):
        if task and name != FULL:
            state = subject.state(recipe, base, seed=1 + task)[1]
        state, losses = _train(step, state, data(subject, task), steps)
        found.losses.append(losses)
        own = recipe.trains if name != FULL else lambda path: path.startswith(HEAD)
        kept.append(_kept(state.adapters, own))
        first.append(_outputs(evaluate, state, subject, task))
    for task in range(TASKS):
        trained = unflatten({**flatten(state.adapters), **kept[task]})
        again = _outputs(evaluate, replace(state, adapters=trained), subject, task)
        found.outputs.append((first[task], again))
    if name != FULL:
        found.base_same = digest(state.base) == before == digest(_without(base, state.base))
    return found


def data(subject: Subject, task: int) -> dict[str, jax.Array]:
    """The batch of a task; each task has its own tokens, and its label depends on one token."""
    ids = subject.ids(seed=task)
    return {"ids": ids, "labels": ids[:, task] % 2}


def _train(
    step: Any, state: aj.TrainState, batch: dict[str, jax.Array], steps: int
) -> tuple[aj.TrainState, list[float]]:
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def _kept(adapters: Tree, own: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Copies the leaves of a task by path, since the next step donates the arrays."""
    return {path: np.array(x) for path, x in flatten(adapters).items() if own(path)}


def _outputs(evaluate: Any, state: aj.TrainState, subject: Subject, task: int) -> np.ndarray:
    return np.array(evaluate(state, data(subject, task)["ids"]))


def _without(base: Tree, frozen: Tree) -> Tree:
    """The leaves of the base that stay frozen."""
    given = flatten(base)
    return unflatten({path: given[path] for path in flatten(frozen)})


def digest(tree: Tree) -> str:
    """The SHA-256 of a tree's paths and bytes."""
    found = hashlib.sha256()
    for path, x in sorted(flatten(tree).items()):
        found.update(path.encode() + np.asarray(x).tobytes())
    return found.hexdigest()
