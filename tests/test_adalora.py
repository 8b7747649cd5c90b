"""AdaLoRA: its change and its penalty by hand, and its budget against the paper's algorithm."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn
from helpers.contract import APIS, CASES, ids
from helpers.errors import raises
from helpers.finished import MEANINGS, REVIEWS, decoder_run, encoder_run
from test_checkpoint import bits
from test_peft import base_of

import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.testing.contract import VARIANTS
from adapters_jax.trees import flatten, unflatten

X, KERNEL, BIAS = drawn((5, 4), 1), drawn((4, 3), 4), drawn(3, 5)
A, LAMBDA, B = drawn((4, 2), 6), drawn(2, 7), drawn((2, 3), 8)
NODE = {"a": A, "lambda": LAMBDA, "b": B}
METHOD = aj.AdaLoRA("**", rank=2, alpha=3.0)
CHANGED = double(KERNEL) + 1.5 * double(A) @ np.diag(double(LAMBDA)) @ double(B)


def test_the_change_is_a_decomposition():
    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS), "adalora": dict(NODE)}
    model = aj.adapt(nn.Dense(3), METHOD)
    np.testing.assert_allclose(
        model.apply({"params": params}, X), double(X) @ CHANGED + BIAS, atol=1e-5
    )
    np.testing.assert_allclose(aj.merge(model, params, X)["kernel"], CHANGED, atol=1e-5)
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    other.kernel[...], other.bias[...] = KERNEL, BIAS
    other = aj.adapt(other, METHOD, rngs=nnx.Rngs(1))
    for name, x in NODE.items():
        other.adalora[name][...] = x
    np.testing.assert_allclose(other(X), double(X) @ CHANGED + BIAS, atol=1e-5)


def test_it_starts_as_peft_does():
    model = aj.adapt(nn.Dense(400), aj.AdaLoRA("**"))
    x = jnp.ones((1, 500))
    base = nn.Dense(400).init(jax.random.key(0), x)["params"]
    own = aj.init_adapters(model, base, jax.random.key(1), x)["adalora"]
    assert own["a"].shape == (500, 12) and not own["lambda"].any()
    for name in "ab":
        assert abs(float(own[name].std()) / 0.02 - 1) < 0.05


def test_combined_it_is_a_lora():
    base = {"kernel": KERNEL}
    made = aj.combine(base, [(METHOD, {"adalora": dict(NODE)})], [2.0])
    own = made.adapters["lora"]
    np.testing.assert_allclose(own["a"] @ own["b"], 2 * (CHANGED - KERNEL), atol=1e-5)


@pytest.mark.slow
def test_in_a_bank_a_smaller_rank_and_another_scale_compute_the_same():
    model = aj.adapt(nn.Dense(3, use_bias=False), aj.AdaLoRA("**", rank=3, alpha=9.0))
    params = aj.init_adapters(model, {"kernel": KERNEL}, jax.random.key(0), X)
    bank = aj.Bank(model, params, capacity=1).put("one", (METHOD, {"adalora": dict(NODE)}))
    rows = bank.rows([None, "one", "one", "one", "one"])
    y = model.apply({"params": bank.params}, X, adapters=rows)
    np.testing.assert_allclose(y[1:], double(X)[1:] @ CHANGED, atol=1e-5)
    np.testing.assert_allclose(y[0], X[0] @ KERNEL, atol=1e-5)


# The budget.

RECIPE = aj.Recipe(
    aj.AdaLoRA("stack/q", rank=3), aj.AdaLoRA("v", rank=2, name="two"), aj.Unfreeze("bias")
)
SHAPES = {
    "stack/q/adalora": ((2, 4, 3), (2, 3), (2, 3, 5)),
    "v/adalora_two": ((2, 3, 2), (2,), (2, 4)),
}


def tree(seed):
    leaves = {"bias": drawn(3, seed)}
    for i, (prefix, shapes) in enumerate(SHAPES.items()):
        for j, (name, shape) in enumerate(zip(("a", "lambda", "b"), shapes, strict=True)):
            leaves[f"{prefix}/{name}"] = drawn(shape, 100 * seed + 10 * i + j)
    return leaves


def algorithm(leaves, slopes, *, rate, total, target, first, final, every, beta1, beta2):
    """Algorithm 1 of the paper, triplet by triplet, for a sequence of gradients.

    Yields the leaves, and the averages of sensitivities and of their uncertainties.
    """
    leaves = {path: double(x) for path, x in leaves.items()}
    mean = {path: np.zeros_like(x) for path, x in leaves.items()}
    far, chosen = {path: np.zeros_like(x) for path, x in leaves.items()}, None
    triplets = [
        (prefix, layer, i)
        for prefix, (_, shape, _) in SHAPES.items()
        for layer in np.ndindex(shape[:-1])
        for i in range(shape[-1])
    ]
    modules = len({(prefix, layer) for prefix, layer, _ in triplets})
    for step, grads in enumerate(slopes, 1):
        leaves = {path: x - rate * double(grads[path]) for path, x in leaves.items()}
        for path, x in leaves.items() if step < total - final else ():
            sensitivity = np.abs(x * grads[path])
            mean[path] = beta1 * mean[path] + (1 - beta1) * sensitivity
            far[path] = beta2 * far[path] + (1 - beta2) * np.abs(sensitivity - mean[path])

        def importance(triplet):
            prefix, layer, i = triplet
            s = {name: (mean[f"{prefix}/{name}"] * far[f"{prefix}/{name}"])[layer] for name in "ab"}
            own = (mean[f"{prefix}/lambda"] * far[f"{prefix}/lambda"])[layer][i]
            return own + s["a"][..., i].mean() + s["b"][i].mean()

        budget = len(triplets)
        if step > first:
            part = 1 - (step - first) / (total - final - first)
            budget = int(target * modules + (len(triplets) - target * modules) * part**3)
        cuts = step > first and (step % every == 0 or step == total - final)
        kept = sorted(triplets, key=importance)[-budget:] if cuts else triplets
        if step >= total - final:
            chosen = chosen or kept
            kept = chosen
        for prefix, layer, i in {*triplets} - {*kept}:
            leaves[f"{prefix}/lambda"][layer][i] = 0.0
        yield leaves, mean, far


PLAN = {"total_steps": 14, "target_rank": 1, "initial_steps": 2, "final_steps": 4, "every": 3}


def budget(tx=None, **fields):
    return aj.adalora_budget(tx or optax.sgd(0.1), RECIPE, **PLAN | fields)


@pytest.mark.parametrize("beta1", [0.85, 0.5])
def test_the_budget_is_that_of_the_algorithm(beta1):
    slopes = [tree(seed) for seed in range(1, 15)]
    reference = algorithm(
        *(tree(0), slopes),
        **{"rate": 0.1, "total": 14, "target": 1, "first": 2, "final": 4, "every": 3},
        **{"beta1": beta1, "beta2": 0.7},
    )
    tx = budget(beta1=beta1, beta2=0.7)
    params = unflatten(tree(0))
    state, update, kept = tx.init(params), jax.jit(tx.update), []
    for grads, (expected, *averages) in zip(slopes, reference, strict=True):
        updates, state = update(unflatten(grads), state, params)
        params = optax.apply_updates(params, updates)
        for path, x in flatten(params).items():
            np.testing.assert_allclose(x, expected[path], atol=1e-5)
            np.testing.assert_array_equal(np.asarray(x) == 0, expected[path] == 0)
        for got, wanted in zip((state.sensitivity, state.uncertainty), averages, strict=True):
            for path, x in flatten(got).items():
                np.testing.assert_allclose(x, wanted[path], atol=1e-5)
        kept.append(sum(int((x != 0).sum()) for p, x in expected.items() if "lambda" in p))
    assert kept == [8, 8, 6, 8, 8, 3, 8, 8, 3, 3, 3, 3, 3, 3]


@pytest.mark.slow
def test_the_gradients_of_a_skipped_step_are_not_remembered():
    tx = budget(optax.apply_if_finite(optax.sgd(0.1), 3))
    params = unflatten(tree(0))
    state = tx.init(params)
    for seed, wrong in ((1, False), (2, True), (3, False)):
        slopes = {p: np.full_like(x, np.nan) if wrong else x for p, x in tree(seed).items()}
        updates, state = tx.update(unflatten(slopes), state, params)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state.sensitivity)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.uncertainty))


def test_what_is_cut_is_what_matters_least():
    params = {path: np.ones_like(x) for path, x in tree(0).items()}
    slopes = {path: np.full_like(x, 0.1) for path, x in params.items()}
    slopes["stack/q/adalora/a"][1, :, 2] = 5.0  # of one triplet in the second layer
    slopes["v/adalora_two/b"][0] = 3.0
    slopes["v/adalora_two/lambda"][1] = 4.0
    params, slopes = unflatten(params), unflatten(slopes)
    tx = budget(optax.sgd(1e-3), total_steps=3, initial_steps=0, final_steps=1, every=1)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(slopes, state, params)
        params = optax.apply_updates(params, updates)
    kept = params["stack"]["q"]["adalora"]["lambda"] != 0
    np.testing.assert_array_equal(kept, [[False] * 3, [False, False, True]])
    np.testing.assert_array_equal(params["v"]["adalora_two"]["lambda"] != 0, [True, True])


def loss_of(subject, recipe):
    def loss(whole, batch, key):
        penalty = 0.1 * aj.orthogonality(whole, recipe)
        return jnp.square(subject.logits_of(whole, batch) - 1.0).mean() + penalty

    return loss


@pytest.mark.slow
@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", APIS)
def test_a_training_resumes_to_the_last_bit_and_compiles_once(api, tmp_path):
    subject = APIS[api](CASES["adalora"], **VARIANTS["plain"])
    recipe = CASES["adalora"].recipe
    tx = aj.adalora_budget(
        optax.adam(1e-2), recipe, total_steps=8, target_rank=1, final_steps=2, every=2
    )
    step = aj.make_train_step(loss_of(subject, recipe))

    def advance(state, first, last):
        for i in range(first, last):
            state, _ = step(state, ids(shape=(4, 6)) + i % 2)
        return state

    straight = advance(subject.state(tx), 0, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, advance(subject.state(tx), 0, 5))
        found = checkpoints.restore(subject.state(tx))
    assert bits(advance(found.state, 5, 8)) == bits(straight)
    assert step.jitted._cache_size() == 1
    numbers = [x for path, x in flatten(straight.adapters).items() if "lambda" in path]
    assert sum(int((np.asarray(x) != 0).sum()) for x in numbers) == len(numbers)


@pytest.mark.slow
def test_trainings_with_budgets_run_together():
    recipe, subject = CASES["adalora"].recipe, APIS["linen"](CASES["adalora"], **VARIANTS["plain"])
    step, states = aj.make_train_step(loss_of(subject, recipe)), []
    for rate, rank in ((1e-2, 1), (3e-2, 2)):
        plan = {"total_steps": 5, "target_rank": rank, "final_steps": 1}
        states.append(subject.state(aj.adalora_budget(optax.adam(rate), recipe, **plan)))
    batch = ids(shape=(4, 6))
    states = [state.replace(base=states[0].base) for state in states]
    stacked = aj.stack_states(states)
    for _ in range(5):
        stacked, _ = step(stacked, jnp.stack([batch, batch]))
        states = [step(state, batch)[0] for state in states]
    for together, alone in zip(aj.unstack_states(stacked), states, strict=True):
        for path, x in flatten(together.adapters).items():
            np.testing.assert_allclose(x, flatten(alone.adapters)[path], atol=1e-5)
    left = [
        int((flatten(s.adapters)[p] != 0).sum())
        for s in states
        for p in flatten(s.adapters)
        if "lambda" in p
    ]
    assert sum(left[: len(left) // 2]) * 2 == sum(left[len(left) // 2 :])


def test_the_penalty_is_a_mean_of_norms():
    leaves = tree(1)
    norms = []
    for prefix in SHAPES:
        a, b = (double(leaves[f"{prefix}/{name}"]) for name in "ab")
        rank = b.shape[-2]
        for layer in np.ndindex(leaves[f"{prefix}/lambda"].shape[:-1]):
            columns, rows = a[layer].reshape(-1, rank), b[layer].reshape(rank, -1)
            norms += [columns.T @ columns, rows @ rows.T]
    expected = np.mean([np.sqrt(np.square(x - np.eye(len(x))).sum()) for x in norms])
    got = aj.orthogonality(unflatten(leaves), RECIPE)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_penalty_has_a_gradient_where_it_is_zero():
    node = {"a": jnp.eye(4)[:, :2], "lambda": jnp.ones(2), "b": jnp.eye(3)[:2]}
    slopes = jax.grad(lambda node: aj.orthogonality({"adalora": node}, METHOD))(node)
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(slopes))


def test_what_cannot_be_a_budget_is_an_error():
    for fields, data in [
        ({"total_steps": 0}, ["total_steps=0"]),
        ({"target_rank": 2.5}, ["target_rank=2.5"]),
        ({"initial_steps": -1}, ["initial_steps=-1"]),
        ({"beta1": 1.0}, ["beta1=1.0"]),
        ({"initial_steps": 10}, ["initial_steps=10", "final_steps=4", "total_steps=14"]),
    ]:
        with raises(aj.UserError, "adalora_budget", *data):
            budget(**fields)
    with raises(aj.UserError, "tx=3"):
        aj.adalora_budget(3, RECIPE, total_steps=2)
    with raises(aj.UserError, "target_rank=3", "2.66667"):
        budget(target_rank=3).init(unflatten(tree(0)))
    with raises(aj.UserError, "params"):
        budget().update({}, None)
    lora = {"q": {"lora": {"a": A, "b": B}}}
    for call in (
        lambda: aj.orthogonality(lora, aj.LoRA("q", 2)),
        lambda: aj.adalora_budget(optax.sgd(0.1), aj.LoRA("q", 2), total_steps=2).init(lora),
    ):
        with raises(aj.RecipeError, "aj.AdaLoRA"):
            call()


# Files.

FACTORS = {"a": drawn((4, 3), 1), "lambda": drawn(3, 2), "b": drawn((3, 6), 3)}


def test_it_is_written_as_lora(tmp_path):
    names, params = {"model.q": "q"}, {"q": {"kernel": np.zeros((4, 6), np.float32)}}
    recipe = aj.AdaLoRA("q", rank=3, alpha=6.0)
    save_peft(tmp_path / "a", recipe, {"q": {"adalora": dict(FACTORS)}}, names, params)
    found, adapters = load_peft(tmp_path / "a", names, params)
    assert found == aj.Recipe(aj.LoRA("q", 3, 6, a_init="uniform"))
    own = adapters["q"]["lora"]
    expected = FACTORS["a"] @ np.diag(FACTORS["lambda"]) @ FACTORS["b"]
    np.testing.assert_allclose(own["a"] @ own["b"], expected, atol=1e-5)
    lacking = {"q": {"adalora": {name: FACTORS[name] for name in "ab"}}}
    with raises(aj.UserError, "q", "lambda"):
        save_peft(tmp_path / "b", recipe, lacking, names, params)


CONFIG = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
MASKS = {"h.q.lora_E": [True, False, True, True], "h.v.lora_E": [False] * 4}


def file_of(q=FACTORS, v_rank=0):
    root = "base_model.model.h."
    a, e, b = q["a"].T, q["lambda"][:, None], q["b"].T
    empty = {"lora_A": (0, 4), "lora_E": (0, 1), "lora_B": (6, 0)}
    tensors = {f"{root}q.lora_{name}": x for name, x in (("A", a), ("E", e), ("B", b))}
    return tensors | {
        f"{root}v.{name}": np.zeros(shape, np.float32) for name, shape in empty.items()
    }


def read(tensors, **fields):
    from adapters_jax.files.peft.convert import from_peft

    names = {"h.q": "q", "h.v": "v"}
    params = {name: {"kernel": np.zeros((4, 6), np.float32)} for name in "qv"}
    return from_peft({**CONFIG, "rank_pattern": MASKS, **fields}, tensors, names, params)


def test_a_file_of_peft_is_read_by_folding():
    recipe, adapters = read(file_of())
    assert recipe == aj.Recipe(aj.LoRA("q", 3, 3, a_init="uniform"))
    own, scale = adapters["q"]["lora"], 8 / (4 + 1e-5)
    expected = double(FACTORS["a"]) @ np.diag(scale * FACTORS["lambda"]) @ double(FACTORS["b"])
    np.testing.assert_allclose(double(own["a"]) @ double(own["b"]), expected, rtol=1e-6)
    assert "v" not in adapters  # nothing of it is left


@pytest.mark.parametrize("short", ["q", "block.q"])
def test_ranks_of_modules_whose_names_end_alike_stay_apart(short):
    """PEFT, and the reader of its LoRA, find a pattern at the end of a name."""
    from adapters_jax.files.peft.convert import from_peft

    names = {"q": "q", "block.q": "block/q"}
    kernel = {"kernel": np.zeros((4, 6), np.float32)}
    tensors, masks = {}, {}
    for name in names:
        rank = 1 if name == short else 3
        masks[f"{name}.lora_E"] = [True] * rank + [False] * (4 - rank)
        for end, shape in (("A", (rank, 4)), ("E", (rank, 1)), ("B", (6, rank))):
            tensors[f"base_model.model.{name}.lora_{end}"] = drawn(shape, rank)
    config = {**CONFIG, "target_modules": ["q"], "rank_pattern": masks}
    recipe, adapters = from_peft(config, tensors, names, {"q": kernel, "block": {"q": kernel}})
    method = recipe.methods[0]
    for path, own in (("q", adapters["q"]), ("block/q", adapters["block"]["q"])):
        rank = 1 if path == short.replace(".", "/") else 3
        assert own["lora"]["a"].shape == (4, rank)
        assert method.rank_at(path) == rank and method.scale_at(path) == 1.0


@pytest.mark.parametrize(
    ("change", "fields", "data"),
    [
        ({}, {"init_r": "4"}, ["init_r='4'"]),
        ({}, {"rank_pattern": {"h.q.lora_E": 3}}, ["rank_pattern", "lists"]),
        ({}, {"rank_pattern": None}, ["h.q", "rank 4", "A [3, 4]"]),
        ({}, {"rank_pattern": MASKS | {"h.q.lora_E": [True] * 4}}, ["h.q", "rank 4"]),
        ({}, {"lora_alpha": 0}, ["lora_alpha=0"]),
        ({}, {"lora_alpha": 1e42}, ["h.q", "lora_alpha", "too large for float32"]),
        ({}, {"use_dora": True}, ["use_dora=True"]),
        ({}, {"target_modules": ["q2"]}, ["h.q", "target modules"]),
        ({"base_model.model.h.q.lora_E": None}, {}, ["h.q", "E"]),
        ({"base_model.model.h.x.lora_E": drawn((3, 1))}, {}, ["h.x"]),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(change, fields, data):
    tensors = {key: x for key, x in (file_of() | change).items() if x is not None}
    with raises(aj.AdapterFileError, *data):
        read(tensors, **fields)


def test_a_convolution_of_peft_has_its_window_flat():
    from adapters_jax.files.peft.convert import from_peft

    a, numbers, b = drawn((2, 3 * 2 * 2), 1), drawn((2, 1), 2), drawn((5, 2), 3)
    root = "base_model.model.conv.lora_"
    config = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
    params = {"conv": {"kernel": np.zeros((2, 2, 3, 5), np.float32)}}
    tensors = {f"{root}A": a, f"{root}E": numbers, f"{root}B": b}
    _, adapters = from_peft(config, tensors, {"conv": "conv"}, params)
    own = adapters["conv"]["lora"]
    theirs = (b @ (a * numbers)).reshape(5, 3, 2, 2) * 2 / (2 + 1e-5)
    got = np.einsum("hwir,ro->oihw", own["a"], own["b"])
    np.testing.assert_allclose(got, theirs, atol=1e-5)


@pytest.mark.slow
def test_gpt2s_fused_projection_gets_it_as_lora(tmp_path):
    names, model, _, inputs = base_of("gpt2")
    recipe = aj.Recipe(aj.AdaLoRA("**/{query,value}", rank=2))
    own = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=tuple(inputs.values()))
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(drawn(x.shape, x.size)), nnx.state(own, aj.nnx.AdapterParam)
    )
    nnx.update(own, adapters)
    _, read_back = load_peft(
        save_peft(tmp_path / "a", recipe, adapters, names, model), names, model
    )
    recipe, _ = load_peft(tmp_path / "a", names, model)
    native = aj.save_adapter(tmp_path / "native", read_back, recipe)
    again = aj.load_adapter(native, model, example_inputs=tuple(inputs.values()))
    np.testing.assert_allclose(again(**inputs), own(**inputs), atol=1e-4)
    assert np.abs(model(**inputs) - own(**inputs)).max() > 0.05


# The command line.


@pytest.mark.witness("encoder_run")
@pytest.mark.weekly
@pytest.mark.parametrize("make", [encoder_run, decoder_run])
def test_a_run_ends_with_the_budget_of_its_flags(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {encoder_run: REVIEWS, decoder_run: f"{MEANINGS} --exact-match 0"}[make]
    make()  # writes the files
    flags = "--method adalora --rank 4 --target-rank 2 --epochs 3 --batch-size 8 --name trained"
    assert main(["finetune", *files.split(), *flags.split()]) == 0
    recipe, adapters = aj.read_adapter("runs/trained/adapter")
    assert [method.rank for method in recipe.attached] == [4]
    numbers = [x for path, x in flatten(adapters).items() if path.endswith("/lambda")]
    left = sum(int((np.asarray(x) != 0).sum()) for x in numbers)
    assert left == 2 * sum(x.size // 4 for x in map(np.asarray, numbers))
    assert main(["convert", "runs/trained", "converted", "--to", "peft"]) == 0


@pytest.mark.slow
def test_flags_of_a_budget_need_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encoder_run()
    flags = f"{REVIEWS} --method lora --target-rank 2 --name other"
    with raises(aj.UserError, "--target-rank", "lora"):
        parse(Finetune, flags.split()).prepare(Console(json=True))


def test_the_default_budget_of_a_run_is_two_thirds_of_the_ranks_at_the_start():
    recipe = aj.AdaLoRA(("q", "v"), rank=12, rank_pattern={"v": 1})
    params = {
        name: {
            "adalora": {"a": drawn((4, r), r), "lambda": drawn(r, 30 + r), "b": drawn((r, 3), 60)}
        }
        for name, r in (("q", 12), ("v", 1))
    }
    options = OptimizerOptions(learning_rate=1e-2, warmup=0.0)
    tx, left = options.make(5, aj.Recipe(recipe)), []
    state = tx.init(params)
    for seed in range(5):
        grads = jax.tree.map(lambda x, seed=seed: drawn(x.shape, 100 + seed), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        left.append(sum(int((node["adalora"]["lambda"] != 0).sum()) for node in params.values()))
    assert left[-2:] == [8, 8]  # 4 of each module, of 6.5


def test_the_penalty_is_in_the_loss_of_a_run():
    options = OptimizerOptions(learning_rate=1e-2, orthogonality=0.25)
    problem = SimpleNamespace(recipe=RECIPE, loss=lambda *_: (2.0, {"accuracy": 1.0}))
    params = unflatten(tree(1))
    loss, metrics = options.loss_of(problem)(params, None, None)
    np.testing.assert_allclose(loss, 2.0 + 0.25 * aj.orthogonality(params, RECIPE), rtol=1e-6)
    assert metrics == {"accuracy": 1.0}
    without = SimpleNamespace(recipe=aj.lora(), loss=problem.loss)
    assert options.loss_of(without) is problem.loss
