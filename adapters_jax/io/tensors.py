"""Safetensors files that others wrote, read with distrust.

The header is checked whole before a tensor is read, and nothing is allocated before its size is
known to fit the file. Everything that is wrong with a file is an `AdapterFileError` that names it.

The package safetensors checks dtypes, offsets and sizes as well, but accepts a name that is there
twice, further keys, a header of up to 100 MB and any name. It has no float8 for numpy, and it maps
the file, so that a process ends by a signal where the file becomes shorter. So one reader checks
and reads it all.

Reference: https://github.com/huggingface/safetensors#format
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import AdapterFileError, UserError, file_errors, shortened
from adapters_jax.io.untrusted import MOST_JSON, opened, parse, read_bytes

LONGEST_NAME = 512
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
    **{f"{kind.upper()}{n}": np.dtype(f"{kind}{n // 8}") for kind in "iu" for n in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
_CHUNK = 2**16  # numbers that are checked at a time, so that the check takes no memory


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a file, and what it is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file whose header is known to be right; `open_tensors` makes it."""

    path: Path
    file: BufferedReader
    places: dict[str, _Entry]

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every tensor by name, as its shape and dtype."""
        return {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in self.places.items()}

    def read(self) -> dict[str, np.ndarray]:
        """Every tensor by name.

        Raises:
            AdapterFileError: the file became shorter, or some number is not finite; all tensors
                that have such numbers are named.
        """
        arrays = {name: self._tensor(place) for name, place in self.places.items()}
        wrong = not_finite(arrays)
        if wrong:
            raise AdapterFileError(f"{self.path} has numbers that are not finite in {wrong}")
        return arrays

    def _tensor(self, place: _Entry) -> np.ndarray:
        array = np.empty(place.shape, place.dtype)
        with file_errors(self.path, error=AdapterFileError):
            self.file.seek(place.begin)
            count = self.file.readinto(array.reshape(-1).view(np.uint8).data) if array.size else 0
        if count != array.nbytes:
            raise AdapterFileError(f"{self.path} became shorter while it was read; read it again")
        return array


def not_finite(arrays: Mapping[str, np.ndarray]) -> str:
    """The names of arrays that hold NaN or infinity, for a message; empty where none does.

    Example:
        >>> not_finite({"a": np.ones(2), "b": np.array([0.0, np.nan])})
        'b'
    """
    wrong = [name for name, array in arrays.items() if not _finite(array)]
    return ", ".join(wrong[:12]) + (f" and {len(wrong) - 12} more" if len(wrong) > 12 else "")


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    flat = array.reshape(-1)
    with np.errstate(invalid="ignore"):  # a signalling NaN is one of those we look for
        return all(np.isfinite(flat[i : i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))


def check_header(length: int, size: int, path: Path) -> None:
    """Raises AdapterFileError where a header is too long for a safetensors file of a size."""
    if not 0 < length <= size - 8:
        raise AdapterFileError(
            f"{path} is damaged: it has {size} bytes and says that {length} of them are its header"
        )
    most = max(MOST_JSON, size // 32)
    if length > most:
        raise AdapterFileError(f"{path} has a header of {length} bytes, expected at most {most}")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a safetensors file and checks its header, whole, before any tensor is read.

    Raises:
        AdapterFileError: it is no ordinary file, or not as the format says: the header is JSON of
            at most 1 MiB (or a 32nd of the file), each name is a plain path, each dtype is known,
            and the tensors fill the file from the header to its end, without overlap or hole.
    """
    with opened(path) as (file, size):
        length = int.from_bytes(read_bytes(file, min(size, 8), path), "little")
        check_header(length, size, path)
        header = read_bytes(file, length, path)
        if not header.startswith(b"{"):
            raise AdapterFileError(f"{path} is damaged: its header is no JSON object")
        entries = parse(header, path)
        try:
            places = _places(entries, 8 + length, size)
        except ValueError as error:
            raise AdapterFileError(f"{path} is damaged: {error}") from error
        yield TensorFile(path, file, places)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a safetensors file by name; raises as `open_tensors` and `read` do.

    Example:
        >>> import pathlib, tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     path = pathlib.Path(place, "a.safetensors")
        ...     save_file({"x": np.ones(2, np.float32)}, path)
        ...     read_tensors(path)
        {'x': array([1., 1.], dtype=float32)}
    """
    with open_tensors(path) as file:
        return file.read()


def _places(header: dict[str, Any], start: int, size: int) -> dict[str, _Entry]:
    """Every tensor's place; raises ValueError where the header is not as the format says."""
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise UserError("its __metadata__ is no mapping from text to text")
    places = {name: _place(name, entry, start) for name, entry in header.items()}
    position = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != position:
            what = (
                "overlaps another tensor" if place.begin < position else "leaves a hole before it"
            )
            raise UserError(f"{name} {what}: it begins at {place.begin}, expected {position}")
        position = place.end
    if position != size:
        raise UserError(f"its tensors end at byte {position}, and the file has {size}")
    return places


def _place(name: str, entry: Any, start: int) -> _Entry:
    """One tensor's place, from its entry in the header."""
    problem = name_problem(name)
    if problem:
        raise UserError(problem)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{name} has no entry of dtype, shape and data_offsets alone")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(f"{name} has the dtype {_told(kind)}, expected one of {', '.join(DTYPES)}")
    if not _sizes(shape, 2**31) or len(shape) > 16 or math.prod(n or 1 for n in shape) > 2**48:
        raise UserError(f"{name} has the shape {_told(shape)}, expected a list of sizes")
    if not _sizes(offsets, 2**63) or len(offsets) != 2:
        raise UserError(f"{name} has the data_offsets {_told(offsets)}, expected two numbers")
    dtype, (begin, end) = DTYPES[kind], offsets
    extent = math.prod(shape) * dtype.itemsize
    if end - begin != extent:
        raise UserError(
            f"{name} is {kind}{_told(shape)}, {extent} bytes, and has the place of {end - begin}"
        )
    return _Entry(dtype, tuple(shape), start + begin, start + end)


def _told(value: Any) -> str:
    return shortened(repr(value), 80)


def _sizes(value: Any, most: int) -> bool:
    """Whether a value is a list of whole numbers from 0 to below `most`."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < most for n in value)


def name_problem(name: str) -> str:
    """What is wrong with a tensor's name; empty where it is a plain path.

    Example:
        >>> name_problem("layer_0/query/lora/a"), name_problem("../a")
        ('', "the name '../a' is no plain path")
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    if len(name) > LONGEST_NAME or not plain:
        return f"the name {shortened(repr(name), 80)} is no plain path"
    return ""
