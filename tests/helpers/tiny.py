"""A tiny random BERT, a tiny Llama, and rows they can learn, for tests of the application."""

import dataclasses
import json
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from adapters_jax.finetune.models.bert import NAMES, Bert, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.trees import flatten

GOOD, BAD = ("good", "fine", "lovely"), ("bad", "poor", "dull")
FILLER = ("the", "film", "was", "and", "a", "plot", "very", "with", "actors", "music")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER)
CONFIG = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
    initializer_range=0.1,
)


def write_model(directory, seed=0, pooler=False, **settings):
    """A random checkpoint in Hugging Face's layout, with a tokenizer of whole words."""
    directory.mkdir(parents=True)
    config = dataclasses.replace(CONFIG, **settings)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    bert = Bert(config)
    run = (lambda bert, ids: bert.pool(bert(ids))) if pooler else Bert.__call__
    init = jax.jit(partial(bert.init, method=run))
    tensors = {}
    for path, leaf in flatten(init(jax.random.key(seed), jnp.ones((1, 4), int))["params"]).items():
        source = NAMES.source(path)
        tensors[source.name] = np.array(leaf.T if source.transposed else leaf, order="C")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return write_words(directory)


def write_words(directory):
    """A tokenizer of whole words, beside a checkpoint of any encoder."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


CHAT = "{% for m in messages %}<user>{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bot>{% endif %}"
FOODS = ("French", "Thai", "Greek", "Dutch")
SPOKEN = ("[UNK]", "<end>", "<user>", "<bot>", "food", "It", "is", "serves", "dishes", *FOODS)
LLAMA = DecoderConfig(
    vocab_size=len(SPOKEN),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)


def write_llama(directory, seed=0, chat_template=CHAT, **settings):
    """A random checkpoint in Hugging Face's layout, with a tokenizer of whole words that chats."""
    directory.mkdir(parents=True)
    config = dataclasses.replace(LLAMA, **settings)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed).normal
    state = jax.tree.map(lambda x: jnp.asarray(draw(0, 0.15, x.shape), x.dtype), nnx.state(model))
    nnx.update(model, state)
    save_decoder(directory, config, model)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPOKEN)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "<user>", "<bot>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"eos_token": {"content": "<end>"}, "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    return directory


def write_meanings(path, rows=120):
    """Prompts whose completion follows from one word."""
    lines = ["mr,ref"]
    for i in range(rows):
        food = FOODS[i % len(FOODS)]
        lines.append(f"{'food ' * (1 + i // 4 % 6)}{food},It serves {food} dishes")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_reviews(path, rows=480, seed=0):
    """Rows whose label follows from one word: a review, a second text, a class and a number."""
    draw = random.Random(seed)
    lines = []
    for i in range(rows):
        label = i % 2
        words = [draw.choice((BAD, GOOD)[label]), *draw.choices(FILLER, k=draw.randint(2, 5))]
        draw.shuffle(words)
        second = draw.choice(FILLER)
        row = {"review": " ".join(words), "topic": second, "label": ("no", "yes")[label]}
        lines.append(json.dumps({**row, "stars": 100.0 + 20 * label + draw.random()}))
    path.write_text("\n".join(lines) + "\n")
    return path
