"""Conversations: their rows, the tokens that count in the loss, and the commands that use them."""

import io
import json
import sys
from pathlib import Path

import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import FOODS, write_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.generate import Generate
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.conversations import Conversation, Conversations, read_conversations
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.packing import Marked, sequence
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.pretrained.assets import cached
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer, load_decoder_tokenizer
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder

SHARED = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ("<s>", "</s>", "<user>", "<bot>", "<system>", "<tool>")
CHAT = "{{ bos_token }}{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}>\n"
CHAT += "{{ m.content }}</s>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<bot>\n{% endif %}"
MARKED = CHAT.replace("{{ m.content }}</s>", "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}")  # fmt: skip
# As templates do that leave out what a model thought, but for its last answer.
FORGETFUL = "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}>"
FORGETFUL += "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}"
FORGETFUL += "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
FORGETFUL += "{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(*contents, system=None):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def bytes_of(template=CHAT, trim=True, merges=()):
    """A tokenizer of bytes, which trims white space off its offsets as GPT-2's does."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return DecoderTokenizer(FAMILIES["llama"], Path("tiny"), tokenizer, tokens, template)


def encoder(template=CHAT, length=1000, learnt="assistant", **how):
    return ChatEncoder(bytes_of(template, **how), length, learnt)


def conversations(*rows):
    return Conversations("rows.jsonl", list(rows), list(range(1, len(rows) + 1)))


def shown(chat, example):
    """An example's text, with what the loss counts in brackets."""
    text, inside = "", False
    for token, learnt in zip(*example, strict=True):
        text += "[" * (learnt and not inside) + "]" * (inside and not learnt)
        text += chat.decoder.tokenizer.decode([token], skip_special_tokens=False)
        inside = learnt
    return text + "]" * inside


def encoded(chat, *messages, **more):
    found = chat.encode(conversations(*(Conversation(m, **more) for m in messages)))
    return [shown(chat, example) for example in found.examples.rows]


# Tokens


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("trim", [True, False])
def test_the_loss_counts_the_answers_with_their_end_tokens(template, trim):
    messages = said(" Hi ", "\nYes. ", "Why?", "So", system="Be brief.")
    chat = encoder(template, trim=trim)
    assert encoded(chat, messages) == [
        "<s><system>\nBe brief.</s>\n<user>\n Hi </s>\n<bot>\n[\nYes. </s>]\n<user>\nWhy?</s>\n"
        "<bot>\n[So</s>]\n"
    ]
    chat = encoder(template, learnt="last", trim=trim)
    assert encoded(chat, messages[1:]) == [
        "<s><user>\n Hi </s>\n<bot>\n\nYes. </s>\n<user>\nWhy?</s>\n<bot>\n[So</s>]\n"
    ]
    chat = encoder(template, learnt="all", trim=trim)
    assert encoded(chat, messages[1:3]) == ["[<s><user>\n Hi </s>\n<bot>\n\nYes. </s>\n]"]


def test_the_tokens_are_those_of_the_whole_text():
    chat = encoder()
    messages = said("Caf\u00e9 \U0001f600", "\U0001f600 na\u00efve", "x", "y")
    (example,) = chat.encode(conversations(Conversation(messages))).examples.rows
    text = chat.decoder.render(messages, False)[0]
    assert example.ids == chat.decoder.tokenizer.encode(text, add_special_tokens=False).ids
    learnt = [i for i, counts in zip(*example, strict=True) if counts]
    decode = chat.decoder.tokenizer.decode
    assert decode(learnt, skip_special_tokens=False) == "\U0001f600 na\u00efve</s>y</s>"
    assert chat.end == chat.decoder.tokenizer.token_to_id("</s>")


def test_the_space_before_an_answer_does_not_count():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    chat = encoder(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert encoded(chat, said("a", " b ")) == ["user: a</s>assistant: [ b </s>]"]


def test_a_word_that_is_one_token_with_the_space_before_it_counts():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    marks = "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    for each in (template, template.replace("{{ m.content }}</s>", marks)):
        chat = ChatEncoder(bytes_of(each, merges=[("\u0120", "y")]), 1000)
        assert encoded(chat, said("a", "yes"))[0].endswith("assistant:[ yes</s>]")
        assert encoded(chat, said("a", "no"))[0].endswith("assistant: [no</s>]")


def test_labels_are_the_next_tokens_that_count():
    row = sequence([Marked([5, 6, 7], [True, True, False]), Marked([8, 9], [False, True])])
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert row.labels.tolist() == [6, -1, -1, 9, -1]
    assert row.segments.tolist() == [1, 1, 1, 2, 2]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]


