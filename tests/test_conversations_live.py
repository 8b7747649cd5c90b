"""The tokens of conversations are those of transformers; needs `interop-test`."""

import pytest
from test_conversations import CHAT, MARKED, SPECIAL, bytes_of, conversations, said

from adapters_jax.finetune.data.conversations import Conversation
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder

WHY = "needs transformers: pip install 'adapters-jax[interop-test]'"
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")
TALKS = [
    said(" Hi ", "\nYes. ", "Why?", "So  \n", system="Be\n\nbrief."),
    said("Caf\u00e9 \U0001f600", "\U0001f600 na\u00efve", "x", "</s"),  # "</s>" would be text here
    said("1", "2", "3", "4", "5", "6"),
]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["plain", "marked"])
def test_tokens_and_marks_are_those_of_transformers(template):
    reader = bytes_of(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader.tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
    for messages in TALKS:
        found = ChatEncoder(reader, 1000).encode(conversations(Conversation(messages)))
        (ours,) = found.examples.rows
        expected = theirs.apply_chat_template(
            messages,
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert ours.ids == expected["input_ids"]
        assert ours.learnt == [bool(each) for each in expected["assistant_masks"]]
        assert any(ours.learnt) and not all(ours.learnt)


def test_a_word_that_is_one_token_with_the_space_before_it_is_marked_there_as_well():
    template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}"
    template += "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}\n"
    template += "{% endfor %}"
    reader = bytes_of(template, merges=[("\u0120", "y")])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=reader.tokenizer)
    for messages in (said("a", "yes"), said("a", "y", "b", "yes")):
        found = ChatEncoder(reader, 1000).encode(conversations(Conversation(messages)))
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, chat_template=template, **options)
        (ours,) = found.examples.rows
        n = len(ours.ids)  # what the template writes behind the last answer is left out or not
        assert ours.ids == expected["input_ids"][:n]
        assert ours.learnt == [bool(each) for each in expected["assistant_masks"][:n]]
