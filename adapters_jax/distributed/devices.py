"""Devices that this machine does not have, to compile for them with their own compilers.

A TPU's compiler comes with `jax[tpu]` and a GPU's with `jax[cuda13]`; neither needs the device.
Nothing can run on such devices: `jax.jit(f).lower(...).compile()` is all that they are for.
"""

import contextlib
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import jax
from jax.experimental import topologies

from adapters_jax.errors import (
    MissingPackageError,
    UserError,
    check_size,
    install_command,
    shortened,
)

GIB = 2**30
# v5e and v6e have a network of two dimensions, v5p and TPU7x of three.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# Without them the compilers look for devices of this machine, and complain that it has none.
_NO_DEVICES_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
_BESIDE_OTHERS = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    Attributes:
        kind: JAX's `device_kind`.
        memory: the bytes of a device that programs can have, as libtpu 0.0.50 says in the error of
            a program that needs more; the data sheets' 16, 95, 32 and 192 GB are of a chip, and a
            chip of `tpu7x` is two devices.
        shapes: topologies that there are, by Google Cloud's pages of the generations.
    """

    kind: str
    memory: int
    shapes: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """A GPU as its compiler needs to know it; from NVIDIA's data sheets and device properties.

    Attributes:
        kind: JAX's `device_kind`.
        memory: the bytes of a device. JAX allocates 75 % of them at once, unless the environment
            variable XLA_PYTHON_CLIENT_MEM_FRACTION has another part.
        bandwidth: of the memory, in bytes a second.
        cores: the number of multiprocessors.
        clock: in GHz.
        cache: bytes of the second level.
        shared: bytes of shared memory of a multiprocessor.
        lanes: float32 units of a multiprocessor.
        capability: the major number of CUDA's compute capability.
    """

    kind: str
    memory: int
    bandwidth: int
    cores: int
    clock: float
    cache: int
    shared: int
    lanes: int
    capability: int

    @property
    def target(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        # XLA checks kernels against these limits. Those written as numbers are the same for all
        # GPUs in the table; dnn_version_info makes it choose cuDNN's attention.
        return f"""gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
            shared_memory_per_block_optin: {self.shared - 1024}
            core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
            memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache}
            device_memory_size: {self.memory}
            cuda_compute_capability {{ major: {self.capability} }} }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.kind}" """


