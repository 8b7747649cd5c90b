"""Tenants: whatever the others do, each gets the numbers of training alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import MismatchError, RecipeError, UserError
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.finetune.models.t5.model import abstract_t5
from adapters_jax.finetune.tenants.engine import Tenants
from adapters_jax.finetune.tenants.losses import KINDS, LOSSES, THRESHOLDS, token_losses
from adapters_jax.finetune.tenants.programs import Batch
from adapters_jax.finetune.tenants.requests import (
    Adam,
    ClosedError,
    Row,
    UnknownTenantError,
    checked_rows,
)
from adapters_jax.finetune.tenants.waiting import Pass, choose, fill
from adapters_jax.trees import flatten

VOCABULARY, EXAMPLE = 32, (jnp.ones((1, 4), int),)
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
BASE = Decoder(CONFIG, rngs=nnx.Rngs(0))
LARGEST = aj.Recipe(
    aj.LoRA(("**/{query,value}", "head"), rank=4),
    aj.DoRA("**/mlp/*", rank=4),
    aj.Bottleneck("**/attention", bottleneck_dim=6, activation="sigmoid"),
)
RECIPES = {
    "lora": aj.LoRA(("**/query", "head"), rank=2, alpha=6.0),
    "dora": aj.DoRA("**/mlp/up", rank=3, alpha=5.0),
    "houlsby": aj.Bottleneck("**/attention", bottleneck_dim=3, scale=2.0, activation="sigmoid"),
    "all": LARGEST,
}


def row(seed, loss, n):
    """A row with what a loss needs; the ratios of policies are around 1, some beyond thresholds."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, VOCABULARY, (2, n))
    values = {
        "weights": rng.uniform(0, 2, n),
        "logprobs": np.log(1 / VOCABULARY) + rng.normal(0, 0.5, n),
        "advantages": rng.normal(size=n),
        "sequence_ratio_mask": np.arange(n) >= n // 3,
    }
    return Row(tokens, targets, {name: values[name] for name in LOSSES[loss].values})


def formula(loss, logprobs, values, config=None):
    """The loss of one row as it is published, and its slope by each log-probability; float64."""
    set_ = LOSSES[loss].config | (config or {})
    p, v = np.asarray(logprobs, np.float64), {n: np.asarray(x, float) for n, x in values.items()}
    if loss == "cross_entropy":
        return -(p * v["weights"]).sum(), -v["weights"]
    a, q = v["advantages"], v["logprobs"]
    ratio = np.exp(p - q)
    if loss == "dro":
        beta = set_["beta"]
        return -(p * a - beta / 2 * (p - q) ** 2).sum(), -(a - beta * (p - q))
    if loss == "importance_sampling":
        return -(ratio * a).sum(), -ratio * a
    low, high = (v.get(name, set_.get(name)) for name in THRESHOLDS)
    if loss == "cispo":
        return -(np.clip(ratio, low, high) * p * a).sum(), -np.clip(ratio, low, high) * a
    if loss == "gspo":
        marked = v["sequence_ratio_mask"] != 0
        ratio = np.full(len(p), np.exp((p - q)[marked].mean()))
    clipped = np.clip(ratio, low, high) * a
    return -np.minimum(ratio * a, clipped).sum(), np.where(ratio * a <= clipped, -ratio * a, 0.0)


@functools.cache
def gradients(recipe, seed):
    """An adapter, and what gives its log-probabilities of a batch and pulls slopes back."""
    model = aj.adapt(BASE, recipe, rngs=nnx.Rngs(seed), example_inputs=EXAMPLE)
    graphdef, trained, rest = nnx.split(model, aj.nnx.AdapterParam, ...)

    @jax.jit
    def pull(trained, tokens, targets, slopes):
        def logprobs(trained):
            logits = jax.nn.log_softmax(nnx.merge(graphdef, trained, rest)(tokens))
            return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]

        found, back = jax.vjp(logprobs, trained)
        return found, back(slopes)[0]

    return trained, pull


