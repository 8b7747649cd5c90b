"""Checkpoints of merged models: whether there can be one, writing it, and reading it again."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from adapters_jax.errors import BaseFileError, UserError, compare_trees, file_errors, shortened
from adapters_jax.files.atomic import new_directory
from adapters_jax.files.untrusted import opened
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.models.decoder import TOWERS
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.parts.checkpoint import save_tensors
from adapters_jax.finetune.pretrained.decoder import TOKENIZER_CONFIG, PretrainedDecoder
from adapters_jax.finetune.pretrained.locate import find_family, locate, read_config
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.base import Problem
from adapters_jax.finetune.tensors import to_tensors
from adapters_jax.placement.patterns import checked_before
from adapters_jax.presets import HEAD
from adapters_jax.transforms.merge import merge
from adapters_jax.transforms.quantize import dequantize
from adapters_jax.trees import flatten

Written = tuple[list[str], list[str]]  # the names of the files, and notes
_BESIDE = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG, *_BESIDE)
# What multimodal checkpoints have for images and for templates with them.
_OF_IMAGES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)

MERGED, HEAD_FILE = "merged", "head.safetensors"
# What transformers has for a task: its class, and the problem type by which that has a loss.
MODELS = {
    "classification": ("ForSequenceClassification", "single_label_classification"),
    "image-classification": ("ForImageClassification", "single_label_classification"),
    "multilabel": ("ForSequenceClassification", "multi_label_classification"),
    "regression": ("ForSequenceClassification", "regression"),
    "multiple-choice": ("ForMultipleChoice", None),
    "masked-language-modelling": ("ForMaskedLM", None),
}
READ = {  # what a head reads that transformers' classes do not, and its formula
    "mean": ("mean of the tokens", "mean(last_hidden_state)"),
    "cls": ("first token", "cls(last_hidden_state)"),
    "pooler": ("", "pooler_output"),
}


def why_not_merged(problem: Problem, family: Family, config: Mapping[str, Any]) -> tuple[str, str]:
    """Why a run's adapter cannot be merged, by doing it without arrays; and what would be lost.

    Both are empty where nothing is in the way.
    """
    lacks = "the bits of its base: --dequantize" if config.get("quantize") else ""
    try:
        check_writable(family)
        with checked_before():
            if problem.params is None:
                nnx.eval_shape(lambda: merge(dequantize(problem.model)))
                return "", lacks
            found = family.config.from_dict(read_config(config["model"]))
            least = found.inputs(1, 8)
            like = jnp.zeros(least.shape, least.dtype)
            jax.eval_shape(lambda p: merge(problem.model, dequantize(p), like), problem.params)
    except UserError as error:
        return shortened(str(error), 200), ""
    if config.get("pooling") not in ("pooler", MASKED) and family.kind != "vision":
        head = f"its head in transformers' format: it reads {config.get('pooling')}"
        lacks = f"{head}; {lacks}" if lacks else head
    return "", lacks


def check_writable(family: Family) -> None:
    """Raises UserError if checkpoints of a family cannot be written."""
    if family.save is None and family.classifier is None:
        raise UserError(f"checkpoints of the family {family.name} cannot be written")


def write_checkpoint(directory: Path, decoder: PretrainedDecoder, model: nnx.Module) -> list[str]:
    """Writes a checkpoint; the directory appears whole or not at all.

    Returns:
        The names of the files.

    Raises:
        UserError: checkpoints of the model's family cannot be written.
        FileSystemError: the system cannot write the directory.
    """
    check_writable(decoder.family)
    save: Any = decoder.family.save
    values = decoder.settings()
    if values["model_type"] in TOWERS:
        values = {"base": decoder.files}
    with _whole(directory) as beside:
        save(beside, decoder.config, model, **values)
        _write_tokenizer(beside, decoder)
    return sorted(path.name for path in directory.iterdir())


def write_encoder(directory: Path, config: Mapping[str, Any], params: Any) -> Written:
    """Writes a merged encoder, with its head; the directory appears whole or not at all.

    Returns:
        The names of the files, and sentences about what the checkpoint does not say.

    Raises:
        FileSystemError: the system cannot write the directory.
    """
    family, files = find_family(config["model"]), locate(config["model"])
    classifier: Any = family.headed(config["pooling"])
    values = huggingface.read_json(files / "config.json")
    prefixes = (family.prefixes[values["model_type"]],)
    head, notes, target, pooling = params.get(HEAD), [], config["target"], config["pooling"]
    if "std" in target:  # its outputs are the labels then; of classes, mean and std are 0 and 1
        kernel, bias = head["kernel"] * target["std"], head["bias"] * target["std"] + target["mean"]
        head = {"kernel": kernel, "bias": bias}
    names = [each.name for each in type(task_of(config)).__mro__ if hasattr(each, "name")]
    kind, problem = next((MODELS[name] for name in names if name in MODELS), (None, None))
    values.pop("problem_type", None)
    if "image_size" in values:  # DINOv2's positions may be interpolated, see its `of_images`
        tokens = params[classifier.base]["embeddings"]["position"].shape[-2]
        patch = family.config.from_dict(values).patch_size
        values["image_size"] = math.isqrt(tokens - 1) * patch
    beside_it: dict[str, Any] = {}
    if kind and (pooling in ("pooler", MASKED) or family.kind == "vision"):
        values = family.config.of_classifier(values)
        values["architectures"] = [
            re.sub(r"(Model|For\w+)$", kind, name) for name in values.get("architectures") or ()
        ] or None
        if problem:
            labels = target.get("names") or ["LABEL_0"]
            values["problem_type"] = problem
            values["id2label"] = {str(i): name for i, name in enumerate(labels)}
            values["label2id"] = {name: i for i, name in enumerate(labels)}
        if pooling == MASKED:
            values["tie_word_embeddings"] = True  # the output layer is not written
        else:
            params = {**params, HEAD: head}
        tree, table = params, replace(classifier.names, prefixes=prefixes)
    else:
        tree, table = params[classifier.base], replace(family.names, prefixes=prefixes)
        if "sentence-embedding" not in names:  # which has no head
            beside_it = {"weight": np.asarray(head["kernel"]).T, "bias": np.asarray(head["bias"])}
            what, states = READ.get(pooling, ("", "last_hidden_state"))
            why = f"transformers has no classifier that reads the {what}, so " * bool(what)
            head_is = f"the head's weight and bias are in {HEAD_FILE}: logits = {states} @ weight.T"
            notes.append(f"{why}{head_is} + bias")
    with _whole(directory) as beside:
        save_tensors(beside, values, to_tensors(tree, table))
        if beside_it:
            # The kernel is a transposed view, and a file has its rows one after the other.
            arrays = {name: np.ascontiguousarray(x) for name, x in beside_it.items()}
            save_file(arrays, beside / HEAD_FILE)
        _copy(files, (*TOKENIZER_FILES, "vocab.txt", "preprocessor_config.json"), beside)
    _, found = classifier.load(directory, config["pooling"], absent=True)
    _check_equal(directory, params[classifier.base], found)
    return sorted(path.name for path in directory.iterdir()), notes


def save_encoder(
    directory: str | Path,
    base: str | Path,
    params: Any,
    *,
    pooling: str = "mean",
    labels: Sequence[str] = (),
) -> list[str]:
    """Writes an encoder without adapters as a checkpoint of Hugging Face, with its tokenizer.

    With a head on the pooler it is a classifier of transformers. Another head is in
    `head.safetensors`, which a sentence of the returned ones explains.

    Args:
        directory: a directory that does not exist; it appears whole or not at all.
        base: the directory or id of the checkpoint that the encoder was loaded from.
        params: the parameters of `Bert` or of another family's encoder, or of `BertClassifier`
            with its head, such as `aj.merge` returns: arrays of the shapes of the checkpoint.
        pooling: what the head reads: "mean", "cls", "pooler" or "tokens", as of the model.
        labels: the names of the head's classes; by default LABEL_0, LABEL_1, ...

    Returns:
        Sentences about what the checkpoint does not say; empty if it is a model of transformers.

    Raises:
        UserError: the directory exists, the base is no encoder, or labels do not fit the head.
        MismatchError: the parameters are not those of the encoder, such as with adapters.
        FileSystemError: the system cannot write the directory.

    Example:
        >>> save_encoder("merged", "my-bert", params, pooling="pooler")  # doctest: +SKIP
        []
    """
    directory, name = Path(directory), str(base)
    if directory.exists():
        raise UserError(f"{str(directory)!r} exists already; give another directory")
    family = find_family(name)
    if family.classifier is None:
        raise UserError(f"{name!r} is of the kind {family.kind}, expected an encoder")
    config, inside = family.config.from_dict(read_config(name)), family.classifier.base
    width = params[HEAD]["kernel"].shape[-1] if HEAD in params else 0
    if labels and len(labels) != width:
        raise UserError(f"{len(labels)} labels for a head of {width} outputs; name each once")
    if not width:
        params, pooling = {inside: params}, "pooler" if "pooler" in params else "mean"
    read = config.pooling if family.kind == "vision" else pooling
    model = family.classifier.build(config, width or 1, read)
    key, inputs = jax.random.key(0), config.inputs(1, 8)
    expected = flatten(jax.eval_shape(model.init, key, inputs)["params"])
    expected = {path: x for path, x in expected.items() if width or not path.startswith(HEAD)}
    fix = "give the encoder's own parameters, after aj.merge(model, params)"
    compare_trees("save_encoder: params", flatten(params), expected, fix)
    task, target = "sentence-embedding", {}
    if width == 1:
        task, target = "regression", {"names": [], "mean": 0.0, "std": 1.0}
    elif width:
        task = "image-classification" if family.kind == "vision" else "classification"
        target = {"names": [*labels] or [f"LABEL_{i}" for i in range(width)]}
    about = {"model": name, "pooling": read, "task_type": task, "target": target}
    return write_encoder(directory, about, params)[1]


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A directory that gets another's name at the end, and is gone if something fails before."""
    with file_errors(directory, "written"):
        beside = new_directory(directory.absolute())
        try:
            yield beside
            os.rename(beside, directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def check_checkpoint(directory: Path, decoder: PretrainedDecoder, model: nnx.Module) -> None:
    """Reads a checkpoint again, and compares each weight with the model's.

    Raises:
        BaseFileError: weights differ; the message names one.
    """
    _, found = decoder.family.load(directory)
    _check_equal(directory, *(nnx.state(each, nnx.Param) for each in (model, found)))


def _check_equal(directory: Path, merged: Any, read: Any) -> None:
    ours, theirs = flatten(merged), flatten(read)

    def same(path: str) -> bool:
        one, other = (np.asarray(tree[path], np.float32) for tree in (ours, theirs))
        # NaN is not equal to itself, so weights that are not finite differ here, too.
        return np.array_equal(one, other)

    both = ours.keys() & theirs.keys()
    differing = sorted(p for p in ours.keys() | theirs.keys() if p not in both or not same(p))
    if differing:
        raise BaseFileError(
            f"{str(directory)!r} was read again with {len(differing)} other weights, such as "
            f"{differing[0]}, than were merged; do not use it"
        )


def _copy(files: Path, names: Iterable[str], directory: Path) -> None:
    """Copies those of these files that a base has; a link out of it would take others along."""
    for name in names:
        if (files / name).is_file():
            with opened(files / name, BaseFileError) as file, open(directory / name, "xb") as copy:
                shutil.copyfileobj(file.stream, copy)


def _write_tokenizer(directory: Path, decoder: PretrainedDecoder) -> None:
    """Writes the tokenizer: copies the base's own files if it has them."""
    if decoder.files.is_dir():
        _copy(decoder.files, (*TOKENIZER_FILES, *_OF_IMAGES), directory)
        return
    decoder.tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(decoder.tokenizer_config(), indent=2, ensure_ascii=False)
    (directory / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
