"""Writes one base and one adapter for all sides, in the layout of each library.

The weights are random. Factors and bottlenecks are not zero, so that a wrong scale or a missing
tensor changes the first loss.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.files.adapterhub import save_adapterhub
from adapters_jax.files.names import NameTable
from adapters_jax.files.peft import save_peft
from adapters_jax.finetune.models import bert
from adapters_jax.finetune.models.bert import BERT_BASE, FAMILY, BertClassifier, BertConfig
from adapters_jax.finetune.models.decoder import NAMES as DECODER_NAMES
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.finetune.tensors import to_tensors
from adapters_jax.trees import flatten, unflatten
from benchmarks.llama import QWEN, SMOLLM2, TINY
from benchmarks.sides.job import LABELS, Job

NOISE = 0.02
ADAPTERS = ("first", "second")
LINEAR = "**/{query,key,value,output,gate,up}"  # all linear layers of a decoder but the head
WORDS = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": WORDS}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run; by default the published ones."""

    bert: BertConfig = BERT_BASE
    llama: DecoderConfig = SMOLLM2
    qwen: DecoderConfig = QWEN
    bert_tokens: tuple[int, int] = (8, 128)
    llama_tokens: tuple[int, int] = (4, 256)
    qwen_tokens: tuple[int, int] = (32, 128)
    rank: int = 8
    bottleneck: int = 64
    matmul: int = 2048

    def job(self, task: str, directory: Path, model: str = "bert", method: str = "lora") -> Job:
        (batch, length), vocab = getattr(self, f"{model}_tokens"), getattr(self, model).vocab_size
        sizes = self.rank, self.bottleneck, self.matmul
        return Job(task, str(directory), model, method, batch, length, vocab, *sizes)


TOY = Sizes(
    BertConfig(99, 64, 2, 4, 128, max_position_embeddings=32),
    TINY,
    replace(QWEN, vocab_size=64, hidden_size=36, intermediate_size=48, head_dim=4),
    (2, 16),
    (2, 8),
    (8, 8),
    4,
    8,
    256,
)


def write(directory: Path, sizes: Sizes) -> None:
    """Writes the base models, and adapters of both methods."""
    write_bert(directory, sizes)
    write_decoder(directory, sizes, "llama", "lora")


def write_bert(directory: Path, sizes: Sizes) -> None:
    """Writes a classifier that reads the pooler, and LoRA and Houlsby's adapters for it."""
    config = replace(sizes.bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, ids = BertClassifier(config, LABELS, pooling="pooler"), np.zeros((1, 4), np.int32)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    _write_bert_base(directory / "bert", config, params)
    for method, recipe in (
        ("lora", aj.lora(sizes.rank, head="head")),
        ("houlsby", aj.houlsby(sizes.bottleneck, head="head")),
    ):
        whole = jax.eval_shape(
            lambda recipe=recipe: aj.init_adapters(
                aj.adapt(model, recipe), params, jax.random.key(0), ids
            )
        )
        for seed, which in enumerate(ADAPTERS, 1):
            values = flatten(shaken(whole, seed)) | flatten(params)
            trained = aj.partition(unflatten(values), recipe)[0]
            formats = Formats(directory / f"bert-{method}", which, FAMILY.classifier.names, params)
            formats.write(recipe, trained, peft=method == "lora", task_type="SEQ_CLS")


def _write_bert_base(directory: Path, config: BertConfig, params: Any) -> None:
    directory.mkdir(parents=True)
    tensors = to_tensors(params["bert"], bert.NAMES)
    tensors["classifier.weight"] = np.ascontiguousarray(params["head"]["kernel"].T)
    tensors["classifier.bias"] = params["head"]["bias"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    about = {"architectures": ["BertForSequenceClassification"], "num_labels": LABELS}
    text = json.dumps({**asdict(config), **about, "dtype": "float32"})
    (directory / "config.json").write_text(text)


def write_decoder(directory: Path, sizes: Sizes, name: str, *methods: str) -> None:
    """Writes a decoder, and LoRA for it on queries and values or on all linear layers."""
    config: DecoderConfig = getattr(sizes, name)
    base = Decoder(config, rngs=nnx.Rngs(0))
    (directory / name).mkdir(parents=True)
    save_decoder(directory / name, config, base)
    # SkyRL loads a tokenizer, too.
    (directory / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    for method in methods:
        recipe = aj.lora(sizes.rank, **({"targets": LINEAR} if method == "lora-all" else {}))
        adapters = nnx.state(aj.adapt(base, recipe, rngs=nnx.Rngs(0)), aj.nnx.AdapterParam)
        for seed, which in enumerate(ADAPTERS, 1):
            formats = Formats(directory / f"{name}-{method}", which, DECODER_NAMES, base)
            tree, hub = shaken(adapters, seed), method == "lora"
            formats.write(recipe, tree, peft=True, hub=hub, task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Formats:
    """Writes an adapter of one base in several formats."""

    directory: Path
    which: str
    names: NameTable
    base: Any

    def write(
        self, recipe: aj.Recipe, trained: Any, peft: bool, task_type: str, hub: bool = True
    ) -> None:
        """Writes our format, PEFT's and AdapterHub's, which takes head and norms from the base."""
        aj.save_adapter(self.directory / "ours" / self.which, trained, recipe)
        if peft:
            directory = self.directory / "peft" / self.which
            save_peft(directory, recipe, trained, self.names, self.base, task_type=task_type)
        if not hub:
            return
        alone, directory = aj.Recipe(*recipe.attached), self.directory / "adapterhub" / self.which
        tree = unflatten({path: x for path, x in flatten(trained).items() if alone.trains(path)})
        save_adapterhub(directory, alone, tree, self.names, self.base, name=self.which)


@contextmanager
def written(sizes: Sizes, decoders: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    """A directory with decoders by name and LoRA for each of their methods, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="adapters-jax-peers-") as made:
        for name, methods in decoders.items():
            write_decoder(Path(made), sizes, name, *methods)
        yield Path(made)


def drawn(like: Any) -> Any:
    """Random parameters of a base; the scale of a norm has mean 1."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.float32(NOISE) * rng.standard_normal(shape, np.float32)
        return noise + np.float32(path.endswith("norm/scale"))

    return unflatten({path: draw(path, x.shape) for path, x in flatten(like).items()})


def shaken(adapters: Any, seed: int) -> Any:
    """Random adapters, whose outputs are about as large as the base's."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> np.ndarray:
        return rng.standard_normal(x.shape, np.float32) / np.float32(2 * np.sqrt(x.shape[0]))

    return jax.tree.map(draw, adapters)