def alone(recipe, seed, steps):
    """A tenant's leaves after steps (adam, [(rows, loss, config), ...]); each loss and norm."""
    trained, pull = gradients(recipe, seed)
    state, seen = None, []
    for adam, calls in steps:
        rows = [(each, loss, config) for rows, loss, config in calls for each in rows]
        tokens, targets = np.zeros((2, 15, 16), int)
        for i, (each, _, _) in enumerate(rows):
            tokens[i, : len(each.tokens)], targets[i, : len(each.tokens)] = each[:2]
        slopes, total = np.zeros((15, 16), np.float32), 0.0
        logprobs, _ = pull(trained, tokens, targets, slopes)
        for i, (each, loss, config) in enumerate(rows):
            n = len(each.tokens)
            lost, slopes[i, :n] = formula(loss, logprobs[i, :n], each.values, config)
            total += lost
        _, grads = pull(trained, tokens, targets, slopes)
        clip = optax.clip_by_global_norm(adam.grad_clip_norm or 1e9)
        tx = optax.chain(clip, optax.adamw(*adam[:4], weight_decay=adam.weight_decay))
        updates, state = tx.update(grads, state or tx.init(trained), trained)
        seen.append((total, float(optax.tree.norm(grads))))
        trained = optax.apply_updates(trained, updates)
    return flatten(trained), seen


@pytest.fixture(scope="module")
def tenants():
    engine = Tenants(BASE, LARGEST, places=3, rows=8, group=2, lengths=(8, 16))
    engine.start()
    yield engine
    engine.close()


STEPS = (
    Adam(0.02, eps=1e-6),
    Adam(0.05, 0.8, 0.9, 1e-6, weight_decay=0.1, grad_clip_norm=0.5),
    Adam(0.01, eps=1e-6, weight_decay=0.3),
)
CALLS = {
    "lora": [("cross_entropy", None), ("ppo", {"clip_low_threshold": 0.9})],
    "dora": [("importance_sampling", None), ("cispo", {"clip_high_threshold": 1.3})],
    "houlsby": [("gspo", {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1})],
    "all": [("dro", {"beta": 0.2}), ("cross_entropy", None), ("gspo", None)],
}


def script(name, seed):
    """What a tenant asks for: for each step its numbers, and calls of forward_backward."""
    rng, steps = np.random.default_rng(seed), []
    for adam in STEPS:
        batch = []
        for loss, config in CALLS[name]:
            sizes = rng.integers(1, 17, rng.integers(1, 6))
            batch.append(([row(rng.integers(1000), loss, n) for n in sizes], loss, config))
        steps.append((adam, batch))
    return steps


