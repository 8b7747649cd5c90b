"""Decoders in the application: losses, packing, and the commands that train and use them."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.commands import announced, command_raises
from helpers.errors import raises
from helpers.reports import Page
from helpers.tiny import CHAT, FOODS, write_llama, write_meanings
from test_decoder_model import TINY, build
from test_generate import shaken
from test_gguf import tensors_of, write

import adapters_jax as aj
from adapters_jax.errors import BaseFileError, RecipeError, TargetError, UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.generate import Generate
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import NOTHING, Batches
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.lazy_rows import Lazy
from adapters_jax.finetune.data.packing import Example, Examples, pack, sequence
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.merging import write_checkpoint
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.report.findings import read_findings
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.tasks import TASKS, decoder, generator
from adapters_jax.finetune.tasks.base import Setup
from adapters_jax.finetune.tasks.completion_problem import (
    CompletionProblem,
    HeldOut,
    build_batches,
    build_completions,
    encode_table,
    token_losses,
)
from adapters_jax.nnx import AdapterParam

LENGTH = 16
EXAMPLES = [Example([3, 4], [5, 1]), Example([6, 7, 8], [9, 10, 1]), Example([2], [4, 1])]


def batch_of(groups, examples=EXAMPLES):
    rows = [sequence([examples[i] for i in group]) for group in groups]
    return next(iter(Batches(rows, None, len(rows), None, (LENGTH,))))


losses = nnx.jit(partial(token_losses, most=LENGTH, chunk=3))
full_pass = nnx.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model():
    recipe = aj.Recipe(aj.LlamaAdapter("layers/0/attention", 3), aj.LoRA("**/{query,value}", 2))
    return shaken(build(TINY), recipe)


def by_hand(model, example):
    """The loss of each token of a completion, from the logits of the example alone."""
    ids = [*example.prompt, *example.completion]
    padded = jnp.array([ids + [0] * (LENGTH - len(ids))])  # after it, so no token sees it
    logits = np.asarray(full_pass(model, padded)[0], np.float64)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    before = range(len(example.prompt) - 1, len(ids) - 1)
    return -np.array([chances[i, ids[i + 1]] for i in before])


def test_a_message_counts_the_rows_that_are_packed():
    examples, said = dict.fromkeys(("train", "dev", "test"), Examples.of(EXAMPLES)), []
    setup = Setup("tiny", None, 1, 0, {}, None, say=said.append)
    for packs in (True, False):
        build_batches(examples, 8, packs, setup)
    assert said == [f"{len(EXAMPLES)} train rows are packed into 2 sequences of 8 tokens"]


def test_rows_of_a_large_file_for_an_encoder_are_as_long_as_those_in_memory():
    rows = [Example([3] * 7, [4] * 5), Example([3] * 2, [4] * 6), Example([3], [1])]
    held = Examples.of(rows)
    setup, widths = Setup("tiny", None, 1, None, {}, None), []
    for own in (held, held._replace(rows=Lazy(rows, lambda row: row))):
        examples = dict.fromkeys(("train", "dev", "test"), own)
        built = build_batches(examples, 8, False, setup, encodes=True)
        widths.append([batch["labels"].shape[1] for batch in built.train])
    assert widths == [[8, 8, 8], [8, 8, 8]]


@pytest.mark.slow
def test_packed_losses_are_those_of_each_example_alone(model):
    packed = losses(model, batch_of([[0, 1, 2]]))
    alone = losses(model, batch_of([[0], [1], [2]]))
    expected = [by_hand(model, example).sum() for example in EXAMPLES]
    np.testing.assert_allclose(alone, expected, rtol=1e-4)
    np.testing.assert_allclose(packed, [sum(expected)], rtol=1e-4)
    unseen = {**batch_of([[0, 1, 2]]), "segments": np.ones((1, LENGTH), np.int32)}
    assert abs(float(losses(model, unseen)[0]) - sum(expected)) > 0.01


def test_the_loss_is_the_mean_over_tokens_of_completions(model):
    rows = [sequence([EXAMPLES[0], EXAMPLES[1]]), sequence([EXAMPLES[2]])]
    train = Batches(rows, None, 3, 0, (LENGTH,))
    problem = CompletionProblem(model, None, train, {}, LENGTH, ("perplexity",))
    batch = problem.batch(0)
    assert batch["weight"].tolist().count(0) == 1
    expected = np.concatenate([by_hand(model, example) for example in EXAMPLES]).mean()
    loss = nnx.jit(lambda model, batch: problem.loss(model, batch, None))
    assert float(loss(model, batch)) == pytest.approx(expected, rel=1e-4)
    held_out = HeldOut(Batches(rows, None, 2, None, (LENGTH,)), 7)
    score = replace(problem, parts={"dev": held_out}).score_model(model, "dev")
    assert score == {"perplexity": pytest.approx(np.exp(expected), rel=1e-4)}


@pytest.mark.slow
def test_dropout_in_the_head_draws_one_mask_for_all_tokens(monkeypatch):
    monkeypatch.setattr(decoder, "TOKENS", 3)
    train = Batches([sequence(EXAMPLES)], None, 1, 0, (LENGTH,))
    losses = []
    for rate, target in ((0.5, "embeddings"), (0.5, "**/query"), (0.0, "embeddings")):
        model = shaken(build(TINY), aj.LoRA(target, 2, dropout=rate))
        problem = CompletionProblem(model, None, train, {}, 8, ("perplexity",))
        assert problem.chunk({"weight": np.ones(1)}) == (8 if len(losses) == 0 else 3)
        losses.append(problem.loss(model, problem.batch(0), None))
    assert np.isfinite(losses).all()


def test_packing_holds_every_example_once_and_no_more_than_fits():
    sizes = np.random.default_rng(0).integers(2, 20, 200).tolist()
    examples = [Example([1], [2] * (size - 1)) for size in sizes]
    lengths = [len(example.ids) for example in examples]
    packed = pack(lengths, 20, seed=1)
    assert sorted(i for group in packed for i in group) == list(range(200))
    held = [sum(sizes[i] for i in group) for group in packed]
    assert max(held) <= 20
    assert np.mean(held) > 18
    assert packed == pack(lengths, 20, seed=1) != pack(lengths, 20, seed=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a decoder, rows, and two runs: `full` learns, `lora` makes one step."""
    directory = tmp_path_factory.mktemp("decoders")
    write_llama(directory / "tiny", num_hidden_layers=1)
    write_meanings(directory / "rows.csv")
    flags = "--method full --learning-rate 0.03 --epochs 4 --evaluations 1"
    assert finetune(directory, "full", flags)[0] == 0
    flags = "--method lora --rank 2 --learning-rate 0.5 --epochs 0.01 --no-baselines"
    assert finetune(directory, "lora", f"{flags} --exact-match 0 --no-pack --limit 8")[0] == 0
    return directory


