"""Pages of runs and comparisons, written from made-up results; and a reader of pages."""

import json
from collections import Counter
from html.parser import HTMLParser

import numpy as np

import adapters_jax as aj
from adapters_jax.finetune.compare.summary import rewrite_comparison
from adapters_jax.finetune.report.findings import write_findings
from adapters_jax.finetune.report.pictures import Picture
from adapters_jax.finetune.report.run import write_report
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks.views import Judged

HOSTILE = """</td></p><script>alert("1")</script> '&lt; {{ 1 + 1 }}"""
RESULTS = [
    {
        "method": "majority class",
        "trainable_parameters": 0,
        "dev": {"f1": 0.1},
        "test": {"f1": 0.2},
    },
    {"method": "<lora>", "trainable_parameters": 1234, "dev": {"f1": 0.8}, "test": {"f1": 0.75}},
]
CONFIG = {
    "model": "some/<b>base",
    "task": 'a "task" & more',
    "method": "lora",
    "optimizer": {"epochs": 1.0},
    "data_sha256": "0",
    "metrics": ["f1"],
    "recipe": {"methods": [{"method": "lora", "targets": ["**/query"], "rank": 2, "alpha": 2.0}]},
    "target": {"names": ["no", HOSTILE], "mean": 0.0, "std": 1.0},
    "rows": {"train": 12345, "dev": 20, "test": 30},
    "seed": 0,
    "nothing": None,
    "text": HOSTILE,
    "pairs": False,
    "data": {"train": "/of/this/machine.csv", "prompt": "of another task"},
    "files": {"train": "/of/this/machine.csv"},
    "options": {"data": {"train": "/of/this/machine.csv", "text": HOSTILE}},
    "summary": {"best_step": 7, "dev": {"f1": 0.8}, "seconds": 61.0, "results": RESULTS},
}
PICTURES = [Picture("a line", lambda axes: axes.plot([0, 1]))]
RECORDS = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "dev": {"f1": 0.8}},
]


WORDS = {"text": HOSTILE, "class": "no", "predicted": "<i>yes</i> (90.0 %)"}
ROW = {"gold": "no", "predicted": HOSTILE, "probability": 0.9, "loss": 2.3}
RIGHT = {"gold": HOSTILE, "predicted": HOSTILE, "probability": 0.9, "loss": 0.1}
JUDGED = Judged.of(
    {"train": Counter({5: 3}), "dev": Counter({5: 1, 9: 2})},
    dev=[{**ROW, "words": WORDS}],
    test=[{**ROW, "words": WORDS}, {**RIGHT, "words": WORDS}],
)


class Page(HTMLParser):
    """Parses a page, and checks that its tags nest.

    Attributes:
        tags: in order.
        links: what `src` and `href` name.
        words: every piece of text.
        sections: the tables of each heading, as rows of cells, and its lines of code.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.sections, self.labels = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.labels += [value for name, value in attributes if name == "aria-label"]
        assert not [name for name, _ in attributes if name.startswith("on")]
        assert all(value is not None for _, value in attributes)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.section.append([])
        if tag in ("td", "th"):
            self.section[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)
        inner = self.open[-1] if self.open else ""
        if inner == "h2":
            self.section = self.sections[data] = []
        elif inner in ("td", "th"):
            self.section[-1][-1] += data
        elif inner == "code":
            self.section.append(data)


def write_page(directory, config, judged=JUDGED):
    """The page of a run with a configuration."""
    run = Run(directory / "a run")
    run.path.mkdir()
    method = config["summary"]["results"][-1]["method"]
    run.write_log({"method": method, **record} for record in RECORDS)
    counts = aj.audit(aj.Recipe(aj.Unfreeze("w")), {"w": np.zeros((2, 3), np.float32)})
    write_findings(run, counts, judged)
    write_report(run, config)
    return run.report.read_text(encoding="utf-8")


def write_compared(out, recipes=2):
    """The page of a comparison of some recipes; returns its summary."""
    out.mkdir()
    texts = [f"lora --rank {2**i}" for i in range(recipes - 1)]
    texts.append("houlsby --bottleneck-dim 8 --targets a/b")
    rows = [
        {
            **{"recipe": text, "method": text.split()[0], "family": text.split()[0]},
            **{"size": int(text.split()[2]), "size_name": "rank", "tuned": False},
            **{"trainable_parameters": 128 * 2**i, "percent": 1.5 * 2**i, "learning_rate": 1e-3},
            **{"seeds": [0, 1], "diverged": 0, "missing": 0},
            **{part: {"accuracy": {"mean": 0.7 + 0.02 * i, "deviation": 0.01}} for part in HELD},
        }
        for i, text in enumerate(texts)
    ]
    summary = {
        **{"out": "out", "task": "reviews", "metrics": ["accuracy"], "seeds": [0, 1]},
        **{"tuning_seeds": 1, "done": 2 * recipes, "missing": 0, "seconds": 2.0, "recipes": rows},
        **{"best": {"recipe": texts[0], "command": "adapters-jax finetune --train=/a/b.csv"}},
        **{"command": "adapters-jax compare --train=/a/b.csv --out=/c/out", "notes": ["A note."]},
        **{"papers": ["2106.09685"], "configuration": {"model": "/a/tiny", "rows": ROWS}},
    }
    scores = {part: {"accuracy": 0.75} for part in HELD}
    cells = [
        {"recipe": text, "learning_rate": 1e-3, "seed": seed, "run": "x", **scores, "seconds": 2.0}
        for text in texts
        for seed in (0, 1)
    ]
    (out / "comparison.json").write_text(json.dumps(summary))
    (out / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    rewrite_comparison(out)
    return summary


HELD = ("dev", "test")
ROWS = {"train": 8, "dev": 1, "test": 2}


def write_pages(directory):
    """A page of each kind: its path by its name."""
    draw = np.random.default_rng(0)
    names = [f"class {i} {HOSTILE if i == 3 else ''}" for i in range(30)]
    texts = {"text": "wide " * 100 + "<b>" + "w" * 500, "class": names[3], "predicted": "x"}
    guesses = [
        {"gold": names[a], "predicted": names[b], "loss": 1.0, "words": texts}
        for a, b in draw.integers(0, 30, (300, 2)).tolist()
    ]
    numbers = [
        {"gold": a, "predicted": a + b, "loss": b * b, "words": {"text": "t", "right": f"{a:.1f}"}}
        for a, b in draw.normal(2, 1, (200, 2)).tolist()
    ]
    pairs = [
        {"chosen": a, "rejected": b, "loss": abs(a), "words": {"prompt": "p", "preferred": "q"}}
        for a, b in draw.normal(0, 1, (200, 2)).tolist()
    ]
    lengths = {part: Counter(draw.poisson(40, 200).tolist()) for part in ("train", *HELD)}
    kinds = {
        "classes": ("classification", {"target": {"names": names}}, guesses),
        "numbers": ("regression", {"target": {"names": [], "mean": 0.0, "std": 1.0}}, numbers),
        "preferences": ("preference", {"kind": "decoder", "messages": False}, pairs),
    }
    found = {}
    for name, (task, config, rows) in kinds.items():
        (directory / name).mkdir()
        judged = Judged.of(lengths, dev=rows, test=rows)
        write_page(directory / name, {**CONFIG, **config, "task_type": task}, judged)
        found[name] = directory / name / "a run" / "report.html"
    write_compared(directory / "compared", recipes=6)
    return {**found, "comparison": directory / "compared" / "comparison.html"}
