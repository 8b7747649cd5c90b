"""`adapters-jax compare` of ranks and widths: one program, and the numbers of each cell alone."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from test_compare import compare
from test_compare_together import same_cells

import adapters_jax as aj
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.compare import cells, comparison
from adapters_jax.finetune.compare.cells import shared_sizes
from adapters_jax.finetune.compare.grid import read_candidates
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.stopping import StoppedError
from adapters_jax.finetune.runs.widened import Widened, check_paddable
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

LORA = ("lora --rank 3 --alpha 3", "lora --rank 1 --alpha 3")  # scales of 1 and 3
# The sigmoid of a padded column is a half, whose product has a gradient that is not zero.
RECIPES = (
    *(*LORA, *(f"{text} --dora" for text in LORA)),
    *(f"pfeiffer --bottleneck-dim {m} --activation sigmoid" for m in (2, 5)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a model, rows, and a comparison whose cells have a program each."""
    directory = tmp_path_factory.mktemp("sizes")
    write_model(directory / "tiny")
    write_reviews(directory / "reviews.jsonl", rows=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "shared_sizes", lambda *_: {})
        assert compare(directory, "apart", "--seeds", 0, recipes=RECIPES)[0] == 0
    return directory


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Counts the training steps that are compiled; padding may be as large as it likes."""
    monkeypatch.setitem(cells.COMPILING, "cpu", 1e9)
    monkeypatch.setattr(Widened, "cut", with_check(Widened.cut))
    before = jax.config.jax_compilation_cache_dir
    settings = {"jax_compilation_cache_dir": str(tmp_path / "programs")}
    settings |= {
        f"jax_persistent_cache_min_{k}": -1 for k in ("compile_time_secs", "entry_size_bytes")
    }
    old = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda: len([*(tmp_path / "programs").glob("jit_update-*-cache")])
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    assert jax.config.jax_compilation_cache_dir == before


def with_check(cut):
    """`Widened.cut` that compares what it cuts off with zero."""

    def checked(self, state):
        own = cut(self, state)
        names = ("adapters", "opt_state")
        whole = ({n: getattr(each, n) for n in names} for each in (self.widen(own), state))
        for x, y in zip(*map(jax.tree.leaves, whole), strict=True):
            np.testing.assert_array_equal(x, y)
        return own

    return checked


@pytest.mark.weekly
def test_sizes_share_a_program_and_keep_their_numbers(directory, programs):
    status, _, last = compare(directory, "shared", "--seeds", 0, recipes=RECIPES)
    assert status == 0, last
    assert programs() == 3  # LoRA's, DoRA's and that of bottlenecks, each of two sizes
    same_cells(directory, "shared")
    for rank in (1, 3):
        cell = directory / "shared" / "cells" / f"lora-rank-{rank}-alpha-3-lr-0.002-seed-0"
        leaves = load_file(cell / "adapter" / "adapter.safetensors")
        assert {x.shape[-1] for path, x in leaves.items() if path.endswith("lora/a")} == {rank}
        summaries = [
            json.loads((directory / each / "cells" / cell.name / "config.json").read_text())
            for each in ("apart", "shared")
        ]
        one, two = (each["summary"]["results"][0]["trainable_parameters"] for each in summaries)
        assert one == two


@pytest.mark.weekly
def test_an_interrupted_cell_goes_on_in_its_own_shapes(directory, programs, monkeypatch):
    batch = LabelledProblem.batch

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LabelledProblem, "batch", interrupted)
        assert compare(directory, "halted", "--seeds", 0, recipes=LORA[::-1])[0] == 143
    shutil.copytree(directory / "halted", directory / "larger")
    shutil.copytree(directory / "apart", directory / "both")
    for cell in (directory / "both" / "cells").iterdir():
        if cell.name.startswith("pfeiffer") or "dora" in cell.name:
            shutil.rmtree(cell)
    # The checkpoint of rank 1 was made in the shapes of rank 3.
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "shared_sizes", lambda *_: {})
        assert compare(directory, "halted", "--seeds", 0, recipes=LORA[::-1])[0] == 0
    same_cells(directory, "halted", "both")
    wider = (*LORA[::-1], "lora --rank 4 --alpha 3")
    assert compare(directory, "larger", "--seeds", 0, recipes=wider)[0] == 0
    shutil.rmtree(directory / "larger" / "cells" / "lora-rank-4-alpha-3-lr-0.002-seed-0")
    same_cells(directory, "larger", "both")


@pytest.mark.weekly
def test_decoders_share_a_program(tmp_path, programs, monkeypatch):
    write_llama(tmp_path / "llama", num_hidden_layers=1)
    write_meanings(tmp_path / "rows.csv", rows=40)
    monkeypatch.chdir(tmp_path)
    words = "compare --model llama --train rows.csv --prompt mr --completion ref --max-length 32"
    words += " --exact-match 2 --epochs 1 --limit 8 --seeds 3 --learning-rates 1e-2 --clip 0.5"
    recipes = [
        "--recipes",
        *(f"lora --rank {rank} --targets **/{{query,value}}" for rank in (1, 4)),
    ]
    assert main([*words.split(), *recipes, "--out", "shared"]) == 0
    assert programs() == 1
    monkeypatch.setattr(comparison, "shared_sizes", lambda *_: {})
    assert main([*words.split(), *recipes, "--out", "apart"]) == 0
    assert programs() == 3
    same_cells(tmp_path, "shared")


@pytest.mark.parametrize(
    ("method", "optimizer", "why"),
    [
        (aj.AdaLoRA("**", rank=4), "adamw", "budget"),
        (aj.VeRA("**", rank=4), "adamw", "VeRA"),
        (aj.PrefixTuning("**", length=4), "adamw", "PrefixTuning"),
        (aj.Unfreeze("**"), "adamw", "parameters of the base"),
        (aj.Bottleneck("**", bottleneck_dim=4, dropout=0.1), "adamw", "dropout of Bottleneck"),
        (aj.LoRA("**", rank=4), "adafactor", "adafactor"),
    ],
)
def test_what_padding_would_change_has_its_own_program(method, optimizer, why):
    problem = SimpleNamespace(mesh=None, recipe=aj.Recipe(method))
    with pytest.raises(aj.RecipeError, match=why):
        check_paddable(problem, optimizer)
    check_paddable(SimpleNamespace(mesh=None, recipe=aj.Recipe(aj.LoRA("**", dropout=0.1))), "lion")


@pytest.mark.weekly
def test_why_a_program_is_not_shared_is_said(directory, programs, monkeypatch):
    said, train = [], comparison.ComparisonJob._train
    monkeypatch.setattr(Console, "say", lambda self, text="": said.append(text))

    def stopped(job):
        raise StoppedError("seen")

    def trained(self, cell, console):
        with monkeypatch.context() as patch:
            patch.setattr(Job, "__call__", stopped)
            return train(self, cell, console)

    monkeypatch.setattr(comparison.ComparisonJob, "_train", trained)
    flags = ("--seeds", 0, "--optimizer", "adafactor")
    assert compare(directory, "said", *flags, recipes=LORA)[0] != 0
    assert [text for text in said if "program" in text and "adafactor" in text]


@pytest.mark.parametrize(("steps", "largest"), [(1, 64), (200, 16)])
def test_sizes_share_where_padding_takes_less_than_compiling(monkeypatch, steps, largest):
    monkeypatch.setattr(cells, "COMPILING", {jax.default_backend(): 4.0})
    texts = ("lora --rank 4", "lora --rank 64", "houlsby --bottleneck-dim 8", "lora --rank 16")
    candidates = read_candidates(texts, (), (0,), 1)
    checked = {
        each.text: SimpleNamespace(
            trainable_parameters=30 * each.size + 7, base_parameters=30_000, steps=steps
        )
        for each in candidates
    }
    found = shared_sizes(candidates, checked)
    shared = [
        text for text in texts if text.startswith("lora") and largest >= int(text.split()[-1])
    ]
    assert found == dict.fromkeys(shared, ("rank", largest))
