"""Preferences as rows and as tokens."""

import json
from pathlib import Path

import pytest
from helpers.errors import raises
from helpers.tiny import write_llama

from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.packing import Example
from adapters_jax.finetune.data.preferences import Preference, read_preferences
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.pretrained.decoder import load_decoder_tokenizer
from adapters_jax.finetune.tasks.preference_problem import PreferenceEncoder, mismatched
from examples.preference_pairs import pairs_of

TINY = "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<user>' }} "
TINY += "{{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def write(*rows, name="rows.jsonl"):
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return Path(name)


# Rows


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"chosen": json.dumps([user("q"), bot("a")]), "rejected": [user("q"), bot("b")]},
        {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
         "rejected": [user("q"), bot("b")]},
    ],
    ids=["lists", "text and answers", "list and answers", "both", "JSON", "ShareGPT"],
)  # fmt: skip
def test_lists_of_messages_have_their_common_beginning_as_prompt(row):
    (found,) = read_preferences(write(row)).rows
    assert found == Preference([user("q")], (bot("a"), bot("b")))
    assert found.talks


def test_texts_judged_rows_and_other_columns():
    rows = read_preferences(write({"prompt": "q", "chosen": "[a]", "rejected": 2}))
    assert rows.rows == [Preference("q", ("[a]", "2"))] and rows.paired
    Path("rows.csv").write_text("q,completion,good\nx,y,True\nx,z,false\n")
    rows = read_preferences("rows.csv", {"prompt": "q", "label": "good"})
    assert rows.rows == [Preference("x", ("y",), True), Preference("x", ("z",), False)]
    assert (rows.labels, rows.paired, rows.lines) == ([True, False], False, [2, 3])
    (single,) = read_preferences(
        write({"prompt": [user("q")], "completion": [bot("a")], "label": False, "system": "s"})
    ).rows
    before = [{"role": "system", "content": "s"}, user("q")]
    assert single == Preference(before, (bot("a"),), False)


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["line 1", "equal"]),
        ({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("a")]}, ["equal"]),
        ({"chosen": [user("q"), bot("a")], "rejected": [user("p"), bot("b")]}, ["prompts"]),
        ({"chosen": [user("q"), bot("a"), user("r"), bot("c")],
          "rejected": [user("q"), bot("b"), user("r"), bot("d")]}, ["prompts"]),
        ({"prompt": "q", "chosen": "a"}, ["rejected", "prompt, chosen"]),
        ({"prompt": "q", "completion": "a"}, ["label", "prompt, completion"]),
        ({"completion": "q", "label": True}, ["no column prompt"]),
        ({"chosen": "a", "rejected": "b"}, ["chosen", "no prompt"]),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, ["chosen", "empty"]),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, ["rejected", "a role"]),
        ({"prompt": "q", "chosen": "a", "rejected": [bot("b")]}, ["text", "list"]),
        ({"chosen": [user("q")], "rejected": [user("q"), bot("b")]}, ["chosen", "nothing"]),
        ({"chosen": [user("q"), bot("b"), user("r")], "rejected": [bot("b")]}, ["of user"]),
        ({"prompt": "q", "chosen": '[{"role": a', "rejected": "b"}, ["not JSON"]),
        ({"prompt": "q", "completion": "a", "label": 1}, ["label is 1", "true or false"]),
        ({"prompt": "q", "completion": "a", "label": "good"}, ["label is 'good'"]),
        ({"prompt": "q", "completion": "a", "label": None}, ["label is None"]),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_compared_are_errors(row, data):
    with raises(DataError, "rows.jsonl", *data):
        read_preferences(write(row))


def test_the_script_pairs_each_prompt_with_the_text_of_one_far_away():
    texts = [("a", "1"), ("a", "2"), ("b", "3"), ("c", "1"), ("d", "4")]
    pairs = [("b", "3", "4"), ("d", "4", "3")]  # those of a and c would be equal
    assert [tuple(pair.values()) for pair in pairs_of(texts, 9)] == pairs


# Tokens


def words(examples, reader):
    back = reader.tokenizer.id_to_token
    return [tuple(" ".join(map(back, part)) for part in example) for example in examples]


def test_completions_follow_their_prompts_as_in_the_other_tasks():
    reader = load_decoder_tokenizer(str(write_llama(Path("tiny"), chat_template=TINY)))
    rows = read_preferences(write({"prompt": "food", "chosen": "It is", "rejected": "Thai"}))
    (texts,), cut = PreferenceEncoder(reader, Prompts(), 99).encode(rows)
    lists = write({"chosen": [user("food"), bot("It is")], "rejected": [user("food"), bot("Thai")]})
    (messages,), _ = PreferenceEncoder(reader, Prompts(), 99).encode(read_preferences(lists))
    expected = [
        ("<user> food <end> <bot>", "It is <end>"),
        ("<user> food <end> <bot>", "Thai <end>"),
    ]
    assert words(texts, reader) == words(messages, reader) == expected and cut == 0
    (plain,), cut = PreferenceEncoder(reader, Prompts("It {prompt}", chat=False), 4).encode(rows)
    assert words(plain, reader) == [("food", "It is <end>"), ("food", "Thai <end>")] and cut == 1
    with raises(DataError, "rows.jsonl", "line 1 (3 tokens)", "--max-length 3"):
        PreferenceEncoder(reader, Prompts(), 3).encode(rows)


def test_each_row_gets_the_completion_of_another_prompt():
    own = [(Example([9, 9, i // 2], [10 + i]),) for i in range(8)]
    found = mismatched(own, 3, 5, "rows.csv")
    assert [mine for mine, _ in found] == [row[0] for row in own]
    assert all(other.prompt == mine.prompt[-2:] for mine, other in found)
    assert all((other.completion[0] - 10) // 2 != mine.prompt[-1] for mine, other in found)
    assert len({other.completion[0] for _, other in found}) > 4
    with raises(DataError, "rows.csv", "one prompt"):
        mismatched(own[:2], 3, 5, "rows.csv")


@pytest.mark.parametrize("indent", [None, 1])
def test_messages_as_a_text_of_json_are_told_from_an_answer_in_json(indent, tmp_path):
    told = [json.dumps([user("Hi"), bot(word)], indent=indent) for word in ("It", "is")]
    answers = [json.dumps([{"name": word}], indent=indent) for word in ("It", "is")]
    for name, pair, talks in (("told", told, True), ("answers", answers, False)):
        row = {"prompt": "Hi", "chosen": pair[0], "rejected": pair[1]}
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row))
        (found,) = read_preferences(path).rows
        assert found.talks == talks
        assert talks or found.completions == tuple(pair)
