"""LoHa, LoKr, OFT and VeRA of PEFT compute the same here, and theirs of ours; needs
`interop-test`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import bert, decoder
from adapters_jax.trees import flatten, unflatten

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = ["up", "down"]
NAMES = {name: name for name in (*BOTH, "conv")}


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 4, (2, 3))
        self.up, self.down = torch.nn.Linear(12, 30), torch.nn.Linear(30, 12)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 12)
        return self.down(torch.relu(self.up(x)))


class Ours(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (2, 3), padding="VALID", name="conv")(x))
        x = nn.relu(nn.Dense(30, name="up")(x.reshape(x.shape[0], -1, 12)))
        return nn.Dense(12, name="down")(x)


X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)


def base_of(model):
    """Our parameters of theirs."""
    found = {}
    for name in NAMES:
        module = getattr(model, name)
        weight = module.weight.detach().numpy()
        kernel = weight.transpose(*range(2, weight.ndim), 1, 0)
        found[name] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(module.bias.detach())}
    return found


def noisy(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def trained(model):
    return sum(x.numel() for x in model.parameters() if x.requires_grad)


def run(model, x=X):
    with torch.no_grad():
        return model(torch.tensor(x)).numpy()


def again(base, directory):
    """An adapter in PEFT, which must miss no tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(base, directory).eval()


def both_ways(config, tmp_path):
    """Reads what PEFT writes, and compares outputs; then writes it, and compares PEFT's."""
    theirs = noisy(peft.get_peft_model(Theirs(), config))
    expected = run(theirs)
    assert np.abs(expected - run(Theirs())).max() > 0.05
    theirs.save_pretrained(tmp_path / "theirs")
    params = base_of(Theirs())
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, params)
    model, whole = aj.adapt(Ours(), recipe), unflatten(flatten(params) | flatten(adapters))
    x = X.transpose(0, 2, 3, 1)
    got = model.apply({"params": whole}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert aj.audit(model, whole).trainable_parameters == trained(theirs)
    ours = save_peft(tmp_path / "ours", recipe, adapters, NAMES, params)
    np.testing.assert_allclose(run(again(Theirs(), ours)), expected, rtol=1e-5, atol=1e-5)
    return recipe


CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=BOTH),
    "loha_patterns": lambda: peft.LoHaConfig(
        **{"r": 3, "alpha": 5, "target_modules": BOTH, "exclude_modules": ["conv"]},
        rank_pattern={"up": 2},
        alpha_pattern={"down": 7},
    ),
    "loha_conv": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=[*BOTH, "conv"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=BOTH),
    "lokr_both": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=BOTH, decompose_both=True),
    "lokr_whole": lambda: peft.LoKrConfig(r=8, alpha=3, target_modules=BOTH),
    "lokr_some_whole": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=BOTH, rank_pattern={"up": 5}, init_weights="lycoris"
    ),
    "lokr_factor": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["up"], decompose_factor=4),
    "lokr_large_factor": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=BOTH, decompose_factor=6, alpha_pattern={"up": 1}
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=BOTH, vera_dropout=0.2),
    "vera_of_one": lambda: peft.VeraConfig(r=4, target_modules=["up"], d_initial=-0.3),
    "vera_saved": lambda: peft.VeraConfig(
        r=4, target_modules=["up"], modules_to_save=["down"], projection_prng_key=3
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=6, target_modules=BOTH),
    "oft_r": lambda: peft.OFTConfig(r=3, oft_block_size=0, target_modules=["up"]),
    "oft_exact": lambda: peft.OFTConfig(
        oft_block_size=3, target_modules=BOTH, use_cayley_neumann=False
    ),
    "oft_share": lambda: peft.OFTConfig(
        oft_block_size=3, target_modules=["up"], block_share=True, module_dropout=0.1
    ),
    **{
        f"oft_{n}_terms": lambda n=n: peft.OFTConfig(
            oft_block_size=3, target_modules=BOTH, num_cayley_neumann_terms=n
        )
        for n in (2, 3, 4, 6)
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name, tmp_path):
    kinds = {method.kind for method in both_ways(CONFIGS[name](), tmp_path)}
    assert name.partition("_")[0] in kinds


