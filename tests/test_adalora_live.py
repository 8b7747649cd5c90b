"""AdaLoRA trains as in PEFT, and its files go both ways; needs the extra `interop-test`."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_peft_methods_live import (
    IDS,
    SIZES,
    logits,
    noisy,
    ours_with,
    peft,
    reloaded,
    torch,
    transformers,
)

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import ARCHITECTURES, load_decoder
from adapters_jax.trees import flatten, with_leaves

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, TARGET, ALPHA, STEPS, RATE = 4, 2, 6.0, 12, 0.5
BUDGET = {"target_r": TARGET, "total_step": STEPS, "tinit": 2, "tfinal": 3, "deltaT": 2}
NAMES = ARCHITECTURES["llama"].names
SCALED = ALPHA * RANK / (RANK + 1e-5)  # PEFT divides by so much more


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_peft(base, **fields):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    config = peft.AdaLoraConfig(  # without its task, PEFT leaves out the penalty
        task_type="CAUSAL_LM",
        init_r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "v_proj", "down_proj"],
        **BUDGET | fields,
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def steps_in_peft(model):
    """Trains by PEFT's allocator; yields the entries of E after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(IDS)
    for step in range(1, STEPS + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        named = dict(model.named_parameters())
        yield {n: p.detach().numpy().ravel().copy() for n, p in named.items() if "lora_E" in n}


def loss(model, batch, key):
    scores = optax.softmax_cross_entropy_with_integer_labels(model(batch)[:, :-1], batch[:, 1:])
    return scores.mean() + 0.5 * aj.orthogonality(model, RECIPE)


OURS = {"self_attn.q_proj": "attention/query", "self_attn.v_proj": "attention/value"} | {
    "mlp.down_proj": "mlp/output"
}
RECIPE = aj.Recipe(aj.AdaLoRA(("**/{query,value}", "**/mlp/output"), RANK, SCALED))


def start_of(model, theirs):
    """Our model with the factors that theirs starts with, and the modules by our paths."""
    own = aj.adapt(model, RECIPE, rngs=nnx.Rngs(0), example_inputs=(IDS,))
    named = {n: p.detach().numpy() for n, p in theirs.named_parameters() if "lora_" in n}
    paths, given = {}, {}
    state = nnx.state(own, aj.nnx.AdapterParam)
    for path, leaf in flatten(state).items():
        _, layer, *rest = path.split("/")
        ours = "/".join(rest[:2])
        name = next(n for n, each in OURS.items() if each == ours)
        key = f"base_model.model.model.layers.{layer}.{name}.lora_{{}}.default"
        prefix, _, last = path.rpartition("/")
        paths[prefix] = key.format("E")
        given[path] = named[key.format({"a": "A", "lambda": "E", "b": "B"}[last])].T
        given[path] = given[path].reshape(leaf.shape)
    nnx.update(own, with_leaves(state, given))
    return own, paths


def test_the_whole_training_is_that_of_peft(base):
    theirs = in_peft(base)
    model, paths = start_of(load_decoder(base)[1], theirs)
    tx = aj.adalora_budget(
        *(optax.sgd(RATE), RECIPE),
        **{"target_rank": TARGET, "total_steps": STEPS, "initial_steps": 2},
        **{"final_steps": 3, "every": 2},
    )
    state = aj.TrainState.create(model, tx=tx, key=jax.random.key(0))
    step, ranks = aj.make_train_step(loss), []
    for expected in steps_in_peft(theirs):
        state, _ = step(state, IDS)
        got = flatten(nnx.to_pure_dict(state.adapters))
        for prefix, key in paths.items():
            numbers = np.asarray(got[f"{prefix}/lambda"])
            np.testing.assert_array_equal(numbers == 0, expected[key] == 0)
            np.testing.assert_allclose(numbers, expected[key], atol=2e-5)
        ranks.append(sum(int((x != 0).sum()) for x in expected.values()))
    assert ranks[-1] == TARGET * len(paths) and len({*ranks}) > 2
    assert len({int((x != 0).sum()) for x in expected.values()}) > 1  # ranks differ
    np.testing.assert_allclose(jax.jit(state.model)(IDS), logits(theirs.eval()), atol=1e-4)


@pytest.mark.parametrize("finished", [True, False])
def test_what_peft_trained_is_read_as_lora(base, finished, tmp_path):
    theirs = in_peft(base)
    if finished:
        *_, _ = steps_in_peft(theirs)
    noisy(theirs)
    if finished:  # the noise is in what was cut as well
        theirs.base_model.update_and_allocate(STEPS)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    np.testing.assert_allclose(
        logits(reloaded(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "theirs")),
        *(expected,),
        atol=1e-5,
    )
    _, model = load_decoder(base)
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    np.testing.assert_allclose(
        ours_with(tmp_path, recipe, adapters, model), expected, rtol=1e-5, atol=1e-5
    )
    assert np.abs(model(IDS) - expected).max() > 0.05
    assert bool(recipe.attached[0].rank_pattern) == finished


def test_ours_is_written_as_lora_that_peft_reads(base, tmp_path):
    _, model = load_decoder(base)
    own = aj.adapt(model, RECIPE, rngs=nnx.Rngs(0), example_inputs=(IDS,))
    adapters = nnx.state(own, aj.nnx.AdapterParam)
    numbers = np.random.default_rng(0).normal
    adapters = jax.tree.map(lambda x: x + numbers(0, 0.3, x.shape).astype(np.float32), adapters)
    nnx.update(own, adapters)
    directory = save_peft(tmp_path / "ours", RECIPE, adapters, NAMES, model)
    theirs = reloaded(transformers.LlamaForCausalLM.from_pretrained(base), directory)
    np.testing.assert_allclose(logits(theirs), own(IDS), atol=1e-4)
    assert np.abs(model(IDS) - own(IDS)).max() > 0.05


SHAPES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=3, num_attention_heads=8
        )
    ),
}


@pytest.mark.parametrize(
    ("kind", "targets", "sizes"),
    [
        ("bert", ["query", "value"], [(768, 768)] * 24),
        ("llama", ["q_proj", "down_proj"], [(512, 512), (1376, 512)] * 3),
    ],
)
def test_the_count_is_that_of_peft(kind, targets, sizes):
    with torch.device("meta"):
        model = SHAPES[kind]()
        theirs = peft.get_peft_model(
            model, peft.AdaLoraConfig(target_modules=targets, total_step=9)
        )
    count = aj.AdaLoRA("**").count
    ours = [count("", {"a": (i, 12), "b": (12, o)}, (i, o)).parameters for i, o in sizes]
    assert sum(ours) == theirs.get_nb_trainable_parameters()[0]
