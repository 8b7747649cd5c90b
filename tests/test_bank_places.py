"""What a bank keeps on the device, and what that costs: no program knows how many adapters are."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models import generation
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.serving import slots
from adapters_jax.testing.subjects import shaken
from adapters_jax.transforms import bank as places
from adapters_jax.trees import flatten

RECIPE = aj.LoRA("**", rank=2, alpha=4.0)  # a scale of 2
D, WIDTH = 4, 3


class Subject:
    """A linear layer with a bank, and the formula of each of its adapters in float64."""

    def __init__(self, api, capacity, dtype=jnp.float32):
        draw, x = np.random.default_rng(0).normal, jnp.ones((1, D))
        self.kernel = draw(size=(D, WIDTH)).astype(dtype)
        if api == "linen":
            model = aj.adapt(nn.Dense(WIDTH, use_bias=False), RECIPE)
            base = {"kernel": jnp.asarray(self.kernel)}
            given = model, aj.init_adapters(model, base, jax.random.key(1), x)
        else:
            base = nnx.Linear(D, WIDTH, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))
            base.kernel[...] = jnp.asarray(self.kernel)
            given = (aj.adapt(base, RECIPE, rngs=nnx.Rngs(1), example_inputs=(x,)),)
        self.api, self.bank = api, aj.Bank(*given, capacity=capacity)
        self.leaves = {}

    def adapter(self, name, seed):
        """An adapter of random numbers."""
        draw = np.random.default_rng(100 + seed).normal
        room = {path: x.shape for path, x in self.bank._idle.items()}
        self.leaves[name] = {
            path.rpartition("/")[-1]: draw(size=shape).astype(self.kernel.dtype)
            for path, shape in room.items()
        }
        return RECIPE, {"lora": self.leaves[name]}

    def formula(self, name, x):
        wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
        change = 0 if name is None else wide(x) @ wide(self.leaves[name]["a"])
        y = wide(x) @ wide(self.kernel)
        return y + (2 * change @ wide(self.leaves[name]["b"]) if name else 0)

    def run(self, bank, rows, x):
        if self.api == "linen":
            return bank.model.apply({"params": bank.params}, x, adapters=rows)
        return nnx.jit(lambda model, x, rows: model(x, adapters=rows))(bank.model, x, rows)

    def check(self, bank, names, rows=None):
        x = jax.random.normal(jax.random.key(len(names)), (len(names), D))
        y = self.run(bank, rows or bank.rows(names), x)
        for i, name in enumerate(names):
            np.testing.assert_allclose(y[i], self.formula(name, x[i]), rtol=1e-5, atol=1e-5)


BOTH = pytest.mark.parametrize("api", ["linen", "nnx"])


@pytest.mark.slow
@BOTH
def test_more_adapters_than_places(api):
    """They come and go, and each row computes its adapter's formula."""
    subject = Subject(api, capacity=2)
    bank = subject.bank
    for i in range(6):
        bank = bank.put(str(i), subject.adapter(str(i), i))
    lots, kept = np.random.default_rng(3), []
    for _ in range(12):
        two = [*lots.choice(6, 2, replace=False).astype(str), None]
        names = [two[i] for i in lots.choice(3, 4)]
        rows = bank.rows(names)
        subject.check(bank, names, rows)
        kept.append((names, rows))
    for names, rows in kept:  # copies, which do not change
        subject.check(bank, names, rows)


@BOTH
def test_a_bank_does_not_change(api):
    """Each of the banks that come from one another has its own adapters of the same names."""
    subject = Subject(api, capacity=1)
    first = subject.bank.put("a", subject.adapter("old", 0))
    second = first.put("a", subject.adapter("new", 1), replace=True)
    third = second.drop("a")
    for bank, content in [(first, "old"), (second, "new"), (first, "old")]:
        subject.check(bank, [content, None], bank.rows(["a", None]))
    with pytest.raises(aj.UserError, match="no adapter is named 'a'; it is empty"):
        third.rows(["a"])
    assert repr(first.rows(["a", None], each=2)) == "Rows(4 rows, 2 leaves)"


