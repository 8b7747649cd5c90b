"""Masked language models and images against transformers, PEFT and AdapterHub; `interop-test`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.trained import trained
from PIL import Image
from test_image_classification import FIXTURES, write_vit

import adapters_jax as aj
from adapters_jax.files.adapterhub import save_adapterhub
from adapters_jax.files.peft import save_peft
from adapters_jax.finetune.data.pixels import Preprocessing
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.models.registry import FAMILIES
from adapters_jax.finetune.pretrained.encoder import load_encoder

WHY = "needs torch, transformers, peft and adapters: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
hub = pytest.importorskip("adapters", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 16}
MODELS = {
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, hidden_act="relu")
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES, type_vocab_size=1)
    ),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(
            vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=16
        )
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SIZES,
            pad_token_id=0,
            local_attention=4,
            classifier_activation="silu",
            norm_eps=1e-3,
            norm_bias=True,
            reference_compile=False,
        )
    ),
}


def randomised(model):
    """Every parameter shows in the outputs."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.25)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_masked_language_models_have_the_logits_and_the_loss_of_transformers(name, tmp_path):
    there = randomised(MODELS[name]())
    there.save_pretrained(tmp_path)
    ids = torch.randint(5, 60, (3, 9))
    mask = (torch.arange(9)[None] < torch.tensor([9, 6, 4])[:, None]).long()
    labels = torch.where(torch.rand(3, 9) < 0.4, ids, -100).masked_fill(mask == 0, -100)
    with torch.no_grad():
        wanted = there(input_ids=ids, attention_mask=mask, labels=labels)
    record = FAMILIES[name].masked_lm
    config, params = record.load(tmp_path, MASKED)
    head = record.read_head(tmp_path, config, params["embeddings"]["word"]["embedding"])
    model, whole = record.build(config, 1, MASKED), {record.base: params, "head": head}
    inputs = jnp.asarray(ids.numpy()), jnp.asarray(mask.numpy())
    logits = np.asarray(model.apply({"params": whole}, *inputs))
    real = mask.numpy() > 0
    np.testing.assert_allclose(logits[real], wanted.logits.numpy()[real], atol=1e-4)
    positions = jnp.asarray([[3, 1], [5, 0], [2, 2]])
    some = model.apply({"params": whole}, *inputs, None, positions)
    np.testing.assert_allclose(
        some, np.take_along_axis(logits, np.asarray(positions)[:, :, None], axis=1), atol=1e-5
    )
    chosen = labels.numpy() >= 0
    losses = -jax.nn.log_softmax(logits)[chosen, labels.numpy()[chosen]]
    assert float(losses.mean()) == pytest.approx(wanted.loss.item(), rel=1e-5)


def processors():
    names = ("ViTImageProcessor", "CLIPImageProcessor", "BitImageProcessor")
    return [name for name in names if hasattr(transformers, name)]


@pytest.mark.parametrize("name", processors())
def test_preprocessing_is_that_of_transformers(name, tmp_path):
    """The processors that resize with Pillow, whose names end in Pil where there are others."""
    build = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    sizes = {"size": {"height": 24, "width": 20}}
    if name != "ViTImageProcessor":
        sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
    there = build(**sizes, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    there.save_pretrained(tmp_path)
    ours = Preprocessing.from_dict(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    draw = np.random.default_rng(0)
    for shape in ((40, 31, 3), (9, 50, 3), (24, 24, 3)):
        pixels = draw.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        wanted = there(Image.open(tmp_path / "image.png").convert("RGB"), return_tensors="np")
        wanted = np.asarray(wanted["pixel_values"])[0].transpose(1, 2, 0)
        found = ours.normalised(ours.read(tmp_path / "image.png"))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_head_of_images_has_the_same_logits_in_peft_and_adapterhub(tmp_path):
    write_vit(tmp_path / "tiny")
    encoder = load_encoder(str(tmp_path / "tiny"))
    names, model = FAMILIES["vit"].classifier.names, encoder.classifier(3)
    params = encoder.init(3, jax.random.key(0))
    recipe = aj.lora(2, 3.0, head="head")
    with np.load(FIXTURES / "vit" / "expected.npz") as file:
        pixels = file["pixels"]
    adapters, logits = trained((names, model, params, {"pixels": pixels}), recipe)
    theirs = torch.tensor(pixels).permute(0, 3, 1, 2)

    saved = save_peft(tmp_path / "peft", recipe, adapters, names, params, prefix="vit.")
    base = transformers.ViTForImageClassification.from_pretrained(FIXTURES / "vit")
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(base, saved).eval()(pixel_values=theirs).logits
    np.testing.assert_allclose(there.numpy(), logits, atol=1e-4)

    saved = save_adapterhub(
        tmp_path / "hub",
        recipe,
        adapters,
        names,
        params,
        pooling="cls",
        head_type="image_classification",
        labels=("a", "b", "c"),
    )
    base = hub.AutoAdapterModel.from_pretrained(FIXTURES / "vit")
    base.load_adapter(str(saved), use_safetensors=True, set_active=True)
    with torch.no_grad():
        there = base.eval()(pixel_values=theirs).logits
    np.testing.assert_allclose(there.numpy(), logits, atol=1e-4)
