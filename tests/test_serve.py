"""The HTTP interface, through Starlette's client: answers are those of `adapters-jax generate`."""

import asyncio
import errno
import itertools
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.finished import decoder_run
from helpers.tiny import write_llama, write_meanings
from starlette.formparsers import MultiPartParser
from starlette.testclient import TestClient

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, MissingPackageError, UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.pretrained.decoder import complete
from adapters_jax.finetune.serving import Engine, Sizes, schemas
from adapters_jax.finetune.serving.adapters import DecoderBase, Read, covering
from adapters_jax.finetune.serving.api import application
from adapters_jax.finetune.serving.completions import TextApi
from adapters_jax.finetune.serving.conversing import Message
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.bank import Bank

HERE = "http://127.0.0.1"
LIMITS = Limits(body=4000, upload=40_000, seconds=20.0)
PROMPT = "food food Thai"
GREEDY = {"temperature": 0, "max_tokens": 8}


class Served:
    """A server of a tiny Llama with two runs, and those runs themselves."""

    def __init__(self, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_llama(Path("llama"), num_hidden_layers=1)
            write_meanings(Path("rows.csv"), rows=40)
            first = decoder_run("--method lora --rank 2", "first")
            second = decoder_run("--method lora --rank 3 --targets **/value", "second")
            self.runs = {"first": folder / first, "second": folder / second}
            self.base = DecoderBase(str(folder / "llama"))
            self.alone = {name: load_generator(path) for name, path in self.runs.items()}
        read = {name: self.base.read(path) for name, path in self.runs.items()}
        self.recipe = covering(read.values())
        self.engine = Engine(
            Bank(self.base.adapted(self.recipe), capacity=5),
            Sizes(rows=2, context=48, pieces=(1, 16), queue=2, adapters=4),
        )
        self.engine.start()
        for name, each in read.items():
            self.engine.put(name, self.engine.fit(name, (each.recipe, each.leaves)), each.about)
        self.api = TextApi(self.base, self.engine, "base", LIMITS)
        self.client = self.asking()

    def asking(self, key=None, page="<title>page</title>"):
        return TestClient(application(self.api, page, LIMITS, [key] if key else []), HERE)

    def files(self, name, **changed):
        """The files of a run's adapter, as a form has them; those changed have other bytes."""
        folder = self.runs[name] / "adapter"
        files = {path.name: path.read_bytes() for path in folder.iterdir()} | changed
        return [("files", (file, content)) for file, content in files.items() if content]

    def ask(self, path="/v1/completions", **values):
        body = {"model": "first", "prompt": PROMPT, **GREEDY, **values}
        return self.client.post(path, json={k: v for k, v in body.items() if v is not None})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.engine.close()


@pytest.mark.slow
def test_answers_are_those_of_the_runs_alone(served, slow):
    distinct = set()
    for name, alone in served.alone.items():
        (expected,) = alone.generate([PROMPT], 8)
        answer = served.ask(model=name).json()
        (choice,) = answer["choices"]
        assert choice["text"] == expected and choice["finish_reason"] in ("length", "stop")
        ids = alone.prompts.encode(PROMPT, alone.decoder)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        distinct.add(choice["text"])
        if name == "first" and not slow:
            continue
        sampled = served.ask(model=name, temperature=0.8, top_p=0.9, seed=5).json()
        (expected,) = complete(
            alone.model,
            alone.decoder,
            [ids],
            8,
            temperature=0.8,
            top_p=0.9,
            key=jax.random.key(5),
        )
        assert sampled["choices"][0]["text"] == expected
    decoder = served.base.decoder
    raw = decoder.tokenizer.encode(PROMPT).ids
    (expected,) = complete(decoder.model, decoder, [raw], 8)
    for prompt in (PROMPT, raw):  # the base takes prompts as they are
        assert served.ask(model="base", prompt=prompt).json()["choices"][0]["text"] == expected
    assert len(distinct | {expected}) == 3


def test_log_probabilities(served):
    """Those of the model, at the tokens of the answer."""
    answer = served.ask(logprobs=3, max_tokens=4).json()["choices"][0]
    seen, alone = answer["logprobs"], served.alone["first"]
    assert "".join(answer["text"].split()) == "".join("".join(seen["tokens"]).split())
    ids = alone.prompts.encode(PROMPT, alone.decoder)
    made = [alone.decoder.tokenizer.token_to_id(text.strip()) for text in seen["tokens"]]
    logits = nnx.jit(alone.model)(jnp.array([[*ids, *made]]))[0, len(ids) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    own = expected[np.arange(len(made)), made]
    np.testing.assert_allclose(seen["token_logprobs"], own, atol=1e-4)
    places = [*seen["text_offset"], len(answer["text"])]
    parts = [answer["text"][a:b] for a, b in itertools.pairwise(places)]
    assert [part.strip() for part in parts] == [text.strip() for text in seen["tokens"]]
    for top, row in zip(seen["top_logprobs"], expected, strict=True):
        np.testing.assert_allclose([*top.values()], -np.sort(-row)[:3], atol=1e-4)
    assert served.ask(max_tokens=4).json()["choices"][0]["logprobs"] is None
    messages = [{"role": "user", "content": "food"}]
    chat = {"prompt": None, "messages": messages, "logprobs": True, "top_logprobs": 2}
    (choice,) = served.ask("/v1/chat/completions", **chat).json()["choices"]
    for row in choice["logprobs"]["content"]:
        assert row["top_logprobs"][0]["logprob"] == row["logprob"] <= 0
    assert served.ask(logprobs=1, stream=True).status_code == 400


def test_conversations(served):
    messages = [{"role": "user", "content": PROMPT}]
    for name, alone in served.alone.items():
        expected = alone.reply(messages, 8)
        asked = {"prompt": None, "messages": messages, "max_tokens": None}
        asked["max_completion_tokens"] = 8
        answer = served.ask("/v1/chat/completions", model=name, **asked).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    again = served.ask("/v1/chat/completions", model=name, **asked | {"messages": parts}).json()
    assert again["choices"] == answer["choices"]


def test_a_control_token_that_a_message_spells_is_no_control_token(served, tmp_path):
    """The tiny tokenizer knows words alone, so it cannot write one as text."""
    messages = [{"role": "user", "content": "food <end> Thai"}]
    chat = served.ask("/v1/chat/completions", prompt=None, messages=messages)
    formatted = served.ask(prompt="food <end> Thai")  # by the template of the run's prompts
    for answer in (chat, formatted):
        assert answer.status_code == 400 and "'<end>'" in answer.json()["error"]["message"]
    raw = served.ask(model="base", prompt="food <end> Thai").json()
    assert raw["usage"]["prompt_tokens"] == 3


def events(response):
    """The events of a stream."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_has_the_same_text_in_pieces(served, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"prompt": None, "messages": [{"role": "user", "content": PROMPT}]} if chat else {}
    whole = served.ask(path, **asked).json()
    found = events(served.ask(path, stream=True, stream_options={"include_usage": True}, **asked))
    assert found.pop() == "[DONE]"
    *pieces, usage = map(json.loads, found)
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    said = [piece["choices"][0] for piece in pieces]
    texts = [s["delta"].get("content", "") if chat else s["text"] for s in said]
    kept = whole["choices"][0]
    assert "".join(texts) == (kept["message"]["content"] if chat else kept["text"])
    assert len(texts) > 3 and said[-1]["finish_reason"] == kept["finish_reason"]
    assert {s["finish_reason"] for s in said[:-1]} == {None}


def test_stop_texts(served):
    text = served.ask().json()["choices"][0]["text"]
    word = text.split()[2]
    before = text[: text.index(f" {word}")]
    for stop in (f" {word}", ["never", f" {word}"]):
        (choice,) = served.ask(stop=stop).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (before, "stop")


def test_the_lists_of_models_and_adapters(served):
    models = served.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["base", "first", "second"]
    assert served.client.get("/v1/models/second").json()["parent"] == "base"
    rows = served.client.get("/v1/adapters").json()["adapters"]
    assert [(row["name"], row["format"], row["methods"]) for row in rows] == [
        ("first", "run", ["LoRA"]),
        ("second", "run", ["LoRA"]),
    ]
    assert rows[1]["parameters"] == 3 * (32 + 16)  # rank, sizes
    for path in ("/healthz", "/livez"):
        assert served.client.get(path).json() == {"status": "ok"}
    assert "page" in served.client.get("/").text
    served.ask()
    figures = served.client.get("/metrics").text
    assert 'adapters_jax_http_requests_total{status="200"}' in figures
    assert "adapters_jax_adapters 2.0" in figures and "adapters_jax_tokens_total" in figures


@pytest.mark.parametrize("form", ["native", "peft"])
def test_adapters_come_change_and_go(served, form, tmp_path):
    files = served.files("second")
    if form == "peft":
        assert (
            main(["convert", str(served.runs["second"]), str(tmp_path / "p"), "--to", "peft"]) == 0
        )
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = [("files", (name, (tmp_path / "p" / name).read_bytes())) for name in names]
    put = lambda files: served.client.put("/v1/adapters/new", files=files)  # noqa: E731
    made = put(files)
    assert (made.status_code, made.json()["format"]) == (201, form)
    alone = served.alone["second"]
    (expected,) = complete(
        alone.model, alone.decoder, [alone.decoder.tokenizer.encode(PROMPT).ids], 8
    )
    assert served.ask(model="new").json()["choices"][0]["text"] == expected
    assert put(served.files("first")).status_code == 200
    assert served.ask(model="new").json()["choices"][0]["text"] != expected
    assert served.client.delete("/v1/adapters/new").json()["deleted"] is True
    for again in (served.client.delete("/v1/adapters/new"), served.ask(model="new")):
        assert again.status_code == 404 and "new" in again.json()["error"]["message"]


def test_hostile_adapters_leave_the_server_as_it_was(served):
    before = served.ask().json()["choices"], served.client.get("/v1/adapters").json()
    big = {"adapter.safetensors": b"\0" * 50_000}
    config = json.loads((served.runs["first"] / "adapter/adapter_config.json").read_text())
    other = json.dumps({**config, "base": {"id": "another/base"}}).encode()
    for files, status, data in [
        (served.files("first", **{"adapter.safetensors": b"\xff" * 100}), 400, "safetensors"),
        (served.files("first", **{"adapter.safetensors": None}), 400, "adapter.safetensors"),
        (served.files("first", **{"adapter_config.json": b"{"}), 400, "adapter_config.json"),
        (served.files("first", **{"adapter_config.json": b"[" * 9000}), 400, "adapter_config"),
        (served.files("first", **{"adapter_config.json": other}), 400, "another"),
        (served.files("first", **{"../../evil": b"x"}), 400, "evil"),
        (served.files("first") * 2, 400, "adapter_config.json"),
        (served.files("first", **big), 413, "40000"),
        ([("files", ("adapter_model.bin", b"\x80\x04."))], 400, "adapter_model.bin"),
        ([("name", (None, "x"))], 400, ""),
    ]:
        answer = served.client.put("/v1/adapters/evil", files=files)
        assert answer.status_code == status, answer.text
        assert data in answer.json()["error"]["message"] and "/tmp" not in answer.text
    answer = served.client.put("/v1/adapters/evil", json={})
    assert answer.status_code == 415
    for name in ("base", "-x", "a" * 65, "a b"):
        answer = served.client.put(f"/v1/adapters/{name}", files=served.files("first"))
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]
    larger = aj.LoRA("**/value", rank=9)
    read = served.base.planned(Recipe(larger))
    leaves = {path: np.ones(leaf.shape, np.float32) for path, leaf in read.leaves.items()}
    with raises(aj.MismatchError, 9):
        served.engine.fit("larger", (read.recipe, leaves))
    assert (served.ask().json()["choices"], served.client.get("/v1/adapters").json()) == before


BAD = {
    "a key twice": (b'{"model": "first", "model": "second", "prompt": "food"}', 400, "'model'"),
    "a key twice inside": (
        b'{"model": "first", "prompt": "food", "stream_options": {"a": 1, "a": 2}}',
        400,
        "'a'",
    ),
    "not JSON": (b"{", 400, "JSON"),
    "no object": (b"[]", 400, "object"),
    "not UTF-8": (b'"\xff"', 400, ""),
    "deep": (b"[" * 3000, 400, ""),
    "no model": (b'{"prompt": "x"}', 400, "model"),
    "a number for a text": (b'{"model": "first", "prompt": 1}', 400, "prompt"),
    "an unknown field": (
        b'{"model": "first", "prompt": "food", "best": {}}',
        400,
        "best",
    ),
    "the best of several": (b'{"model": "first", "prompt": "food", "best_of": 2}', 400, "best_of"),
    "too many answers": (b'{"model": "first", "prompt": ["food", "It", "is"], "n": 90}', 400, "90"),
    "no new tokens": (b'{"model": "first", "prompt": "food", "max_tokens": 0}', 400, "echo"),
    "a bias beyond the vocabulary": (
        b'{"model": "first", "prompt": "food", "logit_bias": {"13": 1}}',
        400,
        "13",
    ),
    "a bias of a word": (
        b'{"model": "first", "prompt": "food", "logit_bias": {"food": 1}}',
        400,
        "logit_bias",
    ),
    "a large penalty": (
        b'{"model": "first", "prompt": "food", "presence_penalty": 3}',
        400,
        "presence_penalty",
    ),
    "one of several prompts too long": (
        b'{"model": "base", "prompt": ["It", "is", "%s"]}' % (b"food " * 60),
        400,
        "48",
    ),
    "temperature NaN": (
        b'{"model": "first", "prompt": "food", "temperature": NaN}',
        400,
        "NaN",
    ),
    "temperature near 0": (
        b'{"model": "first", "prompt": "food", "temperature": 1e-30}',
        400,
        "1e-30",
    ),
    "top_p 0": (b'{"model": "first", "prompt": "food", "top_p": 0}', 400, "top_p"),
    "a text for a number": (
        b'{"model": "first", "prompt": "food", "max_tokens": "8"}',
        400,
        "max_tokens",
    ),
    "a long stop": (
        b'{"model": "first", "prompt": "food", "stop": "%s"}' % (b"x" * 201),
        400,
        "stop",
    ),
    "an unknown model": (b'{"model": "third", "prompt": "food"}', 404, "third"),
    "no tokens": (b'{"model": "base", "prompt": ""}', 400, "empty"),
    "a token too high": (b'{"model": "base", "prompt": [99999999999]}', 400, "99999999999"),
    "a long prompt": (b'{"model": "first", "prompt": "%s"}' % (b"food " * 60), 400, "48"),
    "many new tokens": (b'{"model": "first", "prompt": "food", "max_tokens": 48}', 400, "48"),
    "a large body": (b'{"model": "%s"}' % (b"x" * 4000), 413, "4000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bodies(served, case):
    data, status, datum = BAD[case]
    headers = {"content-type": "application/json"}
    answer = served.client.post("/v1/completions", content=data, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert datum in error["message"] and error["type"] == "invalid_request_error"


def test_other_bad_requests(served):
    client, chat = served.client, "/v1/chat/completions"
    for messages in ([], [{"role": "robot", "content": "x"}], [{"role": "user"}], "x"):
        answer = served.ask(chat, prompt=None, messages=messages)
        assert answer.status_code == 400 and "messages" in answer.json()["error"]["message"]
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/completions").json()["error"]["message"] == "Method Not Allowed"
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    answer = client.post("/predict", json={"model": "first", "texts": ["x"]})
    assert answer.status_code == 400 and "decoder" in answer.json()["error"]["message"]


def test_many_messages_are_refused_before_any_is_read(served, monkeypatch):
    monkeypatch.setattr(Message, "plain", None)  # reading one would fail
    messages = [{"role": "user", "content": "x"}] * (schemas.MOST_MESSAGES + 1)
    body = json.dumps({"model": "first", "messages": messages}).encode()
    with raises(UserError, schemas.MOST_MESSAGES + 1, schemas.MOST_MESSAGES):
        schemas.parsed(schemas.ChatRequest, body)
    # Those that are wrong are not read either, which the message would tell.
    wrong = json.dumps({"model": "first", "messages": [{}] * 20_000}).encode()
    with raises(UserError, "messages: 20000 messages"):  # not pydantic's own, after reading some
        schemas.parsed(schemas.ChatRequest, wrong)


def asked_as(served, target, host="127.0.0.1", method="GET"):
    """The status and the body of a request with a target as it is on the wire."""
    raw, _, query = target.partition(b"?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": unquote(raw.decode()),
        "raw_path": raw,
        "query_string": query,
        "headers": [(b"host", host.encode())],
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(served.client.app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


def test_targets_of_other_forms(served):
    """RFC 9112, section 3.2: a whole address counts, and the header Host beside it does not."""
    models = asked_as(served, b"/v1/models")
    assert models[0] == 200
    for target in (b"http://127.0.0.1/v1/models", b"HTTP://localhost:80/v1/m%6Fdels?x"):
        assert asked_as(served, target) == models
        assert asked_as(served, target, host="evil.example") == models
    assert asked_as(served, b"http://localhost")[1].startswith("<title>page")
    assert asked_as(served, b"http://evil.example/v1/models")[0] == 403
    for target in (b"https://127.0.0.1/", b"http:///v1/models", b"ftp://127.0.0.1/"):
        assert asked_as(served, target)[0] in (400, 403)
    for target, method in ((b"*", "OPTIONS"), (b"127.0.0.1:80", "CONNECT"), (b"x", "GET")):
        status, text = asked_as(served, target, method=method)
        assert status == 400 and target.decode() in text


def uploading(served, name, files, gone_after=None):
    """An upload whose parts come as its events say: (the task, how much was read, its events)."""
    request = served.client.build_request("PUT", f"/v1/adapters/{name}", files=files)
    body, step = request.read(), 300
    parts = [body[i : i + step] for i in range(0, len(body), step)]
    read, events, sent = [], asyncio.Queue(), []

    async def receive():
        await events.get()
        if len(read) == gone_after:
            return {"type": "http.disconnect"}
        read.append(parts[len(read)])
        return {"type": "http.request", "body": read[-1], "more_body": len(read) < len(parts)}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "PUT",
        "path": f"/v1/adapters/{name}",
        "raw_path": f"/v1/adapters/{name}".encode(),
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in request.headers.items()],
    }
    task = asyncio.create_task(served.client.app(scope, receive, send))
    return task, read, events, sent, len(parts)


def test_uploads_come_in_one_after_the_other_and_leave_no_file(served, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1)  # as if they were large
    files = served.files("second")

    async def upload():
        one, read, events, sent, _ = uploading(served, "one", files, gone_after=3)
        two, read_two, events_two, sent_two, parts_two = uploading(served, "two", files)
        for _ in range(3):
            events.put_nowait(None)
        for _ in range(parts_two):
            events_two.put_nowait(None)
        await asyncio.sleep(0.2)
        assert (len(read), len(read_two)) == (3, 0)  # the second waits for the first
        events.put_nowait(None)  # whose client goes away
        await asyncio.gather(one, two)
        assert sent[0]["status"] == 408 and len(read_two) == parts_two
        assert sent_two[0]["status"] == 201

    asyncio.run(upload())
    assert list(tmp_path.iterdir()) == []
    assert served.client.delete("/v1/adapters/two").status_code == 200


def test_an_upload_that_waits_too_long_is_told_to_come_again(served):
    api = TextApi(served.base, served.engine, "base", Limits(seconds=0.1))
    client = TestClient(application(api, "", LIMITS), HERE)

    async def held():
        await api._uploading.acquire()

    asyncio.run(held())
    answer = client.put("/v1/adapters/late", files=served.files("first"))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"


def test_a_full_disk_is_named(served, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    answer = served.client.put("/v1/adapters/new", files=served.files("first"))
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]


def test_pages_of_other_hosts_cannot_ask(served):
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        assert served.client.get("/v1/models", headers=headers).status_code == 403
    for headers in ({"host": "["}, {"origin": "http://["}):
        assert served.client.get("/v1/models", headers=headers).status_code == 400
    own = {"origin": HERE}
    assert served.client.get("/v1/models", headers=own).status_code == 200


def test_a_key(served):
    client = served.asking(key="secret")
    assert client.get("/").status_code == client.get("/healthz").status_code == 200
    for given in ({}, {"authorization": "Bearer other"}):
        answer = client.get("/v1/models", headers=given)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
    right = {"authorization": "Bearer secret", "host": "server.example"}
    assert client.get("/v1/models", headers=right).status_code == 200
    client = served.asking(key="clé")
    for key, status in (("bearer clé", 200), ("Basic clé", 401)):
        answer = client.get("/v1/models", headers={"authorization": key.encode()})
        assert answer.status_code == status


def test_a_client_that_hangs_up_in_its_body_is_no_error_of_the_server(served):
    app, sent = served.client.app, []
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }

    async def receive():
        return next(arriving, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408


def test_a_full_queue_is_refused_and_says_when_to_come_again(served):
    """One runs, two wait, and a fourth is refused."""
    go_on, taken, ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    class Held:
        def token(self, token):
            taken.release()
            go_on.wait()
            return False

        def end(self, why):
            ended.release()

    served.engine.submit([5], Held(), most=2)
    taken.acquire()
    for _ in range(2):
        served.engine.submit([5], Held(), most=2)
    answer = served.ask()
    go_on.set()
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    for _ in range(3):
        ended.acquire()
    assert served.ask().status_code == 200


def test_an_answer_that_takes_too_long(served):
    api = TextApi(served.base, served.engine, "base", Limits(seconds=1e-9))
    client = TestClient(application(api, "", LIMITS), HERE)
    body = {"model": "first", "prompt": PROMPT, **GREEDY}
    assert client.post("/v1/completions", json=body).status_code == 408
    (event,) = events(client.post("/v1/completions", json={**body, "stream": True}))
    assert "longer" in json.loads(event)["error"]["message"]


def test_the_description_names_every_path(served):
    described = served.client.get("/openapi.json").json()
    routes = {route.path.replace(":path", "") for route in served.api.routes()}
    assert described["paths"].keys() == routes
    assert {"CompletionRequest", "ChatRequest", "Message"} <= described["components"][
        "schemas"
    ].keys()


def test_room_for_vera_has_the_factors_that_modules_share(tmp_path):
    base = DecoderBase(str(write_llama(tmp_path / "llama", num_hidden_layers=1)))
    targets = ("layers/0/attention/query", "layers/0/attention/value")
    assert covering([base.planned(aj.vera(4))]) == Recipe(aj.VeRA(targets, 4))


def test_one_entry_has_room_for_vera_of_several_starts_and_dropouts():
    leaves = {"q/vera/d": np.ones(2), "q/vera/b": np.ones(6)}
    leaves |= {"vera/left": np.ones((4, 2)), "vera/right": np.ones((2, 6))}
    recipes = aj.VeRA("q", 2), aj.VeRA("q", 2, d_initial=0.5), aj.VeRA("q", 2, dropout=0.1)
    assert covering([Read(Recipe(each), leaves) for each in recipes]) == Recipe(recipes[0])


def test_covering_has_room_for_every_adapter(served):
    (method,) = served.recipe
    assert (method.rank, len(method.targets)) == (3, 7)
    assert method.rank_pattern == (("**", 3),)  # also where that is above a layer's sizes
    houlsby = served.base.planned(Recipe(aj.Bottleneck("**/attention_sum", bottleneck_dim=4)))
    unfrozen = Read(Recipe(aj.Unfreeze("**/scale")), {"norm/scale": np.ones(32)})
    covered = covering([houlsby, unfrozen, served.base.read(served.runs["first"])])
    assert [type(method) for method in covered] == [aj.Bottleneck, aj.LoRA, aj.Unfreeze]
    assert covered.methods[0].bottleneck_dim == 4 and covered.methods[2].targets == ("norm/scale",)


def test_bad_flags(served, monkeypatch):
    monkeypatch.delenv("ADAPTERS_JAX_API_KEY", raising=False)
    base, run = str(served.runs["first"].parents[1] / "llama"), str(served.runs["first"])
    for flags, kind, data in [
        (["--host", "0.0.0.0"], UserError, ["0.0.0.0", "ADAPTERS_JAX_API_KEY"]),
        (["--port", "70000"], UserError, [70000]),
        (["--rows", "0"], UserError, ["--rows", 0]),
        (["--places", "0"], UserError, ["--places", 0]),
        ([f"x={run}", f"x={run}"], UserError, ["'x'", run]),
        ([f"a b={run}"], UserError, ["'a b'"]),
        ([run, f"b={run}", "--adapters", "1"], UserError, ["--adapters 1", 2]),
        ([str(Path(base).parent / "none")], AdapterFileError, ["none"]),
        (["--name", "first", run], UserError, ["first"]),
    ]:
        with command_raises(kind, *data):
            free = [] if "--port" in flags else ["--port", "0"]
            assert main(["serve", base, *flags, *free]) == 2


def test_without_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("starlette")]:
        monkeypatch.setitem(sys.modules, name, None)
    rooms = ("api", "completions", "guard", "labels", "listening")
    for name in ("cli.serve", *(f"serving.{room}" for room in rooms)):
        monkeypatch.delitem(sys.modules, f"adapters_jax.finetune.{name}", raising=False)
    with command_raises(MissingPackageError, "starlette", "[serve]'"):
        assert main(["serve", "base", "--port", "0"]) == 2


def test_training_without_its_extra(monkeypatch, tmp_path):
    folder = str(write_llama(tmp_path / "llama"))
    for name in [name for name in sys.modules if name.startswith("adapters_jax.finetune.tinker")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tinker", None)
    with command_raises(MissingPackageError, "tinker", "[serve-train]'"):
        assert main(["serve", folder, "--train", "--port", "0"]) == 2
