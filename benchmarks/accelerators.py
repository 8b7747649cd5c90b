"""What the compilers of accelerators say about a step: peak memory, FLOPs, bytes moved, time.

No accelerator is needed, and nothing is timed but the compilers. Steps are compiled for TPUs by
libtpu and for GPUs by XLA's CUDA compiler; `adapters_jax.devices` describes the devices.

A compiler counts the body of a loop once. So costs are compared for models of two and of three
unrolled layers, and those of the whole model are computed from the two. A single layer would have
another peak, since no next layer is in memory at the same time. Whole models are compiled as they
are trained, with layers scanned and recomputed.

Every cell is a line of a record as soon as it is compiled, and an interrupted run goes on behind
it; to compile a cell anew, delete its line. Cells whose compiler or library is not installed are
left for a run that has it. It takes `pip install "adapters-jax[tpu,cuda,quant]" google-tunix`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from adapters_jax.distributed.devices import devices, memory_of
from adapters_jax.distributed.mesh import make_mesh
from adapters_jax.distributed.program import Program, TooLarge, compile_program
from adapters_jax.errors import MissingPackageError
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.planning import Job
from benchmarks.accelerator_sides import SIDES
from benchmarks.report import COSTS, LARGEST, WHOLE, Report, Row
from benchmarks.shapes import agreement

ATTENTION = "dense"  # the attention function of our models
QWIX, HAND, PEAK, MIXED = 1.0, 1.01, 0.5, 1.05
PACKED = {  # estimated time, bytes and temporaries of a quantised base / of one in bfloat16
    ("int8", "v5p"): (1.00, 0.90, 1.00),
    ("int8", "v5e"): (0.92, 0.75, 1.00),
    **{(dtype, "v5p"): (1.02, 0.90, 1.00) for dtype in ("int4", "nf4")},
    **{(dtype, "v5e"): (0.90, 0.70, 1.00) for dtype in ("int4", "nf4")},
    **{(dtype, "h100"): (1.00, 1.00, 1.00) for dtype in ("int8", "int4", "nf4")},
}
NARROWER = {("llama-3.2-1b", "v5e"): 0.80, ("gemma-3-4b-pt", "v5e"): 0.80}  # peak, int4 / int8
THIN = 1.03  # the estimated time of LoRA on all linear layers / on queries and values
EACH, FULL = "ours, an adapter for each 4 rows", "full fine-tuning"
LINEAR = "ours, all linear layers"
COUNTED = ("flops", "bytes_accessed", "moved", "seconds", "total", "temporaries")


@dataclass(frozen=True)
class Cost:
    """A side's step at its costs a layer."""

    side: str
    model: str
    layers: int
    rows: int
    length: int
    device: str = "v5e"
    how: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("tunix", "qwix") if "tunix" in self.side else ()

    def compile(self) -> Row:
        """Compiles two and three layers."""
        mesh = make_mesh("data=1,fsdp=1,tp=1", devices(self.device))  # tunix names the last two
        size = self.model, self.rows, self.length
        two, three = (_described(self._lowered(mesh, layers, *size)) for layers in (2, 3))
        more = self.layers - 2
        whole = {name: _along(two[name], three[name], more) for name in COUNTED}
        return {**whole, "two": two, "three": three}

    def beside(self, side: str) -> "Cost":
        """The same step of another side."""
        return replace(self, side=side)

    def _lowered(self, mesh: Any, layers: int, model: str, rows: int, length: int) -> Any:
        return SIDES[self.side](mesh, model, layers, rows, length, **self.how)


@dataclass(frozen=True)
class Whole:
    """A whole model's step, as `adapters-jax plan --device` compiles it."""

    model: str
    method: str
    dtype: str
    rows: int
    length: int
    device: str
    mesh: str = "fsdp=-1"
    needs: tuple[str, ...] = ()

    def compile(self) -> Row:
        """Compiles the step."""
        there = devices(self.device)
        base = "bfloat16" if self.dtype in ("int8", "int4", "nf4") else self.dtype
        job = Job(
            model=self.model,
            method=MethodOptions(self.method),
            mesh=make_mesh(self.mesh, there),
            rows=self.rows,
            length=self.length,
            dtype=base,
            quantize=None if base == self.dtype else self.dtype,
            remat=True,
            attention=ATTENTION,
            accelerator=True,
            limit=None,
            say=_quiet,
        )
        found = job.plan(self.rows)
        described = asdict(found.program) if found.program else {}
        memory = memory_of(there[0])
        return {**described, **found.to_dict(), "memory": memory, "program": None}