@pytest.mark.weekly
def test_each_tenant_gets_the_numbers_of_training_alone(tenants):
    scripts = {name: script(name, i) for i, name in enumerate(RECIPES)}
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        tenants.create(name, recipe, seed)
    tenants.create("sick", RECIPES["lora"], 7)
    healthy = row(5, "importance_sampling", 9)
    sick = healthy._replace(values=healthy.values | {"logprobs": np.full(9, -1e30)})
    before = tenants.snapshot("sick").result(60)
    futures = {name: [] for name in scripts}
    for i in range(len(STEPS)):  # more tenants than places, all at once
        for name, steps in scripts.items():
            adam, batch = steps[i]
            passes = [tenants.forward_backward(name, *call) for call in batch]
            futures[name].append((passes, tenants.optim_step(name, adam)))
        tenants.forward_backward("sick", [sick], "importance_sampling")
        failed = tenants.optim_step("sick", Adam(0.1))
        with pytest.raises(UserError, match="'sick'.*not finite"):
            failed.result(60)
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        leaves, seen = alone(recipe, seed, scripts[name])
        for (passes, step), (total, norm) in zip(futures[name], seen, strict=True):
            found = sum(each.result(60).metrics["loss:sum"] for each in passes)
            np.testing.assert_allclose(found, total, rtol=2e-5, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(step.result(60)["grad_norm"], norm, rtol=1e-4)
        made = tenants.snapshot(name).result(60)
        assert made.leaves.keys() == leaves.keys() and made.step == len(STEPS)
        for path, leaf in leaves.items():
            np.testing.assert_allclose(made.leaves[path], leaf, atol=2e-5, err_msg=f"{name} {path}")
    after = tenants.snapshot("sick").result(60)
    assert after.step == 0
    jax.tree.map(np.testing.assert_array_equal, after.leaves, before.leaves)
    # It goes on as if nothing had been.
    tenants.forward_backward("sick", [healthy], "importance_sampling")
    assert tenants.optim_step("sick", STEPS[0]).result(60)["step"] == 1
    call = [(STEPS[0], [([healthy], "importance_sampling", None)])]
    leaves, _ = alone(RECIPES["lora"], 7, call)
    made = tenants.snapshot("sick").result(60).leaves
    for path, leaf in leaves.items():
        np.testing.assert_allclose(made[path], leaf, atol=2e-5, err_msg=path)
    for name in tenants.names:
        tenants.drop(name)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_their_slopes_are_the_published_ones(loss):
    """Beside a row of another loss, with padding, and with thresholds of tokens."""
    rows, rng = [row(seed, loss, n) for seed, n in ((1, 9), (2, 5))], np.random.default_rng(3)
    logprobs = np.log(1 / VOCABULARY) + rng.normal(0, 0.5, (4, 9))
    config = dict(LOSSES[loss].config)
    if "clip_low_threshold" in config:
        config = {"clip_low_threshold": 0.7}
        rows[1].values["clip_high_threshold"] = rng.uniform(1.0, 1.5, 5)
    # The ratio is more than float32 holds, which CISPO clips; importance sampling has no loss then.
    for other in ("cispo", "importance_sampling"):
        rows.append(row(4, other, 9))
        rows[-1].values["logprobs"] = np.full(9, -200.0)
    batch, cases = Batch.empty(1, 4, 9), [(loss, config)] * 2
    cases += [("cispo", None), ("importance_sampling", None)]
    for i, (each, case) in enumerate(zip(rows, cases, strict=True)):
        (checked,) = checked_rows([each], *case, vocabulary=VOCABULARY, longest=9)
        fill(batch, i, checked, KINDS[case[0]])
    losses = lambda x: token_losses(x, batch.given)  # noqa: E731
    found, back = jax.vjp(losses, jnp.asarray(logprobs, jnp.float32))
    (slopes,) = back(jnp.ones((4, 9)))
    for i, (each, case) in enumerate(zip(rows[:3], cases, strict=False)):
        n = len(each.tokens)
        total, slope = formula(case[0], logprobs[i, :n], each.values, case[1])
        np.testing.assert_allclose(found[i].sum(), total, rtol=1e-5)
        np.testing.assert_allclose(slopes[i, :n], slope, rtol=1e-4, atol=1e-5)
        assert not found[i, n:].any() and not slopes[i, n:].any()
    assert not np.isfinite(found[3]).any()


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_ratio_beyond_float32_is_clipped_and_counts_nothing_without_an_advantage(loss):
    rows = [row(1, loss, 3), row(2, loss, 3)]
    batch = Batch.empty(1, 2, 3)
    for i, (each, advantage) in enumerate(zip(rows, (1.0, 0.0), strict=True)):
        far = {"logprobs": np.full(3, -300.0), "advantages": np.full(3, advantage)}
        given = [each._replace(values=each.values | far)]
        (checked,) = checked_rows(given, loss, None, vocabulary=VOCABULARY, longest=3)
        fill(batch, i, checked, KINDS[loss])
    losses = lambda x: token_losses(x, batch.given)  # noqa: E731
    found, back = jax.vjp(losses, jnp.full((2, 3), -2.0))
    (slopes,) = back(jnp.ones((2, 3)))
    high = LOSSES[loss].config.get("clip_high_threshold", np.inf)
    value, slope = (2 * high, -high) if loss == "cispo" else (-high, 0.0)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    np.testing.assert_allclose(slopes[0], -np.inf if high == np.inf else slope)
    assert not found[1].any() and not slopes[1].any()


@pytest.mark.slow
def test_nothing_compiles_after_the_start_and_places_are_shared(tenants, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for i in range(5):
            tenants.create(f"t{i}", LARGEST, i)
        futures = [
            tenants.forward_backward(f"t{i}", [row(j, loss, 1 + j) for j in range(i + 1)], loss)
            for i in range(5)
            for loss in LOSSES
        ]
        steps = [tenants.optim_step(f"t{i}") for i in range(5)]
        futures += [tenants.forward_backward("t0", [row(0, "dro", 16)], "dro", backward=False)]
        snapshots = [tenants.snapshot(f"t{i}") for i in range(5)]
        for future in (*futures, *steps, *snapshots):
            future.result(60)
        tenants.restore("t4", snapshots[0].result(), optimizer=True).result(60)
        tenants.drop("t0")
    assert not [each for each in caplog.messages if "ompil" in each]
    for i in range(1, 5):
        tenants.drop(f"t{i}")


@pytest.mark.slow
def test_a_snapshot_restores_a_tenant_with_and_without_its_optimiser(tenants):
    recipe, rows = RECIPES["dora"], [row(1, "cross_entropy", 7), row(2, "cross_entropy", 16)]

    def trained(name):
        tenants.forward_backward(name, rows, "cross_entropy")
        tenants.optim_step(name, STEPS[1]).result(60)
        return tenants.snapshot(name).result(60)

    tenants.create("one", recipe, 1)
    early, late = trained("one"), trained("one")
    tenants.create("two", recipe, 2)
    tenants.forward_backward("two", rows, "cross_entropy")  # is forgotten
    tenants.restore("two", early, optimizer=True)
    again = trained("two")
    jax.tree.map(np.testing.assert_array_equal, again.leaves, late.leaves)
    jax.tree.map(np.testing.assert_array_equal, again.square, late.square)
    assert again.step == late.step == 2
    tenants.restore("two", early, optimizer=False)
    new = trained("two")
    assert new.step == 1 and not np.array_equal(new.leaves.popitem()[1], late.leaves.popitem()[1])
    bank = aj.Bank(aj.adapt(BASE, LARGEST, rngs=nnx.Rngs(0), example_inputs=EXAMPLE), capacity=1)
    assert "mine" in bank.put("mine", again.adapter)
    tenants.create("other", RECIPES["lora"], 1)
    with raises(MismatchError, "other", "absent"):
        tenants.restore("other", early, optimizer=True)
    for name in ("one", "two", "other"):
        tenants.drop(name)


@pytest.mark.slow
def test_a_tenant_with_many_rows_does_not_keep_others_waiting(tenants):
    for name in ("many", "few"):
        tenants.create(name, RECIPES["lora"], 0)
    order = []
    rows = [row(i, "cross_entropy", 16) for i in range(120)]
    many = tenants.forward_backward("many", rows, "cross_entropy")
    few = tenants.forward_backward("few", rows[:4], "cross_entropy")
    step = tenants.optim_step("few")
    for name, future in (("many", many), ("few", few), ("step", step)):
        future.add_done_callback(lambda _, name=name: order.append(name))
    assert len(many.result(60).logprobs) == 120
    step.result(60)
    assert order == ["few", "step", "many"]
    gone = tenants.forward_backward("many", rows, "cross_entropy")
    tenants.drop("many")
    with raises(UnknownTenantError, "many"):
        gone.result(60)
    with raises(UnknownTenantError, "many"):
        tenants.optim_step("many")
    tenants.create("many", RECIPES["houlsby"], 0)  # the name is free again
    assert tenants.optim_step("many").result(60) == {"grad_norm": 0.0, "step": 0.0}
    tenants.drop("many")
    tenants.drop("few")


@pytest.mark.slow
def test_a_request_that_fits_no_batch_of_the_first_tenant_has_its_turn(tenants):
    """One batch has gradients or has none, as the tenant needs that stands first."""
    for name in ("first", "second"):
        tenants.create(name, RECIPES["lora"], seed=1)
    seen = []
    with tenants._changed:  # so that both wait before a batch is chosen
        many = tenants.forward_backward(
            "first", [row(i, "cross_entropy", 8) for i in range(40)], "cross_entropy"
        )
        few = tenants.forward_backward(
            "second", [row(1, "cross_entropy", 8)], "cross_entropy", backward=False
        )
        few.add_done_callback(lambda _: seen.append(many.done()))
    many.result(60)
    assert seen == [False]
    for name in ("first", "second"):
        tenants.drop(name)


def test_tenants_give_groups_in_turn_and_shorter_rows_fill_what_is_left():
    def waits(*sizes):
        rows = checked_rows(
            *([row(1, "cross_entropy", n) for n in sizes], "cross_entropy", None),
            **{"vocabulary": VOCABULARY, "longest": 16},
        )
        return [Pass(rows, "cross_entropy", True, (8, 16))]

    def taken(turns, places=3):
        length, _, groups = choose(turns, (1, 4), 2, places)
        found = [(who, [x.rows[i].tokens.size for x, i in rows]) for who, rows in groups]
        return length, found

    long, few = waits(*[16] * 9), waits(16, 3, 5, 7)
    groups = [("a", [16, 16]), ("b", [16, 3]), ("a", [16, 16]), ("a", [16, 16])]
    assert taken({"a": long, "b": few}) == (16, groups)
    assert taken({"b": few, "a": long}) == (8, [("b", [5, 7])])  # a smaller program is enough
    groups = [("a", [16, 16]), ("c", [16, 3]), ("a", [16])]
    assert taken({"a": long, "c": waits(16, 3), "d": waits(16)}, places=2) == (16, groups)


GOOD = row(1, "cross_entropy", 4)
POLICY = row(1, "ppo", 4)
BAD = {
    "no rows": ([], "cross_entropy", None, "one or more rows"),
    "unknown loss": ([GOOD], "mse", None, "'mse'"),
    "unknown setting": ([POLICY], "ppo", {"clip": 0.2}, "'clip'"),
    "setting of no number": ([POLICY], "ppo", {"clip_low_threshold": np.nan}, "nan"),
    "thresholds": ([POLICY], "ppo", {"clip_low_threshold": 2.0}, "low <= high"),
    "empty": ([Row([], [], {"weights": []})], "cross_entropy", None, "row 0"),
    "beyond": ([GOOD._replace(targets=[1, 2, 3, 32])], "cross_entropy", None, "32"),
    "negative": ([GOOD._replace(tokens=[1, 2, 3, -1])], "cross_entropy", None, "-1"),
    "floats": ([GOOD._replace(tokens=[1.0, 2, 3, 1])], "cross_entropy", None, "float64"),
    "long": ([GOOD, row(1, "cross_entropy", 17)], "cross_entropy", None, "row 1 has 17"),
    "unequal": ([GOOD._replace(targets=[1, 2])], "cross_entropy", None, "4 tokens and 2 targets"),
    "missing": ([POLICY._replace(values={})], "ppo", None, "'logprobs'"),
    "unknown values": ([POLICY], "cross_entropy", None, "'weights'"),
    "nan": ([GOOD._replace(values={"weights": [1, 1, 1, np.nan]})], "cross_entropy", None, "nan"),
    "overflow": (
        [GOOD._replace(values={"weights": [0, 0, 0, 1e39]})],
        "cross_entropy",
        None,
        "inf",
    ),
    "two axes": ([GOOD._replace(values={"weights": [[1.0] * 4]})], "cross_entropy", None, "[1, 4]"),
    "no sequence": (
        [POLICY._replace(values=POLICY.values | {"sequence_ratio_mask": np.zeros(4)})],
        *("gspo", None, "sequence_ratio_mask"),
    ),
}


@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_errors_of_the_call(tenants, case):
    if "good" not in tenants.names:
        tenants.create("good", RECIPES["lora"], 0)
    *call, datum = BAD[case]
    with raises(UserError, datum):
        tenants.forward_backward("good", *call)


@pytest.mark.slow
@pytest.mark.hostile
def test_bad_tenants_and_bad_steps_are_errors_of_the_call(tenants, caplog):
    for change in ({"learning_rate": np.nan}, {"beta1": 1.0}, {"eps": 0.0}, {"weight_decay": -1}):
        with raises(UserError, *change):
            tenants.optim_step("good", Adam()._replace(**change))
    for recipe, error, *data in (
        (aj.LoRA("**/query", rank=5), MismatchError, "5", "4"),
        (aj.LoRA("**/key", rank=2), MismatchError, "key"),
        (aj.IA3("**/query"), MismatchError, "IA3"),
        (aj.LoRA("**/query", rank=2, dropout=0.1), RecipeError, "dropout"),
        (aj.LoRA("**/nothing", rank=2), aj.TargetError, "nothing"),
    ):
        with raises(error, *data), jax.log_compiles(), caplog.at_level("WARNING"):
            tenants.create("bad", recipe, 0)
    assert not [each for each in caplog.messages if "XLA compilation of jit(start)" in each]
    for name, seed in (("good", 0), ("", 0), ("bad", -1), ("bad", 2**32), ("bad", 1.0)):
        with raises(UserError):
            tenants.create(name, RECIPES["lora"], seed)
    assert "bad" not in tenants.names
    for options, datum in (
        ({"group": 3}, "group=3"),
        ({"places": 0}, "places"),
        ({"lengths": ()}, "lengths"),
    ):
        with raises(UserError, datum):
            Tenants(BASE, RECIPES["lora"], **options)


def test_a_prompt_that_no_row_has_placeholders_for_is_refused():
    with raises(RecipeError, "PromptTuning", "placeholders"):
        Tenants(BASE, aj.PromptTuning("embeddings", 2))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with raises(UserError, "T5 is no decoder"):
        Tenants(abstract_t5(config), aj.lora(1))


@pytest.mark.slow
def test_closing_ends_what_waits():
    engine = Tenants(BASE, RECIPES["lora"], places=1, rows=1, group=1, lengths=(8,))
    engine.create("a", RECIPES["lora"], 0)
    waits = engine.optim_step("a")  # before the start
    engine.start()
    assert waits.result(60)["step"] == 0 and engine.alive
    engine.close()
    assert not engine.alive
    with raises(ClosedError):
        engine.snapshot("a")
    with raises(ClosedError):
        engine.create("b", RECIPES["lora"], 0)
