"""LoRA files of Diffusers, kohya and LyCORIS: merged weights by their formula, and each misfit."""

import itertools
import json
import math
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, AdapterMismatchError, UserError
from adapters_jax.files.diffusers import load_diffusers, save_diffusers
from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder import NAMES as NAMES_OF_DECODER
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.methods.lokr import divided
from adapters_jax.targets import selects
from adapters_jax.trees import flatten, unflatten

X = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
BLOCK = "transformer_blocks.0"
FIRST, MIDDLE = "down_blocks.1.attentions.0", "mid_block.attentions.0"
# Names in Diffusers, and those of Stable Diffusion XL's checkpoint, by which kohya trains it.
NAMES = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
    f"{FIRST}.proj_in": "input_blocks.4.1.proj_in",
    **{
        f"{FIRST}.{BLOCK}.{each}": f"input_blocks.4.1.{BLOCK}.{each}"
        for each in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
    },
    f"{FIRST}.{BLOCK}.ff.net.2": f"input_blocks.4.1.{BLOCK}.ff.net.2",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    f"{MIDDLE}.proj_in": "middle_block.1.proj_in",
    f"{MIDDLE}.{BLOCK}.attn1.to_q": f"middle_block.1.{BLOCK}.attn1.to_q",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks.2.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
}


class Part(nn.Module):
    """Layers by the names that Diffusers gives them in Flax, in a chain that uses each of them.

    `layers` has paths with a width each, and the size of a convolution's window, else 0.
    """

    layers: tuple

    @nn.compact
    def __call__(self, x):
        own, inner = {}, {}
        for path, spec in self.layers:
            first, _, rest = path.partition("/")
            if rest:
                inner.setdefault(first, []).append((rest, spec))
            else:
                own[first] = spec
        for name, (width, window) in own.items():
            conv = nn.Conv(width, (window, window), name=name) if window else None
            x = jnp.tanh((conv or nn.Dense(width, name=name))(x))
        for name, layers in inner.items():
            x = Part(tuple(layers), name=name)(x)
        return x


