"""Diffusers and LyCORIS load what is written here, and we read what they write.

Both weights are compared: theirs with the adapter fused, and ours by the formula.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_diffusers import change, dora, ours

import adapters_jax as adapters
from adapters_jax.files.diffusers import load_diffusers, save_diffusers
from adapters_jax.placement import in_tree
from adapters_jax.targets import selects
from adapters_jax.trees import flatten, unflatten

WHY = "needs torch, diffusers and peft: pip install torch diffusers peft"
torch = pytest.importorskip("torch", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}
KINDS = {
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    },
}
LAYERS = r".*(attn1\.to_[qk]|attn2\.to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|conv1|conv)"
PIPELINES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "flux": diffusers.FluxPipeline,
}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "flux":
        model = diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=6,
            pooled_projection_dim=6,
            axes_dims_rope=(2, 2, 0),
        )
    else:
        model = diffusers.UNet2DConditionModel(**SIZES, **KINDS[kind])
    return randomised(model)


def randomised(model, only=""):
    for name, x in model.named_parameters():
        if only in name:
            torch.nn.init.normal_(x.data, std=0.3)
    return model


def weights(model):
    """The weights of the linear layers and convolutions, by the module's name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name.replace(".base_layer", ""): each.weight.detach().double().numpy()
        for name, each in model.named_modules()
        if isinstance(each, kinds) and ".lora_" not in name
    }


def base_of(model):
    """The parameters as of a Flax model whose modules have Diffusers' names, and its names."""
    found = weights(model)
    names = {name: name.replace(".", "/") for name in found}
    kernels = {
        f"{names[name]}/kernel": jnp.asarray(ours(x), jnp.float32) for name, x in found.items()
    }
    return names, unflatten(kernels)


def merged(recipe, tree, base):
    """Our weights with the adapter, in torch's shape, by module."""
    leaves, found = flatten(tree), {}
    for path, kernel in flatten(base).items():
        module = path.removesuffix("/kernel")
        kernel = np.asarray(kernel, np.float64)
        if f"{module}/lora/a" in leaves:
            a, b = (np.asarray(leaves[f"{module}/lora/{leaf}"], np.float64) for leaf in "ab")
            a, b = a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)), b.T
            (method,) = [m for m in adapters.Recipe(recipe) if selects(m.targets, module)]
            scale, norms = method.scale_at(module), leaves.get(f"{module}/lora/magnitude")
            kernel = (
                kernel + ours(change(a, b, scale))
                if norms is None
                else dora(kernel, a, b, scale, np.asarray(norms))
            )
        n = kernel.ndim
        found[module.replace("/", ".")] = kernel.transpose(n - 1, n - 2, *range(n - 2))
    return found


def equal(found, expected, plain, least=3):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=2e-5, err_msg=name)
    changed = [name for name, x in expected.items() if np.abs(x - plain[name]).max() > 1e-2]
    assert len(changed) >= least


def config_of(**fields):
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, **fields)


CONFIGS = {
    "lora": {},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7, "conv1": 2}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_writes(kind, config, alone, tmp_path):
    """A UNet alone, and a pipeline's part, with the configuration among the metadata."""
    model = model_of(kind)
    _, base = base_of(model)
    plain = weights(model)
    model.add_adapter(config_of(**CONFIGS[config]), "default")
    randomised(model, ".lora_")
    if alone:
        model.save_lora_adapter(tmp_path, adapter_name="default")
    else:
        pipeline = PIPELINES[kind]
        layers = peft.utils.get_peft_model_state_dict(model)
        facts = model.peft_config["default"].to_dict()
        pipeline.save_lora_weights(
            tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=facts
        )
    recipe, tree, *_ = load_diffusers(tmp_path / "pytorch_lora_weights.safetensors", None, base)
    model.fuse_lora()
    equal(merged(recipe, tree, base), weights(model), plain)


def sgm(name, layers=2):
    """The name in Stable Diffusion XL's checkpoint, by which kohya trains it."""
    resnet = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    resnet["conv_shortcut"] = "skip_connection"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name):
        side, block, kind, layer, rest = found.groups()
        number = int(block) * (layers + 1) + int(layer) + (side == "down")
        rest = resnet[rest] if kind == "resnets" else rest
        side = {"down": "input", "up": "output"}[side]
        return f"{side}_blocks.{number}.{int(kind == 'attentions')}.{rest}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, layer, rest = found.groups()
        number = 1 if kind == "attentions" else 2 * int(layer)
        return f"middle_block.{number}.{resnet[rest] if kind == 'resnets' else rest}"
    return name


def trained(base, recipe):
    """An adapter of ours with drawn leaves, in the shapes of a recipe for all its targets."""
    leaves, rng = {}, np.random.default_rng(3)
    for path, kernel in flatten(base).items():
        module = path.removesuffix("/kernel")
        for method in adapters.Recipe(recipe):
            if selects(method.targets, module):
                *inputs, outputs = kernel.shape
                leaves[f"{module}/lora/a"] = rng.standard_normal((*inputs, method.rank))
                leaves[f"{module}/lora/b"] = rng.standard_normal((method.rank, outputs))
                if isinstance(method, adapters.DoRA):
                    leaves[f"{module}/lora/magnitude"] = rng.uniform(0.5, 2, outputs)
    return unflatten({path: (0.3 * x).astype(np.float32) for path, x in leaves.items()})


