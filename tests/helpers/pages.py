"""The blocks of the README and of the documentation, and what their commands read."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.files.peft import save_peft
from adapters_jax.finetune.cli import main as command_line
from adapters_jax.finetune.models.bert import FAMILY, BertClassifier, load_bert
from helpers.tiny import FOODS, write_llama, write_meanings, write_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    page for page in PAGES if not {"measured", "commands"} & {*page.parts}
]  # made for the site
FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
PRINTED = re.compile(r"^ *(?:print\(|adapters-jax ).*?(?<! )  # (.*)$", re.M)
ADDED = re.compile(r"# Takes .*the tests take a small model(?: and add (--.*))?\.$", re.M)
SERVERS = re.compile(r"localhost:8000|^adapters-jax (?:serve |push |data hub:)", re.M)
STAND_INS = ("minilm", "smollm2-135m")
TRAINS = ("adapters-jax finetune ", "adapters-jax compare ")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def runs(self):
        return not self.text.startswith("# Not run")

    @property
    def asks(self):
        """Whether it starts a server, or asks one or the Hub."""
        return bool(SERVERS.search(self.text))

    @property
    def added(self):
        """The flags that its trainings get; None if it runs with the models that it names."""
        found = ADDED.match(self.text)
        return None if found is None else re.findall(r"(--\S+) (\S+)", found[1] or "")

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield Block(page, text[: found.start()].count("\n") + 1, *found.groups())


def params(language, runs=True, asks=False):
    """The blocks of a language that are run, or those that are not."""
    blocks = (block for page in PAGES for block in blocks_of(page))
    takes = {True: [pytest.mark.weekly], False: [pytest.mark.slow] if asks else []}
    return [
        pytest.param(block, id=block.name, marks=takes[block.text.startswith("# Takes")])
        for block in blocks
        if (block.language, block.runs, block.asks and block.runs) == (language, runs, asks)
    ]


def commands(block):
    """The lines of a shell block, with those joined that a backslash continues."""
    text = block.text.replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def run_command(line, block):
    """Runs one line of a shell block; its trainings get the flags that the tests add."""
    if not line.startswith("adapters-jax "):
        subprocess.run(["bash", "-euc", line], check=True, env=os.environ)
        return
    words = shlex.split(re.sub(r"\s+#.*", "", line))[1:]
    for flag, value in (block.added or ()) if line.startswith(TRAINS) else ():
        if flag in words:  # its values end where the next flag begins
            first = words.index(flag) + 1
            ends = (i for i in range(first, len(words)) if words[i].startswith("--"))
            words[first : next(ends, len(words))] = [value]
        else:
            words += [flag, value]
    assert command_line.main(words) == 0, line


def check_printed(block, printed):
    for expected in PRINTED.findall(block.text):
        assert expected in printed, f"{expected!r} is not in what the block prints:\n{printed}"


def write_files(folder):
    """Writes what the blocks read: small models, and rows."""
    write_model(folder / "my-bert", pooler=True)
    write_classifier(folder / "my-classifier", folder / "my-bert")
    write_llama(folder / "my-llama")
    write_their_adapter(folder / "their-adapter", folder / "my-bert")
    reviews = [
        f"{word} film,{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(40)
    ]
    spread = [f"{i} {row}" for i, row in enumerate(reviews)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *spread, ""]))
    write_meanings(folder / "devset.csv", 48)
    rows = (folder / "devset.csv").read_text().replace("mr,ref", "prompt,completion")
    (folder / "rows.csv").write_text(rows)
    turn = '{{"messages": [{{"role": "user", "content": "{0}"}}, '
    turn += '{{"role": "assistant", "content": "It serves {1}"}}]}}\n'
    asked = [("food " * i + food, food) for i in range(1, 9) for food in FOODS]
    (folder / "chats.jsonl").write_text("".join(turn.format(*each) for each in asked))
    said = [{"instruction": prompt, "output": f"It serves {food}"} for prompt, food in asked]
    (folder / "alpaca.jsonl").write_text("\n".join(map(json.dumps, said)))


def write_classifier(directory, checkpoint):
    """A checkpoint with a head for three labels."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    width = tensors["embeddings.word_embeddings.weight"].shape[1]
    tensors |= {"classifier.weight": np.ones((3, width), np.float32)}
    tensors |= {"classifier.bias": np.zeros(3, np.float32)}
    save_file(tensors, directory / "model.safetensors")


def write_their_adapter(directory, checkpoint):
    """An adapter of PEFT with a head for two labels."""
    config, bert = load_bert(checkpoint, pooler=True)
    base, ids = BertClassifier(config, num_labels=2, pooling="pooler"), jnp.ones((1, 4), int)
    params = base.init(jax.random.key(0), ids)["params"] | {"bert": bert}
    recipe = aj.lora(4, alpha=8, dropout=0.1, head="head")
    params = aj.init_adapters(aj.adapt(base, recipe), params, jax.random.key(1), ids)
    trained, frozen = aj.partition(params, recipe)
    save_peft(
        directory, recipe, trained, FAMILY.classifier.names, frozen | {"head": params["head"]}
    )


def write_stand_ins(folder, monkeypatch):
    """Takes the names of the pinned models for small ones in this folder."""
    from adapters_jax.finetune.pretrained.assets import ASSETS

    write_model(folder / "minilm", max_position_embeddings=128)
    write_llama(folder / "smollm2-135m", max_position_embeddings=512)
    for name in STAND_INS:
        monkeypatch.delitem(ASSETS, name)
