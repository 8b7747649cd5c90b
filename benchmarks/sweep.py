"""Adapters that PEFT makes, read here and written back: configurations by families.

A cell is one configuration on one family with one release of transformers. PEFT makes the adapter
on a tiny checkpoint, with values in all that trains; the library reads it, and writes it again for
PEFT. Both have to compute what PEFT computed, or to be refused by an error that is meant for users.
The file sweep-cells.jsonl beside the results has a line for each finished cell. A cell that has a
line does not run again; delete the lines of those to try anew, or the file. Run the command once in
an environment with each release of transformers: the tables have all of them.
"""

import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files.names import NameTable
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import FAMILIES, family_of
from adapters_jax.finetune.models.family import Family
from benchmarks.harness import ROOT
from benchmarks.report import Report, Row
from benchmarks.sweep_configurations import every, five

FIXTURES = ROOT / "tests" / "fixtures"
WHOLE = "llama"  # the family of all configurations
TABLE, REFUSED, BROKEN = "PEFT configurations by family", "Refused", "Wrong or crashed"
EQUAL, NO_PEFT = "equal", "PEFT does not make it"
ATOL = 1e-4  # of outputs, or of the largest one where that is above 1
_POOLED = ("bert", "roberta", "vit")
_KINDS = {
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
}


def bases() -> dict[str, Path]:
    """The tiny checkpoints of the families, by the name of their directory.

    Those of multimodal models have tests of their own, since PEFT adapts their images as well.
    """
    files = sorted(FIXTURES.glob("**/config.json"), key=lambda path: (len(path.parts), path))
    types = {name for family in FAMILIES.values() for name in family.prefixes}
    found: dict[str, Path] = {}
    for file in files:
        reads = json.loads(file.read_text()).get("model_type") in types
        if (
            reads
            and not {"runs", "towers"} & {*file.parts}
            and (file.parent / "model.safetensors").exists()
        ):
            found.setdefault(file.parent.name, file.parent)
    return found


