"""What leaves a run or comes from elsewhere: adapters in the formats of several libraries.

An adapter of any format is read, and written in another one with a model card. What a run can
become is known before it trains: each answer is that of the writer's own check, on the recipe and
shapes alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from adapters_jax.errors import AdapterFileError, UserError, shortened
from adapters_jax.files import hub
from adapters_jax.files.destinations import empty_directory
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune import formats
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.formats.base import (
    Adapter,
    AdapterFormat,
    BaseModel,
    Head,
    changes,
    has_head,
    stand_ins,
)
from adapters_jax.finetune.merging import MERGED, why_not_merged
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.pretrained.base_model import described, heads_of, load_base_model
from adapters_jax.finetune.pretrained.locate import find_family, read_config
from adapters_jax.finetune.pretrained.record import OF_BASE, record_of
from adapters_jax.finetune.report.card import Source, card_of
from adapters_jax.finetune.run_directory import Run, check_finished
from adapters_jax.finetune.tasks import read_run, task_of
from adapters_jax.finetune.tasks.base import Problem
from adapters_jax.trees import flatten, unflatten
from adapters_jax.weights.quantized import unboxed

CARD, RUN_CONFIG = "README.md", "config.json"
# The part of a run's configuration without private data: no paths of the machine and no rows.
_PUBLIC: tuple[str, ...] = ("kind", "task_type", "model", *OF_BASE, "dtype", "max_length")
_PUBLIC += ("metrics", "pooling", "target")
_PUBLIC += ("text", "text_pair", "pairs", "prompts", "pack", "prompt", "completion", "task")
_PUBLIC += ("rows", "seed", "quantize", "method", "optimizer", "data_sha256", "versions", "format")


@dataclass(frozen=True)
class Written:
    """The files that an export wrote, and what they lack.

    Attributes:
        files: the sizes in bytes, by file name.
        notes: sentences about what the files lack or changed; empty if nothing was lost.
    """

    files: Mapping[str, int]
    parameters: int
    notes: Sequence[str]


@dataclass(frozen=True)
class Serving:
    """The server that an adapter is written for.

    Attributes:
        name: one of `SERVERS`.
        rank: the rank of all modules; by default the largest that the adapter has.
        max_error: the largest part of a weight's change that may be lost; by default `MAX_ERROR`.
    """

    name: str
    rank: int | None = None
    max_error: float | None = None

    def made_of(self, source: Source) -> tuple[Source, list[str]]:
        """The adapter as the server loads it, and sentences about that; see `for_server`."""
        # Few runs leave for a server, and PEFT's code is only for them.
        from adapters_jax.finetune.formats.servers import (
            MAX_ERROR,
            SERVERS,
            check_decoder,
            for_server,
        )

        base = source.base
        check_decoder(SERVERS[self.name], base.kind)
        served = for_server(
            SERVERS[self.name],
            source.recipe,
            source.leaves,
            base.names,
            base.params,
            model_type=base.model_type,
            rank=self.rank,
            max_error=MAX_ERROR if self.max_error is None else self.max_error,
        )
        return replace(source, recipe=served.recipe, leaves=served.leaves), served.notes


def found(name: str) -> Run:
    """The directory of a run or an adapter, as `open_source` takes it, or a file as one."""
    every = {RUN_CONFIG, *formats.every_file()}
    path = Path(name)
    return Run(path if path.is_file() else hub.find(name, None, sorted(every)))


def is_run(run: Run) -> bool:
    """Whether a directory is that of a run, and not of a model or an adapter."""
    return run.config.is_file() and "base_sha256" in read_json(run.config)


def whole(name: str) -> str:
    """The finished run whose `adapter` a path is, since it says more of it; or the name itself."""
    path = Path(name)
    run = Run(path.parent)
    if path.name != run.adapter.name or not path.is_dir() or not is_run(run):
        return name
    return str(run.path) if "summary" in read_json(run.config) else name


def open_source(
    name: str,
    model: str | None = None,
    pooling: str | None = None,
    any_base: bool = False,
    headed: bool = False,
) -> Source:
    """Reads an adapter and its base model.

    Args:
        name: a directory of a run, or of an adapter of adapters_jax, PEFT or AdapterHub, or the id
            of one on the Hub, optionally with `@` and a revision; or a GGUF file.
        model: the base model; by default the run's, or the one that the adapter's file names.
        pooling: what an encoder's head reads; a run has its own.
        any_base: accept a base that changed, or another one, if the adapter fits it.
        headed: read it for an encoder below a head, as runs have it, if it has no head as well.

    Raises:
        AdapterFileError: there is no adapter, it is damaged, a setting is not supported, or the
            base model is not known.
        RunError: the run is not finished or damaged, or files of its base changed.
        OtherBaseError: the adapter was trained on another base model.
        UserError: the base model cannot be used.
        AssetError: the pinned model could not be fetched.
    """
    run = found(name)
    config = None
    if is_run(run):
        _, config = read_run(run)
        check_finished(run, config)
        pooling = config.get("pooling", pooling)
    place = run.adapter if config or run.adapter.is_dir() else run.path
    form = formats.format_of(place)
    called = model or (config["model"] if config else form.base_name(place))
    if called is None:
        raise AdapterFileError(
            f"{name!r} does not name its base model; add --model with a pinned model, a directory, "
            "or an id on the Hugging Face Hub"
        )
    family = find_family(called)
    classifier = family.headed(pooling)
    head = form.head(place, classifier.base) if classifier else None
    if classifier and headed and head is None:
        head = Head(1)
    width, pooled = (head.width, head.pooling) if head else (None, None)
    width = form.labels(place) if family.kind == "decoder" else width
    if config:
        config = record_of(called).checked(run, config, any_base)
    base = load_base_model(called, width, pooled or pooling)
    recipe, leaves = form.read(place, base.accepting(any_base))
    return Source(form, base, recipe, leaves, config)


def export(
    source: Source,
    directory: Path,
    to: str,
    *,
    name: str | None = None,
    head: bool | None = None,
    license: str | None = None,
    server: Serving | None = None,
) -> Written:
    """Writes an adapter and its card in a format; a run also gets what prediction needs.

    The written files are read again, to find what the format lost.

    Args:
        directory: a new or empty directory; it appears whole or not at all.
        to: the name of the format.
        name: the name by which the card loads the adapter; by default the directory.
        head: whether to write an encoder's head; None writes it where the format's library has
            such a head, and else says in a note that it is left out.
        license: the license in the card.
        server: the server that has to load it; llama.cpp for gguf.

    Raises:
        UserError: the format or the server does not support the adapter; the message lists every
            problem.
    """
    empty_directory(directory)
    form, native = FORMATS[to], to == "native"
    if head is False and native:
        raise UserError(
            "--no-head: a native adapter holds all that its recipe trains; leave it out"
        )
    source, headless = without_head(source, form, head)
    shown = name or directory.as_posix()
    notes = [] if native else _notes(source, form, headless)
    if to == "gguf" and server is None:
        server = Serving("llama.cpp")
    if server:
        source, changed = server.made_of(source)
        notes += changed
    beside = {CARD: card_of(source, form, shown, license, notes)}
    if native and source.config:
        beside[RUN_CONFIG] = json.dumps(_public(source.config), indent=2, ensure_ascii=False) + "\n"
    adapter = Adapter(
        source.recipe,
        source.leaves,
        name=re.sub(r"[^\w-]+", "-", shown.split("/")[-1]),
        labels=source.labels,
        head_type=task_of(source.config).head if source.config else None,
        beside=beside,
    )
    form.write(directory, adapter, source.base)
    # The files alone say what another library gets; what differs from the source is a note.
    again = form.read(directory, source.base)
    notes += changes((source.recipe, source.leaves), again)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    return Written(sizes, sum(leaf.size for leaf in source.leaves.values()), notes)


def _notes(source: Source, to: AdapterFormat, headless: str) -> list[str]:
    """Sentences about what the files of another library cannot hold."""
    notes, config = [], source.config or {}
    target = config.get("target", {})
    if headless:
        notes.append(f"the head is left out: {headless}")
    elif source.labels and not to.names_classes:
        notes.append(
            f"{to.owner}'s files do not name the classes, which are "
            + ", ".join(f"{i}: {label}" for i, label in enumerate(source.labels))
        )
    elif "mean" in target and not source.labels:
        mean, std = target["mean"], target["std"]
        notes.append(f"the head's output y means {mean:g} + {std:g} y; only {CARD} says so")
    if config.get("quantize"):
        notes.append(f"it was trained on a base in {config['quantize']}, and works best on that")
    if config.get("prompts"):
        prompts = json.dumps(config["prompts"], ensure_ascii=False)
        notes.append(f"only {CARD} says how prompts were formatted: {prompts}")
    return notes


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The public part of a run's configuration, which is what its predictions need."""
    keys = (*_PUBLIC, *(key for key in task_of(config).needed if key not in _PUBLIC))
    kept = {key: config[key] for key in keys if key in config}
    summary = dict(config.get("summary", {}))
    # The path of the run, and rows of the data in its samples, stay on this machine.
    summary.pop("run", None)
    rows = summary.get("results", [])
    summary["results"] = [{k: v for k, v in row.items() if k != "samples"} for row in rows]
    path = Path(kept["model"])
    return {**kept, "model": path.name if path.exists() else kept["model"], "summary": summary}