def test_a_template_that_changes_earlier_turns_makes_a_row_for_each_answer():
    chat = encoder(FORGETFUL)
    found = chat.encode(conversations(Conversation(said("a", "so|b", "c", "hm|d"))))
    assert [shown(chat, example) for example in found.examples.rows] == [
        "<user>a</s>\n<bot>[so|b</s>]\n",
        "<user>a</s>\n<bot>b</s>\n<user>c</s>\n<bot>[hm|d</s>]\n",
    ]
    assert (found.split, found.cut, found.left_out) == (1, 0, 0)
    assert encoded(encoder(FORGETFUL, learnt="last"), said("a", "so|b", "c", "hm|d")) == [
        "<user>a</s>\n<bot>b</s>\n<user>c</s>\n<bot>[hm|d</s>]\n"
    ]
    assert encoded(chat, said("a", "so|b")) == ["<user>a</s>\n<bot>[so|b</s>]\n"]


def test_rows_of_single_answers_are_no_longer_than_the_longest():
    row = Conversation(said("a", "t" * 30 + "|b", "c", "d"))
    chat = encoder(FORGETFUL, length=30)
    found = chat.encode(conversations(row))
    assert [shown(chat, example) for example in found.examples.rows] == [
        "<user>a</s>\n<bot>b</s>\n<user>c</s>\n<bot>[d</s>]\n"
    ]
    assert (found.split, found.cut, found.left_out) == (1, 1, 0)


def test_an_answer_may_have_several_marked_parts_or_none():
    part = "{% generation %}{{ part }}{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    template += "{% for part in m.content.split('|') if part != '-' %}({{ loop.index }}" + part
    template += "){% endfor %}{% endif %}</s>{% endfor %}"
    talk = said("a", "b|c", "d", "-", "e", "f")
    expected = "a</s>(1[b])(2[c])</s>d</s></s>e</s>(1[f])</s>"
    assert encoded(encoder(template), talk) == [expected]
    last = encoded(encoder(template, learnt="last"), talk[:2])
    assert last == ["a</s>(1[b])(2[c])</s>"]


def test_a_reply_that_begins_otherwise_is_counted():
    chat = encoder(CHAT.replace("<bot>\n{% endif", "<bot>\n<think>{% endif"))
    found = chat.encode(
        conversations(Conversation(said("a", "b")), Conversation(said("a", "<think>c")))
    )
    assert [shown(chat, example) for example in found.examples.rows] == [
        "<s><user>\na</s>\n<bot>\n[b</s>]\n",
        "<s><user>\na</s>\n<bot>\n<think>[c</s>]\n",
    ]
    assert found.begun_otherwise == 1


def test_a_template_whose_answers_cannot_be_found():
    changing = "{{ messages | length }}" + CHAT
    with raises(DataError, "rows.jsonl, line 1", "messages 1 to 1", "{% generation %}"):
        encoded(encoder(changing), said("a", "b"))
    marked = encoder("{{ messages | length }}" + MARKED)
    assert encoded(marked, said("a", "b")) == ["2<s><user>\na</s>\n<bot>\n[b</s>]\n"]


def test_a_template_without_an_end():
    chat = encoder("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert chat.end is None
    assert encoded(chat, said("a", "b")) == ["user: a\n[assistant: b\n]"]


def test_a_template_that_rejects_a_conversation_names_its_line():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    rows = [Conversation(said("a", "b")), Conversation(said("a", "b", system="c"))]
    with raises(DataError, "rows.jsonl, line 2", "no system"):
        encoder(template + CHAT).encode(conversations(*rows))


def test_tools():
    tools = [{"name": "add"}]
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    assert encoded(encoder(template), said("a", "b"), tools=tools) == [
        '[{"name": "add"}]<s><user>\na</s>\n<bot>\n[b</s>]\n'
    ]
    assert encoded(encoder(template), said("a", "b")) == ["<s><user>\na</s>\n<bot>\n[b</s>]\n"]
    with raises(DataError, "line 1", "tools"):
        encoded(encoder(), said("a", "b"), tools=tools)


def test_no_turn_is_cut_in_half():
    row = Conversation(said("a", "b", "c", "d" * 20))
    whole = "<s><user>\na</s>\n<bot>\n[b</s>]\n<user>\nc</s>\n<bot>\n[" + "d" * 20 + "</s>]\n"
    first = "<s><user>\na</s>\n<bot>\n[b</s>]\n"
    size = lambda text: len(bytes_of().tokenizer.encode(text.replace("[", "").replace("]", "")).ids)  # noqa: E731
    for length, expected, cut in (
        (size(whole), whole, 0),
        (size(whole) - 1, first, 1),
        (size(first), first, 1),
    ):
        chat = encoder(length=length)
        found = chat.encode(conversations(row))
        assert [shown(chat, example) for example in found.examples.rows] == [expected]
        assert (found.cut, found.left_out) == (cut, 0)
    chat = encoder(length=size(first) - 1)
    with raises(DataError, "rows.jsonl", "1 conversations", f"--max-length {size(first) - 1}"):
        chat.encode(conversations(row))
    short = Conversation(said("", "b"))
    found = encoder(length=size(first) - 1).encode(conversations(row, short))
    assert (len(found.examples.rows), found.left_out, found.cut) == (1, 1, 0)


# Rows

SYSTEM = {"role": "system", "content": "s"}


def written(*rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_conversations(name)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": said("a", "b", "c", "d", system="s")},
        {"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"},
            {"from": "gpt", "value": "d", "weight": None}]},
        {"system": "s", "messages": said("a", "b", "c", "d")},
        {"system": "s", "messages": said("a", "b", "c", "d", system="s")},
        {"messages": json.dumps(said("a", "b", "c", "d", system="s"))},
        {"system": "s", "prompt": said("a", "b", "c"), "completion": said("a", "d")[1:]},
    ],
    ids=["messages", "ShareGPT", "system", "both", "JSON", "prompt"],
)  # fmt: skip
def test_layouts_of_conversations(row):
    (found,) = written(row).rows
    assert found == Conversation(said("a", "b", "c", "d", system="s"), None)
    assert (found.opening, found.answers) == ("s\na", [2, 4])