def drawn_like(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


def unet(names=tuple(NAMES)):
    """A model with layers of these names, its parameters, and its paths by name."""
    paths = {name: re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/") for name in names}
    layers = []
    for i, (name, path) in enumerate(paths.items()):
        window = 3 if "conv" in name and "shortcut" not in name else 0
        window = 1 if "proj_in" in name or "shortcut" in name else window
        layers.append((path, (3 + i % 4, window)))
    model = Part(tuple(layers))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return model, drawn_like(shapes), paths


MODEL, PARAMS, PATHS = unet()


def torch_shape(params, path):
    *window, inputs, outputs = flatten(params)[f"{path}/kernel"].shape
    return outputs, inputs, *window


def drawn(params=PARAMS, paths=PATHS, rank=2, seed=2):
    """A pair in torch's shapes for each module, by name; other ranks for convolutions."""
    rng, made = np.random.default_rng(seed), {}
    for name, path in paths.items():
        outputs, inputs, *window = torch_shape(params, path)
        r = rank + len(window) // 2
        down = 0.5 * rng.standard_normal((r, inputs, *window)).astype(np.float32)
        up = 0.5 * rng.standard_normal((outputs, r, *(1 for _ in window))).astype(np.float32)
        made[name] = (down, up)
    return made


def change(down, up, scale):
    """The change of a weight in torch's shape, by the formula, in float64."""
    down, up = np.asarray(down, np.float64), np.asarray(up, np.float64)
    return scale * np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)


def ours(weight):
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def theirs(weight):
    return weight.transpose(weight.ndim - 1, weight.ndim - 2, *range(weight.ndim - 2))


def kohya(pairs, prefix="lora_unet_", alpha=None):
    made = {}
    for i, (name, (down, up)) in enumerate(pairs.items()):
        key = prefix + name.replace(".", "_")
        made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha:
            made[f"{key}.alpha"] = np.asarray(alpha + i % 2, np.float16)
    return made


def check(expected, recipe, adapters, params=PARAMS, model=MODEL):
    """Each kernel is `expected` by path where it has one, and the base's elsewhere."""
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    found = flatten(aj.merge(aj.adapt(model, recipe), whole, X))
    assert found.keys() == flatten(params).keys()
    for path, base in flatten(params).items():
        wanted = expected.get(path.removesuffix("/kernel"), base) if "kernel" in path else base
        np.testing.assert_allclose(found[path], wanted, rtol=2e-5, atol=2e-5, err_msg=path)


def formula(params, paths, pairs, scale_of):
    made = {}
    for i, (name, path) in enumerate(paths.items()):
        base = np.asarray(flatten(params)[f"{path}/kernel"], np.float64)
        down, up = pairs[name]
        made[path] = base + ours(change(down, up, scale_of(i, len(down))))
    return made


@pytest.mark.slow
def test_kohya(tmp_path):
    """Names without dots, LoCon's 3x3 and 1x1 convolutions, and an alpha for each module."""
    pairs = drawn()
    save_file(kohya(pairs, alpha=3), tmp_path / "a.safetensors", {"ss_clip_skip": "2"})
    recipe, adapters, others, metadata = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    assert (others, metadata) == ({}, {"ss_clip_skip": "2"})
    assert {(m.rank, m.alpha) for m in recipe} == {(2, 3), (2, 4), (3, 3), (3, 4)}
    expected = formula(PARAMS, PATHS, pairs, lambda i, rank: (3 + i % 2) / rank)
    check(expected, recipe, adapters)
    whole = aj.merge_trees(adapters, aj.partition(PARAMS, recipe)[1])
    out = aj.adapt(MODEL, recipe).apply({"params": whole}, X)
    kernels = {f"{path}/kernel": jnp.asarray(x, jnp.float32) for path, x in expected.items()}
    plain = unflatten({**flatten(PARAMS), **kernels})
    np.testing.assert_allclose(out, MODEL.apply({"params": plain}, X), atol=1e-4)
    assert np.abs(out - MODEL.apply({"params": PARAMS}, X)).max() > 0.1


def spelled_as(style, pairs):
    made = {}
    for name, (down, up) in pairs.items():
        attention = "attn1" in name
        module = name.replace("attn1.", "attn1.processor.").replace("to_out.0", "to_out")
        ends = {
            "sgm": ("", ".lora_down.weight", ".lora_up.weight"),
            "lycoris": ("", ".lora_down.weight", ".lora_up.weight"),
            "onetrainer": ("", ".lora_down.weight", ".lora_up.weight"),
            "comfy": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
            "peft": ("unet.", ".lora_A.weight", ".lora_B.weight"),
            "diffusers": ("unet.", ".lora.down.weight", ".lora.up.weight"),
            "old": ("unet.", ".lora.down.weight", ".lora.up.weight"),
            "alone": ("", ".lora.down.weight", ".lora.up.weight"),
        }[style]
        if style == "sgm":
            name = f"lora_unet_{NAMES[name].replace('.', '_')}"
        elif style in ("onetrainer", "lycoris"):
            prefix = {"onetrainer": "lora_transformer", "lycoris": "lycoris"}[style]
            name = f"{prefix}_{name.replace('.', '_')}"
        elif style in ("old", "alone") and attention:
            name, ends = module, (ends[0], "_lora.down.weight", "_lora.up.weight")
        made |= {f"{ends[0]}{name}{ends[1]}": down, f"{ends[0]}{name}{ends[2]}": up}
    return made


@pytest.mark.parametrize(
    "style", ["sgm", "onetrainer", "lycoris", "comfy", "peft", "diffusers", "old", "alone"]
)
def test_spellings(style, tmp_path):
    pairs = drawn()
    save_file(spelled_as(style, pairs), tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS, part="unet")
    check(formula(PARAMS, PATHS, pairs, lambda i, rank: 1), recipe, adapters)


def test_a_table_of_the_user(tmp_path):
    """A mapping and a `NameTable`, to names of the model's own; a convolution is dense here."""
    mine = {"proj_in": "enter", "attn1.to_q": "query", "ff.net.2": "leave"}
    layers = [
        (f"block_{i}/{path}", (3 + j, 0)) for i in range(2) for j, path in enumerate(mine.values())
    ]
    model = Part(tuple(layers))
    params = drawn_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    paths = {f"blocks.{i}.{n}": f"block_{i}/{path}" for i in range(2) for n, path in mine.items()}
    pairs = drawn(params, paths)
    for i in range(2):
        down, up = pairs[f"blocks.{i}.proj_in"]
        pairs[f"blocks.{i}.proj_in"] = (down[..., None, None], up[..., None, None])
    save_file(kohya(pairs, alpha=1), tmp_path / "a.safetensors")
    flat = {name: tuple(x.reshape(x.shape[:2]) for x in pair) for name, pair in pairs.items()}
    expected = formula(params, paths, flat, lambda i, rank: (1 + i % 2) / rank)
    rules = [Rule(rf"block_(\d+)/{path}", rf"blocks.\1.{n}") for n, path in mine.items()]
    for names in (paths, NameTable(tuple(rules))):
        recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", names, params)
        check(expected, recipe, adapters, params, model)


@pytest.mark.slow
def test_nnx(tmp_path):
    """The numbers of lists are names, so `blocks/0` is `blocks.0`; both styles are written."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.to_q = nnx.Linear(4, 6, rngs=rngs)
            self.linear_1 = nnx.Conv(6, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return x + self.linear_1(jnp.tanh(self.to_q(x)))

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(2)])

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    base = Net()
    params = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    paths = {f"blocks.{i}.{n}": f"blocks/{i}/{n}" for i in range(2) for n in ("to_q", "linear_1")}
    pairs = drawn(params, paths)
    save_file(kohya(pairs, alpha=5), tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, base)
    expected = formula(params, paths, pairs, lambda i, rank: (5 + i % 2) / rank)

    def check_here(recipe, adapters):
        aj.save_adapter(tmp_path / "ours", adapters, recipe)
        model = aj.load_adapter(tmp_path / "ours", base)
        found = flatten(nnx.to_pure_dict(nnx.state(aj.merge(model), nnx.Param)))
        for path, kernel in expected.items():
            np.testing.assert_allclose(found[f"{path}/kernel"], kernel, rtol=2e-5, atol=2e-5)
        return nnx.state(model, aj.nnx.AdapterParam)

    state = check_here(recipe, adapters)
    for style in ("kohya", "diffusers"):
        part = (recipe, state, None, base)
        file = save_diffusers(tmp_path / "b.safetensors", {"unet": part}, style=style)
        check_here(*load_diffusers(file, None, base)[:2])


def dora(base, down, up, scale, magnitude):
    whole = theirs(np.asarray(base, np.float64)) + change(down, up, scale)
    norms = np.sqrt((whole**2).sum(axis=tuple(range(1, whole.ndim)), keepdims=True))
    return ours(magnitude.reshape(-1, *(1,) * (whole.ndim - 1)) * whole / norms)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_dora(style, tmp_path):
    """LyCORIS has the norms as (out, 1, 1, 1), PEFT as (out,) or (1, out, 1, 1)."""
    pairs = drawn()
    tensors = kohya(pairs, alpha=2) if style == "kohya" else spelled_as("peft", pairs)
    expected = formula(PARAMS, PATHS, pairs, lambda i, rank: (2 + i % 2) / rank)
    if style == "peft":
        expected = formula(PARAMS, PATHS, pairs, lambda i, rank: 1)
    rng = np.random.default_rng(5)
    for i, (name, path) in enumerate(PATHS.items()):
        if i % 3 == 2:
            continue  # stays LoRA
        down, up = pairs[name]
        norms = rng.uniform(0.5, 2, len(up)).astype(np.float32)
        shape = (-1, *(1,) * (down.ndim - 1))
        key = f"lora_unet_{name.replace('.', '_')}.dora_scale"
        if style == "peft":
            key = f"unet.{name}.lora_magnitude_vector{'.weight' * (i % 2)}"
            shape = (1, -1, 1, 1) if down.ndim == 4 else (-1,)
        tensors[key] = norms.reshape(shape)
        scale = (2 + i % 2) / len(down) if style == "kohya" else 1
        kernel = flatten(PARAMS)[f"{path}/kernel"]
        expected[path] = dora(kernel, down, up, scale, norms.astype(np.float64))
    save_file(tensors, tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    assert {type(m) for m in recipe} == {aj.LoRA, aj.DoRA}
    check(expected, recipe, adapters)


def test_tucker(tmp_path):
    """LyCORIS's `lora_mid`: a 1x1, a square one with the window and a 1x1, as one pair."""
    name = "down_blocks.1.resnets.0.conv1"
    outputs, inputs, *window = torch_shape(PARAMS, PATHS[name])
    draw = np.random.default_rng(6).standard_normal
    down, up, middle = draw((2, inputs, 1, 1)), draw((outputs, 2, 1, 1)), draw((2, 2, *window))
    tensors = kohya({name: (down, up)}, alpha=3)
    tensors["lora_unet_down_blocks_1_resnets_0_conv1.lora_mid.weight"] = middle
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    whole = np.einsum("abyx,oa,bi->oiyx", middle, up[..., 0, 0], down[..., 0, 0])
    kernel = np.asarray(flatten(PARAMS)[f"{PATHS[name]}/kernel"], np.float64)
    check({PATHS[name]: kernel + 1.5 * ours(whole)}, recipe, adapters)


DOUBLE = ("attn.to_q", "attn.to_k", "attn.to_v")
SINGLE = (*DOUBLE, "proj_mlp")
# FLUX in Diffusers, with its checkpoint's names of fused layers, which kohya has.
FLUX = {
    **{f"transformer_blocks.3.{n}": "double_blocks.3.img_attn.qkv" for n in DOUBLE},
    **{f"single_transformer_blocks.1.{n}": "single_blocks.1.linear1" for n in SINGLE},
}
OTHERS = {
    "transformer_blocks.3.ff_context.net.0.proj": "double_blocks.3.txt_mlp.0",
    "transformer_blocks.3.norm1.linear": "double_blocks.3.img_mod.lin",
    "single_transformer_blocks.1.proj_out": "single_blocks.1.linear2",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "x_embedder": "img_in",
}
WIDTHS = {name: 9 if "proj_mlp" in name else 4 for name in FLUX}


class Flux(nn.Module):
    """FLUX's fused layers, or the layers of Diffusers that they are."""

    fused: bool

    @nn.compact
    def __call__(self, x):
        outputs = {}
        for whole in dict.fromkeys(FLUX.values()):
            several = [name for name in FLUX if FLUX[name] == whole]
            layers = {whole: sum(WIDTHS[n] for n in several)} if self.fused else {}
            for name, width in (layers or {n: WIDTHS[n] for n in several}).items():
                outputs[name] = nn.Dense(width, name=name.replace(".", "_"))(x)
        for name, fused in OTHERS.items():
            path = (fused if self.fused else name).replace(".", "_")
            outputs[name] = nn.Dense(5, name=path)(x)
        return jnp.concatenate(list(outputs.values()), -1)


def flux(fused):
    model = Flux(fused)
    return model, drawn_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])


