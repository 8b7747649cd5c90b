"""What clients of OpenAI's API send, of a server of a tiny Llama: answers are passes by hand."""

import asyncio
import dataclasses
import json
import threading
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.tiny import CHAT, SPOKEN, write_llama
from pydantic import ValidationError
from starlette.testclient import TestClient

import adapters_jax as aj
from adapters_jax.finetune.serving import Engine, Sizes
from adapters_jax.finetune.serving.adapters import About, DecoderBase
from adapters_jax.finetune.serving.api import application
from adapters_jax.finetune.serving.completions import TextApi
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.finetune.serving.schemas import ChatRequest, CompletionRequest
from adapters_jax.nnx import AdapterParam
from adapters_jax.testing.subjects import shaken
from adapters_jax.transforms.bank import Bank

LIMITS = Limits(seconds=60.0)
CALL = '<tool_call>{"name":"add","arguments":{"x":7}}</tool_call>'
WORDS = (*SPOKEN, CALL, "add", "7", "tool")
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {# <tool_call></tool_call> #}{% endfor %}"
)
TEMPLATE += (
    "{% for m in messages %}<user>{% if m.role == 'tool' %}tool {{ m.tool_call_id }} {% endif %}"
)
TEMPLATE += "{{ m.content }}{% for c in m.tool_calls or [] %} {{ c.function.name }} "
TEMPLATE += "{{ c.function.arguments.x }}{% endfor %}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bot>{% endif %}"
RECIPE = aj.Recipe(aj.LoRA("**/{query,value}", rank=2, alpha=6.0))


class Served:
    """A server of a tiny Llama and of an adapter with random arrays."""

    def __init__(self, folder):
        write_llama(folder / "llama", 3, TEMPLATE, vocab_size=len(WORDS), num_hidden_layers=1)
        file = folder / "llama" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(WORDS)}
        file.write_text(json.dumps(tokenizer))
        self.base = DecoderBase(str(folder / "llama"))
        adapted = self.base.adapted(RECIPE)
        graphdef, tree, rest = nnx.split(adapted, AdapterParam, ...)
        tree = shaken(tree, 5)
        self.models = {"base": self.base.decoder.model, "small": nnx.merge(graphdef, tree, rest)}
        sizes = Sizes(rows=2, context=48, pieces=(1, 16), queue=2, adapters=2)
        self.engine = Engine(Bank(adapted, capacity=4), sizes)
        self.engine.start()
        self.engine.put("small", self.engine.fit("small", (RECIPE, tree)), About({})).result(60)
        self.api = TextApi(self.base, self.engine, "base", LIMITS)
        self.client = TestClient(application(self.api, "", LIMITS), "http://127.0.0.1")

    def ask(self, path="/v1/completions", **values):
        body = {"model": "small", "max_tokens": 6, "temperature": 0, **values}
        return self.client.post(path, json=body)

    def choices(self, **values):
        answer = self.ask(**values)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def logprobs(self, model, ids):
        """The log-probabilities of every token behind each beginning of a text."""
        padded = jnp.array([[*ids, *[0] * (32 - len(ids))]])  # one program for all texts
        return np.asarray(_logprobs(self.models[model], padded))[: len(ids)]


@nnx.jit
def _logprobs(model, ids):
    return jax.nn.log_softmax(model(ids)[0])


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.engine.close()


@pytest.mark.slow
def test_prompts_of_every_form(served):
    texts = ["food food Thai", "It serves", "is", "Greek dishes food", "It serves"]
    alone = [served.choices(prompt=text)[0] for text in texts]
    assert len({each["text"] for each in alone}) > 2
    forms = [texts, [ids_of(text) for text in texts]]
    for prompts in forms:  # more than there are rows and places in the queue
        found = served.choices(prompt=prompts)
        assert found == [{**each, "index": i} for i, each in enumerate(alone)]
    assert served.choices(prompt=ids_of(texts[0])) == [alone[0]]
    usage = served.ask(prompt=texts).json()["usage"]
    made = sum(served.ask(prompt=text).json()["usage"]["completion_tokens"] for text in texts)
    assert usage == {"prompt_tokens": 11, "completion_tokens": made, "total_tokens": 11 + made}


