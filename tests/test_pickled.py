"""Files of torch.save: their tensors without torch, and an error for whatever else they hold."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.errors import raises
from safetensors.numpy import load_file

from adapters_jax.errors import AdapterFileError, BaseFileError
from adapters_jax.files.pickled import MOST, MOST_INSTRUCTIONS, read_pickled
from adapters_jax.files.untrusted import read_tensors

pytestmark = pytest.mark.hostile
FIXTURES = Path(__file__).parent / "fixtures" / "pickled"
STORAGE = b"(X\7\0\0\0storagectorch\n%s\nX\1\0\0\x000X\3\0\0\0cpuK%ctQ"


def number(n):
    return b"K" + bytes([n]) if 0 <= n < 256 else b"\x8a\x08" + struct.pack("<q", n)


def tensor(offset=0, shape=(2,), strides=(1,), count=2, storage=b"FloatStorage", key=b"a"):
    """The instructions of one item of a dictionary, a tensor of storage 0."""
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    name = b"X" + struct.pack("<I", len(key)) + key
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % (storage, count) + number(offset)
    return name + made + b"".join(sizes) + b"\x89ccollections\nOrderedDict\n)RtRs"


def program(*items):
    """A pickle of a dictionary with these items."""
    return b"\x80\x02}" + b"".join(items) + b"."


def archive(path, code=None, compression=zipfile.ZIP_STORED, **files):
    """Writes a zip archive like torch's, of one storage of two float32."""
    code = program(tensor()) if code is None else code
    whole = {"data.pkl": code, "data/0": np.array([1, 2], np.float32).tobytes(), **files}
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in whole.items():
            if content is not None:
                made.writestr(f"archive/{name}", content)
    return path


def fails(path, *data):
    with raises(AdapterFileError, path, *data) as caught:
        read_pickled(path)
    assert len(str(caught.value)) < 1200 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["new.bin", "old.bin"])
def test_tensors_are_those_of_torch(name):
    expected, found = read_tensors(FIXTURES / "all.safetensors"), read_pickled(FIXTURES / name)
    assert len(found) == 16 and {str(x.dtype) for x in found.values()} == {
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *("uint8", "int8", "int16", "int32", "int64"),
    }
    for key, array in found.items():
        assert array.dtype == expected[key].dtype and array.shape == expected[key].shape
        np.testing.assert_array_equal(np.asarray(array), expected[key], err_msg=key)