def describe(written: Written, to: str, where: str) -> list[str]:
    """Describes the written files, and what they lack, in lines for people."""
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in written.files.items())
    lines = [f"{where} holds {written.parameters:,} parameters for {FORMATS[to].owner}: {sizes}"]
    lines += written.notes or ["read again, every tensor and setting is as it was"]
    return lines


def without_head(source: Source, form: AdapterFormat, head: bool | None) -> tuple[Source, str]:
    """An adapter as a format takes it: without its head, if that is asked for or not supported.

    Args:
        head: whether to write the head; None writes it where the format's library supports it.

    Returns:
        The adapter, and why its head is left out; empty if it has none or keeps it.

    Raises:
        UserError: `head` is True, and the library does not support the head.
    """
    if not has_head(source.leaves):
        return source, ""
    problem = form.head_problem(source.base)
    if problem and head:
        raise UserError(
            f"{form.owner} does not support the head: {problem}; leave --head out to write the "
            "adapter without it"
        )
    if head is False or problem:
        return source.without_head(), problem or "as asked"
    return source, ""


class Way(NamedTuple):
    """One thing that a run can become, or cannot.

    Attributes:
        name: the name of a format, or "merged".
        why_not: why the run cannot become it; empty if it can.
        lacks: what it leaves out then, and why; empty if nothing.
    """

    name: str
    why_not: str = ""
    lacks: str = ""

    def __str__(self) -> str:
        if self.why_not:
            return f"no: {self.why_not}"
        return f"yes, without {self.lacks}" if self.lacks else "yes"


