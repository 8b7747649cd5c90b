"""The example of MAD-X: languages below a task, by stacks of named adapters."""

import random
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import WORDS
from test_masked_language_modelling import write_masked

import adapters_jax as aj
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem
from adapters_jax.trees import flatten
from examples.mad_x import main


@pytest.mark.weekly
def test_a_task_keeps_its_adapter_over_each_language(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_masked(Path("tiny"))
    draw, seen = random.Random(0), []
    for name in ("own", "other"):
        texts = (" ".join(draw.choices(WORDS[4:], k=7)) for _ in range(40))
        Path(f"{name}.txt").write_text("\n".join(texts))
    rows = [f"{' '.join(draw.choices(WORDS[4:], k=4))},{i % 2}" for i in range(40)]
    Path("rows.csv").write_text("\n".join(["text,label", *rows]))
    score = LabelledProblem.score_params

    def scored(self, params, part):
        seen.append((self.recipe, flatten(params), score(self, params, part)))
        return seen[-1][-1]

    monkeypatch.setattr(LabelledProblem, "score_params", scored)
    words = "--model tiny --texts own.txt other.txt --rows rows.csv --steps 3 --out out"
    scores = main([*words.split(), "--learning-rate", "0.05"])
    assert list(scores) == ["own", "other", "none"]
    assert [each["accuracy"] for *_, each in seen] == list(scores.values())

    task = {p: x for p, x in seen[0][1].items() if "/adapter_task/" in p or p.startswith("head/")}
    assert len(task) == 4 + 2  # of one layer, and the head
    assert all(np.abs(task[path]).max() > 0.01 for path in task)  # they were trained
    for (recipe, params, _), name in zip(seen, scores, strict=True):
        for path, leaf in task.items():
            np.testing.assert_array_equal(params[path], leaf, err_msg=path)
        languages = {path: x for path, x in params.items() if f"/adapter_{name}/" in path}
        if name == "none":
            assert not languages and [m.name for m in recipe.attached] == ["task"]
            continue
        assert recipe.methods[-1].members == (name, "task")
        saved = aj.read_adapter(f"out/{name}")[1]
        assert languages.keys() == saved.keys()
        for path, leaf in saved.items():  # frozen while the task trained
            np.testing.assert_array_equal(languages[path], leaf, err_msg=path)
    own, other = (dict(aj.read_adapter(f"out/{name}")[1]) for name in ("own", "other"))
    assert all(
        np.abs(x - y).max() > 0.01 for x, y in zip(own.values(), other.values(), strict=True)
    )
    assert "own       " + f"{scores['own']:.3f}" in capsys.readouterr().out
