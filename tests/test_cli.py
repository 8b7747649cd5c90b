"""The command line: its help, its JSON, and one line for each mistake."""

import io
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.tiny import write_model, write_reviews
from safetensors.numpy import load_file, save_file

from adapters_jax.app.cli.main import COMMANDS, main
from adapters_jax.io.run_directory import Run
from adapters_jax.tasks.labelled_problem import LabelledProblem


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, a file of reviews, and a run on them, `runs/pairs`."""
    place = tmp_path_factory.mktemp("cli")
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl", rows=60)
    flags = "--train reviews.jsonl --text review --method head-only --no-baselines --epochs 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, more in (("single", ""), ("pairs", "--text-pair topic"), ("stars", STARS)):
            words = f"finetune --model tiny {flags} {more} --max-length 12 --name {name}".split()
            assert main(words) == 0
    return place


STARS = "--task regression --label stars"


@pytest.fixture
def say(place, monkeypatch, capsys):
    """Runs a command in that directory: its status, its stdout, its stderr."""
    monkeypatch.chdir(place)

    def say(words):
        status = main(words.split() if isinstance(words, str) else words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return say


@pytest.fixture
def mistake(say):
    """What a command says that refuses: one line on stderr and nothing on stdout."""

    def mistake(words):
        status, out, err = say(words)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        return err.strip()

    return mistake


def test_help_lists_every_command(say):
    for words in ("--help", "-h", []):
        status, out, _ = say(words)
        assert status == 0
        assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: adapters-jax {name}")
    assert out.count(f"\n  adapters-jax {name} ") >= 2
    assert all(word in out for word in ("--json", "--config", "--debug"))
    assert all(len(line) <= 80 for line in out.splitlines() if "adapters-jax" not in line)


def test_version(say):
    status, out, _ = say("--version")
    assert (status, out.split()[0]) == (0, "adapters-jax")


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
def test_audit_gives_the_published_counts(say, model, flags, adapters, trainable):
    status, out, err = say(f"audit --model {model} {flags} --json")
    assert (status, err) == (0, "")
    counts = json.loads(out)
    assert counts["adapter_parameters"] == adapters
    assert counts["trainable_parameters"] == trainable
    assert counts["frozen_parameters"] > 0
    assert sum(site["actual"] for site in counts["entries"]) == trainable


def test_audit_of_a_directory_needs_no_weights(say, place, tmp_path):
    shutil.copyfile(place / "tiny" / "config.json", tmp_path / "config.json")
    status, out, _ = say(f"audit --model {tmp_path} --bottleneck-dim 8")
    assert status == 0
    assert "2*32*8 + 32 + 8" in out


def test_predict_prints_a_table_and_json(say):
    status, out, _ = say(["predict", "runs/single", "a lovely film", "a dull plot"])
    assert status == 0
    assert "a lovely film" in out
    status, out, _ = say(["predict", "runs/single", "a lovely film", "a dull plot", "--json"])
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == ["a lovely film", "a dull plot"]
    assert all(row["label"] in ("no", "yes") for row in rows)
    assert all(set(row["probabilities"]) == {"no", "yes"} for row in rows)


def test_predict_reads_files_and_stdin_alike(say, monkeypatch, tmp_path):
    lines = Path("reviews.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    texts = [row["review"] for row in rows]
    _, wanted, _ = say(["predict", "runs/single", *texts, "--json"])
    (tmp_path / "new.tsv").write_text("review\tother\n" + "".join(f"{t}\tx\n" for t in texts))
    _, found, _ = say(f"predict runs/single --file {tmp_path / 'new.tsv'} --json")
    assert found == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n\n"))
    _, found, _ = say("predict runs/single - --json")
    assert found == wanted


def test_predict_on_pairs_and_numbers(say):
    _, out, _ = say(["predict", "runs/pairs", "good film", "plot", "bad film", "plot", "--json"])
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["text"], row["text_pair"]) for row in rows] == [
        ("good film", "plot"),
        ("bad film", "plot"),
    ]
    _, out, _ = say(["predict", "runs/stars", "good film", "--json"])
    assert 80 < json.loads(out)["value"] < 140


def test_predict_reads_pairs_by_the_columns_of_training(say):
    lines = [json.loads(line) for line in Path("reviews.jsonl").read_text().splitlines()[:2]]
    status, out, err = say("predict runs/pairs --file reviews.jsonl --json")
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 60
    found = [(row["text"], row["text_pair"]) for row in rows[:2]]
    assert found == [(line["review"], line["topic"]) for line in lines]


def test_predict_says_which_texts_are_cut(say):
    status, out, err = say(["predict", "runs/single", "film " * 20, "good", "--json"])
    assert (status, out.count("\n")) == (0, 2)
    assert err == "1 of 2 texts are cut at 12 tokens\n"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_predict_writes_files(say, tmp_path, suffix):
    out = tmp_path / f"found.{suffix}"
    status, printed, _ = say(["predict", "runs/single", "a, film", "bad", "--out", str(out)])
    assert (status, printed.strip()) == (0, f"2 predictions in {out}")
    first = out.read_text().splitlines()[0 if suffix == "jsonl" else 1]
    assert {"csv": '"a, film",', "tsv": "a, film\t", "jsonl": '{"text": "a, film"'}[suffix] in first


TRAIN = "finetune --model tiny --train reviews.jsonl --text review --max-length 12"
AUDIT = "audit --model bert-base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "fintune",
            "no such command; there are finetune, compare, predict, generate, merge, combine,",
        ),
        (f"{AUDIT} --rnk 3", "Unknown option: --rnk. Did you mean --rank?"),
        (f"{AUDIT} --rank x", "Invalid value for --rank: expected a whole number, got 'x'"),
        (f"{AUDIT} --rank 4.5", "Invalid value for --rank: expected a whole number, got '4.5'"),
        (f"{AUDIT} --targets a --targets b", "--targets specified multiple times"),
        (f"{AUDIT} --method lorra", 'Did you mean "lora"?'),
        (f"{AUDIT} --rank-pattern a 1 b", "--rank-pattern: expected PATTERN NUMBER"),
        (f"{AUDIT} --method lora --rank-pattern a x", "expected a whole number, got 'x'"),
        (f"{AUDIT} stray", "Unused Tokens: ['stray']"),
        ("predict runs/single --jsn", "Unknown option: --jsn. Did you mean --json?"),
        (f"{AUDIT} --rank 3", "--rank: no field of --method houlsby; its fields are --targets, "),
        (f"{AUDIT} --method lora --rank 0", "LoRA: rank=0, expected a whole number >= 1"),
        (f"{AUDIT} --method lora --rank 999", "rank 999 at 'layer_0/attention/"),
        (f"{AUDIT} --bottleneck-dim 0", "Bottleneck: bottleneck_dim=0, expected a whole number"),
        (f"{AUDIT} --activation gulu", "activation='gulu', expected one of gelu, gelu_exact"),
        (f"{AUDIT} --targets **/outputs", "target '**/outputs' matches nothing. Nearest paths"),
        (f"{AUDIT} --recipe none.json", "none.json cannot be read: No such file or directory"),
        ("audit --model .", "'.' has no config.json"),
        (f"{TRAIN} --learning-rate -1", "the optimizer: --learning-rate=-1.0, expected a finite"),
        (f"{TRAIN} --epochs 0", "--epochs=0.0, expected a finite number > 0"),
        (f"{TRAIN} --accumulate 5", "--accumulate 5 does not divide --batch-size 32"),
        (f"{TRAIN} --max-length 99", "--max-length 99: the model has 16 positions"),
        (f"{TRAIN} --max-length 2", "max_length is 2; it must be at least 8 tokens"),
        (f"{TRAIN} --limit 0", "the data: --limit=0, expected a whole number >= 1"),
        (f"{TRAIN} --seed -1", "--seed -1: expected a number from 0 to 2**32 - 1"),
        (
            f"{TRAIN} --metrics rouge",
            "--metrics rouge: --task classification has accuracy, f1, matth",
        ),
        (f"{TRAIN} {STARS} --metrics f1", "--metrics f1: --task regression has pearson, spearman"),
        (f"{TRAIN} --glue rte", "--train and --glue are two tasks; give one of them"),
        ("finetune --glue rte", "--glue and --data go together, as in --glue cola --data"),
        ("finetune --glue boolq --data .", "no GLUE task 'boolq'; there are: cola"),
        ("finetune --text review --dev x.csv", "--dev, --text: only with --train FILE"),
        (f"{TRAIN} --name a/b", "--name 'a/b': expected the name of one directory, below --runs"),
        (f"{TRAIN} --name single", "runs/single exists already; give this run another --name"),
        (f"{TRAIN} --label star", "no column 'star'; the columns are review, topic, label, stars"),
        (f"{TRAIN} --task regression", "a label that is not a finite number: 'no' (line 1)"),
        (f"{TRAIN} --targets **/nothing", "target '**/nothing' matches nothing"),
        (f"{TRAIN} --model nowhere/", "'nowhere/'"),
        (
            "predict runs/none x",
            "no run at runs/none: it has no config.json; there are: runs/pairs",
        ),
        ("predict runs/single", "predict wants texts, or - for stdin, or --file FILE; one of them"),
        ("predict runs/single x --file y.csv", "one of them"),
        ("predict runs/single x --text review", "--text and --text-pair name columns"),
        ("predict runs/single --file none.csv", "none.csv: no such file"),
        ("predict runs/single --file reviews.jsonl --text x", "no column 'x'"),
        ("predict runs/pairs x", "trained on pairs of texts and got 1 texts; give them two by two"),
        ("predict runs/pairs x --file", "--file"),
        ("predict runs/single --file reviews.jsonl --text-pair topic", "trained on single texts"),
        ("predict runs/single x --out a.xml", "--out a.xml: unknown suffix '.xml'; use .csv, .tsv"),
        ("predict runs/single x --out no/a.csv", "--out no/a.csv: there is no directory no"),
        ("predict runs/single x --out reviews.jsonl", "reviews.jsonl exists already"),
    ],
)
def test_a_mistake_is_one_line(mistake, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in mistake(words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("column.csv", b"text,stars\na,1\n", "column.csv: no column 'label'; the columns are"),
        (
            "empty.csv",
            b"text,label\na,1\n,0\nb,0\n",
            "1 row has no text or label: line 3",
        ),
        ("latin.csv", b"text,label\ncaf\xe9,1\n", "latin.csv, line 2: byte 0xe9 at offset 14"),
        ("none.csv", b"", "none.csv: the file is empty"),
        ("one.csv", b"text,label\na,1\nb,1\n", "every label is '1'; classification needs"),
    ],
)
def test_a_bad_file_is_one_line(mistake, name, content, message):
    Path(name).write_bytes(content)
    assert message in mistake(f"finetune --model tiny --train {name}")


def test_a_label_that_train_lacks_is_named(mistake):
    Path("dev.csv").write_text("review,label\ngood film,maybe\n")
    assert "dev.csv: 1 row has a label that train lacks (no, yes): 'maybe' (line 2)" in mistake(
        f"{TRAIN} --dev dev.csv"
    )
    Path("same.csv").write_text("text,score\na,3\nb,3\nc,3\n")
    same = "--train same.csv --dev same.csv --test same.csv --label score --task regression"
    assert "every training label is 3; there is nothing to learn" in mistake(
        f"finetune --model tiny --max-length 12 {same}"
    )


def test_a_directory_that_cannot_be_made_is_one_line(mistake):
    said = mistake(f"{TRAIN} --runs reviews.jsonl --name x")
    assert "--runs reviews.jsonl is a file; expected a directory" in said


def test_a_mesh_that_does_not_fit_is_refused(mistake):
    said = mistake(f"{TRAIN} --mesh data=2")
    assert "mesh 'data=2' does not multiply to the 1 devices that there are" in said
    assert "does not read as NAME=SIZE" in mistake(f"{TRAIN} --mesh two")


def test_several_hosts_are_refused(mistake, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    said = mistake(f"{TRAIN} --mesh data=1")
    assert "JAX_NUM_PROCESSES is 2, and this command is for one host; several take a script" in said


def test_another_architecture_is_refused(mistake, tmp_path):
    gpt2 = Path(__file__).parent / "fixtures" / "gpt2"
    said = mistake(TRAIN.replace("tiny", str(gpt2)))
    assert str(gpt2) in said and "family gpt2" in said
    shutil.copytree("tiny", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "lacks tokenizer.json" in mistake(TRAIN.replace("tiny", str(tmp_path / "bare")))
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in mistake(TRAIN.replace("tiny", str(tmp_path / "bare")))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"format": 1, "model": "tiny"}', "it has no good base_sha256, dtype"),
        ("config.json", "[]", "config.json holds a list, expected a JSON object"),
        ("config.json", None, "it has no config.json"),
        ("adapter/adapter.safetensors", "x", "is damaged"),
        ("adapter/adapter_config.json", None, "has no adapter_config.json"),
    ],
)
def test_a_corrupted_run_is_refused(mistake, place, tmp_path, file, content, message):
    shutil.copytree(place / "runs" / "single", tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    if content is not None:
        (tmp_path / "run" / file).write_text(content)
    assert message in mistake(f"predict {tmp_path / 'run'} text")


@pytest.mark.parametrize("target", [{}, {"names": ["a"], "mean": "x", "std": 1}])
def test_a_corrupted_target_is_refused(mistake, place, tmp_path, target):
    shutil.copytree(place / "runs" / "single", tmp_path / "run")
    run = Run(tmp_path / "run")
    run.config.write_text(json.dumps({**run.read_config(), "target": target}))
    assert "config.json is damaged: its target is" in mistake(f"predict {run.path} text")


def test_a_base_that_changed_is_refused(mistake, place, tmp_path):
    shutil.copytree(place / "runs" / "single", tmp_path / "run")
    write_model(tmp_path / "tiny", seed=1)
    run = Run(tmp_path / "run")
    run.config.write_text(json.dumps({**run.read_config(), "model": str(tmp_path / "tiny")}))
    assert "are not those that" in mistake(f"predict {run.path} text")
    write_model(tmp_path / "wide", hidden_size=64)
    run.config.write_text(json.dumps({**run.read_config(), "model": str(tmp_path / "wide")}))
    said = mistake(f"predict {run.path} text")
    assert "was trained on another base: config_sha256 '" in said and "tree_sha256 '" in said


def test_a_changed_adapter_is_refused(mistake, place, tmp_path):
    shutil.copytree(place / "runs" / "single", tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    save_file({"head/kernel": tensors["head/kernel"]}, path)
    assert "1 missing: head/bias" in mistake(f"predict {tmp_path / 'run'} text")


def test_a_missing_extra_is_one_line(mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert mistake("audit --model bert-base").endswith("pip install 'adapters-jax[finetune]'")


@pytest.mark.parametrize("bug", [ZeroDivisionError, ValueError, OSError])
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(say, monkeypatch, bug):
    def score(*_):
        raise bug("the bug")

    monkeypatch.setattr(LabelledProblem, "score", score)
    status, _, err = say(f"{TRAIN} --method head-only --name broken-{bug.__name__} --epochs 1")
    assert status == 1
    assert f'File "{__file__}", line {score.__code__.co_firstlineno + 1}, in score' in err
    assert f"{bug.__name__}: the bug" in err
    assert f"adapters_jax {version('adapters-jax')}" in err.splitlines()[-2]


def test_a_mistake_shows_its_traceback_with_debug(say, monkeypatch):
    words = f"{AUDIT} --method lora --rank 0"
    status, _, err = say(f"{words} --debug")
    assert status == 2
    assert err.startswith("Traceback") and "UserError: LoRA: rank=0" in err
    monkeypatch.setenv("ADAPTERS_JAX_DEBUG", "1")
    assert say(words) == (status, "", err)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_of_flags_gives_what_the_line_does_not(say, tmp_path, suffix):
    path = tmp_path / f"flags.{suffix}"
    values = {"method": "lora", "rank": 4, "rank-pattern": {"layer_0/**": 2}, "json": True}
    lines = (f"{key} = {json.dumps(value).replace(': ', ' = ')}\n" for key, value in values.items())
    path.write_text(json.dumps(values) if suffix == "json" else "".join(lines))
    line = f"{AUDIT} --method lora --rank-pattern layer_0/** 2 --json"
    assert say(f"{AUDIT} --config {path}") == say(f"{line} --rank 4")
    assert say(f"{AUDIT} --rank 8 --config={path}") == say(f"{line} --rank 8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "rnk = 4\nnothing = 1", "rnk is unknown, is it rank?; nothing is unknown"),
        ("a.toml", 'rank = "four"', "rank='four', expected a whole number or null"),
        ("a.toml", "rank = 4.5", "rank=4.5, expected a whole number or null"),
        ("a.toml", "json = 1", "json=1, expected true or false"),
        ("a.toml", 'targets = "x"', "targets='x', expected a list, of each a text"),
        ("a.toml", 'method = "lorra"', "method='lorra', expected one of houlsby, pfeiffer"),
        ("a.toml", "[method]\nrank = 4", "method={'rank': 4}, expected one of"),
        ("a.toml", "rank == 4", "a.toml is damaged"),
        ("a.json", "[]", "a.json holds a list"),
        ("a.yaml", "", "unknown suffix '.yaml'; use .toml or .json"),
        ("a.json", None, "a.json cannot be read: No such file or directory"),
    ],
)
def test_a_bad_file_of_flags_is_one_line(mistake, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message in mistake(f"{AUDIT} --config {tmp_path / name}")


def test_interrupting_is_one_line_and_130(say, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelledProblem, "score", interrupt)
    status, _, err = say(f"{TRAIN} --method head-only --name stopped --no-baselines --epochs 1")
    assert (status, err) == (130, "adapters-jax finetune: interrupted\n")