def test_instructions_and_completions():
    assert written({"instruction": "i", "input": " ", "output": "o"}).rows[0].messages == said(
        "i", "o"
    )
    assert written({"prompt": "p", "completion": "c"}).rows[0].messages == said("p", "c")
    for texts in (("[1, 2], sorted", "[1, 2]"), ("[INST] Hi", "[]")):  # no lists of messages
        row = dict(zip(("prompt", "completion"), texts, strict=True))
        assert written(row).rows[0].messages == said(*texts)
    stored = json.dumps(said("a", "b", "c"))
    assert written({"prompt": stored, "completion": "d"}).rows[0].messages == said(*"abcd")


def test_tools_and_their_calls_stay():
    asked, answered = said("a", "b")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = [asked, call, {"role": "tool", "content": "3"}, answered]
    (found,) = written({"messages": messages, "tools": '[{"name": "add"}]'}).rows
    assert found.tools == [{"name": "add"}]
    assert found.messages[1] == {**call, "content": ""}


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"messages": said("a", "b")[1:]}, ["starts with assistant"]),
        ({"messages": [SYSTEM, *said("a", "b")[1:]]}, ["starts with assistant"]),
        ({"messages": [{"role": "tool", "content": "x"}, *said("a", "b")]}, ["starts with"]),
        ({"messages": said("a", " ")}, ["message 2 of assistant is empty"]),
        ({"messages": [*said("a", "b"), {"role": "bing"}]}, ["message 3", "'bing'"]),
        ({"messages": [*said("a", "b"), {"text": "x"}]}, ["message 3", "None", "user"]),
        ({"messages": said("a", ["b"])}, ["message 2", "list"]),
        ({"messages": said("a")}, ["nothing to learn"]),
        ({"messages": said("a", "b", system="s")[:1]}, ["nothing to learn"]),
        ({"messages": []}, ["no messages"]),
        ({"messages": "Hello"}, ["no messages"]),
        ({"messages": "[1"}, ["not JSON"]),
        ({"messages": ["Hello"]}, ["a role and a content"]),
        ({"messages": said("a", "b"), "tools": {"a": 1}}, ["tools", "dict"]),
        ({"messages": said("a", "b", system="s"), "system": "t"}, ["two system prompts"]),
        ({"instruction": "i", "output": " "}, ["message 2 of assistant is empty"]),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_learnt(row, data):
    good = (
        {"messages": said("a", "b")} if "messages" in row else {"instruction": "i", "output": "o"}
    )
    with raises(DataError, "rows.jsonl: 1 of 2 conversations", "line 2", *data):
        written(good, row)


def test_all_bad_conversations_are_counted():
    with raises(DataError, "7 of 7", "line 5", "and 2 more"):
        written(*[{"messages": said("a")}] * 7)
    with raises(DataError, "messages", "text, label"):
        written({"text": "a", "label": 1})
    with raises(DataError, "talk", "text, label"):
        read_conversations("rows.jsonl", "talk")


