"""The engine: whatever joins and leaves meanwhile, each answer is that of `generate` alone."""

import contextlib
import threading
from concurrent.futures import Future
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises
from tokenizers import Tokenizer, decoders, models

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.parts.rotary import RopeScaling
from adapters_jax.finetune.models.t5 import T5, T5Config
from adapters_jax.finetune.serving import (
    BusyError,
    Choice,
    Engine,
    FullError,
    Scores,
    Sizes,
    TextSink,
    UnknownModelError,
)
from adapters_jax.finetune.serving.slots import Slots
from adapters_jax.finetune.serving.texts import offsets_of
from adapters_jax.testing.subjects import shaken

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
SIZES = Sizes(rows=3, context=32, pieces=(1, 8), queue=16)
LARGEST = aj.Recipe(
    aj.LoRA("**/{query,value}", rank=4), aj.LlamaAdapter("**/attention", prompt_length=3)
)
RECIPES = {
    "small": aj.LoRA("**/query", rank=2, alpha=6.0),
    "large": aj.LoRA("**/{query,value}", rank=4),
    "prompt": aj.LlamaAdapter("**/attention", prompt_length=2),
}
BASE = Decoder(CONFIG, rngs=nnx.Rngs(0))


def trained(recipe, seed):
    """An adapter with noise on every leaf, and the model that has it alone."""
    model = aj.adapt(BASE, recipe, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
    graphdef, tree, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    tree = shaken(tree, seed)
    return (aj.Recipe(recipe), tree), nnx.merge(graphdef, tree, rest)


ADAPTERS, ALONE = {}, {None: BASE}
for seed, (name, recipe) in enumerate(RECIPES.items()):
    ADAPTERS[name], ALONE[name] = trained(recipe, seed + 3)


class Collected:
    """A sink that keeps everything; `wait` gives the tokens and the reason of the end."""

    def __init__(self, most=1000, pause=None):
        self.ids, self.most, self.pause, self.done = [], most, pause, Future()
        self.first = threading.Event()

    def token(self, token):
        self.ids.append(token)
        self.first.set()
        if self.pause is not None:
            self.pause.wait()
        return len(self.ids) < self.most

    def end(self, why):
        self.done.set_result(why)

    def wait(self):
        return self.ids, self.done.result(60)


def started(sizes=SIZES, adapters=ADAPTERS, capacity=9):
    model = aj.adapt(BASE, LARGEST, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
    engine = Engine(aj.Bank(model, capacity=capacity), sizes)
    engine.start()
    for name, adapter in adapters.items():
        engine.put(name, engine.fit(name, adapter), name).result(60)
    return engine


@pytest.fixture(scope="module")
def engine():
    engine = started()
    yield engine
    engine.close()


def offline(name, prompt, most, choice=Choice(), stop=()):
    """What `generate` makes of one prompt, without the token that ends it."""
    width = 32  # one program for all prompts
    ids, lengths = generate(
        ALONE[name],
        jnp.array([[0] * (width - len(prompt)) + prompt]),
        jnp.arange(width)[None] >= width - len(prompt),
        max_new_tokens=12,
        temperature=choice.temperature,
        top_p=choice.top_p,
        key=jax.random.key(choice.seed),
        stop=[*stop, *[-1] * (1 - len(stop))],
    )
    return np.asarray(ids)[0, : min(most, int(lengths[0]))].tolist()


@nnx.jit
def _passed(model, ids):
    return model(ids)[0]


def logits_of(name, ids):
    """The logits behind every token of a text, by one program for all texts of a model."""
    padded = jnp.array([ids + [0] * (32 - len(ids))])
    return np.asarray(_passed(ALONE[name], padded))[: len(ids)]


def prompts(n, seed=0, longest=20):
    draw = np.random.default_rng(seed)
    return [
        draw.integers(0, CONFIG.vocab_size, draw.integers(1, longest)).tolist() for _ in range(n)
    ]


@pytest.mark.weekly
def test_many_requests_of_all_adapters_at_once(engine):
    names = [*ALONE] * 4
    given = list(zip(names, prompts(len(names)), strict=True))
    sinks = [Collected() for _ in given]
    for (name, prompt), sink in zip(given, sinks, strict=True):
        engine.submit(prompt, sink, model=name, most=12)
    answers = [sink.wait() for sink in sinks]
    assert answers == [(offline(name, prompt, 12), "length") for name, prompt in given]
    distinct = {tuple(offline(name, given[0][1], 12)) for name in ALONE}
    assert len(distinct) == len(ALONE)  # so that another's adapter would show


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_are_those_of_generate(engine, top_p):
    choice = Choice(temperature=0.9, top_p=top_p, seed=7)
    (prompt,) = prompts(1, seed=2)
    sinks = {name: Collected() for name in ALONE}
    for name, sink in sinks.items():  # beside a greedy one and others
        engine.submit(prompt, sink, model=name, most=12, choice=choice if name else Choice())
    for name, sink in sinks.items():
        expected = offline(name, prompt, 12, choice if name else Choice())
        assert sink.wait() == (expected, "length")


@pytest.mark.slow
def test_top_k(engine):
    (prompt,) = prompts(1, seed=4)
    likely = np.argsort(logits_of(None, prompt)[-1])[::-1].tolist()
    firsts = {1: set(), 3: set()}
    for k, found in firsts.items():
        for seed in range(12):
            sink = Collected()
            choice = Choice(temperature=5.0, top_k=k, seed=seed)
            engine.submit(prompt, sink, most=1, choice=choice)
            found.add(sink.wait()[0][0])
    assert firsts[1] == {likely[0]}
    assert firsts[3] <= {*likely[:3]} and len(firsts[3]) > 1


def by_hand(name, prompt, most, choice):
    """The tokens that the formulas of OpenAI's API give with passes over the whole text."""
    (bias, counts), ids = np.zeros((2, CONFIG.vocab_size), np.float32), [*prompt]
    for token, value in choice.bias:
        bias[token] = value
    key = jax.random.fold_in(jax.random.key(choice.seed), 0)
    for step in range(most):
        logits = logits_of(name, ids)[-1]
        logits = logits + bias - choice.presence * (counts > 0) - choice.frequency * counts
        if choice.temperature:
            at = jax.random.fold_in(key, step)
            ids.append(int(jax.random.categorical(at, logits / choice.temperature)))
        else:
            ids.append(int(logits.argmax()))
        counts[ids[-1]] += 1
    return ids[len(prompt) :]


@pytest.mark.slow
def test_penalties_and_biases(engine):
    """Beside rows without any, alone, and in rows that others had before."""
    likely = offline("large", [3, 4], 12)
    bias = ((likely[0], -100.0), (17, 2.5))
    choices = {
        "presence": Choice(presence=1.9),
        "frequency": Choice(frequency=0.7),
        "rewarded": Choice(frequency=-1.5),
        "bias": Choice(bias=bias),
        "all": Choice(presence=1.0, frequency=0.5, bias=bias),
        "sampled": Choice(1.3, presence=1.0, frequency=0.5, bias=bias, seed=11),
    }
    expected = {name: by_hand("large", [3, 4], 12, each) for name, each in choices.items()}
    assert len({tuple(ids) for ids in [likely, *expected.values()]}) == 7
    for alone in (False, True):
        sinks = {}
        for name, choice in choices.items():
            for kind, given in ((name, choice), (f"plain {name}", Choice())):
                sinks[kind] = Collected()
                engine.submit([3, 4], sinks[kind], model="large", most=12, choice=given)
                if alone:
                    sinks[kind].wait()
        for kind, sink in sinks.items():
            assert sink.wait() == (expected.get(kind, likely), "length"), kind
    with raises(UserError, 64, 63):
        engine.submit([1], Collected(), most=1, choice=Choice(bias=((64, 1.0),)))


class Turns:
    """A rule by which only tokens with a remainder of 3 may follow, another one at each turn."""

    def __init__(self, turns=100):
        self.left, self.taken = turns, 0

    def allowed(self):
        tokens = np.arange(64) % 3 == self.taken % 3
        return np.packbits(tokens, bitorder="little").view(np.int32)

    def take(self, token):
        assert token % 3 == self.taken % 3
        self.taken += 1
        return self.taken <= self.left


def test_rules_say_which_tokens_may_follow(engine, caplog):
    """Beside rows without one, and alone; and a rule that cannot go on ends its request."""
    prompt, expected = [3, 4], [3, 4]
    for step in range(8):
        padded = expected + [0] * (32 - len(expected))
        logits = np.asarray(ALONE["large"](jnp.array([padded])))[0, len(expected) - 1]
        expected.append(int(np.where(np.arange(64) % 3 == step % 3, logits, -np.inf).argmax()))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for several in (False, True):
            sinks = [Collected() for _ in range(4)]
            for i, sink in enumerate(sinks):
                rule = None if i % 2 else Turns()
                engine.submit(prompt, sink, model="large", most=8, rule=rule)
                several or sink.wait()
            plain = offline("large", prompt, 8)
            assert [sink.wait() for sink in sinks] == [
                (expected[2:], "length"),
                (plain, "length"),
            ] * 2
    compiled = [r.message for r in caplog.records if "Compiling jit(" in r.message]
    assert not [text for text in compiled if "(step" in text or "(read" in text]
    sink = Collected()
    engine.submit(prompt, sink, model="large", most=8, rule=Turns(3))
    assert sink.wait() == (expected[2:5], "stuck")


def test_it_answers_with_one_program_while_the_others_are_compiled(monkeypatch, caplog):
    """What is asked for meanwhile is answered as later, up to the last place of the context."""
    model = aj.adapt(BASE, LARGEST, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
    engine = Engine(aj.Bank(model, capacity=9), SIZES)
    held, every, first, later = threading.Event(), threading.Event(), [], []
    lowered = Slots._lowered

    def when_it_may(slots, *name):
        assert name in slots.needed or held.wait(60)
        return lowered(slots, *name)

    monkeypatch.setattr(Slots, "_lowered", when_it_may)

    def told(n, of):
        later.append((n, of))
        every.set() if n == of else None

    engine.start(lambda *n: first.append(n), told)
    programs = 1 + 2 + 3 + 1  # marks, pieces, widths, and the copy
    assert first == [(1, programs), (2, programs)] and not later
    for name, adapter in ADAPTERS.items():
        engine.put(name, engine.fit(name, adapter), name).result(60)

    def answers():
        given = [*zip([None, "small", "large"], prompts(3, seed=8), strict=True)]
        given += [("prompt", [*range(22)])]  # with its 10 new tokens, all of the context
        sinks = [Collected() for _ in given]
        for (name, prompt), sink in zip(given, sinks, strict=True):
            engine.submit(prompt, sink, model=name, most=10, choice=Choice(presence=0.5))
        return [sink.wait() for sink in sinks]

    meanwhile = answers()
    assert not later and {why for _, why in meanwhile} == {"length"}
    held.set()
    assert every.wait(120) and later == [(n, programs) for n in range(3, programs + 1)]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert answers() == meanwhile
    compiled = [r.message for r in caplog.records if "Compiling jit(" in r.message]
    assert not compiled, compiled
    engine.close()


@pytest.mark.slow
def test_a_prompt_that_is_only_read(engine):
    scores, sink = Scores(prompt=True), Collected()
    engine.submit([5, 9, 2], sink, model="large", most=0, scores=scores)
    assert sink.wait() == ([], "length") and not scores.made
    expected = np.asarray(jax.nn.log_softmax(logits_of("large", [5, 9, 2])))
    ((own, _),) = scores.given
    np.testing.assert_allclose(own, [expected[0, 9], expected[1, 2]], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["large", "prompt", None])
def test_log_probabilities_are_those_of_the_model(engine, name):
    """Of new tokens and of a prompt of more than one piece, whatever the temperature."""
    prompt = np.random.default_rng(8).integers(0, CONFIG.vocab_size, 11).tolist()
    scores, sink = Scores(prompt=True, top=True), Collected()
    other = Collected()  # which wants none
    engine.submit(prompt, other, model="small", most=12)
    choice = Choice(temperature=1.7, top_p=0.9, seed=4)
    engine.submit(prompt, sink, model=name, most=6, choice=choice, scores=scores)
    ids, _ = sink.wait()
    text = prompt + ids
    expected = np.asarray(jax.nn.log_softmax(logits_of(name, text)))
    own = np.take_along_axis(expected[:-1], np.array(text[1:])[:, None], 1)[:, 0]
    given = np.concatenate([own for own, _ in scores.given])
    np.testing.assert_allclose(given, own[: len(prompt) - 1], atol=2e-5)
    assert [token.id for token in scores.made] == ids
    np.testing.assert_allclose(
        [token.logprob for token in scores.made], own[len(prompt) - 1 :], atol=2e-5
    )
    tops = [*(top for _, top in scores.given), *(token.top for token in scores.made)]
    likely = np.concatenate([np.atleast_2d(top.logprobs) for top in tops])
    np.testing.assert_allclose(likely, -np.sort(-expected[:-1], axis=1)[:, :20], atol=2e-5)
    likeliest = np.concatenate([np.atleast_2d(top.ids) for top in tops])[:, 0]
    assert likeliest.tolist() == expected[:-1].argmax(1).tolist()
    assert other.wait()[1] == "length"


def test_the_reasons_of_an_end(engine):
    (prompt,) = prompts(1, seed=5)
    made = offline("large", prompt, 12)
    stop = next(token for token in made if made.index(token) > 2)
    sink = Collected()
    engine.submit(prompt, sink, model="large", most=12, stop=frozenset({stop}))
    assert sink.wait() == (offline("large", prompt, 12, stop=[stop]), "stop")
    sink = Collected(most=2)
    engine.submit(prompt, sink, model="large", most=12)
    assert sink.wait() == (made[:2], "stop")
    sink = Collected()
    engine.submit(prompt, sink, most=12, seconds=0.0)
    assert sink.wait()[1] == "timeout"
    go_on = threading.Event()
    sink = Collected(pause=go_on)
    request = engine.submit(prompt, sink, most=12)
    sink.first.wait()
    engine.cancel(request)
    go_on.set()
    assert sink.wait()[1] == "cancelled" and len(sink.ids) < 12


@pytest.mark.slow
def test_a_replaced_adapter_finishes_what_it_began(engine):
    (prompt,) = prompts(1, seed=6)
    go_on = threading.Event()
    engine.put("changing", engine.fit("x", ADAPTERS["small"]), "").result(60)
    running = [Collected(pause=go_on) for _ in range(2)]
    first, second = running
    engine.submit(prompt, first, model="changing", most=12)
    first.first.wait()
    second_done = engine.put("changing", engine.fit("x", ADAPTERS["large"]), "", replace=True)
    go_on.set()
    second_done.result(60)
    engine.submit(prompt, second, model="changing", most=12)
    engine.drop("changing").result(60)
    with raises(UnknownModelError, "changing"):
        engine.submit(prompt, Collected(), model="changing", most=12)
    assert first.wait() == (offline("small", prompt, 12), "length")
    assert second.wait() == (offline("large", prompt, 12), "length")
    for _ in range(6):  # as many as there are places: the old ones are free again
        engine.put("changing", engine.fit("x", ADAPTERS["prompt"]), "").result(60)
        engine.drop("changing").result(60)


def test_changes_compile_nothing(engine, caplog):
    fitted = engine.fit("new", ADAPTERS["small"])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        engine.put("new", fitted, "").result(60)
        for name, prompt in zip(["new", None, "large"], prompts(3, seed=8), strict=True):
            sink = Collected()
            engine.submit(prompt, sink, model=name, most=8, choice=Choice(0.5, 0.9, 3, 1))
            sink.wait()
        engine.drop("new").result(60)
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_numbers_that_are_not_finite_stay_where_they_are(engine):
    """A mask multiplies what it hides by zero, which does not hide what is not finite."""
    recipe, tree = ADAPTERS["large"]
    huge = jax.tree.map(lambda x: x * 1e30, tree)
    engine.put("huge", engine.fit("huge", (recipe, huge)), "").result(60)
    (prompt,) = prompts(1, seed=9)
    sinks = [Collected() for _ in range(3)]
    for sink, name in zip(sinks, ["huge", "small", "huge"], strict=True):
        engine.submit(prompt, sink, model=name, most=12)
    assert [sink.wait()[1] for sink in sinks] == ["not finite", "length", "not finite"]
    assert sinks[1].ids == offline("small", prompt, 12)
    after = [Collected() for _ in range(3)]
    for sink in after:
        engine.submit(prompt, sink, model="small", most=12)
    assert [sink.wait()[0] for sink in after] == [offline("small", prompt, 12)] * 3
    engine.drop("huge").result(60)


def test_bad_requests_and_adapters_change_nothing(engine):
    before, sink = dict(engine.adapters), Collected()
    for prompt, most, data in [
        ([], 1, ["empty"]),
        ([64], 1, [64, 63]),
        ([-1], 1, [-1]),
        ([1] * 30, 3, [30, 3, 32]),
        ([1], -1, [-1]),
    ]:
        with raises(UserError, *data):
            engine.submit(prompt, sink, most=most)
    with raises(UnknownModelError, "none"):
        engine.submit([1], sink, model="none", most=1)
    with raises(UnknownModelError, "none"):
        engine.drop("none").result(60)
    with raises(UserError, "small"):
        engine.put("small", engine.fit("x", ADAPTERS["large"]), "").result(60)
    with raises(aj.MismatchError, "query", [32, 5], [32, 4]):
        engine.fit("x", trained(aj.LoRA("**/query", rank=5), 1)[0])
    with pytest.raises(TypeError, match="got tuple, expected what engine.fit"):
        engine.put("raw", ADAPTERS["large"], "")
    assert engine.adapters == before and not sink.ids


@pytest.mark.weekly
def test_a_full_queue_and_a_closed_engine():
    sizes = Sizes(rows=1, context=8, pieces=(8,), queue=2, adapters=1)
    engine = started(sizes, {"small": ADAPTERS["small"]}, capacity=5)
    with raises(FullError, 1):
        engine.put("large", engine.fit("x", ADAPTERS["large"]), "").result(60)
    go_on = threading.Event()
    running = Collected(pause=go_on)
    engine.submit([1], running, most=3, model="small")
    running.first.wait()
    sinks = [Collected() for _ in range(2)]
    for sink in sinks:
        engine.submit([1], sink, most=2)
    with raises(BusyError, 2):
        engine.submit([1], Collected(), most=2)
    assert (engine.waiting, engine.running, engine.alive) == (2, 1, True)
    go_on.set()
    assert running.wait() == (offline("small", [1], 3), "length")
    assert [sink.wait() for sink in sinks] == [(offline(None, [1], 2), "length")] * 2
    engine.close()
    assert not engine.alive
    with raises(BusyError, "shutting down"):
        engine.submit([1], Collected(), most=2)
    with raises(BusyError, "shutting down"):
        engine.drop("small")


@contextlib.contextmanager
def held(engine):
    """While the block runs, the engine waits in the sink of a request of three tokens."""
    go_on = threading.Event()
    running = Collected(pause=go_on)
    engine.submit([1], running, most=3)
    running.first.wait()
    try:
        yield running
    finally:  # also after a failure, or the engine could not be closed
        go_on.set()


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(engine):
    """Also while a step still runs."""
    sinks = [Collected() for _ in range(SIZES.queue + 1)]
    with held(engine):
        queued = [engine.submit([1], sink, most=1) for sink in sinks[:-1]]
        with raises(BusyError, SIZES.queue):
            engine.submit([1], sinks[-1], most=1)
        engine.cancel(queued[3])
        engine.submit([1], sinks[-1], most=1)
        with raises(BusyError, SIZES.queue):
            engine.submit([1], Collected(), most=1)
    ends = [sink.wait()[1] for sink in sinks]
    assert ends == ["cancelled" if i == 3 else "length" for i in range(len(sinks))]


def test_a_cancelled_change_does_not_happen_and_the_engine_goes_on(engine):
    before = dict(engine.adapters)
    with held(engine) as running:
        future = engine.put("late", engine.fit("late", ADAPTERS["small"]), "")
        assert future.cancel()
    assert running.wait()[1] == "length"
    engine.put("next", engine.fit("next", ADAPTERS["small"]), "").result(60)
    engine.drop("next").result(60)
    assert engine.alive and engine.adapters == before


@pytest.mark.weekly
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_bug_nobody_waits_for_ever():
    engine = started(Sizes(rows=2, context=8, pieces=(8,)), {})
    waiting = Collected()

    class Failing(Collected):
        def end(self, why):
            raise ValueError(why)

    with held(engine) as running:
        engine.submit([1], Failing(), most=2)
        engine.submit([1], waiting, most=2)
        bug, later = engine._order(lambda: {}["bug"]), engine.drop("later")
    assert (running.wait()[1], waiting.wait()[1]) == ("closed", "closed")
    for future in (bug, later):
        with raises(BusyError, "shutting down"):
            future.result(60)
    assert not engine.alive
    engine.close()  # joins the thread, whose error is this test's


@pytest.mark.weekly
def test_more_adapters_than_places():
    """They are fetched as their requests come, and each answer is that of its adapter."""
    engine = started(Sizes(rows=2, context=32, pieces=(1, 8), queue=16), capacity=2)
    prompts = [[i, i + 1, 7] for i in range(12)]
    sinks = [Collected() for _ in prompts]
    names = [*ADAPTERS, None] * 3
    for name, prompt, sink in zip(names, prompts, sinks, strict=True):
        engine.submit(prompt, sink, model=name, most=4)
    for name, prompt, sink in zip(names, prompts, sinks, strict=True):
        assert sink.wait() == (offline(name, prompt, 4), "length")
    engine.close()


def test_the_step_of_a_choice_is_the_engines(engine):
    found = []
    for step in (0, 5):
        sink = Collected()
        engine.submit([1, 2], sink, most=6, choice=Choice(1.0, seed=3, step=step))
        found.append(sink.wait())
    assert found[0] == found[1]


def test_what_an_engine_cannot_serve():
    t5 = T5(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
        rngs=nnx.Rngs(0),
    )
    adapted = aj.adapt(t5, aj.LoRA("**/query", rank=1), rngs=nnx.Rngs(1))
    with raises(UserError, "T5"):
        Engine(aj.Bank(adapted, capacity=1))
    with raises(UserError, "2 places", "at least 3"):
        started(capacity=2)
    for wrong in [{"rows": 0}, {"pieces": (8, 1)}, {"pieces": ()}]:
        with raises(UserError, *wrong):
            Sizes(**wrong)


def test_texts_come_in_whole_characters_and_end_at_stops():
    letters = ["a", "é", "b", "c"]
    whole = "".join(letters).encode()
    decode = lambda ids: whole[: len(ids)].decode(errors="replace")  # noqa: E731  a byte a token
    pieces, ends = [], []
    sink = TextSink(decode, pieces.append, ends.append, ["bc", "zz"])
    assert [sink.token(i) for i in range(5)] == [True, True, True, True, False]
    sink.end("stop")
    assert pieces == ["a", "é"] and ends == ["stop"]
    pieces.clear()
    sink = TextSink(decode, pieces.append, ends.append, ["bx"])
    for i in range(4):
        sink.token(i)
    sink.end("length")  # what may have been a stop is text after all
    assert pieces == ["a", "é", "b"]


def test_bytes_that_end_in_no_character_lose_no_text_after_them():
    """Tokenizers decode neighbouring bytes together: one bad byte spoils the good ones before."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"x": 256, "y": 257, "?": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="?"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = []
    sink = TextSink(tokenizer.decode, pieces.append, lambda why: None)
    for token in (256, 0xC3, 0xA9, 0xE2, 257, 256, 257):
        sink.token(token)
    sink.end("length")
    assert pieces[:2] == ["x", "é"] and "".join(pieces).endswith("yxy")
    whole = []
    sink = TextSink(tokenizer.decode, whole.append, lambda why: None)
    for token in (256, *"é€".encode(), 257):  # the bytes of € spoil é only until they are whole
        sink.token(token)
    assert "".join(whole) == "xé€y"


def test_the_places_of_tokens_in_a_text():
    """A token by itself has no space before it, and may be a part of a character."""
    words = ["<unk>", "▁a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])  # as Llama's
    tokenizer.add_special_tokens(["<end>"])
    tokens = ["▁a", "b", "▁a", "<end>", "▁a", *(f"<0x{i:02X}>" for i in "é€".encode()), "b"]
    ids = [*map(tokenizer.token_to_id, tokens)]
    assert tokenizer.decode(ids) == "ab a aé€b"
    assert offsets_of(ids, tokenizer.decode) == [0, 1, 2, 4, 4, 6, 6, 7, 7, 7, 8]


class Activated:
    """An engine of an adapter that is invoked, one that acts on all tokens, and the base."""

    tokens = (9, 11)
    prefix = (*range(40, 58),)  # two whole pieces, and two tokens more

    def __init__(self, rows=3):
        targets = "**/{query,value}"
        recipes = {
            "check": aj.ActivatedLoRA(targets, 2, alpha=6.0, invocation=self.tokens),
            "other": aj.ActivatedLoRA("**/query", 1, alpha=4.0, invocation=(5,)),
            "plain": aj.LoRA(targets, rank=2),
        }
        made = {name: trained(recipe, 7 + i) for i, (name, recipe) in enumerate(recipes.items())}
        self.alone = {None: BASE, **{name: model for name, (_, model) in made.items()}}
        whole = aj.ActivatedLoRA(targets, 2, invocation=(1,))
        model = aj.adapt(BASE, whole, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
        sizes = Sizes(rows=rows, context=48, pieces=(1, 8), queue=16)
        self.engine = Engine(aj.Bank(model, capacity=9), sizes)
        self.engine.start()
        for name, (adapter, _) in made.items():
            self.engine.put(name, self.engine.fit(name, adapter), name).result(60)

    def ask(self, name, prompt):
        """The tokens of a request that is alone."""
        sink = Collected()
        self.engine.submit(prompt, sink, model=name, most=5)
        ids, why = sink.wait()
        assert why == "length"
        return ids

    def expected(self, name, prompt):
        ids = jnp.array([[0] * (30 - len(prompt)) + prompt])
        mask = jnp.arange(30)[None] >= 30 - len(prompt)
        return generate(self.alone[name], ids, mask, max_new_tokens=5).ids[0].tolist()


@pytest.fixture(scope="module")
def activated():
    made = Activated()
    yield made
    made.engine.close()


@pytest.mark.weekly
def test_requests_act_from_their_own_invocation_on(activated):
    """Together, and each as `generate` alone; also without an invocation, or with another's."""
    texts = [[3, 9, 11, 4], [9, 11, 6, 9, 11], [3, 4, 6], [5, 9, 11, 5, 8], [*range(20, 33), 9, 11]]
    asked = [(name, text) for text in texts for name in activated.alone]
    wanted = [activated.expected(*each) for each in asked]
    assert len({tuple(x) for x in wanted[:4]}) >= 3
    before, sinks = activated.engine.counts.tokens, [Collected() for _ in asked]
    for start in range(0, len(asked), 10):
        some = list(zip(asked, sinks, strict=True))[start : start + 10]
        for (name, text), sink in some:
            activated.engine.submit(text, sink, model=name, most=5)
        assert all(sink.wait()[1] == "length" for _, sink in some)
    assert [sink.ids for sink in sinks] == wanted
    assert activated.engine.counts.tokens - before == 5 * len(asked)


@pytest.mark.weekly
def test_what_the_base_read_is_read_once(activated, caplog):
    """By any request that the base reads so far; in whole pieces, and with the same tokens."""
    prompt = [*activated.prefix]
    engine, alone = activated.engine, Activated(rows=1)
    jax.config.update("jax_log_compiles", True)
    try:
        cases = [  # the adapter, what follows the prefix, and how many tokens are there already
            (None, [1, 2], 0),
            (None, [1, 2], 16),
            ("check", [9, 11, 3], 16),
            ("other", [5, 3], 16),
            ("check", [3, 4], 16),
            ("plain", [9, 11, 3], 0),
            ("plain", [9, 11, 3], 16),
            ("plain", [4], 16),
            ("other", [9, 3], 16),
            ("check", [*activated.tokens, *prompt[:6]], 16),
        ]
        for name, rest, reused in cases:
            before = engine.counts.reused_tokens, engine.counts.prompt_tokens
            assert activated.ask(name, prompt + rest) == activated.expected(name, prompt + rest)
            assert engine.counts.reused_tokens - before[0] == reused, (name, rest)
            assert engine.counts.prompt_tokens - before[1] == len(prompt + rest)
        # An invocation in the middle of a piece: the piece before it alone is the base's.
        early = [*prompt[:10], *activated.tokens, *prompt[10:]]
        before = engine.counts.reused_tokens
        assert activated.ask("check", early) == activated.expected("check", early)
        assert engine.counts.reused_tokens - before == 8
        before = engine.counts.reused_tokens  # and with that adapter the piece of both, too
        assert activated.ask("check", early) == activated.expected("check", early)
        assert engine.counts.reused_tokens - before == 16
        # One row, which a plain adapter overwrites: then nothing is there any more.
        asked = ((None, 0), ("check", 16), ("plain", 0), ("plain", 16), ("check", 0))
        for name, reused in asked:
            before = alone.engine.counts.reused_tokens
            text = [*prompt, 9, 11]
            assert alone.ask(name, text) == activated.expected(name, text)
            assert alone.engine.counts.reused_tokens - before == reused
    finally:
        jax.config.update("jax_log_compiles", False)
        alone.engine.close()
    programs = [r.message for r in caplog.records if "Compiling jit(_" in r.message]
    assert sum("_copied" in text for text in programs) <= 1  # of the engine with one row


@pytest.mark.slow
def test_what_acts_on_all_tokens_beside_an_invoked_method_is_no_base():
    """Before the invocation such an adapter reads as no other one, and with other keys."""
    recipe = aj.Recipe(
        aj.ActivatedLoRA("**/query", 2, invocation=Activated.tokens), aj.IA3("**/mlp/output")
    )
    (adapter, _), prompt = trained(recipe, 5), [*Activated.prefix[:16]]
    model = aj.adapt(BASE, recipe, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
    slots = Slots(aj.Bank(model, capacity=2), rows=2, context=24, pieces=(8,))
    fitted = slots.bank.fit("both", adapter)
    before, beyond = [False] * 8, [*prompt, 3]
    for row, adapter, acts in ((0, fitted, [before, [True] * 8]), (1, None, [before] * 2)):
        slots.read(row, prompt[:8], True, adapter, Choice(), acts[0])
        slots.read(row, prompt[8:], False, adapter, Choice(), acts[1])
    assert slots.reuse(1, beyond, None, [False] * 17) == 16  # its own
    assert slots.reuse(0, beyond, fitted, [False] * 8 + [True] * 9) == 16
    assert slots.reuse(0, beyond, fitted, [False] * 17) == 8
    assert slots.reuse(0, beyond, None, [False] * 17) == 16
    assert slots.reuse(1, beyond, fitted, [False] * 17) == 0


@pytest.mark.slow
def test_a_beginning_is_read_once_by_each_adapter(engine):
    """To the last bit; an adapter of that name that was replaced reads it anew."""
    prompt = np.random.default_rng(21).integers(0, CONFIG.vocab_size, 19).tolist()
    engine.put("mine", engine.fit("mine", ADAPTERS["large"]), "").result(60)

    def ask(name, rest):
        scores, sink, before = Scores(top=True), Collected(), engine.counts.reused_tokens
        engine.submit(prompt + rest, sink, model=name, most=5, scores=scores)
        ids, _ = sink.wait()
        made = [(t.id, t.logprob, t.top.logprobs.tolist()) for t in scores.made]
        return ids, made, engine.counts.reused_tokens - before

    firsts = {name: ask(name, [7]) for name in ("mine", "prompt", None)}  # one a row
    assert [reused for _, _, reused in firsts.values()] == [0, 0, 0]
    for name in ("mine", None):
        ids, made, reused = ask(name, [7])
        assert (ids, made, reused) == (*firsts[name][:2], 16)
        assert ids == offline("large" if name else None, [*prompt, 7], 5)
    ask("small", [7])  # takes the row that was wanted least recently
    assert [ask(name, [8])[2] for name in (None, "mine", "prompt")] == [16, 16, 0]
    engine.put("mine", engine.fit("mine", ADAPTERS["small"]), "", replace=True).result(60)
    ids, _, reused = ask("mine", [7])
    assert (ids, reused) == (offline("small", [*prompt, 7], 5), 0)
    engine.drop("mine").result(60)


@pytest.mark.slow
def test_narrower_steps_leave_of_a_beginning_what_they_do_not_touch():
    """Rows that are free write as well, into the last place that a step sees."""
    made, long = Activated(), [*range(30, 56)]
    try:
        assert made.ask(None, long) == made.expected(None, long)
        sinks = [Collected(), Collected()]
        for sink in sinks:  # two at a time, of less tokens than the narrowest step sees
            made.engine.submit([3, 9, 11], sink, model="check", most=5)
        assert all(sink.wait()[1] == "length" for sink in sinks)
        assert made.engine.counts.reused_tokens == 0
        assert made.ask(None, long) == made.expected(None, long)
        assert made.engine.counts.reused_tokens == 8  # of 24, as a step of width 12 wrote at 11
    finally:
        made.engine.close()


@pytest.mark.weekly
def test_a_copied_beginning_holds_nothing_of_what_followed_it():
    """Numbers that are not finite, which masks would multiply by zero, stay where they were."""
    made = Activated(rows=2)
    try:
        made.ask(None, [*made.prefix])
        made.engine._slots._caches = jax.tree.map(
            lambda x: x.at[0, :, 16:].set(jnp.nan) if x.ndim == 5 else x,
            made.engine._slots._caches,
        )
        text = [*made.prefix[:16], 9, 11, 3]
        assert made.ask("check", text) == made.expected("check", text)
        assert made.engine.counts.reused_tokens == 16
    finally:
        made.engine.close()


@pytest.mark.weekly
def test_a_beginning_ends_where_steps_of_all_rows_go_on():
    """What is read after such a step follows tokens that the row's beginning lacks."""
    model = aj.adapt(BASE, RECIPES["small"], rngs=nnx.Rngs(1))
    slots = Slots(aj.Bank(model, capacity=2), rows=2, context=16, pieces=(1,))
    for n, token in enumerate([5, 6]):
        slots.read(0, [token], not n, None, Choice())
    slots.step([7, None], [None, None], [Choice()] * 2)
    slots.read(0, [8], False, None, Choice())
    assert slots.reuse(1, [5, 6, 8, 9]) == 2


@pytest.mark.parametrize("context", [16, 64])
def test_rotations_by_the_length_of_the_text_are_those_of_the_context(context):
    """A step is narrower than the cache, and the cache is wider than the context."""
    longrope = {"short_factor": (1.0,) * 4, "long_factor": (1.0, 3.0, 8.0, 20.0)}
    scaling = RopeScaling("longrope", 4.0, original_max_position_embeddings=16, **longrope)
    base = Decoder(replace(CONFIG, rope_scaling=scaling), rngs=nnx.Rngs(0))
    model = aj.adapt(base, RECIPES["small"], rngs=nnx.Rngs(1))
    slots = Slots(aj.Bank(model, capacity=2), rows=2, context=context, pieces=(1, 8))
    prompt = [5, 6, 7, 8, 33, 12, 60, 44]
    made = [slots.read(0, prompt, True, None, Choice())]
    for _ in range(6):
        made.append(slots.step([made[-1].id, None], [None] * 2, [Choice()] * 2)[0])
    ids = [token.id for token in made]
    whole = jnp.pad(jnp.array([prompt + ids]), ((0, 0), (0, context - len(prompt) - len(ids))))
    expected = jax.nn.log_softmax(base(whole))[0, len(prompt) - 1 :][: len(ids)]
    expected = jnp.take_along_axis(expected, jnp.array(ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose([token.logprob for token in made], expected, atol=1e-4)
