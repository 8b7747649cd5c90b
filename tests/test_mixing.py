"""Several training files as one, and `--mix`: the shares of the rows drawn from each."""

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.errors import raises
from helpers.tiny import write_llama, write_model, write_reviews

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.batches import Batches, Row
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.mixing import Mixture
from adapters_jax.finetune.data.packing import pack
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.flags import from_plain, portable, words
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.runs.config import differences
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.tasks import TASKS
from adapters_jax.finetune.tasks.base import Setup


def mixed(weights=(3, 1), seed=5, first=30, second=10):
    """The rows of two data sets, of lengths in two buckets."""
    rows = [
        Row(np.full(4 + 9 * (i % 2), i, np.int32), np.zeros(4 + 9 * (i % 2), np.int32))
        for i in range(first + second)
    ]
    sources = [int(i >= first) for i in range(first + second)]
    mix = Mixture.of(sources, weights, ["a", "b"])
    return Batches(rows, None, 4, seed, (8, 16), mix=mix)


def drawn(batches, steps):
    """The rows of steps, without filler rows."""
    return [row for step in steps for row in batches.real(step).tolist()]


# Many rows, since grain shuffles few more slowly; and all of them come within the epochs.
@pytest.mark.parametrize(
    ("weights", "first", "second"), [((3, 1), 120, 40), ((1, 1), 120, 40), ((1, 9), 40, 120)]
)
def test_the_shares_are_those_of_the_weights(weights, first, second):
    batches = mixed(weights, first=first, second=second)
    epochs = 3
    rows = drawn(batches, range(epochs * len(batches)))
    assert len(rows) == epochs * 160
    share = sum(row < first for row in rows) / len(rows)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.02)
    for own in (range(first), range(first, 160)):  # nobody comes again before everybody came
        for bucket in (0, 1):
            counts = Counter(row for row in rows if row in own and row % 2 == bucket)
            assert len(counts) == len(own) // 2
            assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.slow
def test_a_step_is_a_pure_function_of_the_seed_and_the_step():
    one, other = mixed(), mixed()
    late = [other[step] for step in (13, 7)]  # as a run that is resumed asks
    for step, batch in zip((13, 7), late, strict=True):
        [one[i] for i in range(step)]
        for name, values in one[step].items():
            np.testing.assert_array_equal(values, batch[name])
    assert drawn(one, range(10)) != drawn(mixed(seed=6), range(10))


def test_packed_sequences_are_of_one_data_set():
    sources = np.arange(40) % 2
    groups = pack([2 + i % 3 for i in range(40)], 16, 0, sources)
    assert sorted(i for group in groups for i in group) == list(range(40))
    assert all(len({*sources[group].tolist()}) == 1 for group in groups)
    assert max(map(len, groups)) > 1


def flags(place, *more):
    sizes = ["--max-length", 32, "--batch-size", 8, "--epochs", 2, "--rank", 2, "--method", "lora"]
    return [*map(str, ["finetune", *sizes, "--no-baselines", *more, "--runs", place])]


@pytest.fixture
def chats(tmp_path):
    """Two files of conversations, in two layouts."""
    asked = [f"{'food ' * (1 + i)}" for i in range(12)]
    said = [{"instruction": asked[i % 12], "output": "It serves"} for i in range(60)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, said)))
    rows = []
    for i in range(30):
        turns = ("user", f"{asked[i % 12]} Thai"), ("assistant", "dishes")
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.slow
def test_conversations_of_two_layouts_are_mixed_and_resumed_exactly(chats, capsys, monkeypatch):
    write_llama(chats / "llama", num_hidden_layers=1)
    files = ["--train", chats / "alpaca.jsonl", chats / "chats.jsonl", "--mix", 0.25, 0.75]
    command = flags(chats, "--model", chats / "llama", *files, "--checkpoint-every", 2)
    assert main([*command, "--name", "whole"]) == 0
    said = capsys.readouterr().out
    assert "25 % of its" in said and "75 % from chats.jsonl" in said
    made = Training.made

    def interrupted(training, metrics):
        made(training, metrics)
        if training.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "made", interrupted)
        assert main([*command, "--name", "cut"]) == 143
    config = (chats / "cut" / "config.json").read_text()
    assert main(["finetune", "--resume", str(chats / "cut")]) == 0
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (chats / "cut" / name).read_bytes() == (chats / "whole" / name).read_bytes()
    other = json.loads(config)
    other["options"]["data"]["mix"] = [0.5, 0.5]
    (chats / "whole" / "config.json").write_text(json.dumps(other))
    assert main(["finetune", "--resume", str(chats / "whole")]) == 2
    assert "another data" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shares_are_those_of_the_conversations_that_are_trained_on(chats):
    write_llama(chats / "llama", num_hidden_layers=1)
    files, said = (chats / "alpaca.jsonl", chats / "chats.jsonl"), []
    lines = files[0].read_text().splitlines()
    long = json.dumps({"instruction": "food " * 40, "output": "It serves"})
    files[0].write_text("\n".join([*lines, *[long] * 40]))
    options = parse(DataOptions, [*map(str, ["--train", *files, "--mix", 1, 1])])
    task = TASKS["conversation"]
    given = str(chats / "llama"), lambda **_: aj.lora(rank=2), 4, 0, {"messages": None}, None
    more = {"max_length": 32, "pack": False, "mix": (1.0, 1.0), "files": ("a", "b")}
    setup = Setup(*given, **more, say=said.append)
    batches = task.prepare(options.load(task), setup).problem.train
    own = Counter(batches.mix.sources[drawn(batches, range(4 * len(batches)))].tolist())
    assert own[0] == pytest.approx(own[1], abs=4)
    told = [f"{name} ({(batches.mix.sources == i).sum()} rows)" for i, name in enumerate("ab")]
    assert any(all(each in text for each in told) for text in said)


