"""Finished runs with random adapters, made without training."""

import contextlib
import io
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.parsing import parse
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews

REVIEWS = "--model tiny --train reviews.jsonl --text review --max-length 12 --pooling pooler"
MEANINGS = "--model llama --train rows.csv --prompt mr --completion ref --max-length 32"
LORA = "--method lora --rank 2"
# The part of a decoder's summary that has single rows.
SAMPLE = {
    "prompt": "private prompt",
    "completion": "private reference",
    "generated": "private answer",
}


def encoder_run(flags=LORA, name="reviews"):
    """Makes a run on a tiny BERT with a pooler in the current directory; returns its path."""
    if not Path("tiny").exists():
        write_model(Path("tiny"), pooler=True)
        write_reviews(Path("reviews.jsonl"), rows=40)
    return finished_run(f"{REVIEWS} {flags} --name {name}", {"accuracy": 0.75, "f1": 0.8})


def decoder_run(flags=f"{LORA} --targets **/{{query,value}}", name="meanings"):
    """Makes a run on a tiny Llama in the current directory; returns its path."""
    if not Path("llama").exists():
        write_llama(Path("llama"))
        write_meanings(Path("rows.csv"), rows=40)
    flags = f"{MEANINGS} {flags} --exact-match 0 --name {name}"
    return finished_run(flags, {"perplexity": 2.5}, samples=[SAMPLE])


def finished_run(flags, metrics, **of_rows):
    """Makes a run with the flags of `finetune` in the current directory; returns its path."""
    with contextlib.redirect_stderr(io.StringIO()):
        job = parse(Finetune, flags.split()).prepare(Console(json=True))
    problem = job.problem
    if problem.params is None:
        leaves = nnx.to_pure_dict(nnx.state(problem.model, aj.nnx.AdapterParam))
    else:
        leaves, _ = aj.partition(problem.params, problem.recipe)
    draw = np.random.default_rng(0).normal
    leaves = jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(x.dtype), leaves)
    aj.save_adapter(job.run.adapter, leaves, problem.recipe, base=job.identity)
    scores = {"dev": metrics, "test": metrics}
    results = [{"method": job.title, "trainable_parameters": 1, **of_rows, **scores}]
    summary = {"run": "runs/x", "seconds": 1.0, "best_step": 1, "dev": metrics, "results": results}
    job.run.write_config({**job.config, "summary": summary})
    job.run.unlock(job.lock)
    return job.run.path.as_posix()
