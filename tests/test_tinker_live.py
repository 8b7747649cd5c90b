"""Tinker's own client trains and samples on this server; and requests that no client sends."""

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import tarfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from helpers.errors import raises
from helpers.serving import serving
from helpers.tiny import write_llama

WHY = "needs tinker: pip install adapters-jax[serve-train]"
tinker = pytest.importorskip("tinker", reason=WHY)
zstandard = pytest.importorskip("zstandard", reason=WHY)

from tinker import types  # noqa: E402
from tinker.proto import tinker_public_pb2 as pb  # noqa: E402

import adapters_jax as aj  # noqa: E402
from adapters_jax.errors import UserError  # noqa: E402
from adapters_jax.files.adapter import read_adapter  # noqa: E402
from adapters_jax.finetune.formats import FORMATS  # noqa: E402
from adapters_jax.finetune.models.decoder import load_decoder  # noqa: E402
from adapters_jax.finetune.serving import Sizes  # noqa: E402
from adapters_jax.finetune.serving.adapters import DecoderBase, covering  # noqa: E402
from adapters_jax.finetune.serving.api import application  # noqa: E402
from adapters_jax.finetune.serving.completions import TextApi  # noqa: E402
from adapters_jax.finetune.serving.engine import Engine  # noqa: E402
from adapters_jax.finetune.serving.guard import Limits  # noqa: E402
from adapters_jax.finetune.tenants.engine import Tenants  # noqa: E402
from adapters_jax.finetune.tinker.api import TrainingApi  # noqa: E402
from adapters_jax.finetune.tinker.checkpoints import Checkpoints  # noqa: E402
from adapters_jax.finetune.tinker.futures import Bounds, Futures  # noqa: E402
from adapters_jax.finetune.tinker.recipes import Recipes  # noqa: E402
from adapters_jax.finetune.tinker.service import Service  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

KEYS = ("tml-one", "tml-two")
TEXT = [4, 5, 6, 7, 8, 9, 10, 11]
UNTIED = {"tie_word_embeddings": False, "max_position_embeddings": 64, "num_hidden_layers": 1}


class Parts:
    """What all servers of this file share: the base and the compiled programs."""

    def __init__(self, llama):
        self.base = DecoderBase(llama)
        self.recipes = Recipes(self.base, 4)
        room = covering(
            map(self.base.planned, (self.recipes.largest, aj.houlsby(reduction_factor=8)))
        )
        bank = aj.Bank(self.base.adapted(room), capacity=4)
        self.engine = Engine(bank, Sizes(rows=2, context=32, pieces=(1, 8)))
        sizes = {"places": 2, "rows": 4, "group": 2, "lengths": (16,)}
        self.tenants = Tenants(self.base.decoder.model, room, **sizes)
        self.engine.start()
        self.tenants.start()

    @contextlib.contextmanager
    def serve(self, folder, bounds=Bounds(), keys=KEYS, seconds=60.0):
        """A server over HTTP, in a thread; its address, and what it is made of."""
        limits = Limits(training=2**20)
        made = (self.base, self.engine, self.tenants, Checkpoints(folder), self.recipes, bounds)
        service = Service(*made, seconds)
        api = TextApi(self.base, self.engine, "llama", limits)
        api.training = TrainingApi(service, ("llama",), 32, limits)
        app = application(api, "", limits, keys)
        config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            pass
        (socket,) = server.servers[0].sockets
        try:
            yield SimpleNamespace(
                address=f"http://127.0.0.1:{socket.getsockname()[1]}", service=service
            )
        finally:
            server.should_exit = True
            thread.join()
            for name in self.tenants.names:
                self.tenants.drop(name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(write_llama(tmp_path_factory.mktemp("models") / "llama", seed=1, **UNTIED))


@pytest.fixture(scope="module")
def parts(llama):
    parts = Parts(llama)
    yield parts
    parts.engine.close()
    parts.tenants.close()


@pytest.fixture
def server(parts, tmp_path):
    with parts.serve(tmp_path / "kept") as server:
        yield server


def datum(ids=TEXT, **values):
    values = values or {"weights": np.ones(len(ids) - 1, np.float32)}
    given = {"target_tokens": np.array(ids[1:]), **values}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=given)


@contextlib.contextmanager
def connected(server, key=KEYS[0]):
    client = tinker.ServiceClient(base_url=server.address, api_key=key)
    yield client
    client.close("success").result(30)
    del client
    collect()


def collect():
    with warnings.catch_warnings(action="ignore"):  # it leaves a connection open
        gc.collect()


def trained(client, steps=1, rate=0.02, **options):
    model = client.create_lora_training_client("llama", **{"rank": 4, "seed": 0, **options})
    model = model.result(60) if hasattr(model, "result") else model
    return model, [step(model, rate) for _ in range(steps)]


def step(model, rate=0.02, loss="cross_entropy", data=None):
    """The loss before a step; both requests are sent before either is done."""
    passed = model.forward_backward([datum()] if data is None else data, loss)
    model.optim_step(types.AdamParams(learning_rate=rate)).result(60)
    return passed.result(60).metrics["loss:sum"]


def sampled(sampler, n=1, **params):
    given = {"max_tokens": 6, "temperature": 0.0, **params}
    extra = {k: given.pop(k) for k in list(given) if k.startswith(("include", "topk", "prompt_"))}
    prompt = types.ModelInput.from_ints(TEXT[:2])
    return sampler.sample(prompt, n, types.SamplingParams(**given), **extra).result(60)


