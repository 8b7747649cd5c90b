"""What `adapters-jax doctor` looks at: versions, devices, cached files, and a tiny step."""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from packaging.requirements import Requirement

from adapters_jax.adapting import adapt
from adapters_jax.distributed.devices import memory_of
from adapters_jax.errors import install_command
from adapters_jax.finetune.pretrained import assets
from adapters_jax.methods import LoRA
from adapters_jax.nnx import AdapterParam
from adapters_jax.texts import bytes_text
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_train_step

PACKAGES = ("adapters-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The extra of jax that each accelerator's package comes with.
ACCELERATORS = {
    "libtpu": "tpu",
    "jax-cuda12-plugin": "cuda12",
    "jax-cuda13-plugin": "cuda13",
    "jax-rocm7-plugin": "rocm7-local",
}
# Files of devices, the platform that jax should have then, and our extra.
HARDWARE = {
    "dev/nvidia0": ("gpu", "cuda"),
    "dev/accel0": ("tpu", "tpu"),
    "dev/vfio/0": ("tpu", "tpu"),
}
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
RATE, SIZE, SLACK = 0.5, 64, 0.02  # of the step; the error of products in bfloat16


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        problem: what is wrong and what to do; None where nothing is.
    """

    subject: str
    found: str
    problem: str | None = None


def examine(root: Path = Path("/")) -> Iterator[Finding]:
    """Looks at the installation and the devices; `root` is where the files of devices are."""
    yield Finding("python", f"{platform.python_version()}, {platform.platform()}")
    yield from packages()
    for name in VARIABLES:
        if name in os.environ:
            yield Finding(name, os.environ[name])
    yield from cache()
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that it has the asked platform
        chosen = os.environ.get("JAX_PLATFORMS")
        why = str(error).partition("\n")[0] or f"JAX_PLATFORMS={chosen} names no platform it has"
        yield Finding("devices", "none", f"jax finds no device: {why}")
        return
    yield Finding("devices", _described(devices), _idle(devices[0].platform, root))
    for dtype in ("float32", "bfloat16"):
        yield step(dtype)


def packages() -> Iterator[Finding]:
    """The versions of what is installed, and requirements that they do not meet."""
    found = {name: _installed(name) for name in (*PACKAGES, *ACCELERATORS)}
    extras = {ACCELERATORS[name] for name in ACCELERATORS if found[name]}
    for name, own in found.items():
        if own is None and name in ACCELERATORS:
            continue
        wrong = list(_unmet(name, extras if name == "jax" else set())) if own else ["is missing"]
        yield Finding(name, own or "missing", f"{name} {'; '.join(wrong)}" if wrong else None)


def cache() -> Iterator[Finding]:
    """The pinned assets in the cache, and what is damaged there."""
    for asset in assets.ASSETS.values():
        folder = assets.cache_root() / asset.folder
        found = str(folder) if os.path.lexists(folder) else "not in the cache"
        wrong = assets.damaged(folder, asset) if os.path.lexists(folder) else []
        differs = f"{folder} differs from {asset.wheel} in {', '.join(wrong)}"
        remedy = "the next command that uses it fetches it again"
        yield Finding(asset.name, found, f"{differs}: {remedy}" if wrong else None)


def _unmet(name: str, extras: set[str]) -> Iterator[str]:
    """The requirements of a package that installed packages do not meet."""
    for text in requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield (f"needs {wanted}, and {found or 'none'} is installed: pip install '{wanted}'")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _described(devices: list[Any]) -> str:
    """The number of devices, their kind and their memory."""
    first = devices[0]
    limit = (first.memory_stats() or {}).get("bytes_limit") or memory_of(first)
    memory = f", {bytes_text(limit)} each" if limit else ""
    return f"{len(devices)} x {first.device_kind} ({first.platform}){memory}"


def _idle(used: str, root: Path) -> str | None:
    """A sentence where the machine has an accelerator that jax does not use."""
    for file, (needed, extra) in HARDWARE.items():
        if used != needed and (root / file).exists():
            chosen = os.environ.get("JAX_PLATFORMS")
            what = f"unset JAX_PLATFORMS={chosen}" if chosen else "install its packages"
            return (
                f"/{file} is a {needed.upper()}, but jax uses the {used}: {what}, "
                f"{install_command(extra)}"
            )
    return None


def step(dtype: str) -> Finding:
    """A step of LoRA on a layer, whose result is compared with the formula in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, SIZE)).astype(np.float32)
    kind = jnp.dtype(dtype)
    layer = nnx.Linear(SIZE, SIZE, use_bias=False, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
    model = adapt(layer, LoRA("**", rank=4), rngs=nnx.Rngs(1))
    kernel = np.asarray(layer.kernel[...], np.float64)
    a, b = (np.asarray(nnx.state(model, AdapterParam)["lora"][name][...]) for name in "ab")
    state = TrainState.create(model, tx=optax.sgd(RATE), key=jax.random.key(0))
    advance = make_train_step(
        lambda model, x, key: jnp.mean(jnp.square(model(x).astype("float32")))
    )
    began = time.perf_counter()
    state, metrics = advance(state, jnp.asarray(x, kind))
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    x64 = x.astype(np.float64)
    expected = b - RATE * (x64 @ a).T @ (2 * x64 @ kernel / x.size)
    off = np.abs(np.asarray(state.adapters["lora"]["b"]) - expected).max() / np.abs(expected).max()
    found = f"{seconds:.1f} s with compiling, error {off:.0e}"
    wrong = None if off < SLACK else f"the result is not that of the formula: error {off:.0e}"
    return Finding(f"a step in {dtype}", found, wrong and f"a step in {dtype}: {wrong}")
