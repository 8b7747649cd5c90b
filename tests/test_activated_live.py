"""Activated LoRA of PEFT computes and generates the same here, and back; needs `interop-test`."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_peft_methods_live import llama, noisy, peft, reloaded, torch

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import ARCHITECTURES
from adapters_jax.finetune.models.generation import generate

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = [7, 8]
# Rows with the sequence once, twice, cut in two, nowhere, at the start, and at the very end.
IDS = np.array(
    [
        [4, 9, 7, 8, 11, 12],
        [7, 8, 5, 7, 8, 9],
        [7, 5, 8, 7, 6, 8],
        [4, 9, 5, 6, 11, 12],
        [7, 8, 9, 6, 11, 12],
        [3, 4, 5, 6, 7, 8],
    ]
)
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]
NAMES = ARCHITECTURES["llama"].names


def made(tmp_path, **options):
    """The base here and there, and PEFT's adapter with its file."""
    model, base = llama(tmp_path)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=MODULES,
        alora_invocation_tokens=TOKENS,
        **options,
    )
    theirs = noisy(peft.get_peft_model(base(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    return model, base, theirs


def theirs_of(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def padded(left):
    """The rows, cut to several lengths, with padding on the left or none."""
    ids, mask = IDS.copy(), np.ones_like(IDS)
    for row in range(len(ids) if left else 0):
        n = row % 3
        ids[row] = np.concatenate([np.zeros(n, int), IDS[row][n:]])
        mask[row, :n] = 0
    return ids, mask


@pytest.mark.parametrize("left", [False, True])
def test_logits_are_those_of_peft_and_back(left, tmp_path):
    model, base, theirs = made(tmp_path, rank_pattern={"o_proj": 2}, use_rslora=left)
    ids, mask = padded(left)
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    (method,) = recipe.attached
    assert type(method) is aj.ActivatedLoRA and method.invocation == tuple(TOKENS)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    ours = aj.load_adapter(native, model, example_inputs=(ids,))
    acts = aj.invoked(ids, TOKENS)

    def run(model):  # the output layer is adapted as well, and is in the call
        return model(ids, mask, invoked=acts)

    real, wanted = mask != 0, theirs_of(theirs, ids, mask)
    got = np.asarray(nnx.jit(run)(ours))
    np.testing.assert_allclose(got[real], wanted[real], atol=1e-5)
    bare = theirs_of(base(), ids, mask)
    before = real & ~np.asarray(acts)
    np.testing.assert_allclose(got[before], bare[before], atol=1e-5)
    assert np.abs(got - bare)[np.asarray(acts) & real].max() > 0.1
    count = aj.audit(ours).trainable_parameters
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    saved = save_peft(tmp_path / "ours", recipe, adapters, NAMES, model)
    again = theirs_of(reloaded(base(), saved), ids, mask)
    np.testing.assert_allclose(again[real], wanted[real], atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_generation_is_that_of_peft(left, tmp_path):
    model, base, theirs = made(tmp_path)
    ids, mask = padded(left)
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    ours = aj.load_adapter(native, model, example_inputs=(ids,))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def tokens_of(there):
        with torch.no_grad():
            return there.generate(**inputs, **options, pad_token_id=0)[:, ids.shape[1] :].numpy()

    got = generate(ours, jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=6).ids
    np.testing.assert_array_equal(got, tokens_of(theirs))
    assert (np.asarray(got) != tokens_of(base())).any(1).sum() >= 3


def test_what_peft_does_not_activate_is_refused(tmp_path):
    model, _, _ = made(tmp_path)
    recipe = aj.Recipe(
        aj.ActivatedLoRA("**/query", 2, invocation=(1,)),
        aj.ActivatedLoRA("**/value", 2, invocation=(2,)),
    )
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(IDS,))
    adapters = nnx.state(adapted, aj.nnx.AdapterParam)
    with pytest.raises(UserError, match="alora_invocation_tokens"):
        save_peft(tmp_path / "ours", recipe, adapters, NAMES, model)


def test_peft_activates_in_one_task_alone(tmp_path):
    """Of another one, it is the base in silence: not written so, and read with a warning."""
    model, base, _ = made(tmp_path)
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    saved = save_peft(tmp_path / "ours", recipe, adapters, NAMES, model)
    other = {"task_type": "FEATURE_EXTRACTION"}
    with pytest.raises(UserError, match="task_type='FEATURE_EXTRACTION'"):
        save_peft(tmp_path / "other", recipe, adapters, NAMES, model, **other)
    file = saved / "adapter_config.json"
    file.write_text(file.read_text().replace('"CAUSAL_LM"', "null"))
    mask = np.ones_like(IDS)
    silent = theirs_of(reloaded(base(), saved), IDS, mask)
    np.testing.assert_array_equal(silent, theirs_of(base(), IDS, mask))
    with pytest.warns(aj.AdapterWarning, match="task_type=None"):
        again, _ = load_peft(saved, NAMES, model)
    assert again == recipe