def test_a_model_learns_a_text_and_writes_it(server):
    with connected(server) as client:
        model, losses = trained(client, 40)
        assert losses[-1] < 0.1 < losses[0]
        sampler = model.save_weights_and_get_sampling_client()
        asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
        made = sampled(sampler, **asked, topk_sample_logprobs=2)
        (sequence,) = made.sequences
        assert sequence.tokens == TEXT[2:] and sequence.stop_reason == "length"
        # The log-probabilities of samples and of training are the same numbers, whoever asks.
        (alone,) = model.forward([datum()], "cross_entropy").result(60).loss_fn_outputs
        expected = alone["logprobs"].data
        np.testing.assert_allclose(sequence.logprobs, expected[1:], atol=1e-4)
        assert made.prompt_logprobs[0] is None
        np.testing.assert_allclose(made.prompt_logprobs[1], expected[0], atol=1e-4)
        assert made.topk_prompt_logprobs[0] is None and len(made.topk_prompt_logprobs[1]) == 3
        assert [top[0][0] for top in sequence.topk_logprobs] == sequence.tokens
        tops = [top[0][1] for top in sequence.topk_logprobs]
        np.testing.assert_allclose(tops, sequence.logprobs, atol=1e-5)
        # The next step does not change what the session of samples has.
        step(model, 1.0)
        assert sampled(sampler).sequences[0].tokens == TEXT[2:]


def test_samples(server):
    with connected(server) as client:
        sampler = client.create_sampling_client(base_model="llama").result(60)
        two = sampled(sampler, 2, temperature=1.0, seed=3)
        again = sampled(sampler, 2, temperature=1.0, seed=3)
        tokens = [each.tokens for each in two.sequences]
        assert tokens == [each.tokens for each in again.sequences] and tokens[0] != tokens[1]
        (free,) = sampled(sampler, stop=[]).sequences
        stop = free.tokens[2]
        (ended,) = sampled(sampler, stop=[stop]).sequences
        assert ended.stop_reason == "stop"
        assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1]
        word = sampler_text(server, free.tokens[1:2])
        (cut,) = sampled(sampler, stop=[word]).sequences
        assert cut.stop_reason == "stop" and len(cut.tokens) <= 2
        last = {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 1}
        assert sampled(sampler, **last).prompt_logprobs[0] is None
        many = [
            sampler.sample(types.ModelInput.from_ints([5]), 4, types.SamplingParams(max_tokens=2))
            for _ in range(8)
        ]
        assert all(len(each.result(60).sequences) == 4 for each in many)


def test_a_control_token_that_is_spelt_ends_a_sample(server):
    """A sample is tokens, and the control tokens are among them."""
    with connected(server) as client:
        sampler = client.create_sampling_client(base_model="llama").result(60)
        options = {"temperature": 1.0, "seed": 0, "max_tokens": 16}
        free = sampled(sampler, 8, stop=[], **options).sequences
        cut = sampled(sampler, 8, stop=["<end>"], **options).sequences
    end = server.service.base.decoder.end
    whole = [each.tokens for each in free]
    assert any(end in tokens[:-1] for tokens in whole)
    ended = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert [each.tokens for each in cut] == ended


def sampler_text(server, ids):
    return server.service.base.decoder.tokenizer.decode(ids)


def test_a_model_resumes_from_a_checkpoint_of_a_server_that_is_gone(parts, tmp_path):
    """With its optimiser it goes on as if nothing had been; without, otherwise."""
    with parts.serve(tmp_path) as server, connected(server) as client:
        model, _ = trained(client, 3)
        path = model.save_state("three", user_metadata={"note": "x"}).result(60).path
        expected = [step(model) for _ in range(3)]
        model.load_state_with_optimizer(path).result(60)
        assert [step(model) for _ in range(3)] == expected
        named = model.save_weights_for_sampler("final").result(60).path
    with parts.serve(tmp_path) as server, connected(server) as client:
        rest = client.create_rest_client()
        run = path.split("/")[2]
        (listed, sampler) = rest.list_checkpoints(run).result(30).checkpoints
        assert (listed.tinker_path, sampler.tinker_path) == (path, named)
        assert listed.user_metadata == {"note": "x"} and listed.size_bytes > sampler.size_bytes
        assert rest.get_weights_info_by_tinker_path(path).result(30).lora_rank == 4
        (known,) = rest.list_training_runs().result(30).training_runs
        assert known.training_run_id == run and known.last_checkpoint.tinker_path == path
        model = client.create_training_client_from_state_with_optimizer(path)
        model = model.result(60) if hasattr(model, "result") else model
        assert [step(model) for _ in range(3)] == expected
        other = client.create_training_client_from_state(path)
        other = other.result(60) if hasattr(other, "result") else other
        losses = [step(other) for _ in range(3)]
        assert losses[0] == expected[0] and losses[1:] != expected[1:]
        made = sampled(client.create_sampling_client(model_path=named).result(60))
        assert made.sequences[0].tokens
        rest.delete_checkpoint_from_tinker_path(path).result(30)
        assert len(rest.list_checkpoints(run).result(30).checkpoints) == 1
        rest.set_checkpoint_ttl_from_tinker_path(named, 3600).result(30)
        (listed,) = rest.list_checkpoints(run).result(30).checkpoints
        assert 3500 < listed.expires_at.timestamp() - listed.time.timestamp() < 4000
        server.service.checkpoints.expire(server.service.checkpoints.find(owner(0), named), 0)
        assert rest.list_checkpoints(run).result(30).checkpoints == []