def flux_expected(params, changes):
    """Kernels by path; `changes` has those of Diffusers' layers in torch's shape."""
    expected = {}
    for path, kernel in flatten(params).items():
        if not path.endswith("/kernel"):
            continue
        name = path.removesuffix("/kernel")
        fused = [n for n in FLUX if FLUX[n].replace(".", "_") == name]
        zeros = [np.zeros((WIDTHS[n], X.shape[-1])) for n in fused]
        rows = [changes.get(n, zero) for n, zero in zip(fused, zeros, strict=True)]
        every = {n.replace(".", "_"): n for n in changes}
        every |= {OTHERS[n].replace(".", "_"): n for n in OTHERS if n in changes}
        whole = np.concatenate(rows) if rows else changes[every[name]] if name in every else 0.0
        expected[name] = np.asarray(kernel, np.float64) + np.transpose(whole)
    return expected


@pytest.mark.witness("True-True", "False-False")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("is_dora", [False, True])
def test_flux_of_kohya(fused, is_dora, tmp_path):
    """One pair for queries, keys and values is one here too, or one for each, with the same A."""
    model, params = flux(fused)
    rng, tensors, changes, norms = np.random.default_rng(7), {}, {}, {}
    for whole in [*dict.fromkeys(FLUX.values()), *OTHERS.values()]:
        several = [n for n in FLUX if FLUX[n] == whole] or [n for n in OTHERS if OTHERS[n] == whole]
        widths = [WIDTHS.get(n, 5) for n in several]
        down, up = rng.standard_normal((3, 4)), rng.standard_normal((sum(widths), 3))
        key = f"lora_unet_{whole.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = np.asarray(6.0)
        parts = np.split(change(down, up, 2.0), np.cumsum(widths)[:-1])
        changes |= zip(several, parts, strict=True)
        if is_dora:
            tensors[f"{key}.dora_scale"] = rng.uniform(0.5, 2, (sum(widths), 1))
            own = np.split(tensors[f"{key}.dora_scale"].ravel(), np.cumsum(widths)[:-1])
            norms |= zip(several, own, strict=True)
    file = tmp_path / "a.safetensors"
    save_file({key: np.asarray(x, np.float32) for key, x in tensors.items()}, file)
    recipe, adapters, *_ = load_diffusers(file, None, params, part="transformer")
    expected = flux_expected(params, changes)
    if is_dora:  # the norms of outputs, which fusing does not change
        scales = flux_expected(
            jax.tree.map(jnp.zeros_like, params),
            {name: np.repeat(x[:, None], 4, 1) for name, x in norms.items()},
        )
        expected = {
            path: scales[path] * x / np.linalg.norm(x, axis=0) for path, x in expected.items()
        }
    check(expected, recipe, adapters, params, model)


LACKING = [(), ("to_k", "proj_mlp"), ("to_q", "to_k", "to_v"), ("to_q",)]


@pytest.mark.parametrize("lacking", LACKING)
def test_flux_of_diffusers(lacking, tmp_path):
    """Several pairs, of other ranks and alphas, are one of a fused layer; some may be absent."""
    rng, tensors, changes, config = np.random.default_rng(8), {}, {}, {}
    for i, name in enumerate([*FLUX, *OTHERS]):
        if name.rpartition(".")[2] in lacking and "single" in name:
            continue
        rank = 1 + i % 3
        down = rng.standard_normal((rank, 4)).astype(np.float32)
        up = rng.standard_normal((WIDTHS.get(name, 5), rank)).astype(np.float32)
        tensors |= {f"transformer.{name}.lora_A.weight": down}
        tensors |= {f"transformer.{name}.lora_B.weight": up}
        config[name] = 1 + i % 4
        changes[name] = change(down, up, (1 + i % 4) / rank)
    config = {"transformer.lora_alpha": 1, "transformer.alpha_pattern": config}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    for fused in (True, False):
        model, params = flux(fused)
        recipe, adapters, *_ = load_diffusers(file, None, params)
        check(flux_expected(params, changes), recipe, adapters, params, model)


def three_parts():
    """A file of Stable Diffusion XL's: a UNet and two text encoders."""
    text = {"text_model.encoder.layers.0.self_attn.q_proj": (np.ones((2, 3)), np.ones((5, 2)))}
    both = {**text, "text_projection": (np.ones((2, 5)), np.ones((4, 2)))}
    tensors = {**kohya(drawn()), **kohya(text, "lora_te1_", 2), **kohya(both, "lora_te2_", 4)}
    return {key: x.astype(np.float32) for key, x in tensors.items()}


TEXT = {
    "text_model": {"encoder": {"layers": {"0": {"self_attn": {"q_proj": np.zeros((3, 5))}}}}},
    "text_projection": np.zeros((5, 4)),
}
TEXT = jax.tree.map(lambda x: {"kernel": jnp.asarray(x, jnp.float32)}, TEXT)


