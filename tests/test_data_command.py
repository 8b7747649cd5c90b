"""`adapters-jax data`: what it counts, and the tokens that it marks."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import command_raises
from helpers.tiny import write_llama, write_meanings, write_model
from test_conversations import TINY, said

from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.files import DataError, Rows
from adapters_jax.finetune.data.summary import Lengths, summarize
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained.assets import cached
from adapters_jax.finetune.pretrained.decoder import load_decoder_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(capsys):
    """Runs the command; gives its lines, or with --json its values."""

    def run(words):
        assert main(["data", *words.split()]) == 0
        out = capsys.readouterr().out
        return [json.loads(line) for line in out.splitlines()] if "--json" in words else out

    return run


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_lengths():
    found = Lengths.of([7])
    assert found == (7, 7, 7, 7, [(7, 7, 1)])
    found = Lengths.of(list(range(100)))
    assert found.histogram == [(i, i + 9, 10) for i in range(0, 100, 10)]
    for most in (9, 10, 15, 998):
        histogram = Lengths.of([0, 5, 5, most]).histogram
        assert sum(n for _, _, n in histogram) == 4 and 5 <= len(histogram) <= 10
        assert histogram[0][0] == 0 and histogram[-1][0] <= most <= histogram[-1][1]


def test_a_named_label_is_counted(data):
    rows = [{"review": f"Film {i}", "stars": i / 2} for i in range(3)]
    write("a.jsonl", *rows, rows[0])
    (found,) = data("a.jsonl --text review --json")
    assert found["labels"] == {}
    (found,) = data("a.jsonl --text review --label stars --json")
    assert found["labels"] == {"stars": {"0.0": 2, "0.5": 1, "1.0": 1}}
    write("b.jsonl", {"review": "a", "good": True}, {"review": "b", "good": False})
    assert data("b.jsonl --label good --json")[0]["labels"] == {"good": {"true": 1, "false": 1}}
    with command_raises(DataError, "no column 'star'", "did you mean 'stars'?"):
        main(["data", "a.jsonl", "--label", "star"])


def test_columns_without_a_layout_are_named_for_finetune(data):
    Path("a.csv").write_text("review,stars\nGood,1\n")
    assert "for finetune, name the columns: --text COLUMN --label COLUMN" in data("a.csv")


def test_a_bar_of_one_length_names_it_once(data):
    Path("a.csv").write_text("text,label\n" + "Good,1\n" * 3)
    assert "\n  4 █" in data("a.csv")


def test_a_row_that_lacks_a_field_is_an_error():
    Path("a.csv").write_text("text,label\nGood,1\nBad\n")
    with command_raises(DataError, "a.csv", "line 3 has 1", "expected 2 fields"):
        assert main(["data", "a.csv"]) == 2


def test_columns_labels_and_duplicates():
    rows = [["Good film", 1, None, ["B", "O"]], ["good  Film", 1, None, ["B", "O"]]]
    rows += [["Bad", 0, 2.5, ["O"]], ["Dull", 0, "x", ["O"]]]
    found = summarize(Rows(["text", "label", "more", "tags"], list(enumerate(rows))))
    assert (found.rows, found.duplicates, found.layout.name) == (4, 1, "text/label")
    assert found.labels == {"label": {"1": 2, "0": 2}, "tags": {"O": 4, "B": 2}}
    assert [(c.kinds, c.blank, c.distinct) for c in found.columns] == [
        (["text"], 0, 3),
        (["number"], 0, 2),
        (["number", "text"], 2, 3),
        (["list"], 0, 2),
    ]
    assert found.columns[0].lengths[:3] == (3, 4, 10)
    assert found.lengths.total == len("Good filmgood  FilmBadDull")


def test_the_roles_of_messages_are_no_text():
    found = summarize(Rows(["messages"], [(1, [said("abc", "de")])]))
    assert found.lengths.total == 5


def test_rows_shared_with_the_first_file(data):
    write("train.jsonl", *[{"text": f"row {i}", "label": i % 2} for i in range(20)])
    write("test.jsonl", *[{"text": f"ROW  {i}", "label": "?", "id": i} for i in range(15, 25)])
    train, test = data("train.jsonl test.jsonl --json")
    assert "shared" not in train and (test["shared"], test["shared_with"]) == (5, "train.jsonl")
    assert train["labels"] == {"label": {"0": 10, "1": 10}}
    out = data("train.jsonl test.jsonl")
    assert "warning: 5 rows are in train.jsonl as well" in out
    bars = [line for line in out.splitlines() if line.endswith("\N{FULL BLOCK} 10")]
    assert len(bars) == 6 and all(line.count("\N{FULL BLOCK}") == 40 for line in bars)
    assert "layout text/label" in out and "--task classification" in out


def test_images_of_one_name_in_two_directories_are_not_shared(data, capsys):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/1.png", "test/dog/2.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())
    Path("train.csv").write_text("image,label\ntrain/cat/1.png,cat\ntest/dog/2.png,dog\n")
    shared = [rows.get("shared") for rows in data("train test train.csv --json")]
    assert shared == [None, 0, 1]
    assert "--model" not in data("train")
    assert main(["data", "train", "--model", "tiny"]) == 2
    assert "have images" in capsys.readouterr().err


def test_conversations_as_a_decoder_sees_them(data):
    write_llama(Path("tiny"), num_hidden_layers=1, chat_template=TINY)
    talk = said("food Thai", "It serves Thai", "food Dutch", "It serves Dutch")
    write("talks.jsonl", {"messages": talk[:2]}, {"messages": talk})
    (found,) = data("talks.jsonl --model tiny --max-length 9 --json")
    tokens = found["tokens"]
    assert (tokens["total"], tokens["learnt"], tokens["longer"]) == (9 + 18, 4 + 8, 1)
    learnt = ["It serves Thai <end>", "It serves Dutch <end>"]
    assert [text for text, counts in found["examples"][1] if counts] == learnt
    assert found["examples"][0] == [
        ["<user> food Thai <end> <bot>", False],
        ["It serves Thai <end>", True],
    ]
    out = data("talks.jsonl --model tiny --turns last")
    assert "8 of 27 tokens count in the loss" in out
    left, right = (
        "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}",
        "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}",
    )
    assert f"{left}It serves Thai <end>{right}" in out and out.count(left) == 2


def test_completions_and_texts_as_a_decoder_sees_them(data):
    write_llama(Path("tiny"), num_hidden_layers=1)
    write_meanings(Path("rows.csv"), rows=4)
    (found,) = data("rows.csv --model tiny --prompt mr --completion ref --json")
    assert found["examples"][0] == [
        ["<user> food French <end> <bot>", False],
        ["It serves French dishes <end>", True],
    ]
    assert found["tokens"]["learnt"] == 4 * 5
    (found,) = data("rows.csv --model tiny --text ref --json")
    assert found["examples"][0] == [["It", False], ["serves French dishes <end>", True]]
    with command_raises(DataError, "rows.csv", "'prompt' or 'completion'", "mr, ref"):
        assert main(["data", "rows.csv", "--model", "tiny"]) == 2


def test_texts_as_an_encoder_sees_them(data):
    write_model(Path("bert"))
    write("rows.jsonl", {"text": "a good film", "label": 1}, {"text": "bad", "label": 0})
    (found,) = data("rows.jsonl --model bert --json")
    assert found["examples"][0] == [["[CLS] a good film [SEP]", False]]
    assert found["tokens"]["total"] == 8 and "learnt" not in found["tokens"]
    (found,) = data("rows.jsonl --model bert --text_pair label --json".replace("_", "-"))
    assert found["examples"][1][0][0].count("[SEP]") == 2


def test_control_characters_are_written_out(data):
    write("rows.jsonl", {"te\x1b[31mxt": "a", "label": "\x1b]0;x\x07"}, {"label": "\x1b]0;x\x07"})
    out = data("rows.jsonl")
    assert "\x1b" not in out and "\x07" not in out and "\\u001b]0;x\\u0007" in out


def test_bad_input():
    with command_raises(DataError, "train.csv"):
        assert main(["data"]) == 2
    with command_raises(DataError, "none.csv"):
        assert main(["data", "none.csv"]) == 2
    write("rows.jsonl", {"messages": said("a", "b")})
    write_llama(Path("tiny"), num_hidden_layers=1, chat_template=None)
    with command_raises(UserError, "'tiny'", "chat template"):
        assert main(["data", "rows.jsonl", "--model", "tiny"]) == 2


def test_finetune_warns_of_rows_shared_with_train(caplog):
    write_model(Path("bert"))
    write("train.jsonl", *[{"text": f"film {i}", "label": i % 2} for i in range(20)])
    write("test.jsonl", {"text": "FILM 3", "label": 1}, {"text": "film 99", "label": 1})
    shutil.copy("train.jsonl", "copy.jsonl")
    words = "--model bert --train train.jsonl --dev test.jsonl --test copy.jsonl --max-length 8"
    job = parse(Finetune, words.split()).prepare(Console(json=True))
    job.run.unlock(job.lock)
    assert caplog.messages == [
        "warning: 1 of 2 dev rows are also in train, so the dev scores are too good",
        "warning: 20 of 20 test rows are also in train, so the test scores are too good",
        "warning: 1 of 20 test rows are also in dev, so the test scores are too good",
    ]


@pytest.mark.slow
def test_gsm8k_as_smollm2_sees_it(data):
    if cached("smollm2-135m") is None or not SHARED.exists():
        pytest.skip("SmolLM2 or GSM8K is absent")
    file = SHARED / "gsm8k" / "test.jsonl"
    flags = "--model smollm2-135m --prompt question --completion answer --max-length 256 --json"
    (found,) = data(f"{file} {flags}")
    encode = load_decoder_tokenizer("smollm2-135m").tokenizer.encode_batch
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = encode([row["answer"] for row in rows], add_special_tokens=False)
    assert (found["rows"], found["layout"], found["duplicates"]) == (1319, None, 0)
    assert found["tokens"]["learnt"] == sum(len(each.ids) + 1 for each in answers)
    assert 0 < found["tokens"]["longer"] < 1319


def test_prompts_are_shown_in_the_format_of_the_training(data):
    write_llama(Path("llama"))
    rows = {"prompt": "food Thai", "completion": "It serves Thai dishes"}
    write("a.jsonl", *[rows] * 3)

    def prompt(flags=""):
        values = data(f"a.jsonl --model llama --json {flags}")[0]
        return "".join(text for text, learnt in values["examples"][0] if not learnt)

    plain = prompt(r"--no-chat --template It\n{prompt}\nserves")
    assert plain.split() == ["It", "food", "Thai", "serves"]
    assert prompt(r"--template serves\n{prompt}") == prompt().replace("food", "serves food", 1)
    for flags, what in (("", "--model"), ("--model tiny", "encoder")):
        if flags:
            write_model(Path("tiny"))
            write("a.jsonl", {"text": "food", "label": "a"}, {"text": "It", "label": "b"})
        with command_raises(UserError if flags else DataError, "--template", what):
            main(f"data a.jsonl {flags} --template x{{prompt}}".split())