@pytest.mark.weekly
@pytest.mark.parametrize(
    "recipe", [aj.houlsby(reduction_factor=16), aj.Recipe(aj.LoRA("**/mlp/*", 2))]
)
def test_other_methods_and_recipes(server, recipe):
    with connected(server) as client:
        model, losses = trained(client, 12, 0.05, user_metadata={"recipe": recipe.to_json()})
        assert losses[-1] < losses[0] - 1 and not model.get_info().is_lora
        sampler = model.save_weights_and_get_sampling_client()
        (sequence,) = sampled(sampler).sequences
        ids = TEXT[:2] + sequence.tokens
        (alone,) = model.forward([datum(ids)], "cross_entropy").result(60).loss_fn_outputs
        np.testing.assert_allclose(sequence.logprobs, alone["logprobs"].data[1:], atol=1e-4)


def test_losses_of_policies(server):
    """The ratio is 1 where the sampler's log-probabilities are the model's own."""
    with connected(server) as client:
        model, _ = trained(client, 2)
        (own,) = model.forward([datum()], "cross_entropy").result(60).loss_fn_outputs
        own = np.array(own["logprobs"].data, np.float32)
        advantages = np.linspace(-1, 1, own.size, dtype=np.float32)
        data = [datum(logprobs=own, advantages=advantages)]
        for loss in ("importance_sampling", "ppo"):
            passed = model.forward(data, loss).result(60)
            assert math.isclose(passed.metrics["loss:sum"], -advantages.sum(), abs_tol=1e-5)


def test_the_layers_that_train(server):
    with connected(server) as client:
        trained(client, 0, train_mlp=False, train_unembed=False, rank=2)
    lora = types.LoraConfig(rank=2, train_mlp=False, train_unembed=False)
    (method,), _ = server.service._recipes.of(lora, {})
    assert {path.split("/")[-2] for path in method.targets} == {"attention"}
    assert (method.rank, method.alpha) == (2, 32.0)


def test_tables_that_tokens_are_looked_up_in_do_not_train():
    """Gemma 4 has a second one, of what each layer adds."""
    _, model = load_decoder(Path(__file__).parent / "fixtures/decoders/gemma4_text")
    base = SimpleNamespace(decoder=SimpleNamespace(model=model))
    base.planned = lambda recipe: DecoderBase.planned(base, recipe)
    (method,) = Recipes(base, 2).largest
    assert [path for path in method.targets if path.startswith("per_layer")] == [
        "per_layer/projection"
    ]


def test_files_for_peft(server, parts, tmp_path):
    with connected(server) as client:
        model, _ = trained(client, 3)
        named = model.save_state("a").result(60).path
        external = model.save_weights_external("b").result(60).path
        urls = client.create_rest_client().get_external_weights_urls(external).result(30).urls
    for name, url in urls.items():
        (tmp_path / name).write_bytes(httpx.get(url).raise_for_status().content)
    _, leaves = FORMATS["peft"].read(tmp_path, parts.base._base)
    snapshot = server.service.checkpoints.load(server.service.checkpoints.find(owner(0), named))
    assert leaves.keys() == snapshot.leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, snapshot.leaves[path])
    run, kind, name = named.split("/")[2:]
    path = f"training_runs/{run}/checkpoints/{kind}/{name}/archive"
    answer = ask(server, path, method="GET")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert {each.name for each in tar} == {*urls}
    url = next(iter(urls.values()))
    assert httpx.get(url.replace("files/5", "files/6")).status_code == 403


def owner(i):
    return hashlib.sha256(KEYS[i].encode()).hexdigest()[:16]


def ask(server, path, body=None, *, key=KEYS[0], method="POST", **options):
    """A request without the client."""
    headers = {"X-API-Key": key, **options.pop("headers", {})}
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    url = f"{server.address}/api/v1/{path}"
    return httpx.request(method, url, headers=headers, timeout=60, **given, **options)


def begun(server, key=KEYS[0], **lora):
    """A session and a model in it, without the client."""
    body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
    session = ask(server, "create_session", body, key=key).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "llama"}
    body["lora_config"] = {"rank": 2, "seed": 0, **lora}
    answer = ask(server, "create_model", body, key=key)
    return session, answer.json()["model_id"], answer.json()["request_id"]


def answered(server, name, key=KEYS[0]):
    headers = {"Accept": "application/x-protobuf"}
    answer = ask(server, "retrieve_future", {"request_id": name}, key=key, headers=headers)
    if "protobuf" not in answer.headers["content-type"]:
        return answer.json()
    return dict(pb.ForwardBackwardOutput.FromString(answer.content).metrics)


def packed(model, number, ids=TEXT, loss="cross_entropy", **tensors):
    """A forward pass as protobuf."""
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=number, loss_fn=loss)
    if ids:
        made = message.data.add()
        made.model_input.add().encoded_text.tokens = np.array(ids[:-1], "<i4").tobytes()
        given = {"target_tokens": np.array(ids[1:], "<i8"), **tensors}
        for name, array in given.items():
            kind = pb.DTYPE_INT64 if array.dtype.kind == "i" else pb.DTYPE_FLOAT32
            made.loss_fn_inputs[name].CopyFrom(
                pb.Tensor(dense=array.tobytes(), dtype=kind, shape=array.shape)
            )
    return message.SerializeToString()


PROTO = {"Content-Type": "application/x-protobuf"}


def passed(server, *args, key=KEYS[0], **options):
    return ask(server, "forward_backward", packed(*args, **options), headers=PROTO, key=key)


def adam(model, number, **params):
    return {"model_id": model, "seq_id": number, "adam_params": params}


