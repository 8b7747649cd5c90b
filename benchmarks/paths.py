"""Counts the files and functions that common work runs through, and the moves between files.

The work runs once before it is counted, so that modules are imported, and jax's caches are
cleared, so that it is traced again. Models are tiny and made here. Only files of adapters_jax are
counted. A function is a `def`; lambdas and comprehensions belong to the one around them. A move is
a call, or the resumption of a generator, from the code of one file into that of another; calls that
come back through jax, flax or the standard library are not counted.
"""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import adapters_jax as aj
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models.bert import NAMES, Bert, BertConfig
from adapters_jax.trees import flatten
from benchmarks.report import Report

PACKAGE = str(Path(aj.__file__).parent) + os.sep
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "the", "film", "was", "plot", "music")
RECIPE = aj.Recipe(aj.LoRA("**/{query,value}", rank=2))
SHOWN = 12  # pairs of files in the table of moves


@dataclass
class Found:
    """What ran.

    Attributes:
        functions: each function's file, and its name within it.
        moves: how often each pair of files was crossed, from the first to the second.
    """

    functions: set[tuple[str, str]] = field(default_factory=set)
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)

    def sizes(self) -> "Sizes":
        """The numbers of files, functions and moves."""
        files = {file for file, _ in self.functions}
        return Sizes(len(files), len(self.functions), self.moves.total())


class Sizes(NamedTuple):
    """Numbers of files, functions and moves between files."""

    files: int
    functions: int
    moves: int


CSV, STEP = "a CSV file to a finished run", "the second step of training"
GOALS = {
    "load_adapter": Sizes(20, 90, 150),
    "init_adapters": Sizes(15, 70, 120),
    "NNX adapt": Sizes(15, 70, 120),
    CSV: Sizes(130, 800, 5000),
}


def profiled(work: Callable[[], Any], package: str = PACKAGE) -> Found:
    """Does the work, and counts what it runs through in this thread.

    Args:
        work: the work.
        package: the beginning of the paths of the files that count.

    Example:
        >>> found = profiled(lambda: aj.Recipe(aj.LoRA("**", rank=2)))
        >>> ("recipe.py", "Recipe.__init__") in found.functions
        True
    """
    found = Found()

    def note(frame: Any, event: str, _: Any) -> None:
        # Templates of jinja2 are code as well, with the paths of the templates.
        path = frame.f_code.co_filename
        if event != "call" or not (path.startswith(package) and path.endswith(".py")):
            return
        name = frame.f_code.co_qualname
        if not name.rpartition(".")[2].startswith("<"):
            found.functions.add((path.removeprefix(package), name))
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        if caller != path and caller.startswith(package) and caller.endswith(".py"):
            found.moves[caller.removeprefix(package), path.removeprefix(package)] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


class Attention(nn.Module):
    """The two projections that the recipe adapts, in linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query = nn.Dense(8, name="query")(x)
        return x + nn.softmax(query) * nn.Dense(8, name="value")(x)


class Model(nn.Module):
    """One layer in linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Attention(name="layer_0")(x)


class NnxAttention(nnx.Module):
    """The two projections that the recipe adapts, in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.value = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nnx.softmax(self.query(x)) * self.value(x)


class NnxModel(nnx.Module):
    """One layer in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer_0 = NnxAttention(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer_0(x)


def works(directory: Path, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Makes each work, which can be done more than once, with its name."""
    base, x, key = Model(), jnp.ones((2, 8)), jax.random.key(0)
    params = base.init(key, x)["params"]
    model = aj.adapt(base, RECIPE)
    adapted = aj.init_adapters(model, params, key, x)
    trained = aj.TrainState.create(model, adapted, tx=optax.adamw(1e-3), key=key)
    aj.save_adapter(directory / "adapter", trained)
    yield "load_adapter", lambda: aj.load_adapter(directory / "adapter", base, params, x)
    yield "init_adapters", lambda: aj.init_adapters(model, params, key, x)

    other = NnxModel(nnx.Rngs(0))
    yield "NNX adapt", lambda: aj.adapt(other, RECIPE, rngs=nnx.Rngs(1))

    write_model(directory / "model")
    write_rows(directory / "rows.csv", 40 if quick else 80)
    yield CSV, lambda: finetune(directory, epochs=1 if quick else 3)

    def loss(params: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.square(model.apply({"params": params}, batch)).mean()

    step = aj.make_train_step(loss)
    state = aj.TrainState.create(model, adapted, tx=optax.adamw(1e-3), key=key)

    def advance() -> None:
        nonlocal state
        state, _ = step(state, x)

    yield STEP, advance


def finetune(directory: Path, epochs: int) -> None:
    """Trains the default method on a CSV file by the command line, up to the page of the run."""
    runs = directory / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    flags = {"model": directory / "model", "train": directory / "rows.csv", "text": "review"}
    flags |= {"runs": runs, "name": "run", "epochs": epochs}
    command = ["finetune", *(f"--{name}={value}" for name, value in flags.items())]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(command)
    if status or not (runs / "run" / "report.html").exists():
        line = shlex.join(["adapters-jax", *command])
        raise RuntimeError(f"{line} ended with status {status}:\n{printed.getvalue()[-2000:]}")


def write_rows(path: Path, rows: int) -> None:
    """Writes reviews whose label follows from one word."""
    draw, lines = random.Random(0), ["review,label"]
    for row in range(rows):
        words = [("bad", "good")[row % 2], *draw.choices(WORDS[6:], k=4)]
        lines.append(f"{' '.join(words)},{('no', 'yes')[row % 2]}")
    path.write_text("\n".join(lines) + "\n")


def write_model(directory: Path) -> None:
    """Writes a BERT of one layer with random weights, and a tokenizer of whole words."""
    directory.mkdir()
    config = BertConfig(len(WORDS), 32, 1, 4, 48, max_position_embeddings=16)
    (directory / "config.json").write_text(json.dumps(asdict(config)))
    params = jax.jit(Bert(config).init)(jax.random.key(0), jnp.ones((1, 4), int))["params"]
    tensors = {}
    for path, leaf in flatten(params).items():
        source = NAMES.source(path)
        tensors[source.name] = np.array(leaf.T if source.transposed else leaf, order="C")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; with fewer rows and one epoch if quick."""
    pairs = []
    with tempfile.TemporaryDirectory(prefix="adapters-jax-benchmark-") as directory:
        for name, work in works(Path(directory), quick):
            work()
            if name != STEP:  # whose program is there from the first step
                jax.clear_caches()
            found = profiled(work)
            sizes = found.sizes()._asdict()
            report.add("Paths", work=name, **sizes)
            goal = GOALS[name]._asdict() if name in GOALS else {}
            for what, most in goal.items():
                report.claim(f"{what} in {name}", sizes[what], most)
            pairs += [(name, *pair, n) for pair, n in found.moves.most_common(SHOWN)]
    for name, source, target, n in pairs:
        report.add("Most moves", **{"work": name, "from": source, "to": target, "moves": n})