def test_conversations_of_another_column():
    Path("rows.jsonl").write_text(json.dumps({"talk": said("a", "b"), "messages": None}))
    assert read_conversations("rows.jsonl", "talk").rows[0].messages == said("a", "b")


# Commands

TINY = (
    "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<user>' }} {{ m.content }} "
)
TINY += "<end> {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def write_talks(name="talks.jsonl", rows=120):
    """The answer follows from the last food that the user named."""
    lines = []
    for i in range(rows):
        foods = [FOODS[(i + turn * (1 + i // 4)) % 4] for turn in range(1 + i % 2)]
        turns = [
            text
            for food in foods
            for text in (f"{'food ' * (1 + i % 5)}{food}", f"It serves {food}")
        ]
        lines.append(json.dumps({"messages": said(*turns)}))
    Path(name).write_text("\n".join(lines))


@pytest.mark.weekly
def test_a_run_learns_conversations_and_talks(monkeypatch, capsys):
    write_llama(Path("tiny"), num_hidden_layers=1, chat_template=TINY)
    write_talks()
    flags = "--method full --learning-rate 0.03 --epochs 6 --evaluations 1 --max-length 40 --json"
    words = f"finetune --model tiny --train talks.jsonl --name talks --no-baselines {flags}"
    assert main(words.split()) == 0
    captured = capsys.readouterr()
    assert "layout messages" in captured.err and "the task is conversation" in captured.err
    assert json.loads(captured.out)["results"][-1]["test"]["perplexity"] < 1.6
    config = Run(Path("runs/talks")).read_config()
    assert (config["task_type"], config["turns"], config["pack"]) == (
        "conversation",
        "assistant",
        True,
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("food food Thai\n\nfood Dutch\n"))
    assert main(["generate", "runs/talks", "--chat", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"prompt": "food food Thai", "completion": "It serves Thai"},
        {"prompt": "food Dutch", "completion": "It serves Dutch"},
    ]
    for flags, data in (
        ("--system x --prompt y", "--chat"),
        ("--chat --file talks.jsonl", "--file"),
    ):
        with command_raises(UserError if "system" in flags else DataError, data):
            assert main(["generate", "runs/talks", *flags.split()]) == 2


def test_each_turn_reads_all_turns_before_it(capsys):
    class Parrot:
        def reply(self, messages, *sampling):
            return " ".join(f"{m['role'][0]}:{m['content']}" for m in messages)

    Generate("run", system="S")._talk(Parrot(), ["a", " ", "b"], Console(json=False))
    assert capsys.readouterr().out.splitlines() == ["s:S u:a", "s:S u:a a:s:S u:a u:b"]
    assert Generate("run", prompt=("a", "b"), chat=True)._turns() == ["a", "b"]
    with raises(DataError, "empty"):
        Generate("run", prompt=("a", " "), chat=True)._turns()


def test_what_a_decoder_cannot_learn():
    write_llama(Path("tiny"), num_hidden_layers=1, chat_template=None)
    with raises(UserError, "'tiny'", "chat template"):
        load_decoder_tokenizer("tiny").render(said("a"))
    write_talks(rows=40)
    with command_raises(UserError, "'tiny'", "chat template", "--task completion"):
        assert main(["finetune", "--model", "tiny", "--train", "talks.jsonl"]) == 2
    with command_raises(UserError, "--turns", "conversation"):
        words = "finetune --model tiny --train talks.jsonl --task completion --turns all"
        assert main(words.split()) == 2


# Real data


@pytest.mark.slow
def test_real_conversations_in_the_template_of_smollm2():
    if cached("smollm2-135m") is None or not SHARED.exists():
        pytest.skip("SmolLM2 or the conversations are absent")
    chat = ChatEncoder(load_decoder_tokenizer("smollm2-135m"), 8192)
    rows = read_conversations(SHARED / "conversations" / "dummy_conversation.json")
    found = chat.encode(rows)
    assert len(found.examples.rows) == len(rows) == 500
    assert (found.cut, found.left_out, found.split, found.begun_otherwise) == (0, 0, 0, 0)
    for row, (ids, learnt) in zip(rows.rows, found.examples.rows, strict=True):
        answers = [row.messages[i]["content"] for i in row.answers]
        counted = chat.decoder.tokenizer.decode(
            [token for token, counts in zip(ids, learnt, strict=True) if counts],
            skip_special_tokens=False,
        )
        assert counted == "".join(f"{answer}<|im_end|>" for answer in answers)