def loaded_there(kind, file, model):
    """The weights of Diffusers' model with the adapter of a file."""
    pipeline = PIPELINES[kind]
    if kind == "flux":
        tensors, alphas = pipeline.lora_state_dict(file, return_alphas=True)
        pipeline.load_lora_into_transformer(tensors, alphas, model, adapter_name="default")
    else:
        tensors, alphas = pipeline.lora_state_dict(file, unet_config=model.config)
        pipeline.load_lora_into_unet(tensors, alphas, model, adapter_name="default")
    model.fuse_lora()
    return weights(model)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_here(kind, style, tmp_path):
    """kohya names SDXL's modules as its checkpoint does, which Diffusers converts by itself."""
    model = model_of(kind)
    names, base = base_of(model)
    targets = ["**/to_q", "**/to_v", "**/to_out/0", "**/proj", "**/proj_in"]
    targets += [] if kind == "sdxl" and style == "kohya" else ["**/conv1"]
    method = adapters.LoRA(targets, rank=2, alpha=6)
    tree = trained(base, method)
    if kind == "sdxl" and style == "kohya":
        names = {sgm(name): path for name, path in names.items()}
    part = (method, tree, names, base)
    file = save_diffusers(tmp_path / "a.safetensors", {"unet": part}, style=style)
    plain = weights(model)
    equal(loaded_there(kind, file, model), merged(method, tree, base), plain)


def test_dora_that_is_written_here(tmp_path):
    model = model_of("sd")
    names, base = base_of(model)
    method = adapters.DoRA(["**/to_q", "**/conv1"], rank=2, alpha=6)
    tree, plain = trained(base, method), weights(model)
    part = (method, tree, names, base)
    file = save_diffusers(tmp_path / "a.safetensors", {"unet": part}, style="diffusers")
    equal(loaded_there("sd", file, model), merged(method, tree, base), plain)


QKV = {
    f"double_blocks.0.{ours}.qkv": [f"transformer_blocks.0.attn.{x}" for x in theirs]
    for ours, theirs in {
        "img_attn": ("to_q", "to_k", "to_v"),
        "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }.items()
}
ONE = {
    "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.net.2",
    "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
}


def test_flux_of_kohya(tmp_path):
    """Both read a file of kohya's names for FLUX alike, whose queries, keys and values are one."""
    model = model_of("flux")
    _, base = base_of(model)
    rng, tensors, plain = np.random.default_rng(9), {}, weights(model)
    for name, several in {**QKV, **{name: [each] for name, each in ONE.items()}}.items():
        width = sum(len(plain[each]) for each in several)
        down = rng.standard_normal((2, plain[several[0]].shape[1]))
        up, key = rng.standard_normal((width, 2)), f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = np.asarray(5.0)
    file = tmp_path / "a.safetensors"
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, file)
    recipe, tree, *_ = load_diffusers(file, None, base)
    equal(loaded_there("flux", file, model), merged(recipe, tree, base), plain)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_flux_that_is_written_here(style, tmp_path):
    model = model_of("flux")
    names, base = base_of(model)
    # Queries and values have no A in common, so their fused pair has twice their rank.
    method = adapters.Recipe(
        adapters.LoRA("transformer_blocks/0/attn/{to_q,to_v}", rank=2, alpha=3),
        adapters.LoRA("single*/**/proj_out", rank=4, alpha=5),
    )
    if style == "kohya":
        names = {name: tuple(x.replace(".", "/") for x in several) for name, several in QKV.items()}
        names |= {name: each.replace(".", "/") for name, each in ONE.items()}
    tree, plain = trained(base, method), weights(model)
    part = (method, tree, names, base)
    file = save_diffusers(tmp_path / "a.safetensors", {"transformer": part}, style=style)
    equal(loaded_there("flux", file, model), merged(method, tree, base), plain)


LYCORIS = {
    "lora": {},
    "tucker": {"use_tucker": True},
    "dora": {"dora_wd": True, "conv_dim": 2},
    "rslora": {"rs_lora": True},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="needs lycoris: pip install lycoris-lora")
    model = model_of("sd")
    _, base = base_of(model)
    given = {"algo": "lora", "conv_dim": 3, "conv_alpha": 2, **LYCORIS[kind]}
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=6, **given)
    plain, expected = weights(model), {}
    network.apply_to()
    randomised(network, "lora_")
    for x in network.parameters():
        x.data += 0.3 * torch.rand_like(x)
    modules = {f"lycoris_{name.replace('.', '_')}": name for name in plain}
    for lora in network.loras:
        expected[modules[lora.lora_name]] = lora.get_merged_weight()[0].detach().double().numpy()
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    recipe, tree, *_ = load_diffusers(tmp_path / "a.safetensors", None, base)
    assert {isinstance(m, adapters.DoRA) for m in recipe} == {kind == "dora"}
    equal(merged(recipe, tree, base), expected, plain, least=50)