def test_the_order_is_that_of_the_numbers_and_each_counts_once(server):
    _, model, made = begun(server)
    assert answered(server, made)["model_id"] == model
    late = ask(server, "optim_step", adam(model, 2, learning_rate=0.1)).json()["request_id"]
    first = [passed(server, model, 1).json()["request_id"] for _ in range(2)]
    assert first[0] == first[1]
    again = ask(server, "optim_step", adam(model, 2, learning_rate=0.1)).json()["request_id"]
    assert again == late and answered(server, late)["metrics"]["step"] == 1.0
    loss = answered(server, first[0])
    assert answered(server, first[0]) == loss  # a client that lost the answer asks again
    assert answered(server, passed(server, model, 3).json()["request_id"]) != loss
    assert ask(server, "retrieve_future", {"request_id": "none"}).status_code == 410
    for _ in range(2):
        far = ask(server, "optim_step", adam(model, 10**6)).json()["request_id"]
    (own,) = server.service.futures._owners.values()
    assert own.bytes == sum(len(entry.data) for entry in own.entries.values())
    assert "1000000" in answered(server, far)["error"]


def test_a_number_that_never_comes(parts, tmp_path):
    with parts.serve(tmp_path, seconds=0.2) as server:
        _, model, _ = begun(server)
        name = ask(server, "optim_step", adam(model, 3)).json()["request_id"]
        assert answered(server, name)["metrics"]["grad_norm"] == 0.0


def test_nobody_sees_what_another_key_has(server):
    with connected(server) as client, connected(server, KEYS[1]) as other:
        model, _ = trained(client)
        path = model.save_weights_for_sampler("mine").result(60).path
        sampler = model.save_weights_and_get_sampling_client()
        name = sampler.result(60)._sampling_session_id
        rest = other.create_rest_client()
        assert rest.list_training_runs().result(30).training_runs == []
        assert rest.list_user_checkpoints().result(30).checkpoints == []
        with pytest.raises(tinker.NotFoundError):
            other.create_sampling_client(model_path=path).result(30)
        with pytest.raises(tinker.NotFoundError):
            rest.list_checkpoints("x").result(30) and rest.get_training_run(model.model_id).result(
                30
            )
        with pytest.raises((tinker.NotFoundError, tinker.RequestFailedError)):
            other.create_training_client_from_state(path).result(30)
    two = {"key": KEYS[1]}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5]}]}
    body = {"prompt": prompt, "sampling_params": {"max_tokens": 1}, "seq_id": 0}
    assert ask(server, "asample", {**body, "sampling_session_id": name}, **two).status_code == 404
    _, model, made = begun(server)
    assert passed(server, model, 1, **two).status_code == 404
    assert ask(server, "get_info", {"model_id": model}, **two).status_code == 404
    assert ask(server, "retrieve_future", {"request_id": made}, **two).status_code == 410
    assert ask(server, "get_info", {"model_id": model}, key="tml-none").status_code == 401
    assert ask(server, "healthz", method="GET", key="").status_code == 200


NAN = np.full(7, np.nan, np.float32)
BAD_PASSES = {
    "no data": ({"ids": []}, "row"),
    "a target that the model lacks": ({"ids": [4, 5, 999]}, "999"),
    "an unknown loss": ({"loss": "hinge"}, "hinge"),
    "weights that are no numbers": ({"weights": NAN}, "nan"),
    "too few weights": ({"weights": np.ones(3, np.float32)}, "3 weights"),
    "too long a text": ({"ids": [4] * 40}, "39 tokens"),
    "two targets a token": ({"target_tokens": np.ones((7, 2), "<i8")}, "[7, 2]"),
    "no log-probabilities": ({"loss": "ppo"}, "logprobs"),
}


@pytest.mark.parametrize("case", BAD_PASSES)
def test_bad_data_are_the_answer_and_the_next_request_goes_on(server, case):
    options, named = BAD_PASSES[case]
    _, model, _ = begun(server)
    bad = answered(server, passed(server, model, 1, **options).json()["request_id"])
    assert named in bad["error"] and bad["category"] == "user"
    good = answered(server, passed(server, model, 2).json()["request_id"])
    assert good["loss:sum"] > 0


def test_bad_bodies(server):
    _, model, _ = begun(server)
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    packed_ = {**PROTO, "Content-Encoding": "zstd"}
    for body, headers, status in (
        (b"\xff" * 50, PROTO, 400),
        (b"", PROTO, 404),
        (bytes(2**20 + 1), PROTO, 413),
        (bomb, packed_, 400),
        (b"no zstd", packed_, 400),
        (packed(model, 1), {**PROTO, "Content-Encoding": "gzip"}, 400),
        (b"{}", {"Content-Type": "application/json"}, 415),
    ):
        answer = ask(server, "forward_backward", body, headers=headers)
        assert answer.status_code == status, (body[:20], answer.text)
        if body == bomb:
            assert str(2**20) in answer.text  # by its size, not by what it has
    good = zstandard.ZstdCompressor().compress(packed(model, 1))
    answer = ask(server, "forward_backward", good, headers=packed_)
    assert answered(server, answer.json()["request_id"])["loss:sum"] > 0
    # The client counts a step that is refused, so its number is taken.
    name = ask(server, "optim_step", adam(model, 2, learning_rate="x")).json()["request_id"]
    assert "learning_rate" in answered(server, name)["error"]
    text = json.dumps(adam(model, 3, learning_rate=math.nan)).encode()
    name = ask(server, "optim_step", text).json()["request_id"]
    assert "error" in answered(server, name)
    name = ask(server, "optim_step", adam(model, 4, beta1=1.5)).json()["request_id"]
    assert "beta1" in answered(server, name)["error"]
    other = {"model_id": model, "seq_id": 5, "optim_params": {"type": "dimuon", "version": 1}}
    name = ask(server, "optim_step", other).json()["request_id"]
    assert "'dimuon', expected 'adamw'" in answered(server, name)["error"]
    name = ask(server, "optim_step", adam(model, 6)).json()["request_id"]
    assert answered(server, name)["metrics"]["step"] == 1.0