def test_arrays_of_the_user_are_copied():
    subject = Subject("linen", capacity=1)
    recipe, tree = subject.adapter("a", 0)
    given = jax.tree.map(np.copy, tree)
    bank = subject.bank.put("a", (recipe, given))
    for leaf in jax.tree.leaves(given):
        leaf[...] = 7
    subject.check(bank, ["a"])


def test_the_adapter_that_was_named_least_recently_makes_room(monkeypatch):
    subject = Subject("linen", capacity=2)
    bank = subject.bank
    for i, name in enumerate("abc"):
        bank = bank.put(name, subject.adapter(name, i))
    written, write = [], places._written

    def counted(stacked, leaves, place):
        written.append(place)
        return write(stacked, leaves, place)

    monkeypatch.setattr(places, "_written", counted)
    for names, writes in [("ab", 2), ("a", 0), ("c", 1), ("ca", 0), ("b", 1), ("a", 0), ("c", 1)]:
        before = len(written)
        subject.check(bank, list(names))
        assert len(written) - before == writes, names
    assert set(written) == {1, 2}  # place 0 is the base's


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_adapter_is_written_and_read_in_place(dtype):
    """In bytes that do not depend on the places, and without a second stack."""
    shapes = {"up/lora/a": (64, 8), "layers/lora/b": (3, 8, 32), "head/bias": (5,)}
    one = {path: jnp.ones(shape, dtype) for path, shape in shapes.items()}
    size = sum(x.nbytes for x in one.values())
    found = {}
    for n in (33, 4097):
        stacked = jax.eval_shape(lambda n=n: places._copies(one, n))
        write = places._written.lower(stacked, one, 3)
        take = places._taken.lower(stacked, one, jax.ShapeDtypeStruct((16,), jnp.int32))
        memory = write.compile().memory_analysis()
        assert memory.alias_size_in_bytes == n * size and memory.temp_size_in_bytes == 0
        assert not re.search(rf"= \w+\[{n},\S+ (?!parameter)", take.compile().as_text())
        found[n] = (
            write.compile().cost_analysis()["bytes accessed"],
            # Of what is not optimised: of a gather in a fusion, XLA counts the whole operand.
            take.cost_analysis()["bytes accessed"],
        )
    assert found[33] == found[4097]
    assert found[33][0] < 2.1 * size and found[33][1] < 2.1 * 2 * 16 * size


def test_bits_are_kept():
    """Numbers go to their place and come back bit by bit, also those that are no numbers."""
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32, jnp.int8):
        kind = jnp.dtype(dtype)
        bits = np.arange(256, dtype="u1").astype(f"u{kind.itemsize}") * (256**kind.itemsize // 256)
        leaf = bits.view(kind)
        one = {"a": jnp.zeros(256, kind)}
        stacked = places._written(places._copies(one, 3), {"a": leaf}, 2)
        taken = places._taken(stacked, one, np.array([2, 0]))["a"]
        assert taken.dtype == kind
        assert np.asarray(taken)[0].view(bits.dtype).tolist() == bits.tolist()
        assert not np.asarray(taken)[1].view(bits.dtype).any()


CONFIG = DecoderConfig(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_no_program_knows_the_capacity(scan):
    """Forward, decoding and a server's step are the same texts for few places and for many."""

    def texts(capacity):
        base = Decoder(CONFIG, scan=scan, rngs=nnx.Rngs(0))
        bank = aj.Bank(aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)), capacity=capacity)
        rows, ids = bank.rows([None] * 3), jnp.ones((3, 4), jnp.int32)
        forward = nnx.jit(lambda model, ids, rows: model(ids, adapters=rows))
        sampling = generation._Sampling(
            jnp.float32(0), jnp.float32(1), jax.random.key(0), jnp.zeros(0, jnp.int32)
        )
        graphdef, state = nnx.split(bank.model)
        decode = generation._generate
        begin = generation._Begin(ids, ids != 0, None, None, None)
        taken = slots.Slots(bank, rows=3, context=8, pieces=(1, 4))
        feed = slots.Choice.stacked([slots.Choice()] * 3)
        live = np.ones(3, bool)
        own = taken._model, taken._caches, taken._marks
        step = slots.programs.step.lower(*own, ids[:, 0], live, rows, feed, 8, None, taken._any[3])
        return [
            forward.lower(bank.model, ids, rows).as_text(),
            decode.lower(graphdef, state, begin, sampling, rows, 2).as_text(),
            step.as_text(),
        ]

    few, many = texts(3), texts(4096)
    assert few == many and not any("4097" in text for text in many)


