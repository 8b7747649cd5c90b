"""The error of a plan for a CPU: the same steps, planned for a CPU and by a TPU's compiler.

It needs libtpu (`pip install "adapters-jax[tpu]"`), and no TPU. Each row is one device, with layers
scanned and recomputed; a CPU's plan in bfloat16 is half of that in float32.
"""

import itertools

import jax

from adapters_jax.distributed.devices import devices
from adapters_jax.distributed.mesh import make_mesh
from adapters_jax.distributed.plan import Plan
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.planning import Job
from benchmarks.report import Report

DEVICE = "v5e:1x1"
SIZES = {"bert-base": (8, 128), "gpt2": (4, 256)}
CASES = (("bert-base", "lora"), ("bert-base", "houlsby"), ("gpt2", "lora"))
DTYPES = ("bfloat16", "float32")


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; one case if quick."""
    jax.config.update("jax_platforms", "cpu")
    cases = itertools.product(CASES, DTYPES)
    for (model, method), dtype in itertools.islice(cases, 1 if quick else None):
        one, other = (planned(model, method, dtype, where) for where in (DEVICE, None))
        working = [
            found.total - found.base - found.adapters - found.optimizer for found in (one, other)
        ]
        report.add(
            f"MiB of one device, by the compiler of {DEVICE} and by that of a CPU",
            model=model,
            recipe=method,
            dtype=dtype,
            **{"tokens a step": "{} x {}".format(*SIZES[model])},
            **{"total, TPU": one.total / 2**20, "total, CPU": other.total / 2**20},
            **{"CPU / TPU": other.total / one.total},
            **{"working, TPU": working[0] / 2**20, "working, CPU": working[1] / 2**20},
            **{"of working": working[1] / working[0]},
        )


def planned(model: str, method: str, dtype: str, device: str | None) -> Plan:
    """The plan of a step for a device, or for a CPU."""
    there = devices(device) if device else jax.devices("cpu")[:1]
    rows, length = SIZES[model]
    job = Job(
        model=model,
        method=MethodOptions(method),
        mesh=make_mesh("data=1", there),
        rows=rows,
        length=length,
        dtype=dtype,
        quantize=None,
        remat=True,
        attention="auto",
        accelerator=device is not None,
        limit=None,
        say=print,
    )
    return job.plan(rows)