def test_parts(tmp_path):
    """A part is asked for where there are several; the others are named."""
    file = tmp_path / "a.safetensors"
    save_file(three_parts(), file)
    with raises(UserError, file, "unet", len(PATHS), "text_encoder", "text_encoder_2"):
        load_diffusers(file, None, PARAMS)
    with raises(UserError, file, "unet", "text_encoder_2"):
        load_diffusers(file, None, PARAMS, part="text_encoder_3")
    _, adapters, others, _ = load_diffusers(file, None, TEXT, part="text_encoder")
    assert others == {"unet": len(PATHS), "text_encoder_2": 2}
    assert len(flatten(adapters)) == 2
    recipe, adapters, others, _ = load_diffusers(file, None, TEXT, part="text_encoder_2")
    assert others == {"unet": len(PATHS), "text_encoder": 1}
    assert {m.scale_at(path) for m in recipe for path in m.targets} == {4 / 2, 5 / 2}
    assert len(flatten(adapters)) == 4


def of_old_text_encoders(pairs):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    return {f"{name}.{end}.weight": x for end, x in zip(("down", "up"), pairs, strict=True)}


def test_text_encoders_of_old_diffusers(tmp_path):
    down, up = np.ones((1, 3), np.float32), np.arange(5, dtype=np.float32)[:, None]
    save_file(of_old_text_encoders((down, up)), tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, TEXT)
    assert recipe.attached[0].targets == ("text_model/encoder/layers/0/self_attn/q_proj",)
    np.testing.assert_array_equal(list(flatten(adapters).values())[1], up.T)


@pytest.mark.parametrize("generation", ["text_model_", ""])
def test_text_encoders_of_both_generations(generation, tmp_path):
    """transformers 5 has CLIP's layers without the module `text_model`."""
    inner = TEXT["text_model"]
    name = f"lora_te_{generation}encoder_layers_0_self_attn_q_proj"
    tensors = {
        f"{name}.lora_down.weight": np.ones((1, 3)),
        f"{name}.lora_up.weight": np.ones((5, 1)),
    }
    save_file({k: x.astype(np.float32) for k, x in tensors.items()}, tmp_path / "a.safetensors")
    for base in (TEXT, inner):
        recipe, *_ = load_diffusers(tmp_path / "a.safetensors", None, base)
        (target,) = recipe.attached[0].targets
        assert target.endswith("encoder/layers/0/self_attn/q_proj")