@pytest.mark.witness("0-small", "5-base")
@pytest.mark.parametrize("model", ["base", "small"])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_an_echo_has_the_log_probabilities_of_the_prompt(served, model, most):
    """Of prompts of one token, of several, and of more than one piece."""
    draw = np.random.default_rng(7)
    prompts = [[6], [5, 6, 4, 9], draw.integers(4, len(WORDS), 21).tolist()]
    asked = {"model": model, "prompt": prompts, "echo": True, "logprobs": 3, "max_tokens": most}
    found = served.choices(**asked)
    for choice, prompt in zip(found, prompts, strict=True):
        seen = choice["logprobs"]
        shown = [text for text in seen["tokens"] if WORDS.index(text) not in (1, 2, 3)]  # no text
        assert choice["text"] == " ".join(shown)
        ids = [WORDS.index(word) for word in seen["tokens"]]
        assert ids[: len(prompt)] == prompt and len(ids) <= len(prompt) + most
        expected = served.logprobs(model, ids)
        own = expected[np.arange(len(ids) - 1), ids[1:]]
        assert seen["token_logprobs"][0] is None and seen["top_logprobs"][0] is None
        np.testing.assert_allclose(seen["token_logprobs"][1:], own, atol=1e-4)
        for top, row in zip(seen["top_logprobs"][1:], expected, strict=False):
            likely = np.argsort(-row)[:3]
            np.testing.assert_allclose([*top.values()], row[likely], atol=1e-4)
            assert [*top] == [WORDS[i] for i in likely]
        # The last made token is the likeliest one, to the last bit, as clients compare.
        for value, top in zip(seen["token_logprobs"], seen["top_logprobs"], strict=True):
            assert top is None or value <= max(top.values())
        if most:
            assert seen["token_logprobs"][len(prompt)] == max(
                seen["top_logprobs"][len(prompt)].values()
            )
    plain = served.choices(**{**asked, "logprobs": None})
    assert [each["text"] for each in plain] == [each["text"] for each in found]
    assert {each["logprobs"] and 1 for each in plain} == {None}


def test_several_answers_have_seeds_of_their_own(served):
    for path, asked in [
        ("/v1/completions", {"prompt": ["food Thai", "It is"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "food"}]}),
    ]:
        asked |= {"path": path, "temperature": 2.0}
        several = served.choices(**asked, seed=2**32 - 2, n=5)
        assert [each["index"] for each in several] == [*range(len(several))]
        alone = [served.choices(**asked, seed=(2**32 - 2 + i) % 2**32) for i in range(5)]
        per_prompt = len(several) // 5
        flat = [alone[i][p] for p in range(per_prompt) for i in range(5)]
        assert several == [{**each, "index": i} for i, each in enumerate(flat)]
        assert len({json.dumps({**each, "index": 0}) for each in several}) > 3
        assert served.choices(**asked, seed=2**32 - 2, n=5) == several
    free = served.choices(prompt=["food Thai"] * 6, temperature=2.0)  # no seed: their own ones
    assert len({each["text"] for each in free}) > 2
    assert served.choices(prompt="food", best_of=1)[0] == served.choices(prompt="food")[0]


def test_a_stream_of_several_answers(served):
    asked = {"prompt": ["food Thai", "It is"], "n": 2, "temperature": 1.5, "seed": 4, "echo": True}
    whole = served.ask(**asked).json()
    answer = served.ask(**asked, stream=True, stream_options={"include_usage": True})
    *events, last, done = [x.removeprefix("data: ") for x in answer.text.split("\n\n") if x]
    assert done == "[DONE]" and json.loads(last)["usage"] == whole["usage"]
    texts, ends = [""] * 4, {}
    for event in events:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == [each["text"] for each in whole["choices"]]
    assert [ends[i] for i in range(4)] == [each["finish_reason"] for each in whole["choices"]]


