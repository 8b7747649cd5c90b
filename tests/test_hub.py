"""The Hugging Face Hub: ids and revisions, the cache when offline, cards, and what is uploaded."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from helpers.finished import LORA, REVIEWS, decoder_run, encoder_run
from helpers.hub_server import serving
from helpers.tiny import write_model, write_reviews
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.errors import MissingPackageError
from adapters_jax.files import hub
from adapters_jax.files.adapterhub import load_adapterhub
from adapters_jax.files.peft import load_peft
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.models.bert import FAMILY, Bert, load_bert
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.models.t5 import load_t5
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained import locate as bases
from adapters_jax.finetune.run_directory import Run
from adapters_jax.trees import flatten

hf = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
OLD, NEW = "1" * 40, "2" * 40
NAMES = FAMILY.classifier.names
FIXTURES = Path(__file__).parent / "fixtures"
PEFT, ADAPTERHUB = FIXTURES / "peft" / "bert_head", FIXTURES / "adapterhub" / "bert_double"


def cached(cache, repo, commit, directory, ref="main"):
    """Puts a directory into a cache as the Hub's client does: links from a snapshot to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(Path(directory).iterdir())):
        blob = root / "blobs" / f"{commit[0]}{i:039x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    if ref:
        (root / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def lora(directory, value):
    """An adapter of one number."""
    leaves = {"query": {"lora": {"a": np.full((3, 1), value, np.float32), "b": np.ones((1, 2))}}}
    leaves = jax.tree.map(jnp.asarray, leaves)
    return aj.save_adapter(directory, leaves, aj.LoRA("query", 1))


def test_an_adapter_is_read_by_id_at_a_revision(cache, tmp_path):
    cached(cache, "me/mine", OLD, lora(tmp_path / "old", 1.0), ref="v1")
    cached(cache, "me/mine", NEW, lora(tmp_path / "new", 2.0))
    found = {
        revision: float(aj.read_adapter("me/mine", revision=revision)[1]["query/lora/a"][0, 0])
        for revision in (None, "main", "v1", OLD, NEW)
    }
    assert found == {None: 2.0, "main": 2.0, "v1": 1.0, OLD: 1.0, NEW: 2.0}
    assert float(aj.read_adapter(f"me/mine@{OLD}")[1]["query/lora/a"][0, 0]) == 1.0
    params = {"query": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="query")(x)

    model, whole = aj.load_adapter("me/mine", Net(), params, jnp.ones((1, 3)), revision="v1")
    out = model.apply({"params": whole}, jnp.ones((1, 3)))
    np.testing.assert_allclose(out, [[6.0, 6.0]])  # 3 of the kernel, and 3 * 1 of the adapter


def test_a_directory_comes_first_and_has_no_revision(cache, tmp_path):
    cached(cache, "me/mine", NEW, lora(tmp_path / "new", 2.0))
    lora(tmp_path / "me" / "mine", 5.0)
    assert float(aj.read_adapter("me/mine")[1]["query/lora/a"][0, 0]) == 5.0
    with raises(aj.AdapterFileError, "'me/mine'", "'v1'"):
        aj.read_adapter("me/mine", revision="v1")
    with raises(aj.AdapterFileError, "'me/typo'", "user/name"):
        aj.read_adapter("me/typo")  # me/ is a local directory: no Hub is asked
    with raises(aj.AdapterFileError, "'you/mine@a'", "'a'", "revision='b'"):
        aj.read_adapter("you/mine@a", revision="b")


def test_an_offline_error_names_the_cache_and_the_variable(cache):
    with raises(aj.AdapterFileError, "'me/absent'", cache, "'v2'", "HF_HUB_OFFLINE"):
        aj.read_adapter("me/absent", revision="v2")
    with raises(aj.AdapterFileError, "'me/absent'", cache, "'main'"):
        aj.read_adapter("me/absent")
    with raises(aj.UserError, "'me/absent'", "a model", cache, "HF_HUB_OFFLINE"):
        load_bert("me/absent")


@pytest.mark.parametrize(("load", "folder"), [(load_peft, PEFT), (load_adapterhub, ADAPTERHUB)])
def test_other_libraries_adapters_are_read_by_id_through_links(cache, load, folder):
    cached(cache, "them/theirs", NEW, folder)
    config, params = load_bert(FIXTURES / "bert", pooler=True)
    head = {"kernel": jnp.zeros((config.hidden_size, 3)), "bias": jnp.zeros(3)}
    base = {"bert": params, "head": head}
    expected, found = load(folder, NAMES, base), load("them/theirs", NAMES, base, revision=NEW)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_of_a_repository_only_the_adapters_files_are_asked_for(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, **options):
        asked.append(options["allow_patterns"])
        snapshot = tmp_path / "models--me--x" / "snapshots" / NEW
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(hf, "snapshot_download", snapshot_download)
    for read in (
        aj.read_adapter,
        lambda name: load_peft(name, NAMES, {"embeddings": {"word": {"embedding": 1}}}),
    ):
        with raises(aj.AdapterFileError, NEW) as caught:
            read("me/x")
    assert asked == [
        ["adapter_config.json", "adapter.safetensors", "state.safetensors"],
        ["adapter_config.json", "adapter_model.safetensors"],
    ]
    assert "adapter_model.bin" in str(caught.value)


def test_an_adapters_pickle_is_fetched_where_nothing_else_is(monkeypatch, tmp_path):
    snapshot, asked = tmp_path / "models--me--a-b" / "snapshots" / NEW, []
    snapshot.mkdir(parents=True)
    shutil.copy(PEFT / "adapter_config.json", snapshot)

    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["cache_dir"]))
        if "adapter_model.bin" in options["allow_patterns"]:
            (snapshot / "adapter_model.bin").write_bytes(b"cos\nsystem\n.")
        return str(snapshot)

    monkeypatch.setattr(hf, "snapshot_download", snapshot_download)
    with raises(aj.AdapterFileError, snapshot / "adapter_model.bin", "'os.system'"):
        load_peft("me/a-b", NAMES, {"embeddings": {"word": {"embedding": 1}}}, revision="v1")
    assert asked == [("me/a-b", "v1", None), ("me/a-b", NEW, str(tmp_path))]


