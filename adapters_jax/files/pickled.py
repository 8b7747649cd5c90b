"""Reads the tensors of a file that `torch.save` wrote, without torch and without unpickling it.

A pickle is a program that may call anything. This module goes through its instructions itself,
knows only those by which torch describes a dictionary of tensors, and calls nothing: it makes
texts, numbers, containers, and descriptions of tensors. Any other instruction or name is refused.

Since torch 1.6 a file is a zip archive: the pickle `data.pkl`, and a file for each storage, none of
them compressed. Before, it was five pickles and then the storages.

Reference: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import OF_DAMAGE, AdapterFileError, UserError, shortened, shown
from adapters_jax.files.untrusted import Untrusted, name_problem, not_finite, opened

MOST = 2**21  # bytes of a pickle, and of an archive's table; a tensor takes about 150 and 60
MOST_INSTRUCTIONS = 300_000  # read within a second; a tensor takes about 30
_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
_PARAMETER, _TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
_ORDERED = "collections.OrderedDict"
_DTYPES = {
    "torch.BFloat16Storage": jnp.dtype(jnp.bfloat16),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_NAMES = {_PARAMETER, _TENSOR, _ORDERED, *_DTYPES}
# `pickletools` warns of escapes in texts, where warnings may be errors.
_OF_DAMAGE = (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, DeprecationWarning)
_SAME = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_VALUES = {*("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")}
_COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    """A name that the pickle asks for."""

    name: str


class _Storage(NamedTuple):
    """A row of numbers in the file."""

    dtype: np.dtype[Any]
    key: str
    numbers: int

    @property
    def size(self) -> int:
        """The number of its bytes."""
        return self.numbers * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A tensor: the part of a storage from an offset on, with a stride for each axis."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Place = tuple[int, int]  # where the bytes of a storage begin, and how many they are


def read_pickled(path: Path, error: type[UserError] = AdapterFileError) -> dict[str, np.ndarray]:
    """Reads all tensors of a dictionary that `torch.save` wrote, by name.

    Raises:
        AdapterFileError: (or `error`) it asks for anything but tensors, is damaged or compressed,
            too large a pickle, has numbers that are not finite, or its tensors overlap each other.

    Example:
        >>> import pickle, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "adapter_model.bin")
        ...     _ = path.write_bytes(pickle.dumps(print))
        ...     read_pickled(path)
        Traceback (most recent call last):
        adapters_jax.errors.AdapterFileError: .../adapter_model.bin asks for 'builtins.print', ...
    """
    with opened(path, error) as file:
        try:
            is_zip = file.take(min(4, file.size)) == b"PK\3\4"
            file.stream.seek(0)
            tensors, places = _of_zip(file) if is_zip else _of_pickles(file)
            arrays = _arrays(file, tensors, places)
        except UserError as problem:
            if type(problem) is not UserError:
                raise
            raise error(f"{path} {problem}") from problem
        except (*OF_DAMAGE, *_OF_DAMAGE) as problem:
            raise error(f"{path} is damaged: {shortened(str(problem))}") from problem
    if wrong := not_finite(arrays):
        raise error(f"{path} has numbers that are not finite in {wrong}")
    return arrays


# The two kinds of files.


@dataclass(frozen=True)
class _Bounded:
    """A stream for `zipfile`, which would read a table of any size at once."""

    stream: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def read(self, count: int = -1) -> bytes:
        data = self.stream.read(MOST + 1 if count < 0 else min(count, MOST + 1))
        if len(data) > MOST:
            raise UserError(f"has a table of contents of over {MOST} bytes")
        return bytes(data)


def _of_zip(file: Untrusted) -> tuple[Any, dict[str, _Place]]:
    """The object of an archive's pickle, and the places of its storages by key."""
    with zipfile.ZipFile(_Bounded(file.stream)) as archive:  # type: ignore[arg-type]
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or len({*names}) < len(names):
        raise UserError("is not an archive of torch.save, which has one data.pkl")
    places = {entry.filename.removeprefix(roots[0]): _place(file, entry) for entry in entries}
    if "byteorder" in places and _content(file, places["byteorder"]) != b"little":
        raise UserError("has numbers whose highest byte is first; save it on another machine")
    pickle = _content(file, places["data.pkl"])
    return _object(BytesIO(pickle)), {
        key.removeprefix("data/"): place for key, place in places.items() if key[:5] == "data/"
    }