def ways_out(problem: Problem, config: Mapping[str, Any], identity: BaseIdentity) -> list[Way]:
    """What a run on this problem can become."""
    family = find_family(config["model"])
    base, leaves = _shapes(problem, family, config, identity)
    found = [_in_format(form, base, problem, leaves, config) for form in FORMATS.values()]
    return [*found, Way(MERGED, *why_not_merged(problem, family, config))]


def sentences(ways: Sequence[Way]) -> list[str]:
    """The ways in lines for people: what the run can become, then why it cannot become the rest.

    Example:
        >>> sentences([Way("native"), Way("peft", lacks="its head"), Way("merged", "no weight")])
        ['this run can become: native, peft (without its head)', 'not merged: no weight']
    """
    able = [w.name + (f" (without {w.lacks})" if w.lacks else "") for w in ways if not w.why_not]
    rest = [f"not {way.name}: {way.why_not}" for way in ways if way.why_not]
    return [f"this run can become: {', '.join(able)}", *rest]


def _shapes(
    problem: Problem, family: Family, config: Mapping[str, Any], identity: BaseIdentity
) -> tuple[BaseModel, dict[str, Any]]:
    """The base and the adapter of a problem, as stand-ins of their shapes."""
    whole = problem.params
    if whole is None:
        whole = nnx.to_pure_dict(nnx.state(problem.model, nnx.Param))
    shapes = {path: unboxed(leaf) for path, leaf in flatten(whole).items()}
    arrays, recipe = stand_ins(shapes), problem.recipe
    params = unflatten({p: x for p, x in arrays.items() if recipe.owner(p) is None})
    base = described(
        config["model"],
        family,
        read_config(config["model"])["model_type"],
        params,
        heads=heads_of(family, getattr(problem.model, "config", None)),
        identity=identity,
        classifies=family.classifier is not None,
        pooling=config.get("pooling"),
    )
    names = replace(base.names, keys=getattr(problem.model, "attention_keys", ""))
    base = replace(base, names=names)  # stand-ins do not say how their keys turn
    return base, {path: x for path, x in arrays.items() if recipe.keeps(path)}


def _in_format(
    form: AdapterFormat,
    base: BaseModel,
    problem: Problem,
    leaves: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Way:
    source = Source(form, base, problem.recipe, leaves, config)
    source, headless = without_head(source, form, None)
    adapter = Adapter(source.recipe, source.leaves, labels=source.labels)
    try:
        problems = form.problems(adapter, base)
    except UserError as error:
        problems = [str(error)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Way(form.name, f"{shortened(problems[0], 200)}{more}")
    return Way(form.name, lacks=f"its head: {headless}" if headless else "")
