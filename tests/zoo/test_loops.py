"""Trainers of other libraries train the adapters and nothing else; each needs its library."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import adapters_jax as aj
from adapters_jax.nnx import AdapterParam
from adapters_jax.testing.subjects import bits
from adapters_jax.trees import flatten

from .tunix_models import IDS, LENGTH, llama3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what the libraries use
]
FROZEN = nnx.All(nnx.Param, nnx.Not(AdapterParam))
STEPS = 4


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def close(one, two):
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_allclose(x, two[path], rtol=1e-4, atol=1e-6, err_msg=path)


TUNIX = aj.Recipe(aj.LoRA("**/{q_proj,v_proj}", rank=3), aj.Unfreeze("**/input_layernorm/w"))
MASK = np.tile(np.tril(np.ones((LENGTH, LENGTH), bool)), (2, 1, 1))
INPUTS = {"positions": np.tile(np.arange(LENGTH), (2, 1)), "attention_mask": MASK}
BATCHES = [
    {"input_tokens": np.roll(IDS, i, 1), "input_mask": np.ones_like(IDS, bool), **INPUTS}
    for i in range(STEPS)
]


def logits(model):
    return model(IDS, INPUTS["positions"], None, MASK)[0]


def llama():
    return nnx.merge(*llama3().base, copy=True)


def peft_trained(steps, directory):
    """A model after the steps of tunix's trainer, which goes on from what the directory has."""
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    given = aj.inputs(IDS, INPUTS["positions"], None, MASK)
    model = aj.adapt(llama(), TUNIX, rngs=nnx.Rngs(0), example_inputs=given)
    config = TrainingConfig(
        eval_every_n_steps=10, max_steps=steps, checkpoint_root_directory=str(directory)
    )
    trainer = PeftTrainer(model, optax.adam(1e-2), config)
    trainer.train(BATCHES)
    return model, trainer


@needs("tunix")
def test_tunix_trains_saves_and_resumes_adapters(tmp_path):
    from tunix.sft.peft_trainer import _default_loss_fn

    model, _ = peft_trained(STEPS, tmp_path / "whole")
    base = llama()
    assert bits(nnx.state(model, FROZEN)) == bits(
        [x for p, x in flatten(nnx.state(base, nnx.Param)).items() if not TUNIX.trains(p)]
    )
    given = aj.inputs(IDS, INPUTS["positions"], None, MASK)
    fresh = aj.adapt(base, TUNIX, rngs=nnx.Rngs(0), example_inputs=given)
    state = aj.TrainState.create(fresh, tx=optax.adam(1e-2), key=jax.random.key(0))
    step = aj.make_train_step(lambda model, batch, key: _default_loss_fn(model, **batch))
    for batch in BATCHES:
        state, _ = step(state, batch)
    close(flatten(nnx.state(model, AdapterParam)), flatten(state.trained))

    loaded = aj.load_adapter(aj.save_adapter(tmp_path / "a", model), base, example_inputs=given)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    np.testing.assert_allclose(logits(aj.merge(model)), logits(model), rtol=1e-3, atol=1e-5)
    assert float(jnp.abs(logits(model) - logits(base)).max()) > 0.01

    half, trainer = peft_trained(STEPS // 2, tmp_path / "parts")
    assert trainer.train_steps == STEPS // 2
    resumed, trainer = peft_trained(STEPS, tmp_path / "parts")
    assert trainer.train_steps == STEPS
    assert bits(nnx.state(resumed, AdapterParam)) == bits(nnx.state(model, AdapterParam))
    assert bits(nnx.state(half, AdapterParam)) != bits(nnx.state(model, AdapterParam))
    aj.audit(resumed)


class Net(nn.Module):
    x: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))