def test_a_window_of_a_middle_costs_no_memory(tmp_path):
    """Files of some kilobytes could ask for gigabytes."""
    tensors = {
        "lora_unet_conv_in.lora_down.weight": np.ones((1, 2000, 1, 1)),
        "lora_unet_conv_in.lora_up.weight": np.ones((3, 1, 1, 1)),
        "lora_unet_conv_in.lora_mid.weight": np.ones((1, 1, 200, 200)),
    }
    save_file({k: x.astype(np.float32) for k, x in tensors.items()}, tmp_path / "a.safetensors")
    tracemalloc.start()
    with raises(AdapterMismatchError, "lora_unet_conv_in"):
        load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def products(kind, seed=4):
    """LoHa or LoKr of modules as LyCORIS has it: tensors, and changes in torch's shape."""
    rng, tensors, changes = np.random.default_rng(seed), {}, {}

    def draw(*shape):
        return 0.7 * rng.standard_normal(shape).astype(np.float32)

    for i, (name, path) in enumerate(PATHS.items()):
        outputs, inputs, *window = torch_shape(PARAMS, path)
        alpha, flat = 3.0 + i % 2, inputs * math.prod(window)
        if kind == "loha":
            shapes = {"a": (outputs, 2), "b": (2, flat)}
            own = {f"hada_w{n}_{x}": draw(*s) for n in "12" for x, s in shapes.items()}
            made = math.prod(own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"] for n in "12") * alpha / 2
            made = made.reshape(outputs, inputs, *window)
        elif kind == "tucker":  # the window in a tensor of its own
            core = window or [1, 1]
            shapes = {"t": (2, 2, *core), "a": (2, outputs), "b": (2, inputs)}
            own = {
                f"hada_t{n}" if x == "t" else f"hada_w{n}_{x}": draw(*s)
                for n in "12"
                for x, s in shapes.items()
            }
            one, two = (
                np.einsum(
                    "ijkl,jr,ip->prkl",
                    *(own[k.format(n)] for k in ("hada_t{}", "hada_w{}_b", "hada_w{}_a")),
                )
                for n in "12"
            )
            made = (one * two * alpha / 2).reshape(outputs, inputs, *window)
            if not window:
                continue
        else:
            if math.prod(window) > 1:
                continue
            (m, n), (o, k) = (
                divided(size, 1 if kind == "lokr_factor" else None) for size in (inputs, outputs)
            )
            whole = kind == "lokr_whole"
            own = {"lokr_w1": draw(o, m), "lokr_w2": draw(k, n, *(1 for _ in window if whole))}
            w1, w2, scale = own["lokr_w1"], own["lokr_w2"].reshape(k, n), 1.0
            if not whole:
                own |= {"lokr_w2_a": draw(k, 2), "lokr_w2_b": draw(2, n)}
                del own["lokr_w2"]
                w2, scale = own["lokr_w2_a"] @ own["lokr_w2_b"], alpha / 2
            if kind == "lokr_both":
                own |= {"lokr_w1_a": draw(o, 2), "lokr_w1_b": draw(2, m)}
                w1 = own["lokr_w1_a"] @ own["lokr_w1_b"]
                del own["lokr_w1"]
            made = (np.kron(w1, w2) * scale).reshape(outputs, inputs, *window)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.{n}": x for n, x in own.items()}
        tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
        changes[path] = made.astype(np.float64)
    return tensors, changes


def exactly(changes):
    """The kernels with these changes, by path."""
    base = {path: np.asarray(flatten(PARAMS)[f"{path}/kernel"], np.float64) for path in changes}
    return {path: base[path] + ours(made) for path, made in changes.items()}


KINDS = ("loha", "tucker", "lokr", "lokr_factor", "lokr_whole", "lokr_both")


@pytest.mark.witness("loha", "lokr_both", "tucker")
@pytest.mark.parametrize("kind", KINDS)
def test_loha_and_lokr(kind, tmp_path):
    """By the formula, and again of what is written of them; there is no Diffusers' style."""
    tensors, changes = products(kind)
    save_file(tensors, tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    assert {m.kind for m in recipe} == {"loha" if kind == "tucker" else kind.partition("_")[0]}
    assert len(changes) >= 5
    check(exactly(changes), recipe, adapters)
    part, file = (recipe, adapters, dict(PATHS), PARAMS), tmp_path / "b.safetensors"
    with raises(aj.UserError, "LOHA" if kind in ("loha", "tucker") else "LOKR", "style='kohya'"):
        save_diffusers(file, {"unet": part}, style="diffusers")
    save_diffusers(file, {"unet": part})
    written = load_file(file)
    if kind == "loha":
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(written[key], tensor)
    with safe_open(file, "np") as opened:
        assert opened.metadata()["ss_network_module"] == "lycoris.kohya"
    if kind == "lokr_whole":  # whose scale is in the first factor, since LyCORIS applies none
        assert {x.item() for key, x in written.items() if key.endswith("alpha")} == {1.0}
    again, tree, *_ = load_diffusers(file, None, PARAMS)
    check(exactly(changes), again, tree)


def adapted(recipe, params=PARAMS, model=MODEL):
    grown = aj.init_adapters(aj.adapt(model, recipe), params, jax.random.key(0), X)
    return drawn_like(aj.partition(grown, recipe)[0])


BOTH = aj.Recipe(
    aj.LoRA("**/attn1/*", rank=2, alpha=3, rank_stabilized=True),
    aj.LoRA(("**/conv*", "**/proj_in"), rank=3, alpha=1, rank_stabilized=True),
)
WRITTEN = [BOTH, aj.DoRA(("**/attn1/*", "**/conv"), rank=2, alpha=5)]


@pytest.mark.slow
@pytest.mark.witness("lora-kohya", "dora-diffusers")
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("recipe", WRITTEN, ids=["lora", "dora"])
def test_written(style, recipe, tmp_path):
    """The tensors are theirs by the formula, and are read as the same change of each weight."""
    params, file = adapted(recipe), tmp_path / "a.safetensors"
    given = {"ss_base_model_version": "sd_v1", "ss_network_dim": "64", "sshs_model_hash": "old"}
    part = (recipe, params, dict(PATHS), PARAMS)
    assert save_diffusers(file, {"unet": part}, style=style, metadata=given) == file
    tensors, leaves = load_file(file), flatten(params)
    expected = {}
    for name, path in PATHS.items():
        a, b = (leaves.get(f"{path}/lora/{leaf}") for leaf in "ab")
        if a is None:
            continue
        method = next(m for m in aj.Recipe(recipe).attached if selects(m.targets, path))
        a, b = theirs(np.asarray(a, np.float64)), np.asarray(b, np.float64).T
        base, norms = flatten(PARAMS)[f"{path}/kernel"], leaves.get(f"{path}/lora/magnitude")
        scale = method.scale_at(path)
        whole = np.asarray(base, np.float64) + ours(change(a, b, scale))
        expected[path] = whole if norms is None else dora(base, a, b, scale, np.asarray(norms))
        key = f"unet.{name}.lora_A.weight"
        if style == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}.lora_down.weight"
            assert tensors[key.replace("lora_down.weight", "alpha")] == pytest.approx(
                scale * len(a)
            )
        np.testing.assert_array_equal(tensors[key][: len(a)], a.astype(np.float32))
        assert len(tensors[key]) == (3 if recipe is BOTH and style == "diffusers" else len(a))
        assert not tensors[key][len(a) :].any()
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    kept = {"format": "pt", "ss_base_model_version": "sd_v1"}
    rank, alpha = ("Dynamic", "Dynamic") if recipe is BOTH else ("2", "5")
    facts = {
        "ss_network_module": "networks.lora" if recipe is BOTH else "lycoris.kohya",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
    }
    assert metadata == (kept | facts if style == "kohya" else kept)
    check(expected, *load_diffusers(file, None, PARAMS)[:2])


def test_several_parts_are_written(tmp_path):
    """What is read is written again: the same names, tensors and alphas."""
    save_file(three_parts(), tmp_path / "a.safetensors")
    parts = {}
    for part, base in {"unet": PARAMS, "text_encoder": TEXT, "text_encoder_2": TEXT}.items():
        recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, base, part=part)
        parts[part] = (recipe, adapters, None, base)
    back = load_file(save_diffusers(tmp_path / "b.safetensors", parts))
    given = load_file(tmp_path / "a.safetensors")
    assert {key for key in back if not key.endswith(".alpha")} <= given.keys() <= back.keys()
    for key, x in back.items():
        rank = len(back[key.replace("alpha", "lora_down.weight")])
        np.testing.assert_array_equal(x, given.get(key, np.float32(rank)), err_msg=key)
    one = {"text_encoder": parts["text_encoder"]}
    assert {k.split("_text")[0] for k in load_file(save_diffusers(tmp_path / "c", one))} == {
        "lora_te"
    }


def with_keys(tensors, renamed, **arrays):
    """The tensors with words in their names replaced, and others added."""
    made = {}
    for key, x in tensors.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        made[key] = x
    return made | {key: np.asarray(x, np.float32) for key, x in arrays.items()}