TPUS = {
    "v5e": Tpu("TPU v5 lite", int(15.75 * GIB), _FLAT),
    "v5p": Tpu("TPU v5", int(95.73 * GIB), _CUBIC),
    "v6e": Tpu("TPU v6 lite", int(31.24 * GIB), _FLAT),
    "tpu7x": Tpu("TPU7x", int(94.74 * GIB), _CUBIC),
}
_HOPPER: dict[str, Any] = {
    "cores": 132,
    "clock": 1.98,
    "cache": 50 * 2**20,
    "shared": 228 * 1024,
    "lanes": 128,
    "capability": 9,
}
_AMPERE: dict[str, Any] = {
    "cores": 108,
    "clock": 1.41,
    "cache": 40 * 2**20,
    "shared": 164 * 1024,
    "lanes": 64,
    "capability": 8,
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84978434048, 3352320000000, **_HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000, **_HOPPER),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000, **_AMPERE),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 42331013120, 1555200000000, **_AMPERE),
}


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Gives devices to compile for, which this machine need not have.

    They are for a mesh, or for a sharding of `jax.ShapeDtypeStruct`; `aj.plan` takes such a mesh.
    The compiler is the accelerator's own, so `memory_analysis()`, `cost_analysis()` and `as_text()`
    of what it compiled are those of the program that would run there.

    Args:
        name: a TPU's generation and the chips along each axis of its network: `"v5e:2x4"`,
            `"v5p:2x2x1"`, `"v6e:4x4"`, `"tpu7x:2x2x1"`; or a GPU and the number of them in one
            host: `"h100:8"`, `"h200:8"`, `"a100:8"`, `"a100-40gb:8"`. By default one chip.
        slices: the number of such slices of TPUs, which the network of the data centre joins.

    Returns:
        The devices; a chip of `tpu7x` is two.

    Raises:
        UserError: the device or its topology is unknown, or the compiler's version is not jaxlib's;
            or there are several slices of GPUs.
        MissingPackageError: the compiler is not installed; the extras `tpu` and `cuda` have it.

    Example:
        >>> devices("v5f:2x2")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: no device 'v5f'; did you mean v5p or v5e? There are v5e, ...
    """
    if not isinstance(name, str):
        raise UserError(f"devices: got {name!r}, expected a text such as 'v5e:2x4' or 'h100:8'")
    generation, _, shape = name.strip().lower().partition(":")
    if generation in TPUS:
        return _tpus(generation, shape, slices)
    if generation in GPUS:
        if slices != 1:
            raise UserError(f"{name}: slices={slices}, and only TPUs have slices; leave it out")
        return _gpus(generation, shape)
    known = [*TPUS, *GPUS]
    near = difflib.get_close_matches(generation, known, 2, 0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"no device {generation!r}; {meant}There are {', '.join(known)}")


def memory_of(device: Any) -> int | None:
    """The bytes of a device's memory, by its kind; None for a device that is not in the tables.

    Args:
        device: one of `devices`, or a real one.

    Example:
        >>> memory_of(jax.devices("cpu")[0]) is None
        True
    """
    known: list[Tpu | Gpu] = [*TPUS.values(), *GPUS.values()]
    return next((each.memory for each in known if each.kind == device.device_kind), None)


def _tpus(generation: str, shape: str, slices: int) -> list[jax.Device]:
    tpu = TPUS[generation]
    check_size(f"devices({generation!r})", "slices", slices)
    _check_compiler(generation, "libtpu", "tpu", _pinned())
    shape = shape or tpu.shapes[0]
    try:
        return _described(f"{generation}:{shape}", "tpu", num_slices=slices)
    except RuntimeError as error:
        # XLA's errors have no classes; the code is at the beginning of the text.
        if not str(error).startswith("INVALID_ARGUMENT"):
            raise
        raise UserError(
            f"no topology {shape!r} of {generation}: {_reason(error)}; there are "
            f"{', '.join(tpu.shapes)}"
        ) from error


def _gpus(name: str, count: str) -> list[jax.Device]:
    count = count or "1"
    if not count.isdecimal() or not 0 < int(count) <= 16:
        raise UserError(
            f"{name}:{count}: expected the number of GPUs in one host, 1 to 16; write {name}:8"
        )
    plugin = next((x for x in ("13", "12") if _installed(f"jax-cuda{x}-plugin")), "13")
    _check_compiler(name, f"jax-cuda{plugin}-plugin", "cuda", version("jaxlib"))
    try:
        return _described(name, "cuda", target_config=GPUS[name].target, topology=f"1x1x{count}")
    except NotImplementedError as error:  # jax registers its plugins once
        raise UserError(
            f"{name}: jax found no GPU before, and so has not loaded the compiler; call "
            "aj.devices before anything that needs a device, or set JAX_PLATFORMS=cpu"
        ) from error


def _described(name: str, platform: str, **options: Any) -> list[jax.Device]:
    """The devices of a topology.

    Each process that loads libtpu locks it for as long as it runs, although only those that use
    TPUs would disturb each other; so where the lock is taken, it is loaded without.
    """
    with _environment(_NO_DEVICES_HERE):
        try:
            return topologies.get_topology_desc(name, platform, **options).devices
        except RuntimeError as error:
            if "lockfile" not in str(error):
                raise
        with _environment(_BESIDE_OTHERS):
            return topologies.get_topology_desc(name, platform, **options).devices


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Within, the environment has these variables, unless they are set already."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _reason(error: Exception) -> str:
    """The compiler's sentence, without its code and its traces."""
    first = str(error).partition("\n")[0]
    return shortened(first.partition(": ")[2] or first, 200)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _pinned() -> str | None:
    """The versions of libtpu that this jax goes with, such as `0.0.50.*`; None if it says none."""
    # jax states the libtpu of its extra `tpu` exactly, as in `libtpu==0.0.50.*; extra == "tpu"`.
    stated = (each.partition(";")[0].strip() for each in requires("jax") or ())
    return next((x.partition("==")[2] for x in stated if x.startswith("libtpu==")), None)


def _check_compiler(device: str, package: str, extra: str, expected: str | None) -> None:
    """Raises an error where a compiler is not installed, or is not the one of jaxlib's version."""
    found = _installed(package)
    if found is None:
        raise MissingPackageError(f"compiling for {device}", package, extra)
    fits = expected is None or f"{found}.".startswith(expected.removesuffix("*"))
    if not fits:
        raise UserError(
            f"{package} {found} is installed, and jaxlib {version('jaxlib')} goes with {package} "
            f"{expected}; write {install_command(extra)}"
        )