def test_rows_inside_of_a_traced_function():
    """They are constants there, and the bank holds no tracers afterwards."""
    subject = Subject("linen", capacity=1)
    bank = subject.bank.put("a", subject.adapter("a", 0)).put("b", subject.adapter("b", 1))
    x = jnp.ones((2, D))
    y = jax.jit(lambda x: subject.run(bank, bank.rows(["a", None]), x))(x)
    np.testing.assert_allclose(y[0], subject.formula("a", x[0]), rtol=1e-5)
    for name in "bab":
        subject.check(bank, [name, None])


def test_threads_share_the_places():
    subject = Subject("linen", capacity=1)
    bank = subject.bank.put("a", subject.adapter("a", 0)).put("b", subject.adapter("b", 1))
    wrong, begin = [], threading.Barrier(4)

    def work(name):
        begin.wait()
        for _ in range(100):
            try:
                leaf = bank.rows([name]).adapters["lora/a"]
                wrong.extend([] if np.array_equal(leaf[0], subject.leaves[name]["a"]) else [name])
            except (RuntimeError, ValueError) as error:  # a stack that another thread has donated
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_a_part_of_a_model_takes_rows():
    """The part computes with its own leaves of the rows."""
    base = Decoder(CONFIG, rngs=nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
    tree = shaken(nnx.state(model, aj.nnx.AdapterParam), 3)
    nnx.update(model, tree)
    bank = aj.Bank(model, capacity=1).put("a", (aj.nnx.recipe_of(model), tree))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    part = lambda model: model.layers[1].attention.value  # noqa: E731
    y = part(bank.model)(x, adapters=bank.rows(["a", None]))
    np.testing.assert_allclose(y[0], part(model)(x)[0], atol=1e-6)
    np.testing.assert_allclose(y[1], part(base)(x)[1], atol=1e-6)
    assert np.abs(y - part(base)(x))[0].max() > 0.01


class TestBadInput:
    def test_a_batch_of_more_adapters_than_places(self):
        subject = Subject("linen", capacity=2)
        bank = subject.bank
        for i in range(3):
            bank = bank.put(str(i), subject.adapter(str(i), i))
        with pytest.raises(aj.UserError, match="names 3 adapters, and the device has places for 2"):
            bank.rows(["0", "1", "0", "2"])
        subject.check(bank, ["0", "1", "0", None])

    def test_a_bank_beyond_the_memory(self, monkeypatch):
        """It says how many fit, and those do."""
        size = sum(x.nbytes for x in Subject("linen", 1).bank._idle.values())
        monkeypatch.setattr(places.os, "sysconf", {"SC_PHYS_PAGES": 9, "SC_PAGE_SIZE": size}.get)
        with pytest.raises(
            aj.UserError, match=r"capacity=9 .*: 8 adapters of this recipe fit at a time"
        ):
            Subject("linen", capacity=9)
        assert Subject("linen", capacity=8).bank.capacity == 8

    @BOTH
    def test_rows_of_another_bank(self, api):
        subject, other = Subject(api, 1), Decoder(CONFIG, rngs=nnx.Rngs(0))
        foreign = aj.Bank(aj.adapt(other, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)), capacity=1)
        path = min(flatten(nnx.state(foreign.model, aj.nnx.AdapterParam)))
        with pytest.raises(aj.UserError, match=f"a bank of another model: only one has {path}"):
            subject.run(subject.bank, foreign.rows([None]), jnp.ones((1, D)))