ONE = {name: drawn()[name] for name in ("conv_in", f"{FIRST}.{BLOCK}.attn1.to_q")}
Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = ONE[f"{FIRST}.{BLOCK}.attn1.to_q"]
PLAIN = kohya(ONE, alpha=2)
MIDDLE_OF_TWO = kohya({"conv_in": (np.ones((2, 4, 1, 1)), np.ones((3, 2, 1, 1)))})
WRONG = {
    "another model's keys": (
        with_keys(PLAIN, {"down_blocks_1": "layers_7"}),
        AdapterMismatchError,
        (Q.replace("down_blocks_1", "layers_7"), "1 of 2", "conv_in"),
    ),
    "only other keys": (
        kohya({f"layers.{i}.attn.wq": (DOWN, UP) for i in range(9)}),
        AdapterMismatchError,
        ("lora_unet_layers_0_attn_wq", "9 of 9", "4 more", "conv_in"),
    ),
    "no up": (
        {key: x for key, x in PLAIN.items() if key != f"{Q}.lora_up.weight"},
        AdapterFileError,
        (Q, "lora_up"),
    ),
    "no down": (
        {key: x for key, x in PLAIN.items() if "conv_in.lora_down" not in key},
        AdapterFileError,
        ("lora_unet_conv_in", "lora_down"),
    ),
    "an alpha alone": (
        with_keys(PLAIN, {}, **{"lora_unet_conv_out.alpha": 1}),
        AdapterFileError,
        ("lora_unet_conv_out", "lora_down and lora_up"),
    ),
    "an alpha of NaN": (
        with_keys(PLAIN, {}, **{f"{Q}.alpha": np.nan}),
        AdapterFileError,
        (f"{Q}.alpha",),
    ),
    "an alpha of several": (
        with_keys(PLAIN, {}, **{f"{Q}.alpha": [1, 2]}),
        AdapterFileError,
        (Q, "alpha [2]"),
    ),
    "an alpha of zero": (
        with_keys(PLAIN, {}, **{f"{Q}.alpha": 0}),
        AdapterFileError,
        (Q, "alpha 0.0"),
    ),
    "ranks that differ": (
        with_keys(PLAIN, {}, **{f"{Q}.lora_down.weight": DOWN[:1]}),
        AdapterFileError,
        (Q, [1, DOWN.shape[1]], list(UP.shape)),
    ),
    "a vector": (
        with_keys(PLAIN, {}, **{f"{Q}.lora_down.weight": DOWN[0]}),
        AdapterFileError,
        (Q, list(DOWN[0].shape)),
    ),
    "a window of up": (
        with_keys(PLAIN, {}, **{"lora_unet_conv_in.lora_up.weight": np.ones((3, 3, 2, 2))}),
        AdapterFileError,
        ("lora_unet_conv_in", [3, 3, 2, 2]),
    ),
    "other inputs": (
        with_keys(PLAIN, {}, **{f"{Q}.lora_down.weight": np.ones((2, 9))}),
        AdapterMismatchError,
        (Q, [2, 9], "attn1/to_q"),
    ),
    "other outputs": (
        with_keys(PLAIN, {}, **{"lora_unet_conv_in.lora_up.weight": np.ones((9, 3, 1, 1))}),
        AdapterMismatchError,
        ("lora_unet_conv_in", [9, 3, 1, 1], "conv_in [3, 3, 4, 3]"),
    ),
    "two keys of a module": (
        with_keys(PLAIN, {}, **{f"unet.{FIRST}.{BLOCK}.attn1.to_q.lora_A.weight": DOWN}),
        AdapterFileError,
        (f"{Q}.lora_down.weight", f"unet.{FIRST}.{BLOCK}.attn1.to_q.lora_A.weight"),
    ),
    "two names of a module": (
        with_keys(PLAIN, {}, **{"lora_unet_input_blocks_0_0.lora_up.weight": UP}),
        AdapterFileError,
        ("lora_unet_conv_in.lora_up.weight", "lora_unet_input_blocks_0_0.lora_up.weight"),
    ),
    "an unknown suffix": (
        with_keys(PLAIN, {}, **{f"{Q}.lora_upper.weight": UP}),
        AdapterFileError,
        (f"{Q}.lora_upper.weight", ".lora_down.weight"),
    ),
    "a bias": (
        with_keys(PLAIN, {}, **{"unet.conv_in.lora_B.bias": UP[0]}),
        AdapterFileError,
        ("unet.conv_in.lora_B.bias",),
    ),
    "a checkpoint": ({"conv_in.weight": UP}, AdapterFileError, ("conv_in.weight",)),
    "half of a LoHa": (
        {f"{Q}.hada_w1_a": UP, f"{Q}.hada_w1_b": DOWN, f"{Q}.alpha": DOWN[0, 0]},
        AdapterFileError,
        (Q, "hada_w1_a", "expected hada_w1_a, hada_w1_b, hada_w2_a"),
    ),
    "a LoKr of other sizes": (
        {f"{Q}.lokr_w1": np.ones((2, 2)), f"{Q}.lokr_w2": np.ones((3, 7))},
        AdapterMismatchError,
        (Q, "lokr_w2 [3, 7]", "attn1/to_q"),
    ),
    "a LoHa with an alpha of 0": (
        {
            **{f"{Q}.hada_w{i}_a": UP for i in (1, 2)},
            **{f"{Q}.hada_w{i}_b": DOWN for i in (1, 2)},
            f"{Q}.alpha": np.zeros((), np.float32),
        },
        AdapterFileError,
        (Q, "alpha 0"),
    ),
    "OFT": (
        {**PLAIN, f"{Q}.oft_blocks": UP, "unet.a.oft_diag": DOWN},
        AdapterFileError,
        ("OFT", f"{Q}.oft_blocks", "unet.a.oft_diag", "tools/merge.py"),
    ),
    "whole weights": (
        {**PLAIN, f"{Q}.diff": UP, f"{Q}.diff_b": UP[0]},
        AdapterFileError,
        ("weights", f"{Q}.diff", f"{Q}.diff_b"),
    ),
    "a middle of another rank": (
        with_keys(
            MIDDLE_OF_TWO, {}, **{"lora_unet_conv_in.lora_mid.weight": np.ones((3, 3, 3, 3))}
        ),
        AdapterMismatchError,
        ("lora_unet_conv_in", [2, 4, 1, 1], [3, 3, 3, 3]),
    ),
    "a middle with a window of down": (
        with_keys(PLAIN, {}, **{"lora_unet_conv_in.lora_mid.weight": np.ones((3, 3, 3, 3))}),
        AdapterMismatchError,
        ("lora_unet_conv_in", [3, 4, 3, 3], [3, 3, 3, 3]),
    ),
    "a middle of another window": (
        with_keys(
            MIDDLE_OF_TWO, {}, **{"lora_unet_conv_in.lora_mid.weight": np.ones((2, 2, 5, 5))}
        ),
        AdapterMismatchError,
        ("lora_unet_conv_in", [2, 4, 1, 1], [2, 2, 5, 5], "conv_in [3, 3, 4, 3]"),
    ),
    "no rank": (
        with_keys(
            PLAIN,
            {},
            **{f"{Q}.lora_down.weight": np.ones((0, 4)), f"{Q}.lora_up.weight": np.ones((5, 0))},
        ),
        AdapterFileError,
        (Q, [0, 4], [5, 0]),
    ),
    "numbers that float32 lacks": (
        {**PLAIN, f"{Q}.lora_down.weight": np.full(DOWN.shape, 1e300)},
        AdapterMismatchError,
        ("float32", "attn1/to_q/lora/a"),
    ),
    "an alpha that float32 lacks": (
        {**PLAIN, f"{Q}.alpha": np.asarray(1e300)},
        AdapterFileError,
        (Q, "alpha inf"),
    ),
    "complex numbers": (
        {**PLAIN, f"{Q}.lora_down.weight": DOWN.astype(np.complex64)},
        AdapterFileError,
        (f"{Q}.lora_down.weight", "complex64"),
    ),
    "a vector in a LoHa": (
        {f"{Q}.hada_{name}": np.ones(2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        AdapterFileError,
        (Q, "hada_w1_a [2]"),
    ),
    "norms of inputs": (
        with_keys(PLAIN, {}, **{f"{Q}.dora_scale": np.ones((1, DOWN.shape[1]))}),
        AdapterFileError,
        (Q, [1, DOWN.shape[1]], "wd_on_out"),
    ),
    "norms of another number": (
        with_keys(PLAIN, {}, **{f"{Q}.lora_magnitude_vector": np.ones(len(UP) + 1)}),
        AdapterFileError,
        (Q, [len(UP) + 1]),
    ),
    "a norm for all": (
        with_keys(PLAIN, {}, **{"lora_unet_conv_in.dora_scale": np.ones((1, 3, 1, 1))}),
        AdapterFileError,
        ("lora_unet_conv_in", [1, 3, 1, 1]),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case, tmp_path):
    tensors, kind, data = WRONG[case]
    file = tmp_path / "a.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, file)
    with raises(kind, file, *data) as caught:
        load_diffusers(file, None, PARAMS)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 900 + len(str(file))


def test_wrong_numbers_come_together(tmp_path):
    wrong = {f"{Q}.alpha": 0, "lora_unet_conv_in.alpha": [1, 2]}
    save_file(with_keys(PLAIN, {}, **wrong), tmp_path / "a.safetensors")
    with raises(AdapterFileError, Q, "lora_unet_conv_in", "0.0", [2]):
        load_diffusers(tmp_path / "a.safetensors", None, PARAMS)


def test_one_target_of_two_modules(tmp_path):
    """A fused layer of FLUX's checkpoint, and one of Diffusers' that is in it."""
    down, up = np.ones((1, 4), np.float32), np.ones((12, 1), np.float32)
    tensors = kohya({"double_blocks.3.img_attn.qkv": (down, up)})
    tensors |= {
        f"transformer.transformer_blocks.3.attn.to_k.lora_{x}.weight": y
        for x, y in {"A": down, "B": up[:4]}.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    for fused in (True, False):
        with raises(
            AdapterMismatchError,
            "lora_unet_double_blocks_3_img_attn_qkv",
            "transformer.transformer_blocks.3.attn.to_k",
        ):
            load_diffusers(tmp_path / "a.safetensors", None, flux(fused)[1])


def test_parts_of_a_fused_layer_that_differ(tmp_path):
    """Other inputs or widths than the weight's, a window, or norms of some of them."""
    names = [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"]
    good = {name: (np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)) for name in names}
    params, file = flux(True)[1], tmp_path / "a.safetensors"
    save_file(kohya(good), file)
    load_diffusers(file, None, params)
    keys = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    for wrong in (
        {f"{keys[1]}.lora_down.weight": np.ones((1, 9))},
        {f"{keys[2]}.lora_up.weight": np.ones((9, 1))},
        {f"{keys[0]}.dora_scale": np.ones((4, 1))},
    ):
        save_file(with_keys(kohya(good), {}, **wrong), file)
        with raises(AdapterMismatchError, file, *keys, "double_blocks_3_img_attn_qkv"):
            load_diffusers(file, None, params)
    middle = {f"{keys[1]}.lora_mid.weight": np.ones((1, 1, 3, 3))}
    save_file(with_keys(kohya(good), {}, **middle), file)
    with raises(AdapterMismatchError, file, keys[1], "1 of 3"):
        load_diffusers(file, None, params)


def test_parts_that_are_several_modules_here(tmp_path):
    """A fused layer is split into the modules of one part each, and no further."""
    widths = {"q_left": 2, "q_right": 2, "k": 4, "v": 4}
    params = {name: {"kernel": jnp.ones((4, width))} for name, width in widths.items()}
    names = {"transformer_blocks.3.attn.to_q": ("q_left", "q_right")}
    names |= {f"transformer_blocks.3.attn.to_{x}": x for x in "kv"}
    pair = (np.ones((1, 4), np.float32), np.ones((12, 1), np.float32))
    save_file(kohya({"double_blocks.3.img_attn.qkv": pair}), tmp_path / "a.safetensors")
    with raises(AdapterMismatchError, "lora_unet_double_blocks_3_img_attn_qkv", *names):
        load_diffusers(tmp_path / "a.safetensors", names, params)


def test_shapes_decide_between_modules(tmp_path):
    """`a_b/c` and `a/b_c` have one name without dots; a pair that fits both is refused."""

    def base(other):
        return {
            "a_b": {"c": {"kernel": jnp.ones((3, 5))}},
            "a": {"b_c": {"kernel": jnp.ones(other)}},
        }

    tensors = kohya({"a.b.c": (np.ones((1, 3)), np.ones((5, 1)))})
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, tmp_path / "a.safetensors")
    recipe, *_ = load_diffusers(tmp_path / "a.safetensors", None, base((5, 3)))
    assert recipe.attached[0].targets == ("a_b/c",)
    with raises(AdapterMismatchError, "lora_unet_a_b_c", "a_b/c [3, 5]", "a/b_c [3, 5]"):
        load_diffusers(tmp_path / "a.safetensors", None, base((3, 5)))


def test_the_configuration_beside_the_tensors(tmp_path):
    """Diffusers keeps PEFT's configuration by part: alphas and rsLoRA scale, others are checked."""
    pairs = drawn()
    tensors = spelled_as("peft", pairs) | {
        key.replace("unet.", "text_encoder."): x for key, x in spelled_as("peft", pairs).items()
    }
    config = {
        "unet.peft_type": "LORA",
        "unet.lora_alpha": 6,
        "unet.use_rslora": True,
        "unet.alpha_pattern": {"conv_in": 2},
        "unet.target_modules": ["to_q"],
        "text_encoder.lora_alpha": 50,
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    recipe, adapters, *_ = load_diffusers(file, None, PARAMS, part="unet")
    expected = formula(PARAMS, PATHS, pairs, lambda i, rank: (6 if i else 2) / rank**0.5)
    check(expected, recipe, adapters)
    for wrong in (
        *({"unet.bias": "some"}, {"unet.peft_type": "LOHA"}, {"unet.lora_alpha": "x"}),
        {"unet.alora_invocation_tokens": [1, 2]},
    ):
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config | wrong)})
        with raises(AdapterFileError, file, *(k.removeprefix("unet.") for k in wrong)):
            load_diffusers(file, None, PARAMS, part="unet")
    save_file(tensors, file, {"lora_adapter_metadata": "{"})
    with raises(AdapterFileError, file):
        load_diffusers(file, None, PARAMS, part="unet")


@pytest.mark.slow
def test_what_cannot_be_written(tmp_path):
    lora = aj.LoRA(f"{PATHS['conv_in']}", rank=2)
    part = (lora, adapted(lora), None, PARAMS)
    file, scales = tmp_path / "a.safetensors", aj.IA3("**/to_q")
    activated = aj.ActivatedLoRA(lora.targets, rank=2, invocation=(1,))
    cases = [
        ({"unet": part}, {"style": "comfy"}, ("comfy", "kohya", "diffusers")),
        ({"vae": part}, {}, ("vae", "text_encoder_2")),
        ({}, {}, (file,)),
        ({"unet": part, "transformer": part}, {}, ("transformer", "lora_unet_conv_in")),
        ({"unet": (scales, adapted(scales), None, PARAMS)}, {}, ("unet", "ia3")),
        ({"unet": (activated, part[1], None, PARAMS)}, {}, ("unet", "ActivatedLoRA")),
        (
            {"unet": (lora, part[1], {"conv_out": PATHS[f"{MIDDLE}.proj_in"]}, PARAMS)},
            {},
            ("conv_in",),
        ),
    ]
    trained = aj.Recipe(lora, aj.Unfreeze("conv_in/bias"))
    cases.append(({"unet": (trained, adapted(trained), None, PARAMS)}, {}, ("bias",)))
    first = PATHS[f"{FIRST}.proj_in"]
    numbered = aj.LoRA(first, rank=2)
    numbered = {"unet": (numbered, adapted(numbered), None, PARAMS)}
    cases.append(
        (numbered, {"style": "diffusers"}, ("down_blocks_1.attentions_0.proj_in", "names"))
    )
    model, params = flux(False)
    grown = aj.LoRA("transformer_blocks_3_attn_to_q", rank=2)
    tree = adapted(grown, params, model)
    names = {"transformer_blocks.3.attn.to_q": grown.targets[0]}
    cases.append(({"transformer": (grown, tree, names, params)}, {}, ("qkv", *names)))
    for other in (aj.LoHa, aj.LoKr):
        grown = other("transformer_blocks_3_attn_to_q", 2)
        tree = adapted(grown, params, model)
        cases.append(({"transformer": (grown, tree, names, params)}, {}, ("qkv", *names)))
    same = aj.LoHa(lora.targets, 2)
    same = (same, adapted(same), None, PARAMS)
    twice = ("transformer", "lora_unet_conv_in is the name of two modules")
    for one, two in ((part, same), (same, part), (same, same)):
        cases.append(({"unet": one, "transformer": two}, {}, twice))
    for parts, given, data in cases:
        with raises(UserError, *data):
            save_diffusers(file, parts, **given)
        assert not file.exists()


def test_flux_is_written_fused(tmp_path):
    """By the checkpoint's names, three modules of ours are one of kohya's."""
    model, params = flux(False)
    lora = aj.LoRA("transformer_blocks_3_attn_*", rank=1, alpha=3)
    tree = adapted(lora, params, model)
    whole = "double_blocks.3.img_attn.qkv"
    names = {whole: tuple(n.replace(".", "_") for n in FLUX if FLUX[n] == whole)}
    file = save_diffusers(tmp_path / "a.safetensors", {"transformer": (lora, tree, names, params)})
    assert {key.rpartition(".lora")[0] for key in load_file(file) if "lora_up" in key} == {
        "lora_unet_double_blocks_3_img_attn_qkv"
    }
    changes = {}
    for name in names[whole]:
        a, b = (np.asarray(flatten(tree)[f"{name}/lora/{leaf}"], np.float64) for leaf in "ab")
        changes[next(n for n in FLUX if n.replace(".", "_") == name)] = 3 * (a @ b).T
    for fused in (True, False):
        model, params = flux(fused)
        recipe, adapters, *_ = load_diffusers(file, None, params)
        check(flux_expected(params, changes), recipe, adapters, params, model)


def test_a_rank_above_the_sizes(tmp_path):
    """kohya trains one rank for all layers, also for those with fewer inputs or outputs."""
    pairs = drawn(rank=40)
    save_file(kohya(pairs, alpha=10), tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    expected = formula(PARAMS, PATHS, pairs, lambda i, rank: (10 + i % 2) / rank)
    check(expected, recipe, adapters)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_dtypes(dtype, tmp_path):
    pairs = {n: tuple(x.astype(dtype) for x in pair) for n, pair in drawn().items()}
    save_file(kohya(pairs, alpha=2), tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, PARAMS)
    check(formula(PARAMS, PATHS, pairs, lambda i, rank: (2 + i % 2) / rank), recipe, adapters)
    assert {x.dtype.name for x in flatten(adapters).values()} == {"float32"}


@pytest.mark.slow
@pytest.mark.witness("lora_te1_", "text_encoder.")
@pytest.mark.parametrize(
    "prefix", ["lora_te1_", "lora_te_model_", "text_encoder.", "text_encoder.model."]
)
def test_a_text_encoder_of_the_library(prefix, tmp_path):
    """A table's prefixes may be absent in files; layers may be scanned if all of them are alike."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = DecoderConfig(num_attention_heads=2, **sizes)
    rng, tensors = np.random.default_rng(3), {}
    for i, (module, rank, width) in itertools.product(
        range(2), [("self_attn.q_proj", 2, 16), ("mlp.up_proj", 3, 24)]
    ):
        name = f"layers.{i}.{module}"
        name = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((rank, 16)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((width, rank)).astype(np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    leaves = {}
    for scan in (False, True):
        base = Decoder(config, scan=scan, rngs=nnx.Rngs(0))
        recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", NAMES_OF_DECODER, base)
        aj.save_adapter(tmp_path / f"ours-{scan}", adapters, recipe)
        model = aj.load_adapter(tmp_path / f"ours-{scan}", base)
        leaves[scan] = nnx.to_pure_dict(nnx.state(model, aj.nnx.AdapterParam))
    stacked = flatten(leaves[True]["layers"])
    assert len(stacked) == 4
    for i, own in leaves[False]["layers"].items():
        for path, x in flatten(own).items():
            np.testing.assert_array_equal(stacked[path][i], x)
    key = next(key for key in tensors if "1" in key.removeprefix(prefix) and "down" in key)
    alpha = key.replace("lora_down.weight", "alpha")
    save_file({**tensors, alpha: np.asarray(7, np.float32)}, tmp_path / "a.safetensors")
    with raises(AdapterMismatchError, "layers"):
        load_diffusers(tmp_path / "a.safetensors", NAMES_OF_DECODER, base)


@pytest.mark.slow
def test_a_module_with_two_weights(tmp_path):
    """Its target is the weight: the first one that is no bias, as in files of PEFT."""
    base = {"gate": {"kernel": jnp.ones((3, 5)), "other": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    tensors = kohya({"gate": (np.ones((1, 3)), np.ones((5, 1)))})
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, tmp_path / "a.safetensors")
    recipe, adapters, *_ = load_diffusers(tmp_path / "a.safetensors", None, base)
    assert recipe.attached[0].targets == ("gate/kernel",)
    assert {*flatten(adapters)} == {"gate/lora/kernel/a", "gate/lora/kernel/b"}