def test_a_stream_whose_client_is_gone_computes_nothing_more(served):
    """At its first piece, before any answer is waited for."""
    go_on, taken, gone = threading.Event(), threading.Event(), asyncio.Event()

    class Held:
        """Holds the engine's thread, so that all requests wait."""

        def token(self, token):
            taken.set()
            return go_on.wait() and False

        def end(self, why):
            pass

    body = {"model": "small", "prompt": "food", "n": 2, "stream": True, "echo": True}
    arriving = iter([{"type": "http.request", "body": json.dumps(body).encode()}])
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}

    async def receive():
        for message in arriving:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            gone.set()
            await asyncio.Event().wait()  # nobody reads

    served.engine.submit([5], Held(), most=2)
    taken.wait()
    before = served.engine.counts.ended["cancelled"]
    asyncio.run(served.client.app({**scope, "query_string": b""}, receive, send))
    go_on.set()
    assert served.ask(prompt="food").status_code == 200
    assert served.engine.counts.ended["cancelled"] == before + 2


@pytest.mark.slow
def test_penalties_and_a_bias_reach_the_engine(served):
    prompt, bias = ids_of("food food Thai"), {"5": -100, "6": 1.5}
    expected, counts = [*prompt], np.zeros(len(WORDS))
    for _ in range(6):
        logits = served.logprobs("small", expected)[-1]
        logits = logits - 1.5 * (counts > 0) - 0.4 * counts
        logits[5], logits[6] = logits[5] - 100, logits[6] + 1.5
        expected.append(int(logits.argmax()))
        counts[expected[-1]] += 1
        if expected[-1] == served.base.decoder.end:
            break
    (choice,) = served.choices(
        prompt=prompt, presence_penalty=1.5, frequency_penalty=0.4, logit_bias=bias, echo=True
    )
    decode = served.base.decoder.tokenizer.decode
    assert choice["text"] == decode(expected)
    (plain,) = served.choices(prompt=prompt, echo=True)
    assert plain["text"] != choice["text"]


NEUTRAL = {
    "store": False,
    "metadata": None,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "user": "me",
    "service_tier": "auto",
    "stop": None,
    "seed": None,
    "n": 1,
    "top_p": None,
    "stream": False,
    "extra_body": {"safety_identifier": "x", "prompt_cache_key": "y", "suffix": None},
}


def test_neutral_values_by_the_client_itself(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url="http://127.0.0.1/v1", api_key="none", http_client=served.client, max_retries=0
    )
    asked = {"model": "small", "temperature": 0, "max_tokens": 6}
    messages = [
        {"role": "developer", "content": "It serves"},
        {"role": "user", "content": [{"type": "text", "text": "food"}], "name": None},
    ]
    chat = {"parallel_tool_calls": True, "logprobs": False, "modalities": ["text"]}
    found = client.chat.completions.create(**asked, messages=messages, **NEUTRAL, **chat)
    messages = [{"role": "system", "content": "It serves"}, {"role": "user", "content": "food"}]
    (plain,) = served.choices(path="/v1/chat/completions", messages=messages)
    assert found.choices[0].message.content == plain["message"]["content"]
    kept = {k: v for k, v in NEUTRAL.items() if k not in ("store", "metadata", "service_tier")}
    found = client.completions.create(**asked, prompt="food Thai", best_of=1, echo=False, **kept)
    assert found.choices[0].text == served.choices(prompt="food Thai")[0]["text"]
    scored = client.completions.create(**asked, prompt=[[5, 6], [7]], echo=True, logprobs=2)
    assert scored.choices[1].logprobs.token_logprobs[0] is None