LLAMA, BERT, BASE = ("llama-3.2-1b", 16), ("bert-large", 24), ("bert-base", 12)
DEVICES = ("v5e", "v5p", "h100")
FITTING = {  # the largest that fit with a base in bfloat16, int8 and int4, or are thought to
    "v5e": ("llama-7b", "llama-2-13b", "llama-2-13b"),
    "v6e": ("llama-2-13b", "llama-2-13b", "llama-30b"),
    "v5p": ("llama-30b", "meta-llama-3-70b", "meta-llama-3-70b"),
    "h100": ("llama-30b", "llama-65b", "meta-llama-3-70b"),
    "h200": ("llama-65b", "meta-llama-3-70b", "gpt3-175b"),
}
CELLS: tuple[Cost | Whole, ...] = (
    *(
        Whole("llama-7b", method, dtype, rows, 2048, "v5e")
        for method, dtype, rows in (
            ("lora", "int8", 1),
            ("houlsby", "int8", 1),
            ("lora", "int4", 4),
        )
    ),
    *(
        Cost(side, *LLAMA, 1, 2048, device)
        for device in DEVICES
        for side in ("ours, tunix's model", "qwix, tunix's model")
    ),
    *(
        Cost(side, *LLAMA, 4, 4096, "v5p", {"remat": True, **more})
        for side, more in (("ours", {"chunk": 256}), ("tunix", {}))
    ),
    *(
        Cost(side, *size, device)
        for device in DEVICES
        for size in ((*LLAMA, 1, 512), (*BERT, 32, 128))
        for side in ("ours, float32", "by hand, float32")
    ),
    *(
        Cost(side, *size, device)
        for device in DEVICES
        for size in ((*LLAMA, 1, 2048), (*BERT, 32, 128))
        for side in ("ours", FULL)
    ),
    *(
        Cost(side, *BASE, 32, 128, device, {"method": method})
        for device in ("v5e", "h100")
        for method in ("lora", "houlsby")
        for side in (EACH, "ours")
    ),
    Whole("meta-llama-3-70b", "lora", "int8", 16, 2048, "v5e:4x4"),
    Whole("gpt3-175b", "lora", "bfloat16", 64, 2048, "v5p:4x4x4"),
    *(Whole(model, "lora", "nf4", 1, 2048, "v5e") for model in ("llama-7b", "llama-2-13b")),
    *(
        Whole(model, "lora", dtype, 1, 2048, device)
        for device, models in FITTING.items()
        for dtype, model in zip(("bfloat16", "int8", "int4"), models, strict=True)
    ),
    *(
        Whole(model, "lora", dtype, rows, length, device)
        for device in DEVICES
        for model, rows, length in (
            ("bert-large", 32, 128),
            ("llama-3.2-1b", 1, 2048),
            ("gemma-3-4b-pt", 1, 2048),
            ("meta-llama-3-8b", 1, 2048),
        )
        for dtype in (("bfloat16", "int8") if device == "h100" else ("bfloat16", "int8", "int4"))
    ),
    *(
        Cost(side, "meta-llama-3-8b", 32, 1, 2048, "v5p")
        for side in ("ours", LINEAR, FULL, "ours, tunix's model", "qwix, tunix's model")
    ),
    *(Cost("ours", "meta-llama-3-8b", 32, 1, 2048, device) for device in ("v5e", "h100")),
    *(
        Cost("ours", "meta-llama-3-8b", 32, 1, 2048, device, {"quantize": dtype})
        for dtype, device in PACKED
    ),
)


def run(report: Report, quick: bool) -> None:
    """Compiles the cells that the record does not have; the first two of BERT if quick."""
    jax.config.update("jax_platforms", "cpu")
    cells = [cell for cell in CELLS if isinstance(cell, Cost) and cell.model == "bert-large"]
    cells = cells[:2] if quick else list(CELLS)
    record = Record(report.directory / f"{report.name}-cells.jsonl")
    for number, cell in enumerate(cells, 1):
        say(f"{number} of {len(cells)}: {cell_key(cell)}")
        record.compile(cell)
    show(report, cells, record.rows)