def kauldron_trained(model, params, tx, data, loss, directory):
    """The parameters after kauldron's trainer, from the given ones on."""
    from kauldron import kd, kontext

    class Start(kd.ckpts.InitTransform):
        def transform(self, state):
            return state.replace(params=params)

    # The trainer asks the class of a model which fields say where its inputs are.
    type(model).__kontext_keys__ = lambda model: kontext.get_keypaths(model.inner)
    trainer = kd.train.Trainer(
        train_ds=kd.data.InMemoryPipeline(loader=lambda: data, batch_size=4),
        model=model,
        num_train_steps=STEPS,
        train_losses={"loss": loss(kd)},
        optimizer=tx,
        init_transform=Start(),
        writer=None,
        workdir=directory,
    )
    return trainer.train()[0].params


DATA = {
    "x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32),
}
TXS = {
    "freeze_base": lambda tx, recipe: aj.freeze_base(tx, recipe),
    "partial_updates": lambda tx, recipe: partial_updates(tx, "lora"),
}


def partial_updates(tx, pattern):
    from kauldron import kd

    return kd.optim.partial_updates(tx, mask=kd.optim.select(pattern))


@needs("kauldron")
@pytest.mark.parametrize("name", TXS)
def test_kauldron_trains_adapters(name, tmp_path):
    from kauldron import kontext

    Net.__annotations__["x"] = kontext.Key
    recipe = aj.Recipe(aj.LoRA("**", rank=2))
    model, base = aj.adapt(Net(x="batch.x"), recipe), Net(x="batch.x")
    params = base.init(jax.random.key(0), DATA["x"])["params"]
    params = aj.init_adapters(model, params, jax.random.key(1), DATA["x"])
    tx = TXS[name](optax.adam(1e-2), recipe)
    train = lambda tx: kauldron_trained(  # noqa: E731
        model,
        params,
        tx,
        DATA,
        lambda kd: kd.losses.L2(preds="preds", targets="batch.y"),
        tmp_path,
    )
    got = train(tx)
    leaves, frozen = aj.partition(got, recipe)
    assert bits(frozen) == bits(aj.partition(params, recipe)[1])
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(leaves))
    aj.audit(model, got)
    whole = train(optax.adam(1e-2))
    with pytest.raises(aj.MismatchError, match="4 of 4 frozen"):
        aj.audit(model, whole)


@needs("gemma", "kauldron")
def test_gemma_trains_adapters_by_its_own_mask(tmp_path):
    from gemma import gm, peft
    from gemma.gm.nn._config import TransformerConfig
    from gemma.gm.nn._modules import AttentionType

    config = TransformerConfig(
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        sliding_window_size=8,
    )
    base = gm.nn.Transformer(config=config, tokens="batch.tokens", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(1, 32, (16, 8))
    data = {"tokens": tokens, "target": np.roll(tokens, -1, 1)[..., None]}
    recipe = aj.Recipe(aj.LoRA("**/{q_einsum,kv_einsum}", rank=2))
    model = aj.adapt(base, recipe)
    params = base.init(jax.random.key(0), tokens)["params"]
    params = aj.init_adapters(model, params, jax.random.key(1), tokens)
    got = kauldron_trained(
        model,
        params,
        partial_updates(optax.adam(1e-2), "lora"),
        data,
        lambda kd: kd.losses.SoftmaxCrossEntropyWithIntLabels(
            logits="preds.logits", labels="batch.target"
        ),
        tmp_path,
    )
    leaves, frozen = aj.partition(got, recipe)
    assert bits(frozen) == bits(aj.partition(params, recipe)[1])
    original, lora = peft.split_params(got)
    assert bits(original) == bits(frozen) and bits(lora) == bits(leaves)
    saved = aj.save_adapter(tmp_path / "a", leaves, recipe)
    plain = aj.partition(params, recipe)[1]
    _, loaded = aj.load_adapter(saved, base, plain, tokens)
    assert bits(loaded) == bits(got)
    merged = base.apply({"params": aj.merge(model, got)}, tokens).logits
    adapted = model.apply({"params": got}, tokens).logits
    np.testing.assert_allclose(merged, adapted, rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(adapted - base.apply({"params": plain}, tokens).logits).max()) > 1e-3
