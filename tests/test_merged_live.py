"""transformers opens what `adapters-jax merge` writes, and computes the same; `interop-test`."""

import inspect
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.finished import finished_run
from helpers.tiny import SPOKEN, write_llama, write_meanings
from test_leaving import OTHERS, merged_encoder

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.batches import Batches
from adapters_jax.finetune.inference import load_generator, load_predictor

WHY = "needs torch and transformers: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(kind):
    """The merged checkpoint as transformers reads it, which must miss no tensor and leave none."""
    model, report = kind.from_pretrained(
        "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def logits_of(model, inputs):
    """The logits of a model of transformers for those of the inputs that it takes."""
    taken = inspect.signature(model.forward).parameters
    given = {name: torch.tensor(np.array(x)) for name, x in inputs.items() if name in taken}
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.mark.parametrize("base", ["tiny", *OTHERS])
def test_a_merged_encoder_has_the_same_logits_in_transformers(base):
    predictor = load_predictor(merged_encoder(base))
    texts = [("a good film", None), ("the plot was dull", None)]
    rows, _ = predictor.encoder.encode(texts, 12)
    (batch,) = Batches(rows, None, 2, None, (12,), predictor.encoder.config.pad_token_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    expected = predictor.model.apply({"params": predictor.params}, *inputs.values())
    model = opened(transformers.AutoModelForSequenceClassification)
    assert model.config.id2label == {0: "no", 1: "yes"}
    np.testing.assert_allclose(logits_of(model, inputs), expected, atol=1e-4)


def decoder(name):
    """A checkpoint of a decoder in the current directory, with a tokenizer of few words."""
    write_llama(Path("words"))
    if name == "tiny":
        return Path("words").rename(name)
    shutil.copytree(FIXTURES / name, name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("words", file), name)
    return Path(name)


KNOWN = transformers.CONFIG_MAPPING.keys()  # a release lacks the families that came after it
EVERY = sorted(path.name for path in FIXTURES.iterdir() if path.name.split("-")[0] in KNOWN)
TARGETS = {"deepseek_v3": "**/{query_up,key_value}"}


@pytest.mark.slow
@pytest.mark.witness("tiny", "bloom", "gpt_oss", "qwen3_next")
@pytest.mark.parametrize("name", ["tiny", *EVERY])
def test_a_merged_decoder_has_the_same_logits_in_transformers(name):
    write_meanings(Path("rows.csv"), rows=40)
    run = finished_run(
        f"--model {decoder(name)} --train rows.csv --prompt mr --completion ref --max-length 24 "
        f"--exact-match 0 --method lora --rank 2 --alpha 2 --name {name} "
        f"--targets {TARGETS.get(name, '**/{query,value}')}",
        {"perplexity": 2.5},
    )
    assert main(["merge", run, "--out", "merged"]) == 0
    generator = load_generator(run)
    ids = np.random.default_rng(0).integers(4, len(SPOKEN), (2, 9))
    mask = np.ones_like(ids)
    expected = np.asarray(generator.model(jnp.asarray(ids), jnp.asarray(mask)))
    plain = np.asarray(generator.decoder.model(jnp.asarray(ids), jnp.asarray(mask)))
    model = opened(transformers.AutoModelForCausalLM)
    found = logits_of(model, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(plain - expected).max() > 1e-2