@dataclass(frozen=True)
class Base:
    """A tiny checkpoint, here and in transformers."""

    path: Path

    @cached_property
    def family(self) -> Family:
        """Its family."""
        return family_of(self.settings, self.path.name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The values of its `config.json`."""
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def names(self) -> NameTable:
        """The names of its modules."""
        return self.family.names_of(self.settings["model_type"])

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Its configuration here, and its parameters or its NNX model."""
        return self.family.load(self.path)

    def theirs(self) -> Any:
        """The model of transformers, newly loaded."""
        import transformers

        kind = getattr(transformers, _KINDS.get(self.family.kind, "AutoModel"))
        if self.family.name == "clip":  # its configuration may be that of both towers
            kind = transformers.CLIPVisionModel
        # Only a head reads a pooler, and the hidden states are compared here.
        more = {"add_pooling_layer": False} if self.family.name in _POOLED else {}
        # Another attention of transformers 4 leaves out the soft caps of a Gemma 2.
        return kind.from_pretrained(self.path, attn_implementation="eager", **more).eval()

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """Random inputs by their names here."""
        config, draw = self.loaded[0], np.random.default_rng(0)
        shape = config.inputs(2, 6)
        if self.family.kind == "speech":
            sounds = draw.normal(size=shape.shape).astype(np.float32)
            return {"features": sounds, "decoder_input_ids": np.array([[1, 7, 5], [1, 9, 6]])}
        if not np.issubdtype(shape.dtype, np.integer):
            return {"pixels": draw.normal(size=shape.shape).astype(np.float32)}
        ids = draw.integers(5, config.vocab_size, (2, 6)).astype(np.int32)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        more = self.family.kind == "encoder-decoder"
        return {**inputs, "decoder_input_ids": ids[:, :3]} if more else inputs

    def there(self, model: Any) -> np.ndarray:
        """The outputs of a model of transformers."""
        import torch

        inputs = {name: torch.tensor(x) for name, x in self.inputs.items()}
        inputs = {k: x.long() if x.dtype == torch.int32 else x for k, x in inputs.items()}
        if "pixels" in inputs:
            inputs = {"pixel_values": inputs["pixels"].permute(0, 3, 1, 2)}
        if "features" in inputs:
            inputs["input_features"] = inputs.pop("features")
        with torch.no_grad():
            made = model.eval()(**inputs)
        return (made.logits if "logits" in made else made.last_hidden_state).numpy()

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        inputs, (config, params) = self.inputs, self.loaded
        if isinstance(params, nnx.Module):
            return nnx.jit(lambda model: model(**inputs))
        model = self.family.build(config)
        arguments = (inputs["pixels"],) if "pixels" in inputs else ()
        named = {} if arguments else inputs
        return jax.jit(lambda params: model.apply({"params": params}, *arguments, **named))

    def here(self, recipe: Any, adapters: Any) -> np.ndarray:
        """Our outputs with an adapter; it is merged where it can be, so that nothing compiles."""
        config, base = self.loaded
        arguments = tuple(self.inputs.values())
        if isinstance(base, nnx.Module):
            with tempfile.TemporaryDirectory() as folder:
                saved = aj.save_adapter(Path(folder, "a"), adapters, recipe)
                model = aj.load_adapter(saved, nnx.clone(base), example_inputs=arguments)
            if _has(recipe, "prompt_tuning"):
                return np.asarray(model(*aj.with_prompt(recipe, *arguments)[:2]))
            return np.asarray(self._compiled(aj.merge(model) if _merges(recipe) else model))
        adapted = aj.adapt(self.family.build(config), recipe)
        whole = aj.merge_trees(adapters, aj.partition(base, recipe)[1])
        if _merges(recipe):
            return np.asarray(self._compiled(aj.merge(adapted, whole, *arguments)))
        return np.asarray(adapted.apply({"params": whole}, *arguments))


def _merges(recipe: Any) -> bool:
    return not _has(recipe, "llama_adapter", "prefix", "prompt_tuning")


def _has(recipe: Any, *kinds: str) -> bool:
    return any(method.kind in kinds for method in aj.Recipe(recipe).attached)


def _made(base: Base, make: Callable[[Any], Any], directory: Path) -> np.ndarray:
    """Has PEFT make an adapter with values in all that trains; returns its outputs."""
    import peft
    import torch

    torch.manual_seed(0)
    model = peft.get_peft_model(base.theirs(), make(base.theirs()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    outputs = base.there(model)
    model.save_pretrained(directory)
    return outputs


def _close(got: np.ndarray, expected: np.ndarray) -> str:
    worst = float(np.abs(got - expected).max())
    return EQUAL if worst < ATOL * max(1.0, np.abs(expected).max()) else f"wrong by {worst:.2g}"


def _reason(error: BaseException) -> str:
    """One line without the names of directories of this machine."""
    text = re.sub(r"/\S*/(theirs|ours|a)\b", r"\1", str(error)).replace(f"{ROOT}/", "")
    text = text.replace("|", "/")
    return " ".join(text.split())[:300]


def outcome(base: Base, make: Callable[[Any], Any]) -> dict[str, str]:
    """What becomes of one configuration: how it was read, and how PEFT read what was written."""
    import peft

    plain = base.there(base.theirs())
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "theirs"), Path(folder, "ours")
        try:
            expected = _made(base, make, theirs)[:, -plain.shape[1] :]  # without virtual tokens
            effect = float(np.abs(expected - plain).max())
        except Exception as error:  # whatever PEFT says to a configuration that it does not take
            return {"read": f"{NO_PEFT}: {type(error).__name__}: {_reason(error)}"}
        step, found = "read", {"effect": f"{effect:.2g}"}
        try:
            names, params = base.names, base.loaded[1]
            recipe, adapters = load_peft(theirs, names, params)
            got = base.here(recipe, adapters)[:, -plain.shape[1] :]
            found[step] = _close(got, expected)
            step = "written"
            task = json.loads((theirs / "adapter_config.json").read_text()).get("task_type")
            more = {"task_type": task} if task else {}  # without which PEFT applies no prompt
            save_peft(ours, recipe, adapters, names, params, prefix=_prefix(base), **more)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
                again = peft.PeftModel.from_pretrained(base.theirs(), ours)
            found[step] = _close(base.there(again)[:, -plain.shape[1] :], expected)
        except UserError as error:
            found[step] = f"refused: {_reason(error)}"
        except Exception as error:  # a crash is what the sweep looks for
            found[step] = f"crashed: {type(error).__name__}: {_reason(error)}"
    return found


def _prefix(base: Base) -> str | None:
    """The prefix of modules in the class that PEFT wrapped: none where it is the base alone."""
    prefix = "".join(base.names.prefixes[:1])
    inside = any(name.startswith(prefix) for name, _ in base.theirs().named_modules() if name)
    return None if inside else ""


def cells() -> Iterator[tuple[str, Path, str, Callable[[Any], Any]]]:
    """Every cell: the family, its checkpoint, the configuration's name, and what makes it.

    Families that this release of transformers does not have are left out.
    """
    from transformers import CONFIG_MAPPING

    for name, path in bases().items():
        if Base(path).settings["model_type"] not in CONFIG_MAPPING:
            continue
        for configuration, make in (every() if name == WHOLE else five()).items():
            yield name, path, configuration, make


def run(report: Report, quick: bool) -> None:
    """Runs the cells that have no line yet, and writes the tables of all of them."""
    import peft
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    file = report.directory / "sweep-cells.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    keys = ("transformers", "family", "configuration")
    there = {tuple(row[key] for key in keys) for row in rows}
    todo = list(cells())
    todo = todo[::40] if quick else todo
    loaded: dict[Path, Base] = {}
    with file.open("a") as lines:
        for number, (family, path, configuration, make) in enumerate(todo, 1):
            if (transformers.__version__, family, configuration) in there:
                continue
            if path not in loaded:
                loaded = {path: Base(path)}  # one at a time
            row = {**versions, "family": family, "configuration": configuration}
            row |= outcome(loaded[path], make)
            rows.append(row)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            said = f"{family}, {configuration}: {verdict(row)}"
            print(f"{number}/{len(todo)} {said}", file=sys.stderr)
    tables(report, rows)


def verdict(row: Row) -> str:
    """The outcome of a cell in a word."""
    results = [row.get("read", ""), row.get("written", EQUAL)]
    for word in ("crashed", "wrong", "refused", NO_PEFT):
        if any(result.startswith(word) for result in results):
            return word
    return EQUAL


def tables(report: Report, rows: list[Row]) -> None:
    """Adds a row for each family, one for each reason, and one for each broken cell."""
    releases = sorted({row["transformers"] for row in rows})
    for family in dict.fromkeys(row["family"] for row in rows):
        counts = {
            release: Counter(
                verdict(row)
                for row in rows
                if (row["transformers"], row["family"]) == (release, family)
            )
            for release in releases
        }
        shown = {release: _shown(counts[release]) for release in releases}
        report.add(TABLE, family=family, **{f"transformers {k}": x for k, x in shown.items()})
    for word, kind in (("refused", REFUSED), ("wrong", BROKEN), ("crashed", BROKEN)):
        reasons: dict[tuple[str, str], set[str]] = {}
        for row in rows:
            if verdict(row) == word:
                reason = next(x for x in (row.get("written"), row["read"]) if x and word in x)
                where = f"{row['family']}, {row['transformers']}"
                reasons.setdefault((row["configuration"], reason), set()).add(where)
        for (configuration, reason), where in reasons.items():
            told = ", ".join(sorted(where)) if word != "refused" else len(where)
            report.add(kind, configuration=configuration, cells=told, reason=reason)
    swept = {Base(path).family.name for path in bases().values()}
    report.claim("families without a checkpoint to sweep", len(FAMILIES.keys() - swept), 0)
    for release in releases:
        broken = [verdict(row) for row in rows if row["transformers"] == release]
        broken = [word for word in broken if word in ("wrong", "crashed")]
        report.claim(
            f"PEFT configurations wrong or crashed, transformers {release}", len(broken), 0
        )


def _shown(counts: Counter[str]) -> str:
    order = (EQUAL, "refused", NO_PEFT, "wrong", "crashed")
    words = {NO_PEFT: "not made by PEFT"}
    return ", ".join(f"{counts[word]} {words.get(word, word)}" for word in order if counts[word])