@pytest.mark.slow
def test_encoders_learn_the_mixture_with_their_head(tmp_path, capsys):
    write_model(tmp_path / "tiny")
    files = [write_reviews(tmp_path / f"{name}.jsonl", 96, seed) for seed, name in enumerate("ab")]
    command = ["--model", tmp_path / "tiny", "--text", "review", "--train", *files]
    head = ["--method", "head-only", "--mix", 1, 3, "--name", "head"]
    small = ["--epochs", 1, "--no-baselines"]
    assert main([*map(str, ["finetune", *command, *head, *small, "--runs", tmp_path])]) == 0
    assert "25 % of its 156 rows from a.jsonl (80 rows)" in capsys.readouterr().out


def problem_of(*words):
    options = parse(DataOptions, [*map(str, words)])
    with pytest.raises(UserError) as error:
        options.load(options.task_on("encoder", "tiny"))
    return str(error.value)


def test_files_that_do_not_belong_together_are_refused_by_name(chats, monkeypatch):
    monkeypatch.chdir(chats)
    (chats / "a.csv").write_text("text,label\n" + "x y,no\nz,yes\n" * 20)
    (chats / "b.csv").write_text("text,label\n" + "x y,no\nw,maybe\n" * 20)
    (chats / "c.csv").write_text("review,label\n" + "x y,no\nw,yes\n" * 20)
    found = problem_of("--train", "a.csv", "b.csv")
    assert found.startswith("b.csv lacks the label 'yes', which a.csv has;")
    assert problem_of("--train", "a.csv", "c.csv").startswith("c.csv: no column 'text'")
    mixed = problem_of("--train", "a.csv", "chats.jsonl")
    assert "--task classification" in mixed and "chats.jsonl is a conversation" in mixed
    assert "twice" in problem_of("--train", "a.csv", "./a.csv")
    assert "expected a weight for each" in problem_of("--train", "a.csv", "--mix", "1")
    assert "2 for the 3 files" in problem_of("--train", "a.csv", "b.csv", "c.csv", "--mix", 1, 2)
    for weight in ("0", "-1", "nan", "inf"):
        assert "numbers above 0" in problem_of("--train", "a.csv", "b.csv", "--mix=1", weight)
    assert "--mix: allowed only with --train" in problem_of("--mix", 1, 2)
    with raises(DataError, "b.csv", "no row left"):
        Mixture.of([0, 0], [1, 1], ["a.csv", "b.csv"])
    with raises(UserError, "--mix", "masked-language-modelling"):
        TASKS["masked-language-modelling"].readout().owners(None)


def test_rows_of_several_files_keep_their_places(chats, monkeypatch):
    monkeypatch.chdir(chats)
    for name, word in (("a.csv", "x"), ("b.csv", "u")):
        lines = [f"{word}{i},{('no', 'yes')[i % 2]}" for i in range(40)]
        (chats / name).write_text("\n".join(["text,label", *lines]))
    options = parse(DataOptions, ["--train", "a.csv", "b.csv"])
    rows = options.load(TASKS["classification"]).train
    for text, line, source in zip(rows.texts, rows.lines, rows.sources, strict=True):
        name, number = ("a.csv", "b.csv")[source], int(text[0][1:])
        assert text[0].startswith("xu"[source]) and line == f"line {number + 2} of {name}"
    assert options.title == "a-and-1-more"
    (chats / "b.csv").write_text("text,label\nu,no\n,yes\n")
    assert problem_of("--train", "a.csv", "b.csv").startswith("b.csv: 1 row has no text or label")


def test_options_of_several_files_are_kept_and_those_of_older_runs_are_read(chats, monkeypatch):
    monkeypatch.chdir(chats)
    options = DataOptions((Path("a.csv"), Path("b.csv")), mix=(0.7, 0.3))
    line = words(options)
    assert parse(DataOptions, line).mix == (0.7, 0.3)
    assert parse(DataOptions, line).train == (chats / "a.csv", chats / "b.csv")
    shown = portable(" ".join(["adapters-jax", "finetune", *line, "--text=/a"]), DataOptions)
    assert shown == "adapters-jax finetune --train a.csv b.csv --mix 0.7 0.3 --text=/a"
    old = from_plain(DataOptions, {"train": "rows.csv", "dev": None})
    assert old.train == (Path("rows.csv"),)
    stored = {"recipe": None, "task_type": "x", "options": None}
    was = {**stored, "data": {"train": "/rows.csv"}}
    assert differences(was, {**stored, "data": {"train": ["/rows.csv"], "mix": []}}) == []
    for name, text in (("one.yaml", "train: a.csv\n"), ("two.yaml", "train: [a.csv, b.csv]\n")):
        (chats / name).write_text(text)
        read = parse(DataOptions, ["--config", name]).train
        assert read == (Path("a.csv"), Path("b.csv"))[: len(read)]