@pytest.mark.parametrize(
    "values",
    [
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "flex"},
        {"suffix": "x"},
        {"logit_bias": {"99": 1}},
        {"reasoning_effort": "low"},
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(served, values):
    answer = served.ask(prompt="food", **values)
    (name,) = values if "logit_bias" not in values else ["99"]
    assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CompletionRequest, {"prompt": [""] * 1000}),
        (CompletionRequest, {"prompt": [[]] * 1000}),
        (CompletionRequest, {"prompt": [["a"] * 1000]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
        (ChatRequest, {"messages": [], "modalities": ["x"] * 1000}),
    ],
    ids=["texts", "lists", "ids", "parts", "modalities"],
)
def test_a_list_has_one_problem(kind, values):
    """Those of a million items would take seconds of the loop that all requests share."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": "m", **values})
    assert error.value.error_count() < 6


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def test_tools_through_the_template_and_back(served):
    """A client calls a tool, and writes the call and its result back, as the API has them."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url="http://127.0.0.1/v1", api_key="none", http_client=served.client, max_retries=0
    )
    at = str(WORDS.index(CALL))
    asked = {"model": "base", "temperature": 0, "tools": TOOLS, "tool_choice": "auto"}
    said = [{"role": "user", "content": "food"}]
    calling = {"logit_bias": {at: 100}, "max_tokens": 2}  # two calls
    answer = client.chat.completions.create(**asked, **calling, messages=said)
    assert answer.usage.prompt_tokens == len(ids_of("add <user> food <end> <bot>"))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    functions = [
        (c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls
    ]
    assert functions == [("add", {"x": 7})] * 2
    one = client.chat.completions.create(
        **asked, **calling, messages=said, parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls) == 1
    stream = client.chat.completions.create(**asked, **calling, messages=said, stream=True)
    pieces = [piece.choices[0] for piece in stream]
    streamed = [c for piece in pieces for c in piece.delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in streamed] == [(0, "add"), (1, "add")]
    assert pieces[-1].finish_reason == "tool_calls"
    # What is not a call stays text: another function, no tools, and a call with text behind it.
    bias = {at: 100}
    for changed in (
        {"tools": [{**TOOLS[0], "function": {"name": "other"}}]},
        {"tool_choice": "none"},
        {"max_tokens": 6, "presence_penalty": 2, "frequency_penalty": 2, "logit_bias": {at: 8}},
    ):
        values = {**asked, "logit_bias": bias, "max_tokens": 1, **changed}
        (choice,) = client.chat.completions.create(**values, messages=said).choices
        assert CALL in choice.message.content and not choice.message.tool_calls, changed
    call = answer.choices[0].message.tool_calls[0].model_copy(update={"id": "Thai"})
    message = answer.choices[0].message.model_copy(update={"tool_calls": [call]})
    back = [*said, message, {"role": "tool", "tool_call_id": "Thai", "content": "7"}]
    again = client.chat.completions.create(**asked, max_tokens=3, messages=back)
    text = "add <user> food <end> <user> add 7 <end> <user> tool Thai 7 <end> <bot>"
    assert again.usage.prompt_tokens == len(ids_of(text))
    ids = served.choices(model="base", prompt=ids_of(text), max_tokens=3)[0]["text"]
    assert again.choices[0].message.content == ids


def test_what_no_template_or_server_can_do_with_tools(served, monkeypatch):
    said = [{"role": "user", "content": "food"}]
    call = {"id": "a", "function": {"name": "add", "arguments": "7"}}
    for values, datum in [
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"messages": [{"role": "assistant", "tool_calls": [call]}]}, "arguments of add"),
        ({"messages": [{"role": "user", "tool_calls": [call], "content": ""}]}, "user"),
        ({"messages": [{"role": "user"}]}, "content"),
    ]:
        answer = served.ask("/v1/chat/completions", **{"messages": said, **values})
        assert answer.status_code == 400 and datum in answer.json()["error"]["message"]
    answer = served.ask(
        "/v1/chat/completions", messages=said, response_format={"type": "json_object"}
    )  # of whole words
    if find_spec("llguidance"):
        assert answer.status_code == 400 and "no bytes" in answer.json()["error"]["message"]
    blind = dataclasses.replace(served.api.decoder, chat_template=CHAT)
    monkeypatch.setattr(served.api, "decoder", blind)
    answer = served.ask("/v1/chat/completions", messages=said, tools=TOOLS)
    assert answer.status_code == 400 and "shows no tools" in answer.json()["error"]["message"]
