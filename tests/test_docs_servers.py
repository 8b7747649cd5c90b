"""The documentation's blocks that ask a server run as pasted: our own, and a Hub of one thread."""

import io
import json
import shlex
import shutil

import pytest
from helpers import hub_server, pages
from helpers.pages import commands, params
from helpers.serving import serving

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.pretrained.assets import ASSETS

pytestmark = [pytest.mark.pages, pytest.mark.slow]
TRAIN = "finetune --model smollm2-135m --train devset.csv --prompt mr --completion ref --limit 16"
TRAIN += " --held-out 8 --epochs 1 --method lora --rank 8 --exact-match 0 --name e2e"
TRAIN += " --alpha 8 --targets **/{query,value} --learning-rate 2e-3"
SERVE = f"""from adapters_jax.finetune.pretrained.assets import ASSETS
for name in {pages.STAND_INS}:
    del ASSETS[name]
from adapters_jax.finetune.cli.main import main
raise SystemExit(main())"""
HUB = [each for each in params("sh", asks=True) if "localhost" not in each.values[0].text]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a run by three names, and PEFT's files of it."""
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        pages.write_files(made)
        pages.write_stand_ins(made, patch)
        assert main(TRAIN.split()) == 0
        for name in ("e2e-lora", "fr"):
            shutil.copytree("runs/e2e", f"runs/{name}")
        assert main(["convert", "runs/e2e", "theirs", "--to", "peft"]) == 0
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory: a copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in pages.STAND_INS:
        monkeypatch.delitem(ASSETS, name)
    return tmp_path


def block_with(kind, text):
    (block,) = (each.values[0] for each in params(kind, asks=True) if text in each.values[0].text)
    return block


@pytest.mark.weekly
def test_our_server_answers_as_the_page_asks(folder, capfd):
    pytest.importorskip("openai")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"theirs/{file}", file)
    block, client = block_with("sh", "localhost"), block_with("python", "localhost")
    start, *asked = commands(block)
    with serving(*shlex.split(start)[2:], entry=("-c", SERVE)) as server:
        answers = []
        for line in asked:
            capfd.readouterr()
            pages.run_command(line.replace("localhost:8000", server.address), block)
            answers.append(json.loads(capfd.readouterr().out))
        completion, added = answers
        assert completion["model"] == "e2e" and completion["choices"][0]["text"]
        assert added == {"name": "new", "format": "peft", "methods": ["LoRA"], "parameters": 2688}
        found = {}
        exec(client.text.replace("http://localhost:8000", server.address), found)
        assert found["answer"].model == "e2e" and found["answer"].usage.prompt_tokens > 0
        assert capfd.readouterr().out == f"{found['answer'].choices[0].message.content}\n"


@pytest.mark.weekly
@pytest.mark.parametrize("block", HUB)
def test_the_hub_gives_what_the_page_asks(block, folder, monkeypatch, tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows, sink = pyarrow.table({"text": ["a film", "a bad film"], "label": [1, 0]}), io.BytesIO()
    parquet.write_table(rows, sink)
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    with hub_server.serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add("user/their-lora")
        hub.commit("user/their-lora", "main", theirs)
        hub.add("user/name")
        hub.commit("user/name", "revision", {"config/train.parquet": sink.getvalue()})
        for line in commands(block):
            pages.run_command(line, block)
    if "push" in block.text:
        assert "adapter.safetensors" in hub.files("me/e2e-lora")
