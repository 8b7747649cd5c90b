"""PEFT's comparison of methods on Llama 3.2 3B, as far as a compiler goes: sizes and memory.

PEFT trains each method on MetaMathQA on an NVIDIA L40S, 4 rows of up to 768 tokens a step, weights
in bfloat16, adapters in float32, nothing recomputed, and publishes what it measured (repository
huggingface/peft, method_comparison/MetaMathQA/results, at 5d602fdb). Here the same settings are
compiled for an H100, 4 x 768 tokens, with the attention kernel that `--attention auto` chooses;
nothing is run. A file is the adapter in float32, as `save_adapter` writes it. Every cell is kept as
in `accelerators`. It takes `pip install "adapters-jax[cuda]"`, and JAX_PLATFORMS=cpu.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from adapters_jax.distributed.devices import devices, memory_of
from adapters_jax.distributed.mesh import make_mesh
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.planning import Job
from adapters_jax.trees import leaves_by_path
from benchmarks.accelerators import Record, cell_key, say
from benchmarks.report import Report, Row

MODEL, DEVICE, ROWS, LENGTH = "llama-3.2-3b", "h100", 4, 768
TABLE = f"{MODEL}, {ROWS} x {LENGTH}, bfloat16, one {DEVICE} by its compiler; PEFT's on an L40S"
QV, GIB = ("**/{query,value}",), 2**30


@dataclass(frozen=True)
class Published:
    """A row of PEFT's table, and our flags for it.

    Attributes:
        method: our method.
        fields: our flags.
        trainable: PEFT's number of trainable parameters.
        file: the bytes of PEFT's file.
        most, average: the bytes of memory that PEFT reserved.
    """

    method: str
    fields: dict[str, Any]
    trainable: int
    file: int
    most: int
    average: int


def _lora(rank: int, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "alpha": 2.0 * rank, "targets": QV, **more}


MLP = ("**/mlp/*",)
KV, ALL, DOWN = ("**/{key,value}",), ("**/attention/*",), ("**/mlp/output",)
PUBLISHED = {
    "full fine-tuning": Published(
        "full", {}, 3_212_749_824, 6_425_499_648,
        38_868_615_168, 34_338_935_878,
    ),
    "LoRA, r = 32": Published(
        "lora", _lora(32), 9_175_040, 36_715_216,
        22_292_725_760, 14_397_338_969,
    ),
    "LoRA, r = 64": Published(
        "lora", _lora(64), 18_350_080, 73_415_408,
        22_552_772_608, 14_680_105_104,
    ),
    "rank-stabilised LoRA, r = 64": Published(
        "lora", _lora(64, rank_stabilized=True), 18_350_080, 73_415_408,
        22_561_161_216, 14_648_955_686,
    ),
    "LoRA of feed-forwards, r = 10": Published(
        "lora", _lora(10) | {"targets": MLP}, 9_461_760, 37_868_984,
        24_698_159_104, 15_499_421_286,
    ),
    "DoRA, r = 32": Published(
        "lora", _lora(32, dora=True), 9_289_728, 37_181_760,
        24_532_484_096, 15_414_576_807,
    ),
    "AdaLoRA, r = 64 at the start": Published(
        "adalora", _lora(64), 18_353_664, 35_131_056,
        22_781_362_176, 14_912_955_246,
    ),
    "LoHa, r = 32": Published(
        "loha", _lora(32), 18_350_080, 73_429_560,
        23_907_532_800, 16_071_874_995,
    ),
    "LoKr, r = 32, factor 4": Published(
        "lokr", _lora(32, factor=4), 2_294_656, 9_199_776,
        23_590_862_848, 15_807_641_812,
    ),
    "OFT, blocks of 96": Published(
        "oft", {"block": 96, "targets": QV}, 8_171_520, 32_693_568,
        22_332_571_648, 14_572_767_831,
    ),
    "VeRA, r = 256": Published(
        "vera", {"rank": 256, "targets": QV}, 129_024, 6_821_968,
        21_621_637_120, 13_989_738_604,
    ),
    "(IA)^3": Published(
        "ia3", {"targets": KV, "feed_forward": DOWN}, 286_720, 1_157_064,
        23_234_347_008, 14_785_922_360,
    ),
    "(IA)^3 of all projections": Published(
        "ia3", {"targets": ALL, "feed_forward": MLP}, 630_784, 2_546_928,
        26_145_193_984, 16_179_721_876,
    ),
    "norms": Published(
        "layer-norms", {}, 175_104, 358_288,
        21_181_235_200, 13_816_696_720,
    ),
    "prefix tuning, 200 tokens": Published(
        "prefix-tuning", {"prompt_length": 200}, 11_468_800, 45_875_328,
        21_952_987_136, 13_973_039_821,
    ),
    "prefix tuning, 50 tokens": Published(
        "prefix-tuning", {"prompt_length": 50}, 2_867_200, 11_468_928,
        20_585_644_032, 13_487_627_567,
    ),
    "prompt tuning, 200 tokens": Published(
        "prompt-tuning", {"prompt_length": 200}, 614_400, 2_457_728,
        24_394_072_064, 17_520_706_296,
    ),
    "LLaMA-Adapter, 100 tokens": Published(
        "llama-adapter", {"prompt_length": 100, "last": 28, "gate": "layer"}, 8_601_628, 17_210_384,
        22_456_303_616, 14_459_298_067,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A step of one method, with its layers recomputed in the backward pass or not."""

    name: str
    remat: bool
    needs: tuple[str, ...] = ()

    def compile(self) -> Row:
        """Compiles the step."""
        there, asked = devices(DEVICE), PUBLISHED[self.name]
        job = Job(
            model=MODEL,
            method=MethodOptions(asked.method, **asked.fields),  # type: ignore[arg-type]
            mesh=make_mesh("data=1", there),
            rows=ROWS,
            length=LENGTH,
            dtype="bfloat16",
            quantize=None,
            remat=self.remat,
            attention="auto",
            accelerator=True,
            limit=None,
            say=lambda line: None,
        )
        found = job.plan(ROWS)
        _, state = job.state
        leaves = leaves_by_path(state.base) | leaves_by_path(state.adapters)
        shapes = {path: x.shape for path, x in leaves.items() if state.recipe.keeps(path)}
        small = sum(map(math.prod, shapes.values())) < 1e9
        file = {path: np.zeros(shape, np.float32) for path, shape in shapes.items() if small}
        return {
            "attention": job.attention,
            "trainable": found.trainable_parameters,
            "file": len(safetensors.numpy.save(file)) if small else None,
            "peak": found.total,
            "memory": memory_of(there[0]),
        }


