"""What objects show of themselves: a table in a notebook, and the short repr of a state."""

import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers.errors import raises
from helpers.reports import write_compared

import adapters_jax as aj
from adapters_jax.finetune.inference import load_comparison
from adapters_jax.finetune.run_directory import RunError
from adapters_jax.texts import html_table

HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e&amp;"


class Cells(HTMLParser):
    """The texts of the cells of a table, row by row, what follows it, and the tags that it has."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.notes, self.tags, self.styles = [], [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.styles.append(dict(attributes).get("style") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "div":
            self.notes.append("")

    def handle_data(self, text):
        if self.lasttag in ("td", "th"):
            self.rows[-1][-1] += text
        else:
            self.notes[-1] += text


def cells(thing):
    return Cells(thing._repr_html_())


@pytest.fixture
def model():
    return aj.adapt(Net(), RECIPE, rngs=nnx.Rngs(1))


RECIPE = aj.Recipe(aj.LoRA("**/layers/*", rank=2, alpha=4.0), aj.Unfreeze("**/bias"))


class Net(nnx.Module):
    def __init__(self, width=8):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_texts_of_others_have_no_effect():
    found = Cells(html_table([HOSTILE, "n"], [[HOSTILE, "1"]], notes=[HOSTILE]))
    shown = "</td><script>alert(1)</script>\\u001b[2J\\u202e&amp;"
    assert found.rows == [[shown, "n"], [shown, "1"]]
    assert found.notes == ["", shown]
    assert found.tags == {"div", "table", "thead", "tbody", "tr", "th", "td"}


def test_colours_are_those_of_the_page():
    styles = Cells(html_table(["a"], [["b"]])).styles
    colours = [
        part.split(": ")[1] for style in styles for part in style.split("; ") if "color" in part
    ]
    assert set(colours) == {"inherit"} and "overflow-x: auto" in styles[0]


def test_an_audit_has_the_rows_and_totals_of_its_repr(model):
    audit = aj.audit(model)
    found = cells(audit)
    assert found.rows == [[*audit_header()], *map(list, audit.rows())]
    assert ["layers/*", "LoRA", "a [8, 2], b [2, 8]", "2*(8 + 8)", "3", "96"] in found.rows
    assert found.notes[1:] == audit.totals()


def audit_header():
    return "path", "method", "shapes", "formula", "count", "parameters"


def test_a_recipe_has_a_row_for_each_method():
    assert cells(RECIPE).rows == [
        ["method", "targets", "settings"],
        ["LoRA", "**/layers/*", "rank=2, alpha=4.0"],
        ["Unfreeze", "**/bias", ""],
    ]


def test_a_plan_has_the_bytes_of_its_parts():
    plan = aj.Plan(2048, 10, 20, 10, 3, 4, 8, 2, 5, 517)
    rows = cells(plan).rows
    assert rows[0] == ["8 rows a step", "on each of 2 devices"]
    assert rows[1] == ["base", "2.0 KiB"] and ["total", "2.0 KiB"] in rows
    assert ["temporaries", "4 B"] in rows and rows[-1] == ["trainable parameters", "5"]


def test_a_bank_has_its_adapters_and_what_there_is_room_for():
    model = aj.adapt(Net(), aj.LoRA("**/layers/0", rank=2), rngs=nnx.Rngs(1))
    leaves = {"layers": {"0": {"lora": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}}}}
    recipe = aj.LoRA("**/layers/0", rank=2)
    bank = aj.Bank(model, capacity=3).put(HOSTILE, (recipe, leaves)).put("b", (recipe, leaves))
    found = cells(bank)
    assert found.rows[1][0].startswith("</td><script>") and found.rows[2] == ["b"]
    assert found.notes[1].startswith("3 at a time are on the device")
    assert found.rows[4] == ["LoRA", "**/layers/0", "rank=2"]


def test_a_comparison_has_its_results_and_what_is_missing(tmp_path):
    write_compared(tmp_path / "out", recipes=2)
    comparison = load_comparison(tmp_path / "out")
    found = cells(comparison)
    assert found.rows == [
        ["recipe", "trainable", "of base", "rate", "seeds", "test accuracy"],
        ["lora --rank 1", "128", "1.5 %", "0.001", "2", "70.0 ± 1.0 %"],
        ["houlsby --bottleneck-dim 8 --targets a/b", "256", "3 %", "0.001", "2", "72.0 ± 1.0 %"],
    ]
    assert found.notes[1:] == [
        f"4 runs are done, 0 are missing: {tmp_path / 'out'}",
        "The best on dev is lora --rank 1.",
    ]
    for cell in [*found.rows[0], *found.rows[1], *found.notes[1:]]:
        assert cell in str(comparison)
    assert comparison.table("dev", "test")[0][5:] == ["dev accuracy", "test accuracy"]
    assert comparison.table("test", "test") == comparison.table()
    for wrong in ("train", ["dev", "test"]):
        with raises(aj.UserError, repr(wrong), "table('dev', 'test')"):
            comparison.table(wrong)


def test_a_comparison_of_others_has_no_effect_on_a_terminal(tmp_path):
    summary = write_compared(tmp_path / "out")
    summary["recipes"][0]["recipe"] = summary["best"]["recipe"] = HOSTILE
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(summary))
    shown = repr(load_comparison(tmp_path / "out"))
    assert shown.count("\\u001b[2J\\u202e") == 2 and "\x1b" not in shown and "\u202e" not in shown


@pytest.mark.slow
@pytest.mark.witness("metrics", "best")
@pytest.mark.parametrize("lacking", ["recipes", "metrics", "done", "best"])
def test_a_summary_without_a_part_is_damaged(tmp_path, lacking):
    summary = write_compared(tmp_path / "out")
    del summary[lacking]
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(summary))
    with pytest.raises(RunError, match=rf"comparison.json is damaged: .*{lacking}.*writes it anew"):
        load_comparison(tmp_path / "out")


def test_the_repr_of_a_state_has_shapes_and_totals(model):
    state = aj.TrainState.create(model, tx=optax.adam(1e-3), key=jax.random.key(0))
    assert (
        repr(state)
        == """\
TrainState(
  step=0, of an NNX model
  adapters: 120 in 9 arrays, 480 B
    layers/*/bias float32[8] x 3
    layers/*/lora/a float32[8, 2] x 3
    layers/*/lora/b float32[2, 8] x 3
  base: 192 in 3 arrays, 768 B
  opt_state: 241 in 19 arrays, 964 B
  other: none
)"""
    )
    jax.tree.map(lambda x: x.delete(), state.step)
    assert "step=(donated to a step)" in repr(state)


def test_the_repr_of_a_state_without_values(model):
    tx = optax.sgd(0.1)
    state = aj.abstract_state(model, tx=tx)
    assert "step=(not computed)" in repr(state) and "base: 192 in 3 arrays" in repr(state)
    seen = []
    jax.jit(lambda s: (seen.append(repr(s)), s.step)[1]).lower(state)
    assert seen == [repr(state)]


def test_the_repr_of_a_state_is_short_whatever_its_model_is():
    names = {f"name_{chr(97 + i)}": jnp.ones((2,)) for i in range(20)}
    recipe = aj.Recipe(aj.Unfreeze("**"))
    base = aj.TrainState.create(
        aj.adapt(Net(), recipe, rngs=nnx.Rngs(0)), tx=optax.sgd(0.1), key=jax.random.key(0)
    )
    text = repr(base.replace(adapters=names, graphdef=None))
    assert "and 8 others" in text and "of a linen model" in text and len(text.splitlines()) == 20
