"""Image encoders: values of transformers, scans, presets, counts, and what is refused."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import read_arrays
from helpers.commands import command_raises
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.merging import save_encoder
from adapters_jax.finetune.models import KNOWN, family_of
from adapters_jax.finetune.models.encoder.heads import ImageClassifier
from adapters_jax.finetune.models.encoder.model import ImageEncoder
from adapters_jax.finetune.models.known import find_known
from adapters_jax.finetune.models.parts.checkpoint import save_tensors
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.pretrained.encoder import ImageEncoder as Pretrained
from adapters_jax.finetune.shapes import adapted_shape
from adapters_jax.finetune.tensors import to_tensors
from adapters_jax.trees import flatten, unflatten
from adapters_jax.weights.quantized import is_quantized

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("vit", "dinov2", "clip")


def family_at(name):
    return family_of(huggingface.read_json(FIXTURES / name / "config.json"), name)


@cache
def loaded(name, **options):
    """The configuration and the parameters of a fixture, with CLIP's pooler."""
    return family_at(name).load(FIXTURES / name, pooler=True, **options)


@cache
def expected(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


@cache
def classifier(name):
    config, params = loaded(name)
    tensors = read_arrays(FIXTURES / name)
    head = {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]}
    vit = {key: value for key, value in params.items() if config.final_norm or key != "final_norm"}
    return ImageClassifier(config, 3), {"vit": vit, "head": head}


@pytest.mark.slow
@pytest.mark.witness("vit-True", "dinov2-False")
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_those_of_transformers(name, scan):
    config, params = loaded(name, scan=scan)
    wanted, model = expected(name), ImageEncoder(config, scan=scan)
    hidden = jax.jit(model.apply)({"params": params}, wanted["pixels"])
    np.testing.assert_allclose(hidden, wanted["hidden"], atol=1e-4)
    pooled = model.apply({"params": params}, hidden, method=ImageEncoder.pool)
    np.testing.assert_allclose(pooled, wanted["pooled"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.witness("clip")
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_and_every_parameter_shows_in_them(name):
    model, params = classifier(name)
    pixels, wanted = expected(name)["pixels"], expected(name)["logits"]

    def loss(params):
        logits = model.apply({"params": params}, pixels)
        return (logits**2).sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    idle = [path for path, leaf in flatten(gradient).items() if not np.abs(leaf).max() > 0]
    assert [path for path in idle if not path.endswith("key/bias")] == []


@pytest.mark.parametrize("name", NAMES)
def test_tensors_go_back_as_they_came(name):
    names, stored = family_at(name).names, read_arrays(FIXTURES / name)
    tensors = to_tensors(loaded(name)[1], names)
    assert tensors
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(stored[key], tensor, err_msg=key)


PRESETS = {
    "houlsby": (aj.houlsby(4), 2 * (2 * 4 * 24 + 4 + 24)),
    "lora": (aj.lora(2), 2 * 2 * 2 * 24),
    "sums": (aj.Recipe(aj.Bottleneck("**/mlp_sum", 4)), 2 * 4 * 24 + 4 + 24),
    "prefix": (aj.prefix_tuning(3, targets="**/layer_{}/attention"), 2 * 3 * 24),
}


@pytest.mark.slow
@pytest.mark.witness("dinov2-houlsby", "clip-prefix")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_presets_work_unchanged(name, preset):
    model, params = classifier(name)
    (recipe, count), wanted = PRESETS[preset], expected(name)
    adapted = aj.adapt(model, recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(0), wanted["pixels"])
    added = {k: x for k, x in flatten(whole).items() if recipe.owner(k) is not None}
    assert sum(x.size for x in added.values()) == 2 * count
    apply = jax.jit(adapted.apply)
    if preset != "prefix":  # whose keys take a share of the attention from the start
        logits = apply({"params": whole}, wanted["pixels"])
        np.testing.assert_allclose(logits, wanted["logits"], atol=1e-2)
    draw = np.random.default_rng(0).normal
    noise = {path: x + draw(0, 0.3, x.shape).astype(x.dtype) for path, x in added.items()}
    moved = unflatten({**flatten(whole), **noise})
    assert np.abs(apply({"params": moved}, wanted["pixels"]) - wanted["logits"]).max() > 1e-2


@pytest.mark.witness("google/vit-base-patch16-224-85798656", "facebook/dinov2-small-22056192")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("google/vit-base-patch16-224", 85_798_656),  # 86 million in the paper
        ("google/vit-large-patch16-224", 303_301_632),  # 307 million, with a head
        ("facebook/dinov2-small", 22_056_192),  # 21 million in the paper
        ("facebook/dinov2-base", 86_579_712),  # 86 million
        ("facebook/dinov2-large", 304_367_616),  # 300 million
        ("openai/clip-vit-base-patch32", 87_454_464),  # 88 million of the image tower's
        ("openai/clip-vit-large-patch14", 303_177_728),
    ],
)
def test_published_names_have_the_published_counts(name, count):
    model, inputs = KNOWN[name](scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_bfloat16_is_within_its_rounding():
    config, params = loaded("vit")
    wanted = expected("vit")
    pixels = jnp.asarray(wanted["pixels"], jnp.bfloat16)
    hidden = jax.jit(ImageEncoder(config, dtype=jnp.bfloat16).apply)({"params": params}, pixels)
    assert hidden.dtype == jnp.bfloat16
    error = np.abs(hidden.astype(jnp.float32) - wanted["hidden"]).max()
    assert 1e-4 < error < 0.05 * np.abs(wanted["hidden"]).max()


@pytest.mark.slow
def test_audit_plan_and_finetune_take_an_image_encoder_or_say_why_not(capsys, tmp_path):
    lora = ["--model", str(FIXTURES / "vit"), "--method", "lora", "--rank", "2"]
    assert main(["audit", *lora]) == 0
    assert main(["plan", *lora, "--batch-size", "2", "--no-full"]) == 0
    capsys.readouterr()
    rows = "".join(f"film {i},{i % 2}\n" for i in range(80))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    words = ["finetune", *lora, "--train", str(tmp_path / "rows.csv")]
    with command_raises(DataError, "'image'", "rows.csv"):
        main(words)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "facebook/dinov2-small"])