def test_a_base_is_pinned_to_its_commit(cache, tmp_path):
    other = shutil.copytree(FIXTURES / "bert", tmp_path / "other")
    tensors = {name: x + 1 for name, x in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors")
    cached(cache, "me/base", OLD, FIXTURES / "bert", "v1")
    cached(cache, "me/base", NEW, other)
    assert bases.pinned("me/base") == f"me/base@{NEW}"
    assert bases.pinned("me/base@v1") == f"me/base@{OLD}"
    assert bases.pinned("other") == "other"

    def words(name, **options):
        return load_bert(name, **options)[1]["embeddings"]["word"]["embedding"]

    np.testing.assert_array_equal(words("me/base", revision=OLD), words(FIXTURES / "bert"))
    np.testing.assert_array_equal(words("me/base"), words(FIXTURES / "bert") + 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a run on a base of the Hub's cache, and one on a directory."""
    place = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        write_model(Path("tiny"), pooler=True)
        write_reviews(Path("reviews.jsonl"), rows=40)
        cached(place / "cache", "them/base", OLD, place / "tiny", ref="v1")
        encoder_run(f"{LORA} --model them/base@v1")
        decoder_run()
    return place


@pytest.fixture
def server(place, monkeypatch, tmp_path):
    """A Hub that has the first run's base, in the directory of the runs; nothing is cached."""
    monkeypatch.chdir(place)
    with serving(monkeypatch, tmp_path / "cache") as server:
        server.add("them/base")
        files = {path.name: path.read_bytes() for path in (place / "tiny").iterdir()}
        server.commit("them/base", "v1", files, OLD)
        yield server


@pytest.fixture
def command(capfd):
    """Runs a command: its status, its stdout, its stderr."""

    def command(words):
        status = main(words.split())
        return status, *capfd.readouterr()

    return command


@pytest.mark.slow
def test_a_run_on_an_id_notes_the_commit(place, command, monkeypatch, cache):
    monkeypatch.chdir(place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    config = Run(Path("runs/reviews")).read_config()
    assert config["model"] == f"them/base@{OLD}"
    manifest = json.loads(Path("runs/reviews/adapter/adapter_config.json").read_text())
    assert manifest["base"]["id"] == "them/base"
    (place / "cache/models--them--base/refs/v1").unlink()  # the branch is gone, the commit is not
    assert command("predict runs/reviews good")[0] == 0
    (place / "cache/models--them--base/refs/v1").write_text(OLD)


@pytest.mark.slow
def test_a_run_notes_the_commit_of_the_adapter_it_starts_with(place, command, monkeypatch, cache):
    monkeypatch.chdir(place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    cached(place / "cache", "me/start", OLD, "runs/reviews/adapter")
    flags = f"{REVIEWS} --init-from me/start --epochs 1 --runs started"
    job = parse(Finetune, flags.split()).prepare(Console(json=True))
    job.unlock()
    assert job.config["options"]["init_from"] == f"me/start@{OLD}"
    assert job.run.path.name == "tiny-reviews-from-start"
    other = shutil.copytree("runs/reviews/adapter", Path("other"))
    file = other / "adapter.safetensors"
    save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    cached(place / "cache", "me/start", NEW, other)
    status, _, err = command(f"finetune --resume {job.run.path}")
    assert status == 0, err


def test_push_uploads_what_predicts_and_its_card(server, command):
    status, out, _ = command("push runs/reviews me/reviews --license mit --json")
    assert status == 0
    files = server.files("me/reviews")
    assert sorted(files) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "config.json",
    ]
    trained = Path("runs/reviews/adapter/adapter.safetensors").read_bytes()
    assert files["adapter.safetensors"] == trained
    found = json.loads(out)
    commit = server.repos["me/reviews"]["branches"]["main"]
    assert found["url"] == f"{server.endpoint}/me/reviews/commit/{commit}"
    assert found["files"] == {name: len(data) for name, data in files.items()}
    assert set(server.cards) == {files["README.md"].decode()}  # the Hub was asked about it
    uploaded = b"".join(files.values())
    assert str(Path.cwd()).encode() not in uploaded
    assert b"reviews.jsonl" not in uploaded
    status, out, err = command("push runs/meanings me/meanings --private")
    assert status == 0, err
    assert server.repos["me/meanings"]["private"]


@pytest.mark.slow
def test_a_push_in_another_format_leaves_nothing_of_the_first(server, command):
    assert command("push runs/reviews me/both")[0] == 0
    status, out, err = command("push runs/reviews me/both --to peft --revision peft")
    assert status == 0, err
    assert "0: no, 1: yes" in out  # the names of the classes, which PEFT's files cannot hold
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(server.files("me/both", "peft")) == names
    assert "config.json" in server.files("me/both")


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("push runs/reviews reviews", ("'reviews'", "user/name")),
        ("push runs/none me/x", ("runs/none", "config.json")),
        ("push runs/reviews you/x", ("you/x", "403", "You have no rights")),
        ("push runs/reviews me/there --private", ("me/there", "public")),
        ("push runs/reviews me/x --to adapterhub --out tiny", ("tiny",)),
        ("predict me/none text", ("'me/none'", "'main'", "Repository Not Found")),
        ("predict me/there@v9 text", ("'me/there'", "'v9'", "Revision Not Found")),
    ],
)
def test_mistakes_of_a_push_are_one_line(server, command, words, data):
    server.add("me/there")
    status, _, err = command(words)
    lines = [line for line in err.splitlines() if line.startswith("adapters-jax ")]
    assert (status, len(lines)) == (2, 1), err
    assert all(datum in lines[0] for datum in data), lines[0]
    assert lines[0].count("was not uploaded") <= 1
    assert "me/x" not in server.repos


def test_without_token_or_network_nothing_is_tried(server, command, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, _, err = command("push runs/reviews me/x")
    assert status == 2
    assert "me/x" in err and "Invalid credentials in Authorization header" in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    status, out, err = command("push runs/reviews me/x")
    assert (status, out) == (2, "")
    assert err.startswith("adapters-jax push: ") and err.count("\n") == 1
    assert all(remedy in err for remedy in ("`hf auth login`", "HF_TOKEN", "--dry-run"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in command("push runs/reviews me/x")[2]
    out = tmp_path / "out"
    status, message, _ = command(f"push runs/reviews me/x --dry-run --out {out}")
    assert status == 0
    assert "me/x" in message and str(out) in message
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "config.json",
    ]
    assert list(server.repos) == ["them/base"]


def test_the_card_of_a_run_has_its_metadata_and_tables(place, monkeypatch, command, cache):
    monkeypatch.chdir(place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    shutil.rmtree("card", ignore_errors=True)
    assert command("push runs/reviews me/card --dry-run --license apache-2.0")[0] == 0
    card = hf.ModelCard.load("card/README.md")
    data, summary = card.data, Run(Path("runs/reviews")).read_config()["summary"]
    assert (data.base_model, data.license, data.library_name) == (
        "them/base",
        "apache-2.0",
        "adapters_jax",
    )
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["adapters_jax", "jax", "lora"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == summary["results"][-1]["test"]
    text = card.text
    assert f"| metric | on the test rows of {data.eval_results[0].dataset_name} |" in text
    assert "4 rows to train" not in text
    rows = Run(Path("runs/reviews")).read_config()["rows"]
    assert f"{rows['train']} rows to train" in text
    assert "LoRA(targets=('**/{query,value}',), rank=2)" in text
    assert "| `2*(32 + 32)` | 1 | 128 |" in text  # the closed form of one adapter
    assert f"Trainable {2 * 128 + 66:,} (" in text
    assert "warmup 0.1" in text and "lora_plus" not in text
    manifest = json.loads(Path("card/adapter_config.json").read_text())
    assert manifest["base"]["tree_sha256"] in text
    assert aj.read_adapter("card")[0] == aj.lora(2, head="head")
    status, _, err = command("push runs/reviews me/card --dry-run")
    assert (status, err.count("\n")) == (2, 1)
    assert "card exists already; give another directory with --out" in err


@pytest.mark.slow
def test_the_three_lines_of_the_card_run(server, command, monkeypatch):
    found, printed = {}, io.StringIO()
    for run in ("reviews", "meanings"):
        assert command(f"push runs/{run} me/{run}")[0] == 0
        card = server.files(f"me/{run}")["README.md"].decode()
        (code,) = re.findall(r"## How to load it\n\n```python\n(.*?)```", card, re.S)
        assert code.count("\n") == 3
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "card", "exec"), found)
    assert printed.getvalue().count("\n") == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # both are cached now
    expected = load_predictor("runs/reviews").predict([("A text of your own.", None)])
    assert printed.getvalue().startswith(f"{expected[0]}\n")
    mine, expected = found["generator"], load_generator("runs/meanings")
    states = nnx.state(mine.model), nnx.state(expected.model)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.witness("bert")
@pytest.mark.parametrize("name", ["decoders/llama", "t5/flan_t5", "bert"])
def test_the_three_lines_of_a_card_without_a_run_load_the_adapter(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / name, "base")
    found, recipe = {"example_input": jnp.ones((1, 4), jnp.int32)}, aj.lora(2)
    if name == "bert":
        config, found["params"] = load_bert("base")
        found["base"] = Bert(config)
        model = aj.adapt(found["base"], recipe)
        of = found["params"], jax.random.key(0), found["example_input"]
        trained, _ = aj.partition(aj.init_adapters(model, *of), recipe)
    else:
        _, base = load_t5("base") if "t5" in name else load_decoder("base")
        trained = nnx.state(aj.adapt(base, recipe, rngs=nnx.Rngs(0)), aj.nnx.AdapterParam)
    aj.save_adapter("alone", trained, recipe)
    assert main(["convert", "alone", "mine", "--to", "native", "--model", "base"]) == 0
    (code,) = re.findall(r"```python\n(import.*?)```", Path("mine/README.md").read_text(), re.S)
    assert code.count("\n") == 3
    exec(code.replace("path/to/base", "base"), found)
    if name == "bert":
        loaded, _ = aj.partition(found["params"], recipe)
    else:
        loaded = nnx.state(found["model"], aj.nnx.AdapterParam)
    jax.tree.map(np.testing.assert_array_equal, flatten(loaded), flatten(trained))


def test_a_card_of_an_adapter_alone_is_written_beside_it(tmp_path):
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("**", 2), rngs=nnx.Rngs(1))
    recipe, identity = aj.LoRA("**", 2), aj.base_identity(base, id="them/linear")
    load = f"import adapters_jax as aj\nmodel = aj.load_adapter({str(tmp_path / 'a')!r}, base)\n"
    card = aj.model_card(
        'A: "quoted" | ü',
        recipe,
        load,
        base=identity,
        counts=aj.audit(model),
        metrics={"accuracy": 0.5},
    )
    leaves = nnx.state(model, aj.nnx.AdapterParam)
    saved = aj.save_adapter(
        tmp_path / "a", leaves, recipe, base=identity, beside={"README.md": card}
    )
    data = hf.ModelCard.load(saved / "README.md").data
    assert (data.base_model, data.eval_results) == ("them/linear", None)  # there is no data set
    assert "| accuracy | 0.5 |" in card and "| `2*(4 + 3)` | 1 | 14 |" in card
    names = {"base": base}
    exec(load, names)
    np.testing.assert_array_equal(names["model"].lora["a"][...], model.lora["a"][...])
    with raises(aj.UserError, "'a/b'"):
        aj.save_adapter(tmp_path / "b", leaves, recipe, beside={"a/b": ""})
    assert flatten(leaves).keys() == aj.read_adapter(saved)[1].keys()


def test_metrics_of_any_type_of_number_are_read_back_by_the_hub():
    metrics = {"accuracy": np.float32(0.5), "f1": 0.25}
    of = {"task": "text-classification", "dataset": 'a: "b"'}
    card = aj.model_card('A: "quoted" | ü', aj.LoRA("**", 2), "x", metrics=metrics, **of)
    data = hf.ModelCard(card).data
    found = [(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results]
    assert found == [("accuracy", 0.5, 'a: "b"'), ("f1", 0.25, 'a: "b"')]
    assert (data.model_name, data.base_model) == ('A: "quoted" | ü', None)


def test_a_card_without_the_hub_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises(MissingPackageError, "[finetune]") as caught:
        aj.model_card("Mine", aj.LoRA("**", 2), "x")
    assert caught.value.name == "huggingface_hub"
    with raises(MissingPackageError, "'me/x'", "huggingface_hub"):
        aj.read_adapter("me/x")


def test_ids_of_the_hub():
    good = ("gpt2", "me/x", "me/x.y-z_1", "me/x@v1.0", f"me/x@{OLD}")
    bad = ("", "/a", "./a", "../a", "a/b/c", "a b", "a/", "a..b", "a--b", Path("me/x"))
    assert [name for name in (*good, *bad) if hub.is_id(name)] == list(good)


@pytest.mark.slow
def test_audit_asks_the_hub_for_the_configuration_alone(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path / "cache") as server:
        server.add("me/tiny")
        server.commit("me/tiny", "main", files)
        assert main(["audit", "--model", "me/tiny", "--method", "lora", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["adapter_parameters"] == 2 * 8 * (32 + 32)
        resolved = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
        assert resolved == {"config.json"}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # and now from the cache
        assert main(["audit", "--model", "me/tiny", "--method", "lora"]) == 0