def test_bad_models(server):
    for lora, named in (({"rank": 5}, "5"), ({"rank": 0}, "0")):
        body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
        session = ask(server, "create_session", body).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "llama"}
        answer = ask(server, "create_model", {**body, "lora_config": lora})
        assert answer.status_code == 400 and named in answer.json()["error"]["message"]
    for changed, named in (
        ({"base_model": "other"}, "'other', expected 'llama'"),
        ({"session_id": "none"}, "no session"),
        ({"user_metadata": {"recipe": "lora --config /etc/passwd"}}, "JSON"),
        ({"user_metadata": {"recipe": "[{]"}}, "JSON"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "'dimuon', expected 'adamw'"),
    ):
        answer = ask(server, "create_model", {**body, "lora_config": {"rank": 2}, **changed})
        assert answer.status_code in (400, 404)
        assert named in answer.json()["error"]["message"]
    wide = {"recipe": aj.Recipe(aj.LoRA("**/query", 64)).to_json()}
    whole = {**body, "user_metadata": wide}
    name = ask(server, "create_model", whole).json()["request_id"]
    assert "64" in answered(server, name)["error"]


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "x" * 65, "a\0b", "con:1"])
def test_names_that_are_paths(server, tmp_path, name):
    _, model, _ = begun(server)
    body = {"model_id": model, "path": name, "seq_id": 1}
    answer = answered(server, ask(server, "save_weights", body).json()["request_id"])
    assert answer["category"] == "user"
    assert not [*tmp_path.rglob("*.safetensors")]
    for path in (f"tinker://{model}/weights/{name}", "tinker://../../etc/passwd", "/etc/passwd"):
        body = {"model_id": model, "path": path, "seq_id": 2, "optimizer": False}
        answer = answered(server, ask(server, "load_weights", body).json()["request_id"])
        assert answer["category"] == "user"


def test_a_full_disk_is_the_answer_and_leaves_nothing(server, tmp_path, monkeypatch):
    _, model, _ = begun(server)

    def full(*_):
        raise OSError(28, "No space left on device")

    body = {"model_id": model, "path": "a", "seq_id": 1}
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        answer = answered(server, ask(server, "save_weights", body).json()["request_id"])
    assert answer["category"] == "server"
    assert answer["error"] == f"tinker://{model}/weights/a: No space left on device"
    assert server.service.checkpoints.of(owner(0)) == []
    answer = answered(
        server, ask(server, "save_weights", {**body, "seq_id": 2}).json()["request_id"]
    )
    assert answer["path"] == f"tinker://{model}/weights/a"
    (file,) = tmp_path.rglob("adapter*.safetensors")
    file.write_bytes(b"damaged")
    body = {"model_id": model, "path": answer["path"], "seq_id": 3, "optimizer": False}
    answer = answered(server, ask(server, "load_weights", body).json()["request_id"])
    assert "damaged" in answer["error"] and str(tmp_path) not in answer["error"]


def test_a_checkpoint_of_another_base_is_refused(parts, tmp_path, monkeypatch):
    with parts.serve(tmp_path) as server:
        _, model, _ = begun(server)
        body = {"model_id": model, "path": "it", "seq_id": 1}
        path = answered(server, ask(server, "save_weights", body).json()["request_id"])["path"]
    other = dataclasses.replace(parts.base._record, sha256="f" * 64)
    monkeypatch.setattr(parts.base, "_record", other)
    with parts.serve(tmp_path) as server:
        session, model, _ = begun(server)
        body = {"model_id": model, "path": path, "optimizer": False}
        for i, any_base in enumerate((False, True), 1):
            monkeypatch.setattr(server.service, "_any_base", any_base)
            name = ask(server, "load_weights", {**body, "seq_id": i}).json()["request_id"]
            answer = answered(server, name)
            assert ("another base" in answer.get("error", "")) != any_base
            sampling = {"session_id": session, "model_path": path, "sampling_session_seq_id": i}
            found = ask(server, "create_sampling_session", sampling)
            assert found.status_code == (200 if any_base else 400)


def test_a_model_of_a_checkpoint_has_adamw_as_any_other(server):
    session, model, _ = begun(server)
    body = {"model_id": model, "path": "it", "seq_id": 1}
    path = answered(server, ask(server, "save_weights", body).json()["request_id"])["path"]
    body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": False}
    other = {"optimizer_config": {"type": "dimuon", "version": 1}}
    answer = ask(server, "load_weights", {**body, **other})
    assert answer.status_code == 400 and "'dimuon'" in answer.json()["error"]["message"]
    name = ask(server, "load_weights", body).json()["request_id"]
    assert answered(server, name)["path"] == path