def run(report: Report, quick: bool) -> None:
    """Compiles the cells that the record does not have; those of LoRA if quick."""
    jax.config.update("jax_platforms", "cpu")
    record = Record(report.directory / f"{report.name}-cells.jsonl")
    names = ["LoRA, r = 32"] if quick else list(PUBLISHED)
    cells = [Cell(name, remat) for name in names for remat in (False, True)]
    for number, cell in enumerate(cells, 1):
        say(f"{number} of {len(cells)}: {cell_key(cell)}")
        record.compile(cell)
    for name, theirs in PUBLISHED.items():
        kept, again = (record.rows.get(cell_key(Cell(name, remat))) for remat in (False, True))
        if kept and again:
            _show(report, name, theirs, kept, again)


def _show(report: Report, name: str, theirs: Published, kept: Row, again: Row) -> None:
    peaks = [row["peak"] / GIB for row in (kept, again)]
    file, both = kept["file"], [theirs.most / GIB, theirs.average / GIB]
    report.add(
        TABLE,
        method=name,
        **{"trainable": kept["trainable"], "trainable, PEFT": theirs.trainable},
        **{"MB": file and file / 1e6, "MB, PEFT": theirs.file / 1e6},
        **{"peak GiB": peaks[0], "recomputed": peaks[1]},
        **{"GiB at most, PEFT": both[0], "on average": both[1]},
    )
    report.verdict(
        f"{name}: trainable parameters; MB of the file; GiB of memory",
        f"{theirs.trainable:,}; {theirs.file / 1e6:.1f}; at most {both[0]:.1f}, mean {both[1]:.1f}",
        f"{kept['trainable']:,}; {'-' if file is None else f'{file / 1e6:.1f}'}; "
        f"{peaks[0]:.1f}, recomputed {peaks[1]:.1f}",
        "the H100's compiler, nothing run; the verdict is that of the parameters",
        "reproduced" if kept["trainable"] == theirs.trainable else "not reproduced",
    )