def test_four_bits_leave_the_patches_in_floats(name):
    """Blocks do not divide their sizes, such as 16 x 16 x 3, and no flag has another block."""
    packed = {}
    for dtype in ("int8", "nf4"):
        _, params = adapted_shape(name, MethodOptions("lora", rank=2), dtype, layers=1)
        packed[dtype] = {path for path, leaf in flatten(params).items() if is_quantized(leaf)}
    assert packed["int8"] - packed["nf4"] == {"embeddings/patch/kernel"}
    assert len(packed["nf4"]) == 6  # of the block
    family, config = find_known(name)
    config = config.with_layers(1)
    given = jax.eval_shape(ImageEncoder(config).init, jax.random.key(0), config.inputs(1, 1))
    head = {"kernel": (config.head_features, 1), "bias": (1,)}
    head = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in head.items()}
    parts = (family.classifier, config, given["params"], None, config.pooling, "float32", None)
    small = flatten(Pretrained(*parts, head=head).quantized("nf4", "vision").params)
    assert {path for path, leaf in small.items() if is_quantized(leaf)} == packed["nf4"]


@pytest.mark.parametrize(
    ("name", "settings", "data"),
    [
        ("vit", {"qkv_bias": False}, ["qkv_bias=False", True]),
        ("vit", {"patch_size": 5}, [12, 5]),
        ("vit", {"hidden_act": "mish"}, ["hidden_act='mish'", "'gelu'"]),
        ("dinov2", {"use_swiglu_ffn": True}, ["use_swiglu_ffn=True", False]),
        ("dinov2", {"mlp_ratio": "4"}, ["mlp_ratio='4'"]),
        ("clip", {"vision_config": 3}, ["vision_config=3"]),
        ("clip", {"vision_config": {"hidden_act": "mish"}}, ["hidden_act='mish'"]),
    ],
)
def test_unsupported_settings_are_named(name, settings, data):
    values = huggingface.read_json(FIXTURES / name / "config.json")
    with raises(aj.UserError, *data):
        family_at(name).config.from_dict({**values, **settings})


@pytest.mark.parametrize("shape", [(2, 3, 12, 12), (2, 8, 12, 3), (12, 12, 3)])
def test_images_of_another_shape_raise(shape):
    config, _ = loaded("vit")
    with raises(aj.UserError, shape, "(batch, 12, 12, 3)"):
        jax.eval_shape(partial(ImageEncoder(config).init, jax.random.key(0)), jnp.zeros(shape))


def test_a_merged_image_tower_alone_is_the_classifier_that_transformers_has(tmp_path):
    values = huggingface.read_json(FIXTURES / "clip" / "config.json")["vision_config"]
    tower, merged = tmp_path / "tower", tmp_path / "merged"
    values |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    save_tensors(tower, values, read_arrays(FIXTURES / "clip"))
    model, params = classifier("clip")
    assert save_encoder(merged, tower, params, labels=["a", "b", "c"]) == []
    config = huggingface.read_json(merged / "config.json")
    assert config["model_type"] == "clip" and config["vision_config"]["hidden_size"] == 24
    assert config["architectures"] == ["CLIPForImageClassification"]
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert family_at("clip").config.from_dict(config) == model.config