def test_an_archive_of_our_own_is_read(tmp_path):
    np.testing.assert_array_equal(read_pickled(archive(tmp_path / "a"))["a"], np.float32([1, 2]))
    turned = program(tensor(shape=(2, 1), strides=(1, 7)))
    assert read_pickled(archive(tmp_path / "b", turned))["a"].tolist() == [[1], [2]]
    low = program(tensor(storage=b"BFloat16Storage", count=4, shape=(4,), offset=0))
    assert read_pickled(archive(tmp_path / "c", low))["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["module.bin", "nested.bin"])
def test_what_torch_saves_beside_tensors_is_refused_by_name(name):
    names = {"module.bin": "'torch.nn.modules.linear.Linear'", "nested.bin": "'adapter'"}
    fails(FIXTURES / name, names[name])


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_call_is_refused_and_not_run(tmp_path, protocol, zipped):
    for function, name in ((os.mkdir, "posix.mkdir"), (eval, "eval"), (np.ones, "numpy")):
        code = pickle.dumps({"a": Calls(function, str(tmp_path / "made"))}, protocol)
        path = archive(tmp_path / "a", code) if zipped else tmp_path / "a"
        if not zipped:
            path.write_bytes(code)
        fails(path, *([name] if protocol > 1 else []))
    assert not (tmp_path / "made").exists()


ONE = np.float32(1).tobytes()
BAD = {  # the pickle, further files of the archive, and the data in the message
    "a name": (b"cos\nsystem\n.", {}, "'os.system'", "run"),
    "a name on the stack": (b"\x80\x04\x8c\2os\x8c\6system\x93.", {}, "'os.system'"),
    "a module that is a dictionary": (b"}X\1\0\0\0a\x93.", {}, "damaged"),
    "a hidden name": (b"co\x1b[2Js\nsystem\n.", {}, r"'o\x1b[2Js.system'"),
    "an old instruction": (b"(ios\nsystem\n.", {}, "INST"),
    "an object": (b"(cos\nsystem\no.", {}, "'os.system'"),
    "an extension": (b"\x82\1.", {}, "EXT1"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R.", {}, "damaged"),
    "an ordered dictionary of items": (b"ccollections\nOrderedDict\n(}tR.", {}, "no tensor"),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n(K\1tR.", {}, "no tensor"),
    "an unknown storage": (program(tensor(storage=b"QInt8Storage")), {}, "'torch.QInt8Storage'"),
    "outside its storage": (program(tensor(offset=1)), {}, "[2] outside its storage of 2"),
    "far outside": (program(tensor(strides=(2**40,))), {}, "outside its storage of 2"),
    "a negative offset": (program(tensor(offset=-1)), {}, "another form"),
    "a negative stride": (program(tensor(strides=(-1,))), {}, "another form"),
    "strides of another number": (program(tensor(strides=(1, 1))), {}, "another form"),
    "a huge tensor": (program(tensor(shape=(2**40,), strides=(0,))), {}, 2**42),
    "a view of many": (program(tensor(shape=(2000, 2), strides=(0, 1))), {}, 16_000),
    "two kinds of a storage": (
        program(tensor(), tensor(storage=b"IntStorage", key=b"b")),
        {},
        "two kinds",
    ),
    "a storage that lacks": (program(tensor()), {"data/0": None}, "'0'"),
    "a storage cut off": (program(tensor()), {"data/0": ONE}, "'0'"),
    "a longer storage": (program(tensor()), {"data/0": ONE * 3}, "'0'"),
    "another order of bytes": (program(tensor()), {"byteorder": b"big"}, "highest byte"),
    "not a dictionary": (b"]K\1a.", {}, "list"),
    "a text": (program(b"X\1\0\0\0aX\1\0\0\0bs"), {}, "'a'"),
    "a key of numbers": (program(b"K\1K\1s"), {}, "not named"),
    "a key of nested tuples": (program(b")" + b"\x85" * 100_000 + b"Ns"), {}, "not named"),
    "a name that goes up": (program(tensor(key=b"../a")), {}, "'../a'"),
    "NaN": (program(tensor()), {"data/0": b"\0\0\xc0\x7f" * 2}, "finite"),
    "no end": (program(tensor())[:-1], {}, "damaged"),
    "nothing": (b"", {}, "damaged"),
    "a mark that is none": (b"t.", {}, "damaged"),
    "a memo that is none": (b"j\0\0\0\x80.", {}, "damaged"),
    "a text of gigabytes": (b"X\xff\xff\xff\x7fa.", {}, "damaged"),
    "bytes of exabytes": (b"\x8e" + b"\xff" * 7 + b"\x7f.", {}, "damaged"),
    "a number of gigabytes": (b"\x8b\xff\xff\xff\x7f.", {}, "damaged"),
    "a long decimal": (b"L" + b"9" * 10_000 + b"L\n.", {}, "damaged"),
    "copies": (b"]" + b"2" * 30 + b".", {}, "DUP"),
    "many instructions": (b"0" * (MOST_INSTRUCTIONS + 1), {}, "POP"),
    "many more": (b")" * (MOST_INSTRUCTIONS + 1) + b".", {}, MOST_INSTRUCTIONS),
    "a long pickle": (b"\x80\x02}" * MOST, {}, 3 * MOST, MOST),
    "two pickles": (program(), {"more/data.pkl": b"."}, "one data.pkl"),
    "no pickle": (program(), {"data.pkl": None}, "one data.pkl"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pickles_are_an_error(tmp_path, kind):
    code, files, *data = BAD[kind]
    fails(archive(tmp_path / "a", code, **files), *data)


def test_as_many_instructions_as_allowed_are_read(tmp_path):
    code = b"\x80\x02}" + b")" * (MOST_INSTRUCTIONS - 3) + b"."
    fails(archive(tmp_path / "a", code), "tuple, expected a dictionary")


HOSTILE = {  # each fills what it can
    "dictionaries": b"}" * (MOST_INSTRUCTIONS - 2) + b"].",
    "a memo": b"]" + b"r\0\0\0\x80" * 1000 + b"".join(
        b"r" + struct.pack("<I", 2**31 + n) for n in range(MOST_INSTRUCTIONS - 1002)
    ) + b".",
    "nested lists": b"]" * (MOST_INSTRUCTIONS // 2) + b"a" * (MOST_INSTRUCTIONS // 2 - 1) + b".",
    "nested tuples": b")" + b"\x85" * (MOST_INSTRUCTIONS - 2) + b".",
    "doubled tuples": b")" + b"q\0h\0\x86" * (MOST_INSTRUCTIONS // 3 - 2) + b".",
    "doubled tuples as a module": b")" + b"q\0h\0\x86" * 100 + b"X\1\0\0\0a\x93.",
    "doubled tuples as a key": b"}X\1\0\0\0a)" + b"q\0h\0\x86" * 100 + b"s.",
    "texts": b"X\4\0\0\0aaaa" * (MOST_INSTRUCTIONS // 2) + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_takes_little_memory(tmp_path, kind):
    path = archive(tmp_path / "a", HOSTILE[kind])
    tracemalloc.start()
    try:
        fails(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + 2**26
    finally:
        tracemalloc.stop()


def test_a_file_takes_its_own_memory(tmp_path):
    count = 2**20
    size = b"\x8a\x04" + struct.pack("<i", count)
    code = (
        program(tensor(count=0))
        .replace(b"cpuK\0", b"cpu" + size)
        .replace(b"(K\2t", b"(" + size + b"t")
    )
    row = np.arange(count, dtype=np.float32)
    path = archive(tmp_path / "a", code, **{"data/0": row.tobytes()})
    tracemalloc.start()
    try:
        found = read_pickled(path)["a"]
        assert tracemalloc.get_traced_memory()[1] < 1.5 * path.stat().st_size
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, row)


def test_compressed_data_is_refused(tmp_path):
    bomb = archive(tmp_path / "a", compression=zipfile.ZIP_DEFLATED, **{"data/0": bytes(2**26)})
    assert bomb.stat().st_size < 2**17
    tracemalloc.start()
    try:
        fails(bomb, "compressed", "data.pkl")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_two_storages_on_the_same_bytes_are_no_way_to_more_memory(tmp_path):
    """A table may name the same bytes again and again."""
    names = 50
    items = [
        tensor(key=bytes([97 + n // 26, 97 + n % 26])).replace(
            b"X\1\0\0\x000X", b"X\2\0\0\0%02dX" % n
        )
        for n in range(names)
    ]
    files = {f"data/{n:02}": np.ones(2, np.float32).tobytes() for n in range(names)}
    whole = bytearray(archive(tmp_path / "a", program(*items), **files).read_bytes())
    assert len(read_pickled(tmp_path / "a")) == names
    table = zipfile.ZipFile(tmp_path / "a").start_dir
    with zipfile.ZipFile(tmp_path / "a") as made:
        first = made.getinfo("archive/data/00").header_offset
    at, seen = table, 0
    while whole[at : at + 4] == b"PK\1\2":
        name, extra, note = struct.unpack_from("<HHH", whole, at + 28)
        if whole[at + 46 :][:name].startswith(b"archive/data/") and name > 14:
            struct.pack_into("<I", whole, at + 42, first)
            seen += 1
        at += 46 + name + extra + note
    assert seen == names
    (tmp_path / "b").write_bytes(whole)
    try:  # newer releases of Python see that these overlap
        found = read_pickled(tmp_path / "b")
    except AdapterFileError:
        return
    assert sum(x.nbytes for x in found.values()) <= len(whole)


@pytest.mark.parametrize("size", [0, 3, 4, 30, 200, -1, -30])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, size):
    for name in ("new.bin", "old.bin"):
        (tmp_path / name).write_bytes(
            (FIXTURES / name).read_bytes()[: size or None] if size else b""
        )
        fails(tmp_path / name)


def test_a_table_of_contents_is_read_within_a_limit(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for n in range(MOST // 100):
            made.writestr(f"archive/{n:060}", b"")
    (tmp_path / "a").write_bytes(stream.getvalue())
    fails(tmp_path / "a", "table of contents", MOST)


def test_files_of_torch_before_1_6_are_checked(tmp_path):
    data = (FIXTURES / "old.bin").read_bytes()
    for old, new, *words in (
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03.", "torch 0.4"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "highest byte"),
        (data[:20], b"\x80\x02K\1." + data[5:20], "torch.save"),
        (struct.pack("<q", 6) + load_file_bytes("float32"), b"\0" * 32, "is not at byte"),
    ):
        assert old in data
        (tmp_path / "a").write_bytes(data.replace(old, new))
        fails(tmp_path / "a", *words)


def load_file_bytes(name):
    return load_file(FIXTURES / "all.safetensors")[name].tobytes()


def test_the_error_is_the_callers(tmp_path):
    with raises(BaseFileError, tmp_path / "a"):
        read_pickled(archive(tmp_path / "a", b"cos\nsystem\n."), BaseFileError)