def test_a_client_that_never_asks_for_its_answers(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(futures=4, tokens=20, models=1)) as server:
        _, model, made = begun(server)
        names = []
        for i in range(1, 12):
            answer = passed(server, model, i)
            while answer.status_code == 429:
                answer = passed(server, model, i)
            names.append(answer.json()["request_id"])
        assert answered(server, names[-1])["loss:sum"] > 0
        assert ask(server, "retrieve_future", {"request_id": made}).status_code == 410
        (own,) = server.service.futures._owners.values()
        assert len(own.entries) <= 4 and own.tokens == 0
        too_long = packed(model, 12, [4] * 30)
        assert ask(server, "forward_backward", too_long, headers=PROTO).status_code == 400
        body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
        session = ask(server, "create_session", body).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "llama"}
        more = ask(server, "create_model", {**body, "lora_config": {"rank": 2}})
        assert more.status_code == 400 and "1 models" in more.json()["error"]["message"]
        ask(server, "unload_model", {"model_id": model})
        assert ask(server, "get_info", {"model_id": model}).status_code == 404
        assert ask(server, "create_model", {**body, "lora_config": {"rank": 2}}).status_code == 200


def test_the_sampling_session_that_was_used_least_recently_makes_room(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(samplers=11)) as server:
        body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
        session = ask(server, "create_session", body).json()["session_id"]
        names = []
        for i in range(12):
            body = {"session_id": session, "sampling_session_seq_id": i, "base_model": "llama"}
            answer = ask(server, "create_sampling_session", body)
            names.append(answer.json()["sampling_session_id"])
            assert ask(server, f"samplers/{names[1 % len(names)]}", method="GET").status_code == 200
        there = [ask(server, f"samplers/{name}", method="GET").status_code for name in names]
        assert there == [404] + [200] * 11
        assert ask(server, f"sessions/{session}/finish", {}).status_code == 200
        assert len(server.service.samplers) == 0


BAD_SAMPLES = [
    {"num_samples": 0},
    {"num_samples": 10**6},
    {"sampling_params": {"max_tokens": 100}},
    {"sampling_params": {"temperature": -1}},
    {"sampling_params": {"temperature": 1e-9}},
    {"sampling_params": {"top_p": 0}},
    {"sampling_params": {"stop": [""]}},
    {"topk_prompt_logprobs": 21},
    {"prompt_logprobs_last_n": 1},
    {"prompt_alt_tokens_k": 2},
    {"prompt": {"chunks": []}},
    {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [999]}]}},
    {"prompt": {"chunks": [{"type": "image", "data": "aaaa", "format": "png"}]}},
    {"base_model": "other"},
]


@pytest.mark.parametrize("changed", BAD_SAMPLES)
def test_bad_samples(server, changed):
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5]}]}
    body = {"prompt": prompt, "sampling_params": {"max_tokens": 2}, "base_model": "llama"}
    answer = ask(server, "asample", {**body, **changed})
    if answer.status_code == 200:
        assert answered(server, answer.json()["request_id"])["category"] == "user"
    else:
        assert answer.status_code == 400


def run_block(page, address):
    """Runs the block of a page that asks a server."""
    text = (Path(__file__).parents[1] / page).read_text()
    block = next(x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "import tinker" in x)
    seen = {}
    exec(block.replace("http://localhost:8000", address).replace("smollm2-135m", "llama"), seen)
    assert seen["answer"].sequences[0].tokens == seen["ids"][2:] and seen["loss"] < 0.1
    seen["client"].close("success").result(30)


@pytest.mark.weekly
def test_acknowledged_saves_survive_a_kill(llama, tmp_path):
    """A server as the guide starts it, killed and started again."""
    flags = (llama, "--train", "--rank", "4", "--context", "32", "--rows", "2", "--keep")
    more = ("--adapters", "2", "--places", "2")
    with serving(*flags, str(tmp_path), *more) as server:
        run_block("docs/guides/training-service.md", server.address)
        client = tinker.ServiceClient(base_url=server.address, api_key="tml-any")
        model, _ = trained(client, 2)
        path = model.save_state("two").result(60).path
        expected = step(model)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        client.holder.close()
    with serving(*flags, str(tmp_path), *more) as server, connected(server, "tml-any") as client:
        model = client.create_training_client_from_state_with_optimizer(path)
        model = model.result(60) if hasattr(model, "result") else model
        assert step(model) == expected
        with server.open("/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "llama"
    del client, model
    collect()


@pytest.mark.weekly
def test_a_server_on_a_mesh_is_the_same_server(llama, server):
    flags = ("--train", "--rank", "4", "--context", "32", "--rows", "4", "--mesh", "data=4,model=2")
    devices = "--xla_force_host_platform_device_count=8"
    more = ("--adapters", "2", "--places", "2")
    with serving(llama, *flags, *more, env={"XLA_FLAGS": devices}) as other:
        found = []
        for each, key in ((server, KEYS[0]), (other, "tml-any")):
            with connected(each, key) as client:
                model, losses = trained(client, 20)
                made = sampled(model.save_weights_and_get_sampling_client()).sequences[0]
                found.append((losses, made.logprobs, made.tokens))
                del model
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-3)
        np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-3)
        assert found[1][2] == found[0][2]


def session_of(server):
    body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
    return ask(server, "create_session", body).json()["session_id"]


def create(server, session, number=0, **more):
    body = {"session_id": session, "model_seq_id": number, "base_model": "llama"}
    return ask(server, "create_model", {**body, "lora_config": {"rank": 2}, **more})


