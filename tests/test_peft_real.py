"""LoRA on MiniLM and on SmolLM2, trained here and in PEFT: equal logits both ways.

Needs the extra `interop-test`, and the models where `adapters-jax finetune` keeps them; it fetches
neither. With --slow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.spelling import _IDLE, INSTEAD, NAMES, OURS
from adapters_jax.finetune.formats.peft import PROMPTED
from adapters_jax.finetune.models import decoder
from adapters_jax.finetune.models.bert import FAMILY, BertClassifier, load_bert
from adapters_jax.finetune.pretrained import assets

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, RATE = 3, 2e-3
TEXTS = ["a moving and beautifully acted film", "dull, slow and far too long", "it is what it is"]
LABELS = [1, 0, 1]


def fetched(name):
    directory = assets.cached(name)
    if directory is None:
        pytest.skip(f"{name} is not fetched")
    return directory


def close(ours, theirs):
    """Within 1e-4 of each other, or of the largest logit where that is above 1."""
    assert np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


def train_theirs(model, loss_of):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model.eval()


def train_ours(model, params, loss):
    tx, key = optax.adamw(RATE), jax.random.key(0)
    state = aj.TrainState.create(model, params, tx=tx, key=key)
    step = aj.make_train_step(loss)
    for _ in range(STEPS):
        state, metrics = step(state, 0)
    assert float(metrics["finite"]) == 1.0
    return state


@pytest.fixture(scope="module")
def minilm():
    """The directory, our classifier and its parameters, with their random head, and the inputs."""
    directory = fetched("minilm")
    torch.manual_seed(0)
    cls = transformers.AutoModelForSequenceClassification
    theirs = cls.from_pretrained(directory, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="np"))
    config, params = load_bert(directory, pooler=True)
    head = {
        "kernel": theirs.classifier.weight.detach().numpy().T,
        "bias": theirs.classifier.bias.detach().numpy(),
    }
    model = BertClassifier(config, 2, pooling="pooler")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: inputs[name].astype(np.int32) for name in names}
    return theirs, model, {"bert": params, "head": head}, inputs


def as_torch(inputs):
    return {name: torch.tensor(x, dtype=torch.long) for name, x in inputs.items()}


def test_minilm_trained_in_peft_has_equal_logits_here(minilm, tmp_path):
    theirs, model, params, inputs = minilm
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    adapted = peft.get_peft_model(theirs, config)
    labels = torch.tensor(LABELS)
    trained = train_theirs(adapted, lambda m: m(**as_torch(inputs), labels=labels).loss)
    trained.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = trained(**as_torch(inputs)).logits.numpy()
        with trained.disable_adapter():
            before = trained(**as_torch(inputs)).logits.numpy()
    trained.unload()
    recipe, adapters = load_peft(tmp_path, FAMILY.classifier.names, params)
    base = aj.partition(params, recipe)[1]
    whole = aj.merge_trees(adapters, base)
    ours = aj.adapt(model, recipe).apply({"params": whole}, **inputs)
    close(np.asarray(ours), expected)
    assert np.abs(expected - before).max() > 0.05


def test_minilm_trained_here_has_equal_logits_in_peft(minilm, tmp_path):
    _, model, params, inputs = minilm
    recipe = aj.lora(8, 16.0, head="head")
    adapted = aj.adapt(model, recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(1), **inputs)

    def loss(params, batch, key):
        logits = adapted.apply({"params": params}, **inputs)
        labels = jnp.array(LABELS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    state = train_ours(adapted, whole, loss)
    expected = np.asarray(adapted.apply({"params": state.params}, **inputs))
    save_peft(tmp_path / "a", recipe, state.trained, FAMILY.classifier.names, params)
    cls = transformers.AutoModelForSequenceClassification
    theirs = cls.from_pretrained(fetched("minilm"), num_labels=2)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()(**as_torch(inputs))
    close(expected, found.logits.numpy())


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """SmolLM2 in Hugging Face's layout, and the first tokens of a text."""
    place = tmp_path_factory.mktemp("smollm")
    config, model = decoder.load_decoder(fetched("smollm2-135m"))
    decoder.save_decoder(place, config, model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    return place, model, ids


def test_smollm2_trained_in_peft_has_equal_logits_here(smollm, tmp_path):
    place, model, ids = smollm
    theirs = transformers.LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    tokens = torch.tensor(ids, dtype=torch.long)
    adapted = peft.get_peft_model(theirs, config)
    trained = train_theirs(adapted, lambda m: m(tokens, labels=tokens).loss)
    trained.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = trained(tokens).logits.numpy()
    recipe, adapters = load_peft(tmp_path, decoder.NAMES, model)
    grown = aj.adapt(model, recipe, rngs=nnx.Rngs(0))
    aj.save_adapter(tmp_path / "ours", adapters, recipe)
    grown = aj.load_adapter(tmp_path / "ours", model)
    close(np.asarray(grown(ids)), expected)
    assert np.abs(np.asarray(model(ids)) - expected).max() > 0.5


def test_smollm2_trained_here_has_equal_logits_in_peft(smollm, tmp_path):
    place, model, ids = smollm
    recipe = aj.lora(8, 16.0)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(1))

    def loss(model, batch, key):
        logits = model(ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    state = train_ours(adapted, None, loss)
    expected = np.asarray(state.model(ids))
    save_peft(tmp_path / "a", recipe, state.trained, decoder.NAMES, model)
    theirs = transformers.LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
        logits = found(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    close(expected, logits)


def test_names_of_the_installed_peft():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ours = {field.name for field in dataclasses.fields(aj.LoRA)}
    assert fields <= {*OURS, *INSTEAD, *_IDLE, *ours}
    kinds = set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values())
    assert {kind.__name__ for kind in kinds} <= {*NAMES}
    assert peft.tuners.adaption_prompt.config.TRANSFORMERS_MODEL_CONFIG.keys() == {*PROMPTED}