def test_a_window_in_a_tensor_of_its_own_is_read(tmp_path):
    """PEFT's effective convolution has fewer numbers than ours, so the counts differ."""
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=["conv"], use_effective_conv2d=True)
    theirs = noisy(peft.get_peft_model(Theirs(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    params = base_of(Theirs())
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, params)
    whole = aj.merge_trees(adapters, params)
    got = aj.adapt(Ours(), recipe).apply({"params": whole}, X.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, run(theirs), rtol=1e-4, atol=1e-4)
    ours = save_peft(tmp_path / "ours", recipe, adapters, NAMES, params)
    np.testing.assert_allclose(run(again(Theirs(), ours)), run(theirs), rtol=1e-4, atol=1e-5)


REFUSED = {
    "lokr_conv": (
        lambda: peft.LoKrConfig(r=2, target_modules=["conv"]),
        ["conv", "lokr_w1", "[2, 3, 3, 4]"],
    ),
    "oft_conv": (
        lambda: peft.OFTConfig(oft_block_size=9, target_modules=["conv"]),
        ["conv", "blocks of", "[2, 3, 3, 4]"],
    ),
    "oft_coft": (
        lambda: peft.OFTConfig(oft_block_size=3, target_modules=["up"], coft=True),
        ["coft=True"],
    ),
    "oft_bias": (
        lambda: peft.OFTConfig(oft_block_size=3, target_modules=["up"], bias="all"),
        ["bias='all'"],
    ),
    "vera_unsaved": (
        lambda: peft.VeraConfig(r=4, target_modules=["up"], save_projection=False),
        ["vera_A", "save_projection=True"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name, tmp_path):
    make, data = REFUSED[name]
    noisy(peft.get_peft_model(Theirs(), make())).save_pretrained(tmp_path / "theirs")
    with raises(aj.AdapterFileError, *data):
        load_peft(tmp_path / "theirs", NAMES, base_of(Theirs()))


SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
IDS = np.array([[4, 9, 5, 6, 11, 7], [1, 2, 3, 4, 5, 6]])
EVERY = ["q_proj", "v_proj", "down_proj"]
ON_LLAMA = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=EVERY, layers_to_transform=[1]),
    "lokr": lambda: peft.LoKrConfig(r=1, target_modules=EVERY, rank_pattern={"v_proj": 2}),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=EVERY),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=EVERY),
}


@pytest.mark.parametrize("kind", ON_LLAMA)
def test_a_llama_with_fewer_keys_and_values(kind, tmp_path):
    llama = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    llama(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    theirs = noisy(peft.get_peft_model(llama.from_pretrained(tmp_path / "base"), ON_LLAMA[kind]()))
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    _, model = decoder.load_decoder(tmp_path / "base")
    recipe, adapters = load_peft(tmp_path / "theirs", decoder.NAMES, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    adapted = aj.load_adapter(native, model, example_inputs=(IDS,))
    assert aj.audit(adapted).trainable_parameters == trained(theirs)
    got = nnx.jit(lambda model: model(IDS))(adapted)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(model(IDS) - expected).max() > 0.02
    ours = save_peft(tmp_path / "ours", recipe, adapters, decoder.NAMES, model)
    back = again(llama.from_pretrained(tmp_path / "base"), ours)
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(IDS)).logits.numpy(), expected, atol=1e-5)


COUNTED = {
    "loha": (aj.loha(8), lambda names: peft.LoHaConfig(r=8, target_modules=names)),
    "lokr": (aj.lokr(8), lambda names: peft.LoKrConfig(r=8, target_modules=names)),
    "lokr_factor": (
        aj.lokr(4, factor=16, both=True),
        lambda names: peft.LoKrConfig(
            r=4, target_modules=names, decompose_factor=16, decompose_both=True
        ),
    ),
    "oft": (aj.oft(32), lambda names: peft.OFTConfig(oft_block_size=32, target_modules=names)),
    "vera": (aj.vera(256), lambda names: peft.VeraConfig(r=256, target_modules=names)),
}
LLAMA = {  # of Llama 3.2 1B, with two of its layers
    **{"vocab_size": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}


@pytest.mark.parametrize("base", ["bert", "llama"])
@pytest.mark.parametrize("name", COUNTED)
def test_the_parameters_are_as_many(name, base):
    """BERT-base and a Llama with fewer keys and values; VeRA's stored factors are as large, too."""
    recipe, config = COUNTED[name]
    if base == "bert":
        with torch.device("meta"):
            theirs = transformers.BertModel(transformers.BertConfig(vocab_size=64))
        names = ["query", "value"]
        module = bert.Bert(bert.BertConfig(vocab_size=64))
        ids = jnp.ones((1, 4), int)
        shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
        model = aj.adapt(module, recipe)
        whole = aj.init_adapters(model, shapes, jax.random.key(1), ids)
        audit, leaves = aj.audit(model, whole), flatten(whole)
    else:
        with torch.device("meta"):
            theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        names = ["q_proj", "v_proj"]
        shapes = decoder.DecoderConfig(**LLAMA)
        module = nnx.eval_shape(lambda: decoder.Decoder(shapes, rngs=nnx.Rngs(0)))
        model = aj.adapt(module, recipe, rngs=nnx.Rngs(1))
        audit, leaves = aj.audit(model), flatten(nnx.state(model, nnx.Param))
    theirs = peft.get_peft_model(theirs, config(names))
    assert audit.trainable_parameters == trained(theirs)
    if name == "vera":
        stored = {n: x.numel() for n, x in theirs.named_buffers() if n.endswith("vera_A.default")}
        assert leaves["vera/left"].shape[0] * 256 == next(iter(stored.values()))