def test_a_model_that_is_unloaded_while_it_is_made_leaves_no_tenant(server, parts, monkeypatch):
    whole = parts.tenants.create
    begun_, go_on, made = (threading.Event() for _ in range(3))

    def slow(*args):
        begun_.set()
        assert go_on.wait(30)
        whole(*args)
        made.set()

    monkeypatch.setattr(parts.tenants, "create", slow)
    model = create(server, session_of(server)).json()["model_id"]
    assert begun_.wait(30)
    assert ask(server, "unload_model", {"model_id": model}).status_code == 200
    go_on.set()
    assert made.wait(30)
    for _ in range(1000):
        if model not in parts.tenants.names:
            break
        time.sleep(0.01)
    assert model not in parts.tenants.names


def test_a_model_that_was_refused_for_now_is_made_later(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(futures=1), seconds=0.5) as server:
        session, model, name = begun(server)
        answered(server, name)
        ask(server, "optim_step", adam(model, 2))  # waits for the one before it
        answer = create(server, session, 1)
        assert answer.status_code == 429
        while answer.status_code == 429:
            answer = create(server, session, 1)
        assert answered(server, answer.json()["request_id"])["type"] == "create_model"


@pytest.mark.parametrize("shape", [[2**62] * 20, [1] * 70, [-1]])
def test_shapes_that_no_array_has(server, shape):
    _, model, _ = begun(server)
    message = pb.ForwardBackwardRequest.FromString(packed(model, 1, [4, 5]))
    del message.data[0].loss_fn_inputs["target_tokens"].shape[:]
    message.data[0].loss_fn_inputs["target_tokens"].shape.extend(shape)
    answer = ask(server, "forward_backward", message.SerializeToString(), headers=PROTO)
    assert "target_tokens" in answered(server, answer.json()["request_id"])["error"]
    assert answered(server, passed(server, model, 2).json()["request_id"])["loss:sum"] > 0


def test_an_answer_that_is_forgotten_while_it_is_waited_for(server, monkeypatch):
    """It is gone, and no empty one."""
    _, model, name = begun(server)
    answered(server, name)
    end = Futures.end

    def forgotten(self, owner, entry, *args):
        end(self, owner, entry, *args)
        self.drop(owner, entry.id)

    monkeypatch.setattr(Futures, "end", forgotten)
    late = ask(server, "optim_step", adam(model, 2)).json()["request_id"]
    first = threading.Timer(0.5, lambda: ask(server, "optim_step", adam(model, 1)))
    first.start()
    assert ask(server, "retrieve_future", {"request_id": late}).status_code == 410
    first.join()


def test_what_a_key_may_have_is_bounded():
    """An answer's time begins when it is there; lists of clones are as few as answers."""
    futures = Futures(Bounds(futures=3, seconds=100.0))
    entry = futures.make("me", "a")
    entry.made -= 200
    futures.end("me", entry, b"x")
    assert futures.find("me", "a") is entry
    for i in range(9):
        futures.end("me", futures.make("me", f"s:{i}", target=f"s:{i}"), b"x")
    assert len(futures._ended) == 3


def test_bodies_that_wait_are_bounded(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(tokens=64, sessions=2)) as server:
        _, model, _ = begun(server)
        wide = np.ones(2**12, np.float32)
        assert passed(server, model, 2, [4, 5], weights=wide).status_code == 400
        said = {"user_metadata": {"note": "x" * 2**16}}
        body = {"model_id": model, "path": "a", "seq_id": 1, **said}
        answer = answered(server, ask(server, "save_weights", body).json()["request_id"])
        assert "65536" in answer["error"]
        assert create(server, session_of(server), **said).status_code == 400
        session_of(server)
        assert ask(server, "get_info", {"model_id": model}).status_code == 404


def test_a_silent_session_ends_when_another_is_heard(server):
    silent, model, _ = begun(server)
    server.service._sessions[silent].seen -= 1000
    other, kept, _ = begun(server)
    assert ask(server, "get_info", {"model_id": model}).status_code == 404
    server.service._sessions[other].seen -= 1000  # the one that is heard lives on
    assert ask(server, "session_heartbeat", {"session_id": other}).status_code == 200
    assert ask(server, "get_info", {"model_id": kept}).status_code == 200
    server.service._sessions[other].seen -= 1000  # also by a request of its model
    assert ask(server, "get_info", {"model_id": kept}).status_code == 200
    begun(server)
    assert ask(server, "get_info", {"model_id": kept}).status_code == 200


def test_a_heartbeat_ends_the_silent(server):
    silent, model, _ = begun(server)
    other, _, _ = begun(server)
    server.service._sessions[silent].seen -= 1000
    assert ask(server, "session_heartbeat", {"session_id": other}).status_code == 200
    assert ask(server, "get_info", {"model_id": model}).status_code == 404


