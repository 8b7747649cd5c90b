"""lm-eval's requests, unchanged, against our server; scores are transformers' (`interop5-test`)."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.serving import serving

from adapters_jax.finetune.models.decoder import save_decoder
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder

WHY = "needs torch, transformers and lm-eval: pip install 'adapters-jax[interop5-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
lm_tasks = pytest.importorskip("lm_eval.tasks", reason=WHY)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FACTS = {
    "The capital of France is": ["Paris", "London", "Rome", "Madrid"],
    "The capital of Japan is": ["Tokyo", "Osaka", "Beijing", "Seoul"],
    "Water freezes into": ["ice", "steam", "sand", "wood"],
    "The opposite of hot is": ["cold", "warm", "red", "loud"],
    "A week has seven": ["days", "hours", "months", "years"],
    "The sun rises in the": ["east", "west", "night", "kitchen"],
    "Bees make": ["honey", "milk", "bread", "silk"],
    "Cows give us": ["milk", "honey", "cotton", "salt"],
    "Two plus two is": ["four", "five", "ten", "one"],
    "The largest planet is": ["Jupiter", "Mars", "Earth", "Venus"],
    "Fish live in": ["water", "trees", "clouds", "caves"],
    "A triangle has three": ["sides", "wheels", "colours", "legs"],
    "Shakespeare wrote": ["Hamlet", "Faust", "Ulysses", "Candide"],
    "The chemical symbol of gold is": ["Au", "Ag", "Fe", "Pb"],
    "Birds fly with their": ["wings", "noses", "teeth", "ears"],
    "The Great Wall is in": ["China", "Peru", "Kenya", "Spain"],
    "A year has twelve": ["months", "weeks", "days", "seasons"],
    "Penguins live in the": ["Antarctic", "Sahara", "Alps", "Amazon"],
    "We hear with our": ["ears", "eyes", "hands", "feet"],
    "The Earth moves around the": ["Sun", "Moon", "Mars", "sea"],
    "Doctors work in": ["hospitals", "garages", "mines", "zoos"],
    "Bread is made of": ["flour", "stone", "glass", "iron"],
    "The first month is": ["January", "March", "June", "October"],
    "Ten minus three is": ["seven", "six", "two", "nine"],
}
CHOICE = """task: facts
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
dataset_path: json
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """task: written
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
dataset_path: json
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder):
    """A task of choices and one of texts, over the same rows; right answers are in all places."""
    rows, folder = [], folder / "tasks"
    folder.mkdir()
    for i, (question, (right, *others)) in enumerate(FACTS.items()):
        choices = [*others[: i % 4], right, *others[i % 4 :]]
        rows.append({"question": question, "choices": choices, "answer": i % 4})
    for name, some, text in (("facts", rows, CHOICE), ("written", rows[:8], WRITE)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        data = f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        (folder / f"{name}.yaml").write_text(text + data)
    return lm_tasks.TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(tasks, kind, **settings):
    """The scores, the log-likelihood of each choice, and the written texts."""
    torch.manual_seed(0)
    found = lm_eval.simple_evaluate(
        kind,
        model_args=settings,
        tasks=["facts", "written"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    samples = {
        name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()
    }
    scores = [[(ll, greedy) for ((ll, greedy),) in row["resps"]] for row in samples["facts"]]
    texts = [row["resps"][0][0] for row in samples["written"]]
    return found["results"], np.array(scores, float), texts


def write_model(folder, layers=3):
    """The first layers of SmolLM2, whose asset is a GGUF file, as transformers reads them."""
    folder.mkdir()
    decoder = load_pretrained_decoder("smollm2-135m")
    config = dataclasses.replace(decoder.config, num_hidden_layers=layers)
    decoder.model.layers = decoder.model.layers[:layers]
    save_decoder(folder, config, decoder.model)
    decoder.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(decoder.tokenizer_config()))
    return str(folder)


def test_the_same_accuracy_as_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tasks = write_model(tmp_path / "smollm2"), write_tasks(tmp_path)
    theirs = evaluated(tasks, "hf", pretrained=model, dtype="float32", device="cpu", batch_size=4)
    flags = "--room", "lora --rank 1", "--context", "64", "--rows", "4"
    found = []
    with serving(model, *flags) as server:
        asked = {"model": "smollm2", "base_url": f"{server.address}/v1/completions"}
        asked |= {"tokenizer": model, "tokenizer_backend": "huggingface", "max_length": 64}
        texts = {"tokenized_requests": False, "num_concurrent": 3}
        for more in ({"batch_size": 8}, texts):  # lists of lists of ids, and single texts
            found.append(evaluated(tasks, "local-completions", **asked, **more))
    results, scores, written = theirs
    for ours in found:
        np.testing.assert_allclose(ours[1], scores, atol=1e-3)
        assert ours[2] == written
        for task, row in results.items():
            for metric, value in row.items():
                assert ours[0][task][metric] == value, (task, metric)
    # So that another answer would show; three layers of a model know few facts.
    assert 0 < results["facts"]["acc,none"] < 1 and len({*written}) > 2