def _place(file: Untrusted, entry: zipfile.ZipInfo) -> _Place:
    """Where the bytes of an entry are."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UserError(f"has compressed or encrypted data, {shown(entry.filename, 80)}")
    begin = max(entry.header_offset, 0)  # negative in some damaged files
    file.stream.seek(begin)
    header = struct.unpack("<4s22xHH", file.stream.read(30))
    if header[0] != b"PK\3\4":
        raise ValueError(f"{shown(entry.filename, 80)} is not where its table says")
    return begin + 30 + header[1] + header[2], entry.file_size


def _content(file: Untrusted, place: _Place) -> bytes:
    """The bytes of a place, of a pickle or shorter."""
    if place[1] > MOST:
        raise UserError(f"has a pickle of {place[1]} bytes, expected at most {MOST}")
    file.stream.seek(place[0])
    return file.take(place[1])


def _of_pickles(file: Untrusted) -> tuple[Any, dict[str, _Place]]:
    """The object of a file of torch before 1.6, and the places of its storages by key."""
    stream = BytesIO(file.take(min(MOST, file.size)))
    storages: dict[str, _Storage] = {}
    first = _object(stream)
    if first != _MAGIC:
        raise UserError("is not a file of torch.save")
    version, system = _object(stream), _object(stream)
    if version != 1001 or type(system) is not dict or system.get("little_endian") is not True:
        raise UserError("has numbers whose highest byte is first, or is older than torch 0.4")
    value, keys = _object(stream, storages), _object(stream)
    places, begin = {}, stream.tell()
    for key in keys:
        storage = storages[key]
        file.stream.seek(begin)
        if int.from_bytes(file.stream.read(8), "little") != storage.numbers:
            raise ValueError(f"storage {shown(key, 80)} is not at byte {begin}")
        places[key] = begin + 8, storage.size
        begin += 8 + storage.size
    return value, places


# What a pickle describes.


def _object(stream: BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """The value that the next pickle of a stream describes, and its storages by key.

    Raises:
        UserError: it has another instruction or name, or too many.
        ValueError: or another one of `OF_DAMAGE`: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def marked() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    argument: Any
    for number, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        name = instruction.name
        if number == MOST_INSTRUCTIONS:
            raise UserError(f"has a pickle of over {MOST_INSTRUCTIONS} instructions")
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _SAME:
            stack.append(_SAME[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in _COUNTS:
            stack[-_COUNTS[name] :] = [tuple(stack[-_COUNTS[name] :])]
        elif name == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_named(".".join(stack[-2:]))]
        elif name == "BINPERSID":
            storage = _storage(*stack.pop())
            if storages.setdefault(storage.key, storage) != storage:
                raise ValueError(f"storage {shown(storage.key, 80)} has two kinds")
            stack.append(storage)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), *arguments))
        elif name == "BUILD":
            stack.pop()  # attributes, such as the versions of the modules of a state dict
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else marked()
            # A key of nested tuples would be hashed by recursion.
            if type(stack[-1]) is not dict or not all(type(key) is str for key in items[::2]):
                raise ValueError("its pickle sets items that are not named")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else marked()
            if type(stack[-1]) is not list:
                raise ValueError("its pickle appends to what is no list")
            stack[-1].extend(items)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"has the instruction {name} in its pickle, which no tensor needs")
    raise ValueError("its pickle has no end")


def _named(name: str) -> _Name:
    """A name that the pickle asks for, if tensors need it."""
    if name not in _NAMES:
        raise UserError(f"asks for {shown(name)}, and only tensors are read; nothing of it was run")
    return _Name(name)


def _storage(
    kind: Any, dtype: Any, key: Any, device: Any, count: Any, view: Any = None
) -> _Storage:
    """The storage of an identifier."""
    found = _DTYPES.get(dtype.name) if type(dtype) is _Name else None
    if found is None or type(key) is not str or not _is_size(count) or view is not None:
        raise ValueError("its pickle has a storage of another form")
    return _Storage(found, key, count)


def _made(function: Any, *arguments: Any) -> Any:
    """What a function of torch would return."""
    name = function.name if type(function) is _Name else ""
    if name == _ORDERED and not arguments:
        return {}
    first, *rest = arguments
    if name == _PARAMETER and type(first) is _Tensor:
        return first
    if name != _TENSOR or type(first) is not _Storage:
        raise ValueError("its pickle calls what makes no tensor")
    offset, shape, strides, *_ = rest
    axes = len(shape)
    if axes != len(strides) or axes > 16 or not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("its pickle has a tensor of another form")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= first.numbers:
        raise UserError(
            f"has a tensor of {[*shape]} outside its storage of {first.numbers} numbers"
        )
    return _Tensor(first, offset, tuple(shape), tuple(strides))


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**48


# Their numbers.


def _arrays(file: Untrusted, tensors: Any, places: dict[str, _Place]) -> dict[str, np.ndarray]:
    """The arrays of tensors, which are views of the storages."""
    if type(tensors) is not dict:
        raise UserError(f"holds a {type(tensors).__name__}, expected a dictionary of tensors")
    if others := [name for name, tensor in tensors.items() if type(tensor) is not _Tensor]:
        raise UserError(f"has {shown(others[0], 80)}, which is not a tensor")
    if wrong := next(filter(None, map(name_problem, tensors)), ""):
        raise UserError(f"is damaged: {wrong}")
    views = set(tensors.values())
    storages = {view.storage for view in views}
    for what, sizes in (
        ("tensors", [math.prod(view.shape) * view.storage.dtype.itemsize for view in views]),
        ("storages", [storage.size for storage in storages]),
    ):
        if sum(sizes) > file.size:
            raise UserError(f"has {sum(sizes)} bytes of {what}, but only {file.size} bytes")
    rows = {storage.key: _row(file, storage, places[storage.key]) for storage in storages}
    return {name: _view(rows[tensor.storage.key], tensor) for name, tensor in tensors.items()}


def _row(file: Untrusted, storage: _Storage, place: _Place) -> np.ndarray:
    """The numbers of a storage."""
    row = np.empty(storage.numbers, storage.dtype)
    if row.nbytes != place[1] or sum(place) > file.size:
        raise ValueError(f"storage {shown(storage.key, 80)} is cut off")
    file.fill(row, place[0])
    return row


def _view(row: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The part of a storage that a tensor is."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, row.dtype)
    steps = [step * row.itemsize for step in tensor.strides]
    # bfloat16 is no type of Python's buffers.
    bytes_ = row.view(np.uint8).data
    return np.ndarray(tensor.shape, row.dtype, bytes_, tensor.offset * row.itemsize, steps)