def test_samples_that_are_short_or_have_no_number(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(tokens=1000)) as server:
        body = {"session_id": session_of(server), "sampling_session_seq_id": 0}
        answer = ask(server, "create_sampling_session", {**body, "base_model": "llama"}).json()
        body = {"sampling_session_id": answer["sampling_session_id"], "num_samples": 8}
        body["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [5]}]}
        body["sampling_params"] = {"max_tokens": 1}
        answer = ask(server, "asample", body)
        assert answer.status_code == 400 and "seq_id" in answer.text
        assert ask(server, "asample", {**body, "seq_id": 0}).status_code == 200
        answer = ask(server, "asample", {**body, "seq_id": 1, "num_samples": 32})
        assert answer.status_code == 400 and "tokens" in answer.text


def test_a_time_that_no_clock_has(server):
    _, model, _ = begun(server)
    body = {"model_id": model, "path": "a", "seq_id": 1, "ttl_seconds": 10**39}
    answer = answered(server, ask(server, "save_weights", body).json()["request_id"])
    assert "ttl_seconds" in answer["error"]
    body = {**body, "seq_id": 2, "ttl_seconds": 60}
    path = answered(server, ask(server, "save_weights", body).json()["request_id"])["path"]
    place = "/".join(["training_runs", model, "checkpoints", *path.split("/")[3:], "ttl"])
    for seconds in (10**39, -1):
        answer = ask(server, place, {"ttl_seconds": seconds}, method="PUT")
        assert answer.status_code == 400


def test_a_link_is_not_read_before_its_mark_is_right(server):
    text = (b"[" * 9000).hex()
    for link in (f"{text}.0", "x", "0.\u00e9"):
        assert ask(server, f"files/{link}/a", method="GET").status_code == 403


def test_a_removal_that_comes_late_takes_no_later_checkpoint(parts, tmp_path, monkeypatch):
    parts.tenants.create("t", parts.recipes.largest, 0)
    snapshot, made = parts.tenants.snapshot("t").result(60), Checkpoints(tmp_path)
    parts.tenants.drop("t")
    about = {"metadata": {}, "lora": None, "recipe": ""}
    place = "me", "m", "weights", "a", snapshot, {}
    old = made.save(*place, {**about, "expires": time.time() - 1})
    new = made.save(*place, about)  # the name is free, since the old one's time is over
    made.drop(old)
    with pytest.raises(UserError, match="there is no checkpoint"):
        made.expire(old, 60)
    assert made.find("me", new.path) is new and made.load(new).leaves
    made._most = new.about["size"]
    made.save(*place, about, overwrite=True)  # in the place of its own bytes
    left = shutil.disk_usage(tmp_path)._replace(free=2**28 + new.about["size"] - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
    with raises(UserError, left.free, new.about["size"]):
        made.save(*place, about, overwrite=True)


def test_checkpoints_of_one_second_keep_their_order(parts, tmp_path):
    parts.tenants.create("t", parts.recipes.largest, 0)
    snapshot, made = parts.tenants.snapshot("t").result(60), Checkpoints(tmp_path)
    parts.tenants.drop("t")
    about = {"metadata": {}, "lora": None, "recipe": ""}
    names = ["d", "a", "c", "b", "e"]
    for name in names:
        made.save("me", "m", "sampler_weights", name, snapshot, {}, about)
    assert [each.name for each in Checkpoints(tmp_path).of("me")] == names


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_whole(parts, tmp_path, monkeypatch):
    parts.tenants.create("t", parts.recipes.largest, 0)
    snapshot, made = parts.tenants.snapshot("t").result(60), Checkpoints(tmp_path)
    parts.tenants.drop("t")
    about = {"metadata": {}, "lora": None, "recipe": ""}
    place, later = ("me", "m", "weights", "a"), dataclasses.replace(snapshot, step=7)
    saved = made.save(*place, snapshot, {}, about)
    other = threading.Thread(target=made.save, args=(*place, later, {}, about, True))

    def read(folder):
        found = read_adapter(folder)
        other.start()
        other.join(1)  # the optimiser's file is read after this
        return found

    with monkeypatch.context() as slowly:
        slowly.setattr("adapters_jax.finetune.tinker.checkpoints.read_adapter", read)
        assert made.load(saved).step == 0
    other.join()
    assert made.load(made.find("me", saved.path)).step == 7


@pytest.mark.weekly
def test_a_key_does_not_hold_all_connections_with_its_questions(parts, tmp_path):
    with parts.serve(tmp_path, Bounds(polls=1), seconds=2.0) as server:
        _, model, name = begun(server)
        answered(server, name)
        late = passed(server, model, 2).json()["request_id"]  # number 1 is waited for
        held = threading.Thread(target=lambda: answered(server, late))
        held.start()
        own = server.service.futures._owners
        while not any(each.polls for each in own.values()):
            time.sleep(0.01)
        more = ask(server, "retrieve_future", {"request_id": late})
        assert more.status_code == 429 and more.headers["retry-after"] == "1"
        held.join()
        assert not any(each.polls for each in own.values())
        assert answered(server, late)["loss:sum"] > 0


def test_a_rank_above_a_layers_sides_is_said_of_the_flag(parts):
    with raises(UserError, "--rank 33", 13, "head"):
        Recipes(parts.base, 33)


def test_an_engine_that_ended_is_said(parts, tmp_path):
    """By the server's health, and as no mistake of the client."""
    with parts.serve(tmp_path) as server:
        _, model, name = begun(server)
        answered(server, name)
        parts.tenants._closing = True
        try:
            assert ask(server, "healthz", method="GET").status_code == 503
            assert httpx.get(f"{server.address}/healthz").status_code == 503
            name = ask(server, "optim_step", adam(model, 1)).json()["request_id"]
            assert answered(server, name)["category"] == "server"
        finally:
            parts.tenants._closing = False


def test_many_models_that_are_made_slowly_keep_nobody_from_asking(parts, tmp_path, monkeypatch):
    whole, go_on = parts.tenants.create, threading.Event()

    def slow(*args):
        assert go_on.wait(20)
        whole(*args)

    monkeypatch.setattr(parts.tenants, "create", slow)
    with parts.serve(tmp_path, Bounds(models=99)) as server:
        session, answers = session_of(server), []
        try:
            for i in range(min(32, os.cpu_count() + 4) + 1):  # as many threads as asyncio has
                answers.append(create(server, session, i).json()["request_id"])
            assert ask(server, "session_heartbeat", {"session_id": session}).status_code == 200
        finally:
            go_on.set()
        for name in answers:
            assert "error" not in answered(server, name)