PRODUCTS = {
    "loha": {"algo": "loha", "conv_dim": 3, "conv_alpha": 2},
    "loha_tucker": {"algo": "loha", "conv_dim": 2, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_dim": 2},
    "lokr_factor": {"algo": "lokr", "linear_dim": 1, "factor": 4, "decompose_both": True},
    "lokr_whole": {"algo": "lokr", "linear_dim": 10_000},
}


def added(recipe, tree, base):
    """Our weights with any adapter merged, in torch's shape, by module."""
    flat = flatten(base)
    shapes = {path: x.shape for path, x in {**flat, **flatten(tree)}.items()}
    for each in in_tree(recipe, shapes):
        own = {each.weight: flat[each.weight_path]}
        made = each.method.merged(each.leaves(flatten(tree)), each.point(), own)
        flat[each.weight_path] = made[each.weight]
    turned = {path.removesuffix("/kernel"): np.asarray(x, np.float64) for path, x in flat.items()}
    return {
        name.replace("/", "."): x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
        for name, x in turned.items()
    }


@pytest.mark.parametrize("kind", PRODUCTS)
def test_loha_and_lokr_of_lycoris(kind, tmp_path, monkeypatch):
    """Read as LyCORIS computes them, written, and loaded by LyCORIS again."""

    def change_of(each):
        return each.get_weight(each.shape).detach().double().numpy()

    lycoris = pytest.importorskip("lycoris", reason="needs lycoris: pip install lycoris-lora")
    model = model_of("sd")
    _, base = base_of(model)
    targets = ["Transformer2DModel", *(["ResnetBlock2D"] if "loha" in kind else [])]
    # `apply_preset` sets the class for good, also for other tests.
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_MODULE", targets)
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_NAME", [])
    given = {"linear_dim": 4, "linear_alpha": 6, **PRODUCTS[kind]}
    network = lycoris.create_lycoris(model, 1.0, **given)
    plain, expected = weights(model), weights(model)
    network.apply_to()
    for x in network.parameters():
        torch.nn.init.normal_(x.data, std=0.5)
    modules = {f"lycoris_{name.replace('.', '_')}": name for name in plain}
    for each in network.loras:  # as its `forward` has it; `get_merged_weight` scales twice
        expected[modules[each.lora_name]] += change_of(each)
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    recipe, tree, *_ = load_diffusers(tmp_path / "a.safetensors", None, base)
    assert {m.kind for m in recipe} == {kind.partition("_")[0]}
    equal(added(recipe, tree, base), expected, plain, least=10)
    names = {name: name.replace(".", "/") for name in plain}
    file = save_diffusers(tmp_path / "b.safetensors", {"unet": (recipe, tree, names, base)})
    tensors = {  # LyCORIS wants its own prefix
        key.replace("lora_unet_", "lycoris_"): torch.tensor(x) for key, x in load_file(file).items()
    }
    other, _ = lycoris.create_lycoris_from_weights(1.0, None, model_of("sd"), tensors)
    assert len(other.loras) == len(network.loras)
    for each in other.loras:
        name = modules[each.lora_name]
        np.testing.assert_allclose(plain[name] + change_of(each), expected[name], atol=2e-5)


def test_the_unet_of_flax(tmp_path):
    """The real UNet in Flax computes what torch's does, from kohya's names and without a table."""
    if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
        pytest.skip("diffusers has no models in Flax since 0.36")
    from diffusers.models.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    sizes = {**SIZES, **KINDS["sd"], "block_out_channels": (32, 64), "norm_num_groups": 32}
    model = diffusers.UNet2DConditionModel(**sizes)
    sizes.pop("norm_num_groups")
    flax = diffusers.FlaxUNet2DConditionModel(**sizes)
    params = convert_pytorch_state_dict_to_flax(model.state_dict(), flax)
    rng, tensors = np.random.default_rng(5), {}
    for name, x in weights(model).items():
        if re.fullmatch(LAYERS, name):
            key = f"lora_unet_{name.replace('.', '_')}"
            down = rng.standard_normal((3, *x.shape[1:])) * 0.2
            up = rng.standard_normal((len(x), 3, *(1 for _ in x.shape[2:]))) * 0.2
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.asarray(2.0)
    file = tmp_path / "a.safetensors"
    save_file({key: np.asarray(x, np.float32) for key, x in tensors.items()}, file)
    recipe, tree, *_ = load_diffusers(file, None, params)
    sample, context = rng.standard_normal((1, 4, 8, 8)), rng.standard_normal((1, 5, 12))
    inputs = (jnp.asarray(sample, jnp.float32), jnp.asarray(7), jnp.asarray(context, jnp.float32))
    whole = adapters.merge_trees(tree, adapters.partition(params, recipe)[1])
    found = adapters.adapt(flax, recipe).apply({"params": whole}, *inputs).sample
    given = (torch.tensor(sample).float(), 7, torch.tensor(context).float())
    with torch.no_grad():
        plain = model(*given).sample.numpy()
        loaded_there("sd", file, model)
        expected = model(*given).sample.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
