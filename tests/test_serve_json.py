"""Answers that follow a JSON schema, of a tiny Llama whose tokens are bytes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import CHAT, write_llama
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import adapters_jax as aj
from adapters_jax.finetune.serving import Engine, Sizes
from adapters_jax.finetune.serving.adapters import DecoderBase
from adapters_jax.finetune.serving.api import application
from adapters_jax.finetune.serving.completions import TextApi
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.transforms.bank import Bank

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'adapters-jax[serve]'")
SPECIAL = ["<end>", "<user>", "<bot>"]
WORDS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
ANY = [
    {"anyOf": [{"properties": {f"p{7 * i + j}": {"const": j}}} for j in range(6)]} for i in range(9)
]
LARGE = {"allOf": ANY}  # 6 ** 9 shapes
# 2 ** 20 ways to go on after an a, so each more doubles the memory.
PATTERNS = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(20)]}
LIMITS = Limits(seconds=60.0)


class Served:
    def __init__(self, folder):
        write_llama(folder, 7, CHAT, vocab_size=len(WORDS) + 5)  # more than the tokenizer's
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.save(str(folder / "tokenizer.json"))
        base = DecoderBase(str(folder))
        self.decoder, adapted = base.decoder, base.adapted(aj.Recipe(aj.LoRA("**/query", rank=1)))
        sizes = Sizes(rows=2, context=64, pieces=(1, 16), queue=4)
        self.engine = Engine(Bank(adapted, capacity=2), sizes)
        self.engine.start()
        api = TextApi(base, self.engine, "base", LIMITS)
        self.client = TestClient(application(api, "", LIMITS), "http://127.0.0.1")

    def ask(self, shape, **values):
        body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
        body |= {"response_format": shape, "temperature": 0, "max_tokens": 40, **values}
        return self.client.post("/v1/chat/completions", json=body)

    def texts(self, schema, **values):
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = self.ask(shape, **values)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        return [(each["message"]["content"], each["finish_reason"]) for each in choices]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served") / "llama")
    yield served
    served.engine.close()


@pytest.mark.weekly
def test_an_answer_is_the_likeliest_of_its_schema(served):
    """By hand: at each byte, the likeliest of those with which one of the texts goes on."""
    words = ["alpha", "alto", "beta", "gamma", "gas"]
    whole = [json.dumps(word) for word in words]
    ids = served.decoder.encode(served.decoder.render([{"role": "user", "content": "Hi"}])[0]).ids
    text = ""
    while text not in whole:
        logits = np.asarray(served.decoder.model(jnp.array([ids])))[0, -1]
        follow = {WORDS.index(each[len(text)]) for each in whole if each.startswith(text)}
        ids.append(max(follow, key=lambda i: logits[i]))
        text += WORDS[ids[-1]]
    assert served.texts({"enum": words}) == [(text, "stop")]
    drawn = served.texts({"enum": words}, n=12, temperature=2.0, seed=1)
    assert {each for each, _ in drawn} <= {*whole} and len({*drawn}) > 2


@pytest.mark.slow
def test_answers_are_objects_of_the_schema(served):
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"enum": [1, "x"]},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for text, why in served.texts(schema, n=4, temperature=1.5, seed=3):
        found = json.loads(text)
        assert why == "stop" and found.keys() == {"a", "b"}, text
        assert 0 <= found["a"] <= 99 and found["b"] in (1, "x") and text == json.dumps(found)
    (begun,) = served.ask({"type": "json_object"}, temperature=1.0, seed=2).json()["choices"]
    assert begun["message"]["content"].startswith("{")
    plain = served.ask({"type": "text"}).json()["choices"]
    assert plain == served.ask(None).json()["choices"] and plain != [begun]


@pytest.mark.slow
def test_schemas_that_cannot_be_followed(served):
    for shape, datum in [
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "obj"}}}, "obj"),
        ({"type": "json_schema", "json_schema": {"schema": LARGE}}, "too large"),
        ({"type": "json_schema", "json_schema": {"schema": PATTERNS}}, "20 patterns"),
        ({"type": "grammar"}, "response_format.type"),
    ]:
        answer = served.ask(shape)
        assert answer.status_code == 400 and datum in answer.json()["error"]["message"]