class Record:
    """The compiled cells by key, a line of a file each.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, Row] = {row.pop("cell"): row for row in map(json.loads, lines)}

    def compile(self, cell: Cost | Whole) -> None:
        """Compiles a cell that is not here, unless something is missing for it."""
        key = cell_key(cell)
        if key in self.rows:
            return
        absent = [name for name in cell.needs if not find_spec(name)]
        if absent:
            say(f"left out: {', '.join(absent)} not installed")
            return
        try:
            row = {"attention": ATTENTION, "jax": jax.__version__, **cell.compile()}
        except MissingPackageError as error:
            say(f"left out: {error}")
            return
        self.rows[key] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"cell": key, **row}) + "\n")


def show(report: Report, cells: list[Any], rows: Mapping[str, Row]) -> None:
    """Adds the rows of the compiled cells, and the figures that they reach."""
    done = {cell: rows[cell_key(cell)] for cell in cells if cell_key(cell) in rows}
    for cell, row in done.items():
        add = _add_cost if isinstance(cell, Cost) else _add_whole
        add(report, cell, row)
    costs = ("flops", "moved", "bytes_accessed")
    for first, second, limits in (
        ("ours, tunix's model", "qwix, tunix's model", dict.fromkeys(costs, QWIX)),
        ("ours, float32", "by hand, float32", dict.fromkeys(costs, HAND)),
        ("ours", "tunix", {"total": PEAK}),
        (EACH, "ours", dict.fromkeys(costs, MIXED)),
    ):
        _claim(report, done, first, second, limits)
    for cell, row in done.items():
        if isinstance(cell, Cost) and "quantize" in cell.how:
            _claim_packed(report, cell, row, done.get(replace(cell, how={}), {}))
        if isinstance(cell, Cost) and cell.side == LINEAR and cell.beside("ours") in done:
            took = _layer(row, "seconds") / _layer(done[cell.beside("ours")], "seconds")
            what = f"seconds of a layer, {cell.model}, {cell.device}"
            report.claim(f"{what}: LoRA on all linear layers / q and v", round(took, 3), THIN)
        if isinstance(cell, Whole) and cell.dtype == "int4":
            wider = done.get(replace(cell, dtype="int8"))
            if wider and (cell.model, cell.device) in NARROWER:
                limit = NARROWER[cell.model, cell.device]
                what = f"peak memory, {cell.model}, {cell.rows} x {cell.length}, {cell.device}"
                peak = round(row["total"] / wider["total"], 3)
                report.claim(f"{what}: int4 / int8", peak, limit)
    for cell, row in done.items():
        beside = cell.beside(FULL) if isinstance(cell, Cost) and cell.side == "ours" else None
        if isinstance(cell, Cost) and beside in done:
            _published(report, cell, row, done[beside])
    for row in largest((cell for cell in done if isinstance(cell, Whole)), rows):
        report.add(LARGEST, **row)
    for cell, row in done.items():
        if isinstance(cell, Whole) and cell.model == "llama-7b":
            what = f"{cell.method}, {cell.dtype}, {cell.rows} x {cell.length}, one {cell.device}"
            fits = row["total"] / row["memory"]
            report.claim(f"memory of LLaMA-7B, {what} / the device's", fits, 1.0)


def largest(cells: Iterable[Whole], rows: Mapping[str, Row]) -> list[Row]:
    """Of each card and dtype, the largest compiled model that fits one of it under LoRA."""
    found: dict[tuple[str, str], Row] = {}
    for cell in cells:
        row = rows.get(cell_key(cell))
        one = cell.method == "lora" and ":" not in cell.device
        if row and one and row["total"] <= row["memory"]:
            shown = {"card": cell.device, "base in": cell.dtype, "model": cell.model}
            shown |= {"tokens a step": f"{cell.rows} x {cell.length}"}
            shown |= {"GiB of a device": row["memory"] / 2**30, "peak GiB": row["total"] / 2**30}
            best = found.get((cell.device, cell.dtype))
            if best is None or row["parameters"] > best["parameters"]:
                found[cell.device, cell.dtype] = {**shown, "parameters": row["parameters"]}
    return [found[key] for key in sorted(found)]


def _add_cost(report: Report, cell: Cost, row: Row) -> None:
    report.add(
        COSTS,
        side=", ".join(filter(None, (cell.side, cell.how.get("quantize")))),
        **_named(cell, row),
        **{"peak GiB": _in(row["total"], 2**30), "TFLOP": _in(row["flops"], 1e12)},
        **{"GB moved": _in(row["moved"], 1e9), "GB accessed": _in(row["bytes_accessed"], 1e9)},
        **{"ms, estimated": _in(row["seconds"], 1e-3)},
    )


def _add_whole(report: Report, cell: Whole, row: Row) -> None:
    sent = row.get("collectives") or {}
    report.add(
        WHOLE,
        **_named(cell, row),
        recipe=cell.method,
        base=cell.dtype,
        **{"peak GiB": row["total"] / 2**30, "of a device's": row["memory"] / 2**30},
        **{"base GiB": row["base"] / 2**30, "fits": row["total"] <= row["memory"]},
        **{"GB exchanged": sum(sent.values()) / 1e9},
    )


def _published(report: Report, cell: Cost, ours: Row, full: Row) -> None:
    """Full fine-tuning over LoRA, beside what Hu et al. 2021 say of GPT-3 175B."""
    what = f"full / LoRA, {cell.model}, {cell.rows} x {cell.length}, {cell.device}"
    timed = bool(ours["seconds"] and full["seconds"])
    time = ("seconds", "the compiler's estimate of the time") if timed else ("flops", "FLOPs")
    for claim, published, wanted, (name, how) in (
        ("memory of training", "3 times, on GPT-3 175B", 3.0, ("total", "peak memory")),
        ("training is faster", "1.33 times, on GPT-3 175B and GPUs", 4 / 3, time),
    ):
        if ours[name] is None:  # a GPU's compiler says nothing of costs
            continue
        found = full[name] / ours[name]
        how = f"{how}; everything in bfloat16, AdamW, nothing recomputed"
        verdict = agreement(found, wanted, more_is_fine=True)
        report.verdict(f"{claim}, {what}", published, f"{found:.2f} times", how, verdict)


def _named(cell: Cost | Whole, row: Row) -> Row:
    tokens = {"tokens a step": f"{cell.rows} x {cell.length}"}
    return {"model": cell.model, "device": cell.device, **tokens, "attention": row["attention"]}


def _claim(
    report: Report, done: Mapping[Any, Row], first: str, second: str, limits: Mapping[str, float]
) -> None:
    """The costs of one side over those of another, wherever both are compiled."""
    for cell, row in done.items():
        others = [x for x in done if isinstance(x, Cost) and x.side == second]
        if not isinstance(cell, Cost) or cell.side != first:
            continue
        for other in others:
            size = ("model", "rows", "length", "device")
            method, beside = (each.how.get("method", "") for each in (cell, other))
            if method == beside and all(getattr(cell, k) == getattr(other, k) for k in size):
                for name, limit in limits.items():
                    if row[name] is None:  # a GPU's compiler says what is moved, and no FLOPs
                        continue
                    what = {"total": "peak memory", "moved": "bytes moved"}.get(name, name)
                    what = what.replace("_", " ")
                    tokens = f"{cell.rows} x {cell.length}, {cell.device}"
                    tokens = ", ".join(filter(None, (cell.model, method, tokens)))
                    found = round(row[name] / done[other][name], 3)
                    report.claim(f"{what} of a step, {tokens}: {first} / {second}", found, limit)


def _claim_packed(report: Report, cell: Cost, row: Row, floats: Row) -> None:
    """The costs of a layer on a quantised base over those on a base in bfloat16."""
    dtype = cell.how["quantize"]
    time, moved, kept = PACKED[dtype, cell.device]
    limits = {"seconds": time, "bytes_accessed": moved, "moved": moved, "temporaries": kept}
    for name, limit in limits.items():
        mine, others = (
            each.get("two", {}).get(name) if name == "temporaries" else _layer(each, name)
            for each in (row, floats)
        )
        if mine is None or others is None:  # a compiler that does not say
            continue
        names = {"moved": "bytes moved", "temporaries": "temporaries of two layers"}
        what = names.get(name, name.replace("_", " "))
        what = what if name == "temporaries" else f"{what} of a layer"
        what = f"{what}, {cell.model}, {cell.device}"
        report.claim(f"{what}: {dtype} / bfloat16", round(mine / others, 3), limit)


def _layer(row: Row, name: str) -> Any:
    """What a layer costs: the difference of three and of two; None where one is not known."""
    two, three = (row.get(size, {}).get(name) for size in ("two", "three"))
    return None if two is None or three is None else three - two


def _described(lowered: jax.stages.Lowered) -> Row:
    """What a compiler says of a step; of one that does not fit, its bytes alone."""
    found = compile_program(lowered)
    if isinstance(found, TooLarge):
        return {**dict.fromkeys(COUNTED), "total": found.total, "compile_seconds": None}
    return {name: value for name, value in asdict(found).items() if name in Program.__annotations__}


def _along(two: float | None, three: float | None, more: int) -> float | None:
    return None if two is None or three is None else two + more * (three - two)


def _in(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def cell_key(cell: Cost | Whole) -> str:
    """A cell as the text by which the record has it."""
    return " ".join(f"{name}={value}" for name, value in asdict(cell).items() if value)


say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
_quiet: Callable[[str], None] = lambda line: None  # noqa: E731
