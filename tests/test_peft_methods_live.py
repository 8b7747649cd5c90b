"""What PEFT trains beside LoRA of modules computes the same here; needs `interop-test`."""

import json
import warnings

import numpy as np
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import ARCHITECTURES, load_decoder

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[4, 9, 5, 6, 11, 7], [1, 2, 3, 4, 5, 6]])
SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VERSION = transformers.__version__


def noisy(model, std=0.3):
    """The model, with values in all that trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * std)
    return model.eval()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        inputs = {name: torch.tensor(x) for name, x in inputs.items()}
        return model(input_ids=torch.tensor(ids), **inputs).logits.numpy()


def reloaded(base, directory):
    """An adapter in PEFT, which must miss no tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(base, directory).eval()


def ours_with(tmp_path, recipe, adapters, model, ids=IDS, **inputs):
    """The logits of an adapter on an NNX model."""
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    adapted = aj.load_adapter(native, model, example_inputs=(ids,))
    return nnx.jit(lambda model: model(ids, **inputs))(adapted)


MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


@pytest.mark.skipif(int(VERSION.split(".")[0]) < 5, reason="transformers 5 stacks experts")
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:2], TARGETS[2:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_and_routers_go_both_ways(family, targets, tmp_path):
    name, more = MIXTURES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    kind = getattr(transformers, f"{name}ForCausalLM")
    noisy(kind(config)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"  # Qwen's of transformers 5 has num_local_experts alone
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    _, model = load_decoder(tmp_path / "base")
    names = ARCHITECTURES[family].names
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"experts.down_proj": 1},
    )
    theirs = noisy(peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), lora))
    theirs.save_pretrained(tmp_path / "theirs")
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    expected = logits(theirs)
    got = ours_with(tmp_path, recipe, adapters, model)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(model(IDS) - expected).max() > 0.05
    ours = save_peft(tmp_path / "ours", recipe, adapters, names.of_version(VERSION), model)
    again = reloaded(kind.from_pretrained(tmp_path / "base"), ours)
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)
