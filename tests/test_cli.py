"""The command line: its help, its JSON, and one line for each user error."""

import contextlib
import csv
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_model, write_reviews
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.distributed.mesh import ShardingError
from adapters_jax.errors import (
    EXPLAINED,
    PLAIN,
    AdapterFileError,
    AdapterMismatchError,
    BaseFileError,
    FileSystemError,
    RecipeError,
    TargetError,
    UserError,
)
from adapters_jax.finetune import console
from adapters_jax.finetune.cli.convert import Convert
from adapters_jax.finetune.cli.main import COMMANDS, _unraisable, command_of, main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.formats.servers import MAX_ERROR
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.options.flags import Format
from adapters_jax.finetune.options.method import MethodName
from adapters_jax.finetune.options.parsing import UsageError
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.tasks import TASKS
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem
from adapters_jax.methods.registry import every_method


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a model, a file of reviews, and the runs single, pairs and stars."""
    directory = tmp_path_factory.mktemp("cli")
    write_model(directory / "tiny")
    write_reviews(directory / "reviews.jsonl", rows=60)
    (directory / "twice.csv").write_text("id,id,review\n1,2,good\n")
    (directory / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (directory / "deep.toml").write_text("rank = " + "[" * 100_000 + "]" * 100_000)
    (directory / "nul.json").write_text('{"model": "a\\u0000b"}')
    flags = "--train reviews.jsonl --text review --method head-only --no-baselines --epochs 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for name, more in (("single", ""), ("pairs", "--text-pair topic"), ("stars", STARS)):
            words = f"finetune --model tiny {flags} {more} --max-length 12 --name {name}".split()
            assert main(words) == 0
    return directory


STARS = "--task regression --label stars"


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
    """Runs a command that ends with a user error: one line on stderr and nothing on stdout."""

    def fails(words, kind, *data):
        with command_raises(kind, *data):
            status, out, err = command(words)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        explained = EXPLAINED.format(kind=kind.__name__)
        assert err.endswith(f"; {explained}\n") == (kind.__name__ not in PLAIN)

    return fails


@pytest.mark.weekly
def test_help_lists_every_command(command):
    for words in ("--help", "-h", []):
        status, out, _ = command(words)
        assert status == 0
        assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: adapters-jax {name}")
    assert len(re.findall(rf"\n  adapters-jax {name}\b", out)) >= 2
    assert all(word in out for word in ("--json", "--config", "--debug"))
    assert all(len(line) <= 80 for line in out.splitlines())
    examples = out.partition("examples:\n")[2].partition("\n\n")[0]
    assert all(line.startswith("  ") for line in examples.splitlines())  # none was wrapped


@pytest.mark.witness("--version-", "schema finetune-1")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--version", "schema finetune"])
def test_a_command_whose_output_nobody_reads_ends_quietly(words, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    line = [sys.executable, "-m", "adapters_jax.finetune.cli.main", *words.split()]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_flags_are_grouped_by_what_they_are_about(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["finetune", "--help"]) == 0
    found, title = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("╭─ "):
            title = line.strip("╭─╮ ")
        for flag in re.findall(r"^│ {1,4}(--[a-z-]+)", line):
            found[flag] = title
    assert list(dict.fromkeys(found.values())) == [
        *("Model", "Data", "Method", "Optimizer", "Prompts", "Decoders", "Run", "Every command"),
    ]
    assert (found["--dtype"], found["--train"], found["--rank"]) == ("Model", "Data", "Method")
    assert (found["--beta"], found["--resume"]) == ("Decoders", "Run")
    assert (found["--json"], found["--debug"]) == ("Every command", "Every command")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("adapters-jax fine", {"finetune"}),
        ("adapters-jax finetune --learning", {"--learning-rate"}),
        ("adapters-jax finetune --dtype b", {"bfloat16"}),
        ("adapters-jax audit --method llama", {"llama-adapter"}),
        ("adapters-jax completion f", {"fish"}),
    ],
)
def test_bash_completes_commands_flags_and_choices(completion_of_bash, line, expected):
    """A shell of its own sources the script and completes the last word of a line."""
    words = line.split()
    program = (
        f'source "$1"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; '
        '_adapters_jax; printf "%s\n" "${COMPREPLY[@]}"'
    )
    shell = ["bash", "-c", program, "bash", completion_of_bash]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert {word.strip() for word in done.stdout.split()} == expected


@pytest.fixture(scope="module")
def completion_of_bash(tmp_path_factory):
    """The file of the script for bash."""
    path = tmp_path_factory.mktemp("completion") / "adapters-jax"
    with path.open("w") as file, contextlib.redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_have_every_command_and_flag(command, shell):
    status, out, _ = command(f"completion {shell} --json")
    script = json.loads(out)["script"]
    assert status == 0 and all(name in script for name in COMMANDS)
    assert "learning-rate" in script and "layer-norms" in script


@pytest.mark.slow
def test_the_methods_are_listed_with_those_of_the_registry(command):
    status, out, _ = command("methods --json")
    found = {each["method"]: each for each in json.loads(out)}
    assert status == 0 and [*found] == [*get_args(MethodName)]
    assert found["lora"]["about"].startswith("Hu et al. 2021, arXiv:2106.09685")
    assert found["lora"]["learning_rate"] == 2e-3 and "--rank" in found["lora"]["flags"]
    _, page, _ = command("methods --markdown")
    assert page.startswith("# Methods\n")
    assert all(f"| {name} |" in page for name in (*found, *every_method()))


def test_the_tasks_are_listed(command):
    status, out, _ = command("tasks --json")
    found = {each["task"]: each for each in json.loads(out)}
    assert status == 0 and [*found] == [*TASKS]
    assert found["regression"]["metrics"] == ["pearson", "spearman"]
    assert (found["preference"]["model"], found["preference"]["command"]) == ("decoder", "generate")
    _, shown, _ = command("tasks")
    words = {word for cell in ([*TASKS], *(x["metrics"] for x in found.values())) for word in cell}
    assert words <= {*re.findall(r"[\w-]+", shown)}  # no line breaks one
    _, page, _ = command("tasks --markdown")
    assert all(f"| {name} | " in page for name in TASKS)


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["models", "tasks", "methods"])
def test_listings_are_whole_at_any_width(name, capsys):
    for table in command_of(name)().find().tables:
        expected = {word for row in table.rows for cell in row for word in cell.split()}
        for width in range(60, 130):
            console = Console(json=False)
            console.printer.width = width
            console.listing(list(table.header), list(map(list, table.rows)), table.words)
            shown = capsys.readouterr().out
            assert expected <= {*re.split(r"[\s│]+", shown)}, width


def test_the_choices_of_formats_are_those_of_the_registry():
    assert get_args(Format) == tuple(FORMATS)
    assert Convert("a", Path("b"), "peft").max_error == MAX_ERROR


@pytest.mark.parametrize("terminal", [True, False])
def test_waiting_shows_a_spinner_on_a_terminal_alone(monkeypatch, terminal):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with Console(json=True).waiting("compiling \x1b[2J"):
        pass
    assert ("compiling \\u001b[2J" in shown.getvalue()) == terminal
    assert terminal or shown.getvalue() == ""


@pytest.mark.parametrize(("least", "said"), [(0.1, "scoring the rows\n"), (3600.0, "")])
def test_a_long_wait_is_a_line_without_a_terminal(monkeypatch, capsys, least, said):
    monkeypatch.setattr(console, "WAIT_SECONDS", least)
    others = {*threading.enumerate()}
    with Console(json=False).waiting("scoring the rows"):
        new = {*threading.enumerate()} - others
        (timer,) = (each for each in new if isinstance(each, threading.Timer))
        timer.join(None if said else 0)
    assert capsys.readouterr() == ("", said)


def test_version(command):
    status, out, _ = command("--version")
    assert (status, out) == (0, f"adapters-jax {aj.__version__}\n")


@pytest.mark.slow
@pytest.mark.witness(
    "bert-base---method houlsby --bottleneck-dim 64-2379264-2417664",
    "llama-7b---method llama-adapter-1229760-1229760",
)
@pytest.mark.parametrize(
    ("model", "flags", "adapters", "trainable"),
    [
        ("bert-base", "--method houlsby --bottleneck-dim 64", 2_379_264, 2_379_264 + 38_400),
        ("bert-base", "--method pfeiffer --reduction-factor 16", 894_528, 894_528),
        ("bert-base", "--reduction-factor 16 --layer-norms=", 1_789_056, 1_789_056),
        ("roberta-base", "--method lora --rank 8", 294_912, 294_912),
        ("llama-7b", "--method llama-adapter", 1_229_760, 1_229_760),
    ],
)
def test_audit_gives_the_published_counts(command, model, flags, adapters, trainable):
    status, out, err = command(f"audit --model {model} {flags} --json")
    assert (status, err) == (0, "")
    counts = json.loads(out)
    assert counts["adapter_parameters"] == adapters
    assert counts["trainable_parameters"] == trainable
    assert counts["frozen_parameters"] > 0
    assert sum(entry["actual"] for entry in counts["entries"]) == trainable


def test_audit_of_a_directory_needs_no_weights(command, directory, tmp_path):
    shutil.copyfile(directory / "tiny" / "config.json", tmp_path / "config.json")
    status, out, _ = command(f"audit --model {tmp_path} --bottleneck-dim 8")
    assert status == 0
    assert "2*32*8 + 32 + 8" in out


def test_predict_prints_a_table_and_json(command):
    status, out, _ = command(["predict", "runs/single", "a lovely film", "a dull plot"])
    assert status == 0
    assert "a lovely film" in out
    status, out, _ = command(["predict", "runs/single", "a lovely film", "a dull plot", "--json"])
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == ["a lovely film", "a dull plot"]
    assert all(row["label"] in ("no", "yes") for row in rows)
    assert all(set(row["probabilities"]) == {"no", "yes"} for row in rows)


@pytest.mark.slow
def test_predict_reads_files_and_stdin_alike(command, monkeypatch, tmp_path):
    lines = Path("reviews.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    texts = [row["review"] for row in rows]
    _, expected, _ = command(["predict", "runs/single", *texts, "--json"])
    (tmp_path / "new.tsv").write_text("review\tother\n" + "".join(f"{t}\tx\n" for t in texts))
    _, found, _ = command(f"predict runs/single --file {tmp_path / 'new.tsv'} --json")
    assert found == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n\n"))
    _, found, _ = command("predict runs/single - --json")
    assert found == expected


@pytest.mark.slow
def test_predict_on_pairs_and_numbers(command):
    _, out, _ = command(
        ["predict", "runs/pairs", "good film", "plot", "bad film", "plot", "--json"]
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["text"], row["text_pair"]) for row in rows] == [
        ("good film", "plot"),
        ("bad film", "plot"),
    ]
    _, out, _ = command(["predict", "runs/stars", "good film", "--json"])
    assert 80 < json.loads(out)["value"] < 140


def test_predict_reads_pairs_by_the_columns_of_training(command):
    lines = [json.loads(line) for line in Path("reviews.jsonl").read_text().splitlines()[:2]]
    status, out, err = command("predict runs/pairs --file reviews.jsonl --json")
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 60
    found = [(row["text"], row["text_pair"]) for row in rows[:2]]
    assert found == [(line["review"], line["topic"]) for line in lines]


def test_predict_warns_of_texts_that_are_cut(command):
    status, out, err = command(["predict", "runs/single", "film " * 20, "good", "--json"])
    assert (status, out.count("\n")) == (0, 2)
    assert err == "1 of 2 texts are cut at 12 tokens\n"


def test_predict_warns_of_a_file_that_is_taken_for_a_text(command):
    status, out, err = command(["predict", "runs/single", "reviews.jsonl", "--json"])
    assert (status, out.count("\n")) == (0, 1)
    assert "--file reviews.jsonl" in err and err.count("\n") == 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_predict_writes_files(command, tmp_path, suffix):
    out = tmp_path / f"found.{suffix}"
    status, printed, _ = command(["predict", "runs/single", "a, film", "bad", "--out", str(out)])
    assert (status, printed.strip()) == (0, f"2 predictions in {out}")
    first = out.read_text().splitlines()[0 if suffix == "jsonl" else 1]
    assert {"csv": '"a, film",', "tsv": "a, film\t", "jsonl": '{"text": "a, film"'}[suffix] in first


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_predict_writes_beside_the_columns_of_the_file(command, tmp_path, suffix):
    rows = [
        {"id": 7, "review": "a, film", "label": "bad", "predicted_label": "kept", "tags": ["x"]},
        {"id": 8, "review": "bad", "label": None, "predicted_label": "", "tags": []},
    ]
    new, out = tmp_path / "new.jsonl", tmp_path / f"found.{suffix}"
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, *_ = command(["predict", "runs/single", "--file", str(new), "--out", str(out)])
    assert status == 0
    lines, ours = out.read_text().splitlines(), "predicted_predicted_label"
    if suffix == "jsonl":
        found = [json.loads(line) for line in lines]
        assert [{name: row[name] for name in rows[0]} for row in found] == rows
        assert [[*row][5:] for row in found] == [[ours, "probabilities"]] * 2
    else:
        header, *found = csv.reader(lines, delimiter="," if suffix == "csv" else "\t")
        assert header[:6] == [*rows[0], ours]
        given = [["7", "a, film", "bad", "kept", '["x"]'], ["8", "bad", "", "", "[]"]]
        assert [row[:5] for row in found] == given
        assert all(len(row) == len(header) and row[5] for row in found)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_writes_values_of_parquet_as_they_are_read(command, tmp_path, suffix):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    day = date(2024, 1, 31)
    columns = {"review": ["a film", "bad"], "day": [day, None], "share": [0.5, math.nan]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "new.parquet")
    out = tmp_path / f"found.{suffix}"
    words = ["predict", "runs/single", "--file", str(tmp_path / "new.parquet"), "--out", str(out)]
    assert command(words)[0] == 0
    if suffix == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(r["day"], r["share"]) for r in found] == [("2024-01-31", 0.5), (None, None)]
    else:
        _, *found = csv.reader(out.read_text().splitlines())
        assert [row[1:3] for row in found] == [["2024-01-31", "0.5"], ["", ""]]


TRAIN = "finetune --model tiny --train reviews.jsonl --text review --max-length 12"
AUDIT = "audit --model bert-base"


@pytest.mark.parametrize(
    ("words", "kind", "data"),
    [
        ("fintune", UsageError, ["finetune", "compare", "generate", "push"]),
        (f"{AUDIT} --rnk 3", UsageError, ["--rnk", "--rank"]),
        (f"{AUDIT} --rank x", UsageError, ["--rank", "'x'"]),
        (f"{AUDIT} --rank 4.5", UsageError, ["--rank", "'4.5'"]),
        (f"{AUDIT} --targets a --targets b", UsageError, ["--targets"]),
        (f"{AUDIT} --method lorra", UsageError, ["lorra", '"lora"', "--method"]),
        (f"{AUDIT} --rank-pattern a 1 b", UsageError, ["--rank-pattern", "a 1 b"]),
        (f"{AUDIT} --method lora --rank-pattern a x", UsageError, ["--rank-pattern", "'x'"]),
        (f"{AUDIT} stray", UsageError, ["'stray'"]),
        ("predict", UsageError, ["RUN", "directory of the run"]),
        ("predict --run", UsageError, ["--run"]),
        ("convert runs/single", UsageError, ["DESTINATION"]),
        ("predict runs/single --jsn", UsageError, ["--jsn", "--json"]),
        (f"{AUDIT} --rank 3", UserError, ["--rank", "--method houlsby", "--bottleneck-dim"]),
        (f"{AUDIT} --method lora --rank 0", UserError, ["LoRA", "rank=0", ">= 1"]),
        (f"{AUDIT} --method lora --rank 999", RecipeError, ["999", "layer_0/attention/", "768"]),
        (f"{AUDIT} --bottleneck-dim 0", UserError, ["Bottleneck", "bottleneck_dim=0"]),
        (f"{AUDIT} --activation gulu", UserError, ["activation='gulu'", "gelu, gelu_exact"]),
        (f"{AUDIT} --targets **/outputs", TargetError, ["'**/outputs'", "attention/output"]),
        (f"{AUDIT} --recipe none.json", FileSystemError, ["none.json"]),
        (f"{AUDIT} --recipe lora", FileSystemError, ["--recipe lora", "--method lora"]),
        (f"{AUDIT} --recipe tiny", FileSystemError, ["tiny", os.strerror(errno.EISDIR)]),
        (f"{AUDIT} --recipe tiny/model.safetensors", UserError, ["model.safetensors", "UTF-8"]),
        (f"{AUDIT} --recipe deep.json", UserError, ["deep.json", "32"]),
        (f"{AUDIT} --config deep.json", UsageError, ["deep.json", "32"]),
        (f"{AUDIT} --config deep.toml", UsageError, ["deep.toml"]),
        (f"{AUDIT} --config nul.json", UsageError, ["nul.json", "model='a\\x00b'", "NUL"]),
        ("compare --recipes --seeds 0", UsageError, ["--recipes", "at least 1", "0"]),
        ("schema fintune", UserError, ["'fintune'", "finetune, "]),
        ("audit", UsageError, ["--model is missing", "config.json"]),
        ("audit --model", UsageError, ["--model requires an argument"]),
        ("audit --model .", BaseFileError, ["'.'", "config.json"]),
        (f"{TRAIN} --learning-rate -1", UserError, ["--learning-rate=-1.0", "> 0"]),
        (f"{TRAIN} --learning-rate nan", UserError, ["--learning-rate=nan", "> 0"]),
        (f"{TRAIN} --head-learning-rate -inf", UserError, ["--head-learning-rate=-inf", "> 0"]),
        (f"{TRAIN} --lora-plus nan", UserError, ["--lora-plus=nan", "> 0"]),
        (f"{TRAIN} --method ia3 --lora-plus 16", UserError, ["--lora-plus", "ia3"]),
        (f"{TRAIN} --epochs 0", UserError, ["--epochs=0.0", "> 0"]),
        (f"{TRAIN} --accumulate 5", UserError, ["--accumulate 5", "--batch-size 32"]),
        (f"{TRAIN} --max-length 99", UserError, ["--max-length 99", "16"]),
        (f"{TRAIN} --max-length 2", UserError, ["max_length is 2", "8"]),
        (f"{TRAIN} --limit 0", UserError, ["--limit=0", ">= 1"]),
        (f"{TRAIN} --seed -1", UserError, ["--seed -1", "2**32 - 1"]),
        (f"{TRAIN} --metrics rouge", UserError, ["rouge", "--task classification", "matthews"]),
        (f"{TRAIN} {STARS} --metrics f1", UserError, ["f1", "--task regression", "spearman"]),
        (f"{TRAIN} --glue rte", UserError, ["--train", "--glue"]),
        ("finetune --glue rte", UserError, ["--glue", "--data"]),
        ("finetune --glue boolq --data .", DataError, ["'boolq'", "cola, sst2, mrpc"]),
        ("finetune --text review --dev x.csv", UserError, ["--dev, --text", "--train FILE"]),
        (f"{TRAIN} --name a/b", RunError, ["--name 'a/b'", "--runs"]),
        (f"{TRAIN} --name single", RunError, ["runs/single", "--name", "--resume"]),
        (f"{TRAIN} --label star", DataError, ["'star'", "review, topic, label, stars"]),
        (f"{TRAIN} --task regression", DataError, ["reviews.jsonl", "60", "'no' (line 1)"]),
        (f"{TRAIN} --targets **/nothing", TargetError, ["'**/nothing'"]),
        (f"{TRAIN} --model nowhere/", UserError, ["'nowhere/'"]),
        ("predict runs/none x", RunConfigError, ["runs/none", "config.json", "runs/pairs"]),
        ("predict none x", RunConfigError, ["none", "runs/pairs"]),
        ("report runs/single/adapter", RunConfigError, ["aj.load_adapter"]),
        (
            f"{TRAIN} --method lora --rank-pattern q=4",
            UsageError,
            ["--rank-pattern: expected PATT"],
        ),
        (TRAIN.replace("reviews.jsonl", "imdb"), DataError, ["imdb: ", "hub:imdb"]),
        ("predict runs/single", DataError, ["--file FILE"]),
        ("predict runs/single x --file y.csv", DataError, ["--file FILE"]),
        ("predict runs/single x --text review", DataError, ["--text", "--text-pair", "--file"]),
        ("predict runs/single --file none.csv", DataError, ["none.csv"]),
        ("predict runs/single --file reviews.jsonl --text x", DataError, ["'x'", "review, topic"]),
        ("predict runs/pairs x", DataError, [" 1 "]),
        ("predct runs/pairs x", UsageError, ["mean predict?", "finetune, data"]),
        ("chat runs/pairs", UsageError, ["mean generate --chat?"]),
        ("train --rank 4", UsageError, ["mean finetune?"]),
        ("generate runs/pairs word", UsageError, ["'word'", "no flag"]),
        (f"{TRAIN} --lora-r 4", UsageError, ["--lora-r", "--rank"]),
        ("predict runs/pairs x --file", UsageError, ["--file"]),
        (
            "predict runs/single --file reviews.jsonl --text-pair topic",
            DataError,
            ["--text-pair"],
        ),
        ("predict runs/single x --out a.xml", DataError, ["--out a.xml", "'.xml'", ".csv, .tsv"]),
        ("predict runs/single x --out no/a.csv", DataError, ["--out no/a.csv", "directory no"]),
        ("predict runs/single x --out reviews.jsonl", DataError, ["reviews.jsonl"]),
        ("predict runs/single --file twice.csv --out a.csv", DataError, ["'id'", "2 times"]),
    ],
)
def test_a_user_error_is_one_line(fails, monkeypatch, words, kind, data):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(words, kind, *data)


@pytest.mark.parametrize(
    ("name", "content", "data"),
    [
        ("column.csv", b"text,stars\na,1\n", ["'label'", "text, stars", "--label COLUMN"]),
        ("both.csv", b"a,b\na,1\n", ["a, b", "--text COLUMN --label COLUMN"]),
        ("empty.csv", b"text,label\na,1\n,0\nb,0\n", ["1 row", "line 3"]),
        ("latin.csv", b"text,label\ncaf\xe9,1\n", ["line 2", "0xe9", "14"]),
        ("none.csv", b"", []),
        ("one.csv", b"text,label\na,1\nb,1\n", ["'1'"]),
    ],
)
def test_a_bad_file_is_one_line(fails, name, content, data):
    Path(name).write_bytes(content)
    fails(f"finetune --model tiny --train {name}", DataError, name, *data)


def test_a_label_that_train_lacks_is_named(fails):
    Path("dev.csv").write_text("review,label\ngood film,maybe\n")
    line = ("dev.csv", "1 row", "no, yes", "'maybe' (line 2)")
    fails(f"{TRAIN} --dev dev.csv", DataError, *line)
    for part in ("one", "two", "three"):
        rows = "".join(f"{part} {word},3\n" for word in "abc")
        Path(f"{part}.csv").write_text(f"text,score\n{rows}")
    same = "--train one.csv --dev two.csv --test three.csv --label score --task regression"
    fails(f"finetune --model tiny --max-length 12 {same}", DataError, " 3;")


def test_one_file_for_two_parts_is_an_error(fails):
    shutil.copy("reviews.jsonl", "more.jsonl")
    fails(f"{TRAIN} --dev more.jsonl --test ./more.jsonl", UserError, "--dev", "more.jsonl")
    fails(f"{TRAIN} --test reviews.jsonl", UserError, "--train and --test", "reviews.jsonl")


@pytest.mark.slow
def test_rows_that_are_in_two_parts_are_counted(command, monkeypatch):
    handlers = [*logging.root.handlers, logging.StreamHandler(sys.stderr)]  # as orbax makes one
    monkeypatch.setattr(logging.root, "handlers", handlers)
    rows = [json.loads(line) for line in Path("reviews.jsonl").read_text().splitlines()]
    new = {**rows[0], "review": "a film of its own"}
    dev, test = [rows[0], new], [{**rows[1], "review": rows[1]["review"].upper()}, rows[0], rows[0]]
    for name, part in (("dev", dev), ("test", test)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flags = "--dev dev.jsonl --test test.jsonl --method head-only --epochs 1 --no-baselines"
    status, _, err = command(f"{TRAIN} {flags} --name overlaps".split())
    assert status == 0
    for words in ("1 of 2 dev rows are also in train", "3 of 3 test rows are also in train"):
        assert err.count(words) == 1
    assert err.count("2 of 3 test rows are also in dev") == 1


@pytest.mark.parametrize(("text", "shown"), [("Event loop is closed", False), ("other", True)])
def test_writes_after_a_failed_one_are_silent(capsys, monkeypatch, text, shown):
    class Write:
        def __del__(self):  # nobody can catch what is raised here
            raise RuntimeError(text)

    monkeypatch.setattr(sys, "unraisablehook", _unraisable)
    Write()
    assert (text in capsys.readouterr().err) == shown


def test_no_text_on_stdin_is_one_line(fails, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    fails("predict runs/single -", DataError, "stdin")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    fails("predict runs/single -", UserError, "stdin", "UTF-8")


def test_each_line_of_stdin_is_a_row_of_its_own(fails, monkeypatch):
    for lines, row in (("good film\nplot\n", "row 1"), ("a\tb\n\nc\td\te\nf\n", "row 2")):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        fails("predict runs/pairs -", DataError, f"{row} of stdin", "review, topic", "tabs")


@pytest.mark.parametrize("texts", [[], [("a",)], "ab"])
def test_a_predictor_is_given_rows(directory, monkeypatch, texts):
    monkeypatch.chdir(directory)
    with raises(DataError, "predict(['A text.'])"):
        load_predictor("runs/single").predict(texts)


def test_a_directory_that_cannot_be_made_is_one_line(fails):
    fails(f"{TRAIN} --runs reviews.jsonl --name x", RunError, "--runs reviews.jsonl")


def test_a_mesh_that_does_not_fit_is_an_error(fails):
    fails(f"{TRAIN} --mesh data=2", ShardingError, "'data=2'", "1 devices", "data=1")
    fails(f"{TRAIN} --mesh two", ShardingError, "'two'", "NAME=SIZE")


def test_several_processes_are_an_error(fails, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    script = "examples/finetune_llama_sharded.py"
    fails(f"{TRAIN} --mesh data=1", UserError, "JAX_NUM_PROCESSES is 2", script)


def test_an_unsupported_architecture_is_an_error(fails, tmp_path):
    images = Path(__file__).parent / "fixtures" / "vit"
    fails(TRAIN.replace("tiny", str(images)), UserError, images, "kind vision")
    shutil.copytree("tiny", tmp_path / "bare")
    tokenizer = tmp_path / "bare" / "tokenizer.json"
    tokenizer.unlink()
    words = TRAIN.replace("tiny", str(tmp_path / "bare"))
    fails(words, BaseFileError, tmp_path / "bare", "tokenizer.json")
    tokenizer.write_text("{}")
    fails(words, BaseFileError, tokenizer)


@pytest.mark.parametrize(
    ("file", "content", "kind", "data"),
    [
        ("config.json", "{", RunConfigError, ["config.json", "line 1 column 2"]),
        (
            "config.json",
            '{"format": 1, "model": "tiny"}',
            RunError,
            ["config.json", "base_sha256, dtype"],
        ),
        (
            "config.json",
            '{"model_type": "bert"}',
            RunError,
            ["is a model, expected a run", "finetune --model"],
        ),
        ("config.json", "[]", RunConfigError, ["config.json", "list"]),
        ("config.json", None, RunConfigError, ["config.json"]),
        ("config.json", "[" * 100_000, RunConfigError, ["config.json", "32"]),
        ("adapter/adapter.safetensors", "x", AdapterFileError, ["adapter.safetensors"]),
        ("adapter/adapter_config.json", None, AdapterFileError, ["adapter_config.json"]),
    ],
)
def test_a_corrupted_run_is_an_error(fails, directory, tmp_path, file, content, kind, data):
    shutil.copytree(directory / "runs" / "single", tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    if content is not None:
        (tmp_path / "run" / file).write_text(content)
    fails(f"predict {tmp_path / 'run'} text", kind, tmp_path / "run", *data)


@pytest.mark.parametrize("target", [{}, {"names": ["a"], "mean": "x", "std": 1}])
def test_a_corrupted_target_is_an_error(fails, directory, tmp_path, target):
    shutil.copytree(directory / "runs" / "single", tmp_path / "run")
    run = Run(tmp_path / "run")
    run.config.write_text(json.dumps({**run.read_config(), "target": target}))
    fails(f"predict {run.path} text", RunError, run.config, target)


@pytest.mark.slow
def test_a_base_that_changed_is_an_error(fails, directory, tmp_path):
    shutil.copytree(directory / "runs" / "single", tmp_path / "run")
    write_model(tmp_path / "tiny", seed=1)
    run = Run(tmp_path / "run")
    was = run.read_config()["base_sha256"]
    run.config.write_text(json.dumps({**run.read_config(), "model": str(tmp_path / "tiny")}))
    fails(f"predict {run.path} text", RunError, tmp_path / "tiny", run.path, was[:12])
    write_model(tmp_path / "wide", hidden_size=64)
    run.config.write_text(json.dumps({**run.read_config(), "model": str(tmp_path / "wide")}))
    differing = ("base_sha256", "config.json: hidden_size 32, here 64", "--any-base")
    fails(f"predict {run.path} text", RunError, run.path, *differing)
    with command_raises(AdapterMismatchError, run.adapter, "head/kernel", "[64, 2]"):
        assert main(["predict", str(run.path), "text", "--any-base"]) == 2


def test_a_changed_adapter_is_an_error(fails, directory, tmp_path):
    shutil.copytree(directory / "runs" / "single", tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    save_file({"head/kernel": tensors["head/kernel"]}, path)
    fails(f"predict {tmp_path / 'run'} text", AdapterMismatchError, "1 missing: head/bias")


@pytest.mark.witness("OSError")
@pytest.mark.parametrize("bug", [ZeroDivisionError, ValueError, OSError])
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(command, monkeypatch, bug):
    def score(*_):
        raise bug("the bug")

    monkeypatch.setattr(LabelledProblem, "score", score)
    status, _, err = command(f"{TRAIN} --method head-only --name broken-{bug.__name__} --epochs 1")
    assert status == 1
    assert f'File "{__file__}", line {score.__code__.co_firstlineno + 1}, in score' in err
    assert f"{bug.__name__}: the bug" in err
    assert f"adapters_jax {aj.__version__}" in err.splitlines()[-2]


def test_a_user_error_shows_its_traceback_with_debug(command, monkeypatch):
    words = f"{AUDIT} --method lora --rank 0"
    status, _, err = command(f"{words} --debug")
    assert status == 2
    assert err.startswith("Traceback") and "UserError: LoRA: rank=0" in err
    monkeypatch.setenv("ADAPTERS_JAX_DEBUG", "1")
    assert command(words) == (status, "", err)


def test_the_schema_of_a_file_of_flags_takes_what_the_command_takes(command):
    """Every flag is in it, with the values that the command reads and no others."""
    status, out, _ = command("schema finetune")
    schema = json.loads(out)
    fields = schema["properties"]
    assert (status, schema["additionalProperties"]) == (0, False)
    assert fields["rank"] == {
        "type": ["integer", "null"],
        "description": fields["rank"]["description"],
    }
    assert "houlsby" in fields["method"]["anyOf"][0]["enum"]
    assert fields["targets"]["items"] == {"type": "string"}
    assert fields["rank_pattern"]["additionalProperties"] == {"type": "integer"}
    assert fields["warmup"]["default"] == 0.1
    help_ = command("finetune --help")[1]
    flags = set(re.findall(r"^│ \*?\s*(?:[A-Z]+ )?--([a-z][a-z-]*)", help_, re.M))
    flags = {flag for flag in flags if not flag.startswith("no-")} - {"config", "debug"}
    assert {name.replace("_", "-") for name in fields} == flags


@pytest.mark.weekly
@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_file_of_flags_gives_what_the_line_does_not(command, tmp_path, suffix):
    path = tmp_path / f"flags.{suffix}"
    values = {"method": "lora", "rank": 4, "rank-pattern": {"layer_0/**": 2}, "json": True}
    toml = (f"{key} = {json.dumps(value).replace(': ', ' = ')}\n" for key, value in values.items())
    yaml = "method: lora\nrank: 4  # of both\nrank-pattern:\n  layer_0/**: 2\njson: true\n"
    path.write_text({"json": json.dumps(values), "toml": "".join(toml), "yaml": yaml}[suffix])
    line = f"{AUDIT} --method lora --rank-pattern layer_0/** 2 --json"
    assert command(f"{AUDIT} --config {path}") == command(f"{line} --rank 4")
    assert command(f"{AUDIT} --rank 8 --config={path}") == command(f"{line} --rank 8")


@pytest.mark.parametrize(
    ("name", "text", "kind", "data"),
    [
        (
            "a.toml",
            "rnk = 4\nnothing = 1",
            UsageError,
            ["rnk", "Did you mean rank?", "nothing is unknown"],
        ),
        ("a.toml", 'rank = "four"', UsageError, ["rank='four'"]),
        ("a.toml", "rank = 4.5", UsageError, ["rank=4.5"]),
        ("a.toml", "json = 1", UsageError, ["json=1"]),
        ("a.toml", 'targets = "x"', UsageError, ["targets='x'"]),
        ("a.toml", 'method = "lorra"', UsageError, ["method='lorra'", "houlsby, pfeiffer"]),
        ("a.toml", "[method]\nrank = 4", UsageError, ["method={'rank': 4}"]),
        ("a.toml", "rank == 4", UsageError, ["line 1, column 7"]),
        ("a.json", "[]", UsageError, ["list"]),
        ("a.ini", "", UsageError, ["'.ini'", ".yaml", ".toml", ".json"]),
        ("a.yaml", "rank: 4\nrank: 8", UsageError, ["'rank'", "line 2"]),
        ("a.yaml", "rank:\n\t- 4", UsageError, ["tab", "line 2"]),
        ("a.yaml", "rank: &r 4\nscale: *r", UsageError, ["anchor", "line 1"]),
        ("a.yaml", "rank: !!python/name:os.system x", UsageError, ["tag", "line 1"]),
        ("a.yaml", "rank: [4", UsageError, ["line 1, column 9"]),
        ("a.yaml", "rank: 1e999", UsageError, ["'1e999'", "line 1"]),
        ("a.yaml", f"rank: {'9' * 50}", UsageError, ["'9999", "line 1"]),
        ("a.yaml", "{[1]: 2}", UsageError, ["a key", "line 1"]),
        ("a.yaml", "[" * 5000, UsageError, ["a.yaml"]),
        ("a.yaml", "rank: yes", UsageError, ["rank='yes'"]),
        ("a.yaml", "- rank: 4", UsageError, ["list"]),
        ("a.yaml", "prompt-length: 4\nprompt_length: 8", UsageError, ["prompt_length", "twice"]),
        ("a.yaml", "lora_r: 4\nwandb: true", UsageError, ["Write rank", "wandb"]),
        ("a.json", None, FileSystemError, []),
    ],
)
def test_a_bad_file_of_flags_is_one_line(fails, tmp_path, name, text, kind, data):
    if text is not None:
        (tmp_path / name).write_text(text)
    fails(f"{AUDIT} --config {tmp_path / name}", kind, tmp_path / name, *data)


def test_interrupting_is_one_line_and_130(command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelledProblem, "score", interrupt)
    status, _, err = command(f"{TRAIN} --method head-only --name stopped --no-baselines --epochs 1")
    assert (status, err) == (130, "adapters-jax finetune: interrupted\n")
