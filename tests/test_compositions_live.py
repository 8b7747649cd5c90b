"""AdapterHub's compositions compute the same here, and ours there; needs `interop-test`."""

import numpy as np
import pytest
from helpers.errors import raises
from helpers.trained import trained
from test_adapterhub import base_of, logits_of, seen
from test_adapterhub_live import BASES, FIELDS, hub, model_of, torch, transformers

import adapters_jax as aj
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub

pytestmark = pytest.mark.filterwarnings("ignore")
ac = hub.composition
KINDS = {
    "double": lambda: hub.DoubleSeqBnConfig(reduction_factor=7),
    "seq": lambda: hub.SeqBnConfig(reduction_factor=5),
    "plus": lambda: hub.SeqBnConfig(original_ln_after=False, residual_before_ln=False),
}
SETUPS = {
    "stack": lambda n, m: ac.Stack("a", "b", "c-2"),
    "fuse": lambda n, m: ac.Fuse("a", "b", "c-2"),
    "stack of fuse": lambda n, m: ac.Stack("a", ac.Fuse("b", "c-2")),
    "fuse in a stack before": lambda n, m: ac.Stack(ac.Fuse("b", "c-2"), "a"),
    "split": lambda n, m: ac.Split("a", "b", splits=[3, m - 3]),
    "batch split": lambda n, m: ac.BatchSplit("b", "a", batch_sizes=[1, n - 1]),
    "parallel": lambda n, m: ac.Parallel("b", "a"),
    "split of splits": lambda n, m: ac.Split(
        ac.Split("b", "c-2", splits=[2, 2]), "a", splits=[4, m - 4]
    ),
}


def inputs_there(base):
    with np.load(BASES / base / "expected.npz") as file:
        return {name: torch.tensor(file[name]) for name in FIELDS if name in file}


def there(model, base):
    with torch.no_grad():
        return model.eval()(**inputs_there(base)).logits.numpy()


def made(base, kind, setup, directory):
    """A setup of AdapterHub with noise on every tensor, saved; and its logits."""
    model = model_of(base, False)
    for name in ("a", "b", "c-2"):
        model.add_adapter(name, config=KINDS[kind]())
    parts = [setup, *setup.children]
    for fuse in [each for each in parts if isinstance(each, ac.Fuse)]:
        model.add_adapter_fusion(fuse)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".adapters." in name or ".adapter_fusion_layer." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise
    model.set_active_adapters(setup)
    logits = there(model, base)
    model.save_adapter_setup(str(directory), setup, use_safetensors=True)
    return logits


def tiled(of, setup, base):
    """The base with the rows of a batch for each of the adapters in parallel."""
    n = len(setup) if isinstance(setup, ac.Parallel) else 1
    names, model, params, inputs = of
    return names, model, params, {k: np.tile(x, (n, 1)) for k, x in inputs.items()}


# What AdapterHub computes in another way: it adds the residual once more.
DIFFERS = {
    ("double", "split of splits"): False,
    **{("seq", case): case == "split of splits" for case in SETUPS},
    **{("plus", case): "stack" in case or case == "split of splits" for case in SETUPS},
}


@pytest.mark.parametrize("base", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SETUPS)
def test_a_setup_of_adapterhub_computes_the_same_and_goes_back(base, kind, case, tmp_path):
    setup = SETUPS[case](*inputs_there(base)["input_ids"].shape)
    of = tiled(base_of(base), setup, base)
    wanted = made(base, kind, setup, tmp_path / "theirs")
    if DIFFERS.get((kind, case)):
        with raises(aj.AdapterFileError, "AdapterHub adds the residual"):
            load_adapterhub(tmp_path / "theirs", of[0], of[2])
        return
    recipe, adapters = load_adapterhub(tmp_path / "theirs", of[0], of[2])
    got = logits_of(of, recipe, adapters, tmp_path)
    np.testing.assert_allclose(seen(of, got), seen(of, wanted), atol=2e-4)
    saved = save_adapterhub(tmp_path / "back", recipe, adapters, of[0], of[2])
    model = model_of(base, any(saved.glob("*/head_config.json")))
    model.load_adapter_setup(str(saved), set_active=True, use_safetensors=True)
    np.testing.assert_allclose(seen(of, there(model, base)), seen(of, wanted), atol=2e-4)


BOTTLENECK = {"targets": "**/mlp_norm", "bottleneck_dim": 4, "placement": "norm"}
REFUSED = {
    "an average": (aj.average("a", "b"), BOTTLENECK, "divides an average by the number"),
    "a split without sizes": (
        aj.split("a", "b", sizes=(3, None)),
        BOTTLENECK,
        "AdapterHub needs sizes=",
    ),
    "parallel bottlenecks": (
        aj.stack("a", "b"),
        {"targets": "**/mlp_sum", "bottleneck_dim": 4, "placement": "parallel"},
        "has a parallel bottleneck",
    ),
    "a fuse of stacks around norms": (
        aj.fuse(aj.stack("a", "b"), "c"),
        BOTTLENECK,
        "the fuse has another composition in it",
    ),
    "one beside": (aj.stack("a", "b"), BOTTLENECK, "one composition of all adapters, and Bottle"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_adapterhub_computes_in_another_way_is_not_written(case, tmp_path):
    entries, fields, words = REFUSED[case]
    names = "abc" if case in ("one beside", "a fuse of stacks around norms") else "ab"
    of = base_of("bert")
    recipe = aj.Recipe([aj.Bottleneck(name=name, **fields) for name in names], entries)
    adapters, _ = trained(of, recipe)
    with raises(aj.UserError, words):
        save_adapterhub(tmp_path / "a", recipe, adapters, of[0], of[2])
    assert not (tmp_path / "a").exists()


SHAPES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(hidden_size=2048, num_hidden_layers=3, intermediate_size=5632)
    ),
}


@pytest.mark.parametrize("base", SHAPES)
@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_a_fusion_has_as_many_parameters_as_adapterhubs(base, form):
    with torch.device("meta"):
        model = SHAPES[base]()
        hub.init(model)
        for name in "ab":
            model.add_adapter(name, config=hub.SeqBnConfig(reduction_factor=16))
        model.add_adapter_fusion(ac.Fuse("a", "b"), form)
    theirs = [x for name, x in model.named_parameters() if ".adapter_fusion_layer." in name]
    d, layers = model.config.hidden_size, model.config.num_hidden_layers
    (fusion,) = aj.fuse("a", "b", value=form == "dynamic")
    ours = fusion.count("", {"query/kernel": (layers, d, d)}, ())
    assert ours.parameters * ours.copies == sum(x.numel() for x in theirs)