def finetune(directory, name, flags):
    """The exit status, the JSON summary and the stderr of a `finetune` command."""
    words = f"finetune --model tiny --train rows.csv --prompt mr --completion ref --name {name}"
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(directory),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main(f"{words} --max-length 32 --json {flags}".split())
    return status, json.loads(out.getvalue() or "null"), err.getvalue()


@pytest.fixture
def command(directory, monkeypatch, capsys):
    """Runs a command in that directory; returns its status, stdout and stderr."""
    monkeypatch.chdir(directory)

    def command(words):
        status = main(words.split() if isinstance(words, str) else words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def fails(command):
    """Runs a command that ends with a user error, which is one line on stderr."""

    def fails(words, kind, *data):
        with command_raises(kind, *data):
            status, out, err = command(words)
        # The rows may be packed before the error.
        said = ["100 train rows are packed into 49 sequences of 32 tokens"]
        assert (status, out.splitlines()) in ((2, []), (2, said)), err
        assert err.count("\n") == 1, err

    return fails


def test_a_run_learns_and_writes_what_it_found(directory):
    run = Run(directory / "runs" / "full")
    config = run.read_config("decoder")
    base, full = config["summary"]["results"]
    assert (base["method"], base["trainable_parameters"]) == ("base", 0)
    assert base["test"]["perplexity"] > 5 > 1.5 > full["test"]["perplexity"] >= 1
    assert (base["test"]["exact_match"], full["test"]["exact_match"]) == (0.0, 1.0)
    assert full["samples"][0]["generated"] == full["samples"][0]["completion"]
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    scored = [r["dev"]["perplexity"] for r in records if r["method"] == "full" and "dev" in r]
    assert len(scored) == 4
    assert config["summary"]["dev"]["perplexity"] == min(scored)
    rows = read_findings(run).judged.rows["test"]
    nll = sum(row["loss"] * row["learnt"] for row in rows) / sum(row["learnt"] for row in rows)
    assert np.exp(nll) == pytest.approx(full["test"]["perplexity"], rel=1e-6)
    page = run.report.read_text(encoding="utf-8")
    headings = Page(page).sections.keys()
    assert {"Losses of sequences", "Highest losses on dev", "Lengths", "Samples"} <= headings
    assert "adapters-jax generate" in page
    assert full["samples"][0]["generated"] in page
    assert run.curves.read_bytes().startswith(b"\x89PNG")


@pytest.mark.weekly
def test_generate_prints_what_the_run_learnt(command, monkeypatch):
    prompts = [f"food {food}" for food in FOODS]
    texts = [f"It serves {food} dishes" for food in FOODS]
    status, out, _ = command(
        ["generate", "runs/full", "--prompt", *prompts, "--max-new-tokens", "8"]
    )
    assert (status, out.splitlines()) == (0, texts)
    Path("prompts.csv").write_text("mr\n" + "\n".join(prompts))
    _, out, _ = command("generate runs/full --file prompts.csv --max-new-tokens 8 --json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts) + "\n"))
    _, piped, _ = command("generate runs/full --prompt - --max-new-tokens 8 --json")
    assert piped == out


@pytest.mark.slow
def test_a_seed_decides_what_is_sampled(directory):
    generator = load_generator(directory / "runs" / "lora")
    draws = [list(generator.generate(["food Thai"] * 4, 8, 2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 1


def test_by_default_as_many_tokens_are_generated_as_have_positions(directory, monkeypatch):
    run, asked = load_generator(directory / "runs" / "lora"), []
    monkeypatch.setattr(generator, "complete", lambda *given, **_: asked.append(given[3]) or [""])
    longest = run.decoder.config.longest
    prompt = len(run.prompts.encode("food Thai", run.decoder))
    assert list(run.generate(["food Thai"])) == [""]
    assert asked == [min(128, longest - prompt)]
    assert list(run.generate([])) == []
    with raises(aj.UserError, f"at most {longest}", f"at most {longest - prompt} new tokens"):
        list(run.generate(["food Thai"], longest))


@pytest.mark.slow
@pytest.mark.witness("lora")
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_merged_checkpoint_has_the_logits_of_the_adapted_model(command, tmp_path, name):
    out = tmp_path / "merged"
    status, printed, err = command(["merge", f"runs/{name}", "--out", str(out), "--json"])
    assert status == 0, err
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(printed) == {"out": out.as_posix(), "files": files, "notes": []}
    ids = jnp.array([[4, 9, 5, 6]])
    adapted = full_pass(load_generator(f"runs/{name}").model, ids)
    merged, base = (full_pass(load_decoder(path)[1], ids) for path in (out, "tiny"))
    np.testing.assert_allclose(merged, adapted, atol=1e-4)
    assert np.abs(base - adapted).max() > 0.01
    assert load_pretrained_decoder(str(out)).chat("food Thai") == load_pretrained_decoder(
        "tiny"
    ).chat("food Thai")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


@pytest.mark.slow
def test_generate_and_merge_announce_each_wait(command, monkeypatch, tmp_path):
    texts, out = announced(monkeypatch), tmp_path / "merged"
    status, _, err = command("generate runs/lora --max-new-tokens 2 --prompt food mr ref")
    assert status == 0, err
    first, *later = texts[1:]  # one for each prompt, since any may begin a batch
    assert texts[0] == "loading runs/lora"
    assert (first, later) == ("compiling and generating", ["generating"] * 2)
    texts.clear()
    assert command(f"merge runs/lora --out {out}")[0] == 0
    assert texts == ["loading and merging runs/lora", f"writing {out}"]


@pytest.mark.slow
def test_a_combined_run_generates_from_the_sum(command):
    words = "combine runs/lora runs/lora --weights 1.5 -0.5 --out runs/both --json"
    status, out, err = command(words)
    assert (status, json.loads(out)) == (0, {"out": "runs/both", "error": 0.0}), err
    ids = jnp.array([[4, 9, 5, 6]])
    one, both = (load_generator(f"runs/{name}").model for name in ("lora", "both"))
    np.testing.assert_allclose(full_pass(both, ids), full_pass(one, ids), atol=1e-4)
    assert aj.nnx.recipe_of(both).attached[0].rank == 2 * aj.nnx.recipe_of(one).attached[0].rank
    config = Run(Path("runs/both")).read_config("decoder")
    assert config["combined"]["weights"] == [1.5, -0.5] and "summary" not in config
    assert command("generate runs/both --prompt food --max-new-tokens 2")[0] == 0
    _, _, err = command(words.replace("runs/both", "runs/svd --how svd --rank 1"))
    assert "runs/svd holds the sum of 2 adapters; the rank lost " in err


def test_a_gguf_file_becomes_a_checkpoint(tmp_path):
    model = build(replace(TINY, intermediate_size=32, rope_theta=500.0, rms_norm_eps=1e-5))
    fields = {"llama.context_length": 99, "tokenizer.ggml.bos_token_id": 1}
    path = write(tmp_path / "tiny.gguf", tensors_of(model), **fields)
    decoder = load_pretrained_decoder(str(path))
    write_checkpoint(tmp_path / "merged", decoder, decoder.model)
    again = load_pretrained_decoder(str(tmp_path / "merged"))
    assert again.end == decoder.end == 0
    assert again.chat("ab12") == decoder.chat("ab12") == "<|user|>ab12<|end|><|user|>"
    assert again.tokenizer.encode("ab 12.").ids == decoder.tokenizer.encode("ab 12.").ids
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (99, 0)
    assert config["bos_token_id"] == 1
    assert (
        again.special_tokens
        == decoder.special_tokens
        == {"bos_token": "<|user|>"} | {"eos_token": "<|end|>"}
    )
    ids = jnp.array([[3, 4, 5]])
    logits = full_pass(again.model, ids)
    np.testing.assert_allclose(logits, full_pass(decoder.model, ids), atol=1e-6)


@pytest.mark.parametrize(
    ("template", "jinja", "expected"),
    [
        ([{"name": "tools", "template": "no"}, {"name": "default", "template": CHAT}], None, CHAT),
        ([{"name": "tools", "template": "no"}], None, None),
        ("no", CHAT, CHAT),
    ],
)
def test_a_chat_template_may_be_one_of_several_or_a_file(tmp_path, template, jinja, expected):
    tiny = write_llama(tmp_path / "tiny", chat_template=template, num_hidden_layers=1)
    if jinja is not None:
        (tiny / "chat_template.jinja").write_text(jinja)
    decoder = load_pretrained_decoder(str(tiny))
    assert decoder.chat_template == expected
    if expected is None:
        with raises(UserError, tiny, "--no-chat"):
            decoder.chat("food Thai")


def test_a_row_is_a_chat_and_only_its_completion_is_learnt(directory):
    decoder = load_pretrained_decoder(str(directory / "tiny"))
    table = Table([("food Thai", "It serves")], None, (), "rows.csv", [2])
    ((example,), *_), cut = encode_table(table, Prompts(), decoder, 32)
    spoken = decoder.tokenizer.decode(example.prompt, skip_special_tokens=False)
    assert spoken == "<user> food Thai <end> <bot>"
    assert decoder.tokenizer.decode(example.completion, skip_special_tokens=False) == (
        "It serves <end>"
    )
    row = sequence([example])
    learnt = row.labels[row.labels != NOTHING].tolist()
    assert (learnt, cut) == (example.completion, 0)
    ((example,), *_), cut = encode_table(table, Prompts("is {prompt}", chat=False), decoder, 4)
    assert decoder.tokenizer.decode(example.prompt) == "is food Thai"
    assert (len(example.completion), cut) == (1, 1)
    ((example,), *_), _ = encode_table(
        Table([("It is", None)], None, (), "a", [1]), Prompts(), decoder, 32
    )
    assert [len(part) for part in example] == [1, 2]


def test_completions_are_generated_up_to_the_positions_of_the_model(directory):
    decoder = load_pretrained_decoder(str(directory / "tiny"))
    decoder = replace(decoder, config=replace(decoder.config, max_position_embeddings=8))
    texts = [("food", "It serves Thai dishes dishes"), ("food food food food is Thai", "It")]
    table, said = Table(texts, None, (), "rows.csv", [2, 3]), []
    setup = Setup("tiny", lambda **_: aj.Recipe(), 2, 0, {}, None, exact_match=2, say=said.append)
    data = TaskData("rows", table, table, table, ("perplexity",))
    rows = build_completions(data, decoder, Prompts(chat=False), 8, False, setup)
    assert rows.parts["dev"].new_tokens == 8 - 6
    assert ["2 tokens of 6" in text for text in said] == [True, True]
    decoder = load_pretrained_decoder(str(directory / "tiny"))
    rows = build_completions(data, decoder, Prompts(chat=False), 8, False, setup)
    assert (rows.parts["dev"].new_tokens, len(said)) == (16, 2)


def test_rows_of_one_prompt_are_held_out_together(tmp_path):
    write_meanings(tmp_path / "rows.csv")
    rows = DataOptions((tmp_path / "rows.csv",), prompt="mr", completion="ref", limit=50)
    task = rows.load(TASKS["completion"])
    prompts = [{text for text, _ in part.texts} for part in (task.train, task.dev, task.test)]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(task.train) == 50


def test_prompts_are_in_all_layers_but_two():
    options = {"layers": {"layers/{}": 30}}
    recipe = MethodOptions("llama-adapter").build(**options)
    assert recipe == aj.llama_adapter(10, last=28, num_layers=30)
    few = MethodOptions("llama-adapter", prompt_length=4, last=3, gate="layer").build(**options)
    assert few == aj.llama_adapter(4, last=3, num_layers=30, gate="layer")
    prefix = MethodOptions("prefix-tuning", prompt_length=5).build(**options)
    assert prefix == aj.prefix_tuning(5, last=30, num_layers=30)


TRAIN = "finetune --model tiny --train rows.csv --prompt mr --completion ref --max-length 32"


@pytest.mark.parametrize(
    ("words", "kind", "data"),
    [
        (f"{TRAIN} --prompt meaning", DataError, ["rows.csv", "'meaning'", "mr, ref"]),
        (f"{TRAIN} --text mr", UserError, ["--text", "--prompt", "--completion"]),
        (f"{TRAIN} --max-length 8", DataError, ["rows.csv", 55, "--max-length 8", "line 14"]),
        (f"{TRAIN} --template {{mr}}", UserError, ["--template '{mr}'", "{prompt}"]),
        (f"{TRAIN} --template Say:", UserError, ["--template 'Say:'", "{prompt}"]),
        (f"{TRAIN} --template {{prompt", UserError, ["--template '{prompt'", "'}'", "{{"]),
        (f"{TRAIN} --label ref --dropout 0.1", UserError, ["--label", "--dropout", "'tiny'"]),
        (f"{TRAIN} --pooling cls", UserError, ["--pooling", "classification", "regression"]),
        (f"{TRAIN} --method head-only", UserError, ["--method head-only", "decoder"]),
        (f"{TRAIN} --method bitfit", TargetError, ["'**/bias'", "layers/0/attention/key/kernel"]),
        (f"{TRAIN} --method llama-adapter --last 9", UserError, ["last=9", "num_layers=1"]),
        (
            f"{TRAIN} --rank 4 --prompt-length 3",
            UserError,
            ["--prompt-length", "--method lora", "--alpha"],
        ),
        (f"{TRAIN} --held-out 0", UserError, ["--held-out=0", 1]),
        (f"{TRAIN} --exact-match -1", UserError, ["--exact-match -1", 0]),
        ("finetune --model tiny", UserError, ["--train", "--prompt", "--completion", "--text"]),
        (
            "finetune --model tiny --train rows.csv --text mr --no-chat",
            UserError,
            ["--text", "--template"],
        ),
        ("predict runs/full x", RunError, ["runs/full", "completion", "adapters-jax generate"]),
        (
            "generate runs/none --prompt x",
            RunConfigError,
            ["runs/none", "config.json", "runs/full"],
        ),
        ("generate runs/full", DataError, ["--prompt TEXT", "--prompt -", "--file"]),
        ("generate runs/full --prompt x --column mr", DataError, ["--column", "--file"]),
        ("generate runs/full --prompt x --top-p 0", UserError, ["--top-p 0", 1]),
        ("generate runs/full --prompt x --seed -1", UserError, ["--seed -1", "2**32 - 1"]),
        ("generate runs/full --prompt x --temperature -1", UserError, ["--temperature=-1.0"]),
        ("generate runs/full --prompt x --max-new-tokens 62", UserError, [62, "at most 64"]),
        (f"{TRAIN.replace('32', '65')} --method lora", UserError, ["--max-length 65", 64]),
        ("generate runs/full --prompt x --max-new-tokens 0", UserError, ["--max-new-tokens=0"]),
        ("combine runs/lora --weights 1 2 --out both", UserError, ["1 adapter", "2 weights"]),
        ("combine runs/lora --weights 1 --out runs/full", RunError, ["runs/full", "--name"]),
        ("combine runs/full --weights 1 --out both", RecipeError, ["embeddings/embedding"]),
        (
            "combine runs/lora --weights 1 --how svd --out both",
            UserError,
            ["how='svd'", "rank"],
        ),
        ("merge runs/full --out tiny", DataError, ["--out tiny"]),
        ("merge runs/full --out no/where", DataError, ["--out no/where", "directory no"]),
    ],
)
def test_a_user_error_is_one_line(fails, words, kind, data):
    fails(words, kind, *data)


def test_a_decoder_without_eos_token_or_tokenizer_is_an_error(directory, fails, tmp_path):
    bare = shutil.copytree(directory / "tiny", tmp_path / "bare")
    words = TRAIN.replace("tiny", str(bare))
    (bare / "tokenizer_config.json").unlink()
    fails(words, UserError, bare, "eos_token", "tokenizer_config.json")
    (bare / "tokenizer.json").unlink()
    fails(words, BaseFileError, bare, "tokenizer.json", "save_pretrained(DIR)")


def test_a_row_without_prompt_or_completion_is_an_error(command, fails):
    Path("blank.csv").write_text("mr,ref\na,b\nc, \n")
    fails(TRAIN.replace("rows.", "blank."), DataError, "blank.csv", "mr", "ref", "line 3")


def test_a_file_without_the_column_of_prompts_names_the_flag_of_generate(tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text("mr\nfood\n")
    with raises(DataError, "--column COLUMN"):
        Generate("run", file=path)._read("prompt")


def test_an_adapter_that_changes_no_weight_is_not_merged(command, fails, tmp_path):
    shutil.copytree("runs/lora", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    recipe = aj.LlamaAdapter("layers/0/attention", 2)
    adapted = shaken(load_pretrained_decoder("tiny").model, recipe)
    aj.save_adapter(tmp_path / "run" / "adapter", nnx.state(adapted, AdapterParam), recipe)
    words = f"merge {tmp_path / 'run'} --out {tmp_path / 'merged'}"
    fails(words, RecipeError, "LlamaAdapter", "layers/0/attention")
    assert not (tmp_path / "merged").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "prompts": {"a": 1}}))
    words = f"generate {tmp_path / 'run'} --prompt x"
    fails(words, RunError, "config.json", "prompts", "{'a': 1}")


def test_an_existing_run_or_an_encoder_is_an_error(fails):
    words = "finetune --train rows.csv --pack --completion x --template {prompt}!"
    fails(words, UserError, "--completion", "--template", "'minilm'", "encoder")
    fails(f"{TRAIN} --name full", RunError, "runs/full")


def test_texts_alone_are_learnt_from_their_second_token(directory, monkeypatch):
    monkeypatch.chdir(directory)
    write_llama(directory / "silent", chat_template=None, num_hidden_layers=1)
    options = {"max_length": 32, "name": "texts", "pack": False}
    data = DataOptions((Path("rows.csv"),), text="mr", limit=8)
    job = Finetune("silent", data, **options).prepare(Console(json=True))
    assert (job.config["prompt"], job.config["completion"]) == (None, "mr")
    assert job.config["prompts"] == {"template": "{prompt}", "chat": False}
    assert (job.problem.metrics, job.problem.parts["dev"].prompts) == (("perplexity",), [])
    batch = job.problem.batch(0)
    assert batch["input_ids"].shape[0] == 4
    for ids, mask, labels in zip(
        *map(batch.get, ("input_ids", "attention_mask", "labels")), strict=True
    ):
        assert labels[labels != NOTHING].tolist() == ids[mask == 1].tolist()[1:]
        assert ids[mask == 1][-1] == 1
    plain = Finetune(
        "silent", DataOptions((Path("rows.csv"),), None, None, **MEANINGS), name="plain"
    )
    assert plain.prepare(Console(json=True)).config["prompts"]["chat"] is False


MEANINGS = {"prompt": "mr", "completion": "ref"}
