"""Times adapting, saving, loading and switching, and the imports of the libraries."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Spread, fresh, interleave
from benchmarks.peers.contenders import (
    CONTENDERS,
    FAILED,
    HUB,
    NNX_LORA,
    OURS,
    PEFT,
    QWIX,
    TORCH,
    Group,
    unavailable,
)
from benchmarks.peers.files import Sizes
from benchmarks.report import Report
from benchmarks.workers import HERE, PeerError, interpreter

SIDES = (OURS, PEFT, HUB, QWIX, NNX_LORA)
WHOLE = (OURS, PEFT, HUB)  # libraries with files and switches
USES = {
    "adapt": "new adapters on a loaded base",
    "save": "the adapter's file (ours waits for the disk)",
    "load": "the file onto a loaded base",
    "switch": "to another adapter under a warm model",
}
IMPORTS = {  # by library: its environment, its import, and the imports of its dependencies
    OURS: (HERE, "import adapters_jax", "import jax, flax.linen, flax.nnx"),
    QWIX: (HERE, "import qwix", "import jax, flax.linen, flax.nnx"),
    PEFT: (TORCH, "import peft", "import torch, transformers"),
    HUB: (TORCH, "import adapters", "import torch, transformers"),
}


def run(report: Report, directory: Path, sizes: Sizes, rounds: int, imports: int) -> None:
    """Times both methods, then the imports."""
    for method in ("lora", "houlsby"):
        run_uses(report, directory, sizes, method, rounds)
    run_imports(report, imports)


def run_uses(report: Report, directory: Path, sizes: Sizes, method: str, rounds: int) -> None:
    """Times the uses that each library has; the first time has its own column."""
    job = replace(sizes.job("uses", directory, method=method), batch=1)
    with Group(report, f"adapt, save, load, switch, {method}") as group:
        group.start({name: CONTENDERS[name] for name in SIDES}, job)
        check_switch(group)
        for name in [n for n in group.workers if n not in WHOLE]:
            row = {"job": "save, load, switch", "contender": name}
            report.add(FAILED, **row, why="it has no functions for adapters apart from the base")
        for use, words in USES.items():
            able = [n for n in group.workers if n in WHOLE or use == "adapt"]
            seconds = group.time({n: (n, {"what": use}) for n in able}, rounds + 1, warmup=0)
            for name, (first, *later) in seconds.items():
                row = {"what": use, "method": method, "side": name, "first, ms": 1e3 * first}
                row["then, ms"] = Spread.of(1e3 * s for s in later)
                report.add("Around training, BERT-base", **row, how=words)


def check_switch(group: Group) -> None:
    """Raises ValueError if switching twice does not give the logits of each adapter."""
    able = [name for name in group.workers if name in WHOLE]
    logits = []
    for _ in range(3):
        logits.append(group.ask("result", able, what="forward"))
        group.ask("time", able, what="switch")
    group.ask("time", able, what="switch")  # back to the first
    for name in [name for name in able if name in group.workers]:
        first, second, again = (np.array(found[name]) for found in logits)
        if not np.array_equal(first, again) or np.allclose(first, second, 0, 1e-4):
            raise ValueError(f"{name} does not switch: {first}, {second}, {again}")
    if group.ask("result", [OURS], what="traces").get(OURS, 1) != 1:
        raise ValueError(f"{OURS} compiled more than one program for two adapters")


def _import_seconds(python: str, statement: str) -> float:
    clock = "time.perf_counter()"
    code = f"import time; t = {clock}; {statement}; print({clock} - t)"
    return float(fresh(code, python=python).stdout.split()[-1])


def run_imports(report: Report, rounds: int) -> None:
    """Times imports in fresh interpreters, of each library and of its dependencies."""
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for name, (environment, *statements) in IMPORTS.items():
        try:
            if why := unavailable(environment):
                raise PeerError(why)
            python = interpreter(environment)
            for statement in statements:
                _import_seconds(python, statement)  # puts the files into the system's cache
                runs[name, statement] = partial(_import_seconds, python, statement)
        except (PeerError, RuntimeError) as error:
            why = str(error).strip().splitlines()[-1]
            report.add(FAILED, job="import", contender=name, why=why)
    seconds = interleave(runs, rounds, warmup=0)
    report.samples("imports", {str(key): values for key, values in seconds.items()})
    for name, (_, own, base) in IMPORTS.items():
        if (name, own) in seconds and (name, base) in seconds:
            pairs = list(zip(seconds[name, own], seconds[name, base], strict=True))
            row = {"import": own.removeprefix("import "), "seconds": Spread.of(a for a, _ in pairs)}
            row["beyond"] = base.removeprefix("import ")
            report.add("Import", **row, **{"seconds beyond": Spread.of(a - b for a, b in pairs)})
