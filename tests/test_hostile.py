"""What a hostile adapter file may try, case by case: each is an error that names the file."""

import errno
import json
import os
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fuzz.mutators import RAW, put_together, taken_apart
from helpers.arrays import drawn
from helpers.errors import raises
from helpers.hostile import RECIPES, X, linen_base, nnx_base, save
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.errors import AdapterMismatchError, AdapterRecipeError
from adapters_jax.files.adapter import TENSORS, read_adapter
from adapters_jax.files.manifest import CONFIG, Manifest
from adapters_jax.files.untrusted import open_tensors, read_json, read_tensors

pytestmark = pytest.mark.hostile


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of LoRA on query and value, four tensors."""
    directory = save(tmp_path_factory.mktemp("saved"), "linen", "lora")
    return {name: (directory / name).read_bytes() for name in (TENSORS, CONFIG)}


@pytest.fixture
def adapter(tmp_path, saved):
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, data in saved.items():
        (directory / name).write_bytes(data)
    return directory


def fails(directory, name, *data):
    """Reading raises an error that names a file and the data, shortly and in plain text."""
    with raises(aj.AdapterFileError, *data) as caught:
        read_adapter(directory)
    message = str(caught.value)
    assert message.startswith(str(directory / name))
    assert len(message) < 1200 and message.isprintable()


def entry_edit(name="attention/query/lora/a", new=None, **fields):
    """Changes one entry of the header, or its name."""

    def edit(data):
        entries, body = taken_apart(data)
        at = [key for key, _ in entries].index(name)
        entries[at] = (new if new is not None else name, {**entries[at][1], **fields})
        return put_together(entries, body)

    return edit


def twice(data):
    entries, body = taken_apart(data)
    return put_together([*entries, entries[0]], body)


def deep(data):
    header = b'{"a":' * 5000 + b"1" + b"}" * 5000
    return struct.pack("<Q", len(header)) + header + data


def with_number(bits, name="attention/value/lora/b"):
    def edit(data):
        entries, body = taken_apart(data)
        start, _ = dict(entries)[name]["data_offsets"]
        return put_together(entries, body[:start] + bits + body[start + len(bits) :])

    return edit


QUERY_A, VALUE_A = "attention/query/lora/a", "attention/value/lora/a"
QUERY_B, VALUE_B = "attention/query/lora/b", "attention/value/lora/b"
BAD_TENSORS = {  # the edit, and the data in the message
    "cut in the data": (lambda d: d[:-3], 424, 421),
    "cut in the header": (lambda d: d[:90], 90, 320),
    "cut in the length": (lambda d: d[:5], 5),
    "empty": (lambda d: b"", 0),
    "more data": (lambda d: d + b"x", 424, 425),
    "a huge header": (lambda d: struct.pack("<Q", 2**63) + d[8:], 424, 2**63),
    "a long header": (
        lambda d: struct.pack("<Q", 2**21) + b"{" + b" " * 2**21,
        2**21,
        2**20,
    ),
    "a header of no bytes": (lambda d: struct.pack("<Q", 0) + d[8:], 424, 0),
    "a header of the whole file": (lambda d: struct.pack("<Q", 417) + d[8:], 424, 417),
    "a flipped brace": (lambda d: d[:8] + b"[" + d[9:], "JSON object"),
    "a flipped quote": (lambda d: d[:9] + b"'" + d[10:], "line 1 column 2"),
    "a deep header": (deep, 32),
    "an overlap": (entry_edit(VALUE_A, data_offsets=[0, 16]), QUERY_A, "overlaps", 353, 369),
    "a hole": (entry_edit(VALUE_B, data_offsets=[96, 112]), VALUE_B, "hole", 451, 435),
    "offsets that go back": (entry_edit(data_offsets=[32, 0]), QUERY_A, 32, -32),
    "huge offsets": (
        entry_edit(data_offsets=[2**62, 2**62 + 32]),
        QUERY_B,
        "hole",
    ),
    "huger offsets": (entry_edit(data_offsets=[0, 2**64]), QUERY_A, f"data_offsets [0, {2**64}]"),
    "three offsets": (entry_edit(data_offsets=[0, 16, 32]), QUERY_A, "data_offsets [0, 16, 32]"),
    "a number with a point": (entry_edit(shape=[4.0, 2]), QUERY_A, "shape [4.0, 2]"),
    "a shape too large": (entry_edit(shape=[4, 3]), QUERY_A, "F32[4, 3]", 48, 32),
    "a shape of petabytes": (entry_edit(shape=[2**30, 2**30]), QUERY_A, [2**30, 2**30]),
    "an empty shape of petabytes": (entry_edit(shape=[0, 2**30, 2**30]), [0, 2**30, 2**30]),
    "a shape of 17 axes": (entry_edit(shape=[4, 2, *[1] * 15]), [4, 2, *[1] * 15]),
    "a negative shape": (entry_edit(shape=[-4, -2]), QUERY_A, "shape [-4, -2]"),
    "no shape": (entry_edit(shape=None), QUERY_A, "shape None"),
    "another dtype": (entry_edit(dtype="F16"), QUERY_A, "F16[4, 2]", 16, 32),
    "an unknown dtype": (entry_edit(dtype="F4"), QUERY_A, "'F4'", "F64, F32, F16, BF16"),
    "an integer": (entry_edit(dtype="I32"), QUERY_A, "int32"),
    "64 bits": (entry_edit(dtype="F64", shape=[2, 2]), QUERY_A, "float64", "jax_enable_x64"),
    "more in an entry": (entry_edit(more=1), QUERY_A, "dtype, shape and data_offsets"),
    "notes of numbers": (entry_edit(new="__metadata__"), "__metadata__"),
    "a name twice": (twice, repr(QUERY_A)),
    "a name that goes up": (entry_edit(new="../../etc/passwd"), "'../../etc/passwd'"),
    "an absolute name": (entry_edit(new="/etc/passwd"), "'/etc/passwd'"),
    "a name in Windows": (entry_edit(new="..\\a"), repr("..\\a")),
    "an empty name": (entry_edit(new=""), "''"),
    "an empty part": (entry_edit(new="a//b"), "'a//b'"),
    "a control character": (entry_edit(new="a\x1b[2Jb"), r"'a\x1b[2Jb'"),
    "a text turned round": (entry_edit(new="a\u202eb"), r"'a\u202eb'"),
    "half a character": (entry_edit(new="a\ud800"), r"'\ud800'"),
    "a long name": (entry_edit(new="a" * 600), "aaa... (602 characters)"),
    "NaN": (with_number(b"\0\0\xc0\x7f"), VALUE_B),
    "signalling NaN": (with_number(b"\x01\0\x80\xff"), VALUE_B),
    "infinity": (with_number(b"\0\0\x80\xff", QUERY_A), QUERY_A),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_an_error(adapter, saved, kind):
    edit, *data = BAD_TENSORS[kind]
    (adapter / TENSORS).write_bytes(edit(saved[TENSORS]))
    fails(adapter, TENSORS, *data)


def test_a_name_that_the_recipe_does_not_train_is_unexpected(adapter, saved):
    edit = entry_edit(new="attention/query/lora/z")
    (adapter / TENSORS).write_bytes(edit(saved[TENSORS]))
    with raises(AdapterMismatchError, QUERY_A, "attention/query/lora/z"):
        aj.load_adapter(adapter, *linen_base(), X)


def test_all_tensors_with_bad_numbers_are_named(adapter, saved):
    edit = with_number(b"\0\0\x80\x7f", QUERY_B)
    (adapter / TENSORS).write_bytes(edit(with_number(b"\0\0\x80\x7f")(saved[TENSORS])))
    fails(adapter, TENSORS, f"{QUERY_B}, {VALUE_B}")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64"]
)
def test_bad_numbers_of_every_dtype(tmp_path, dtype):
    array = np.ones(70_000).astype(jnp.dtype(dtype))
    save_file({"a": array}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a"].tobytes() == array.tobytes()
    array[69_999] = np.nan
    save_file({"a": array}, tmp_path / "a.safetensors")
    with raises(aj.AdapterFileError, tmp_path / "a.safetensors") as caught:
        read_tensors(tmp_path / "a.safetensors")
    assert str(caught.value).endswith(" a")


BAD_JSON = {  # the data in the message
    b'{"format": NaN}': ("NaN",),
    b'{"format": 1e999}': ("1e999",),
    b'{"format": 1, "format": 1}': ("'format'",),
    b"\xef\xbb\xbf{}": ("BOM",),
    b'{"a": "\xff"}': ("byte 0xff in position 7",),
    b'{"a": "\\ud800"}': (r"'\ud800'",),
    b'"' + b'\\"' * 9000: ("line 1 column 1",),
    b"[" * 20_000: (32,),
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000: (32,),
    b'{"format": ' + b"9" * 9000 + b"}": ("99999... (9000 characters)",),
    b"[" + b"0," * 9000 + b"0]": ("list", "JSON object"),
    b" " * (2**20 + 1): (2**20 + 1, 2**20),
    b"": ("line 1 column 1",),
    b"null": ("NoneType", "JSON object"),
}


@pytest.mark.parametrize("number", range(len(RAW)))
def test_bad_json_is_an_error(adapter, number):
    (adapter / CONFIG).write_bytes(RAW[number])
    fails(adapter, CONFIG, *BAD_JSON[RAW[number]])


def test_limits_of_json_are_inclusive(tmp_path):
    path = tmp_path / "a"
    for depth, digits, spaces in ((32, 40, 0), (1, 1, 2**20 - len('{"a":9}'))):
        text = '{"a":' * depth + "9" * digits + "}" * depth + " " * spaces
        path.write_text(text)
        assert read_json(path) == json.loads(text)
    for text, datum in (('{"a":' * 33 + "9" + "}" * 33, 32), (f'{{"a":{"9" * 41}}}', "9" * 30)):
        path.write_text(text)
        with raises(aj.AdapterFileError, path, datum):
            read_json(path)


def test_limits_of_a_header_are_inclusive(tmp_path):
    path = tmp_path / "a.safetensors"
    shape = [2**30, 2**18, *[1] * 13, 0]  # 16 axes
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path.write_bytes(put_together([("x" * 512, entry)], b""))
    assert {n: list(x.shape) for n, x in read_tensors(path).items()} == {"x" * 512: shape}
    path.write_bytes(put_together([("x" * 513, entry)], b""))
    with raises(aj.AdapterFileError, path, "515 characters"):  # 513 and two quotes
        read_tensors(path)
    path.write_bytes(put_together([("x", {**entry, "shape": [2**31 - 1, 0]})], b""))
    assert read_tensors(path)["x"].shape == (2**31 - 1, 0)
    for shape in ([2**31, 0], [2**30, 2**18 + 1, 0]):
        path.write_bytes(put_together([("x", {**entry, "shape": shape})], b""))
        with raises(aj.AdapterFileError, path, shape):
            read_tensors(path)
    path.write_bytes(put_together([], b""))
    assert read_tensors(path) == {}


def test_a_message_names_at_most_twelve_tensors_with_bad_numbers(tmp_path):
    path = tmp_path / "a.safetensors"
    for n, end in ((12, "x11"), (13, "x11 and 1 more"), (15, "x11 and 3 more")):
        save_file({f"x{i:02}": np.full(1, np.nan, np.float32) for i in range(n)}, path)
        with raises(aj.AdapterFileError, "x00, x01") as caught:
            read_tensors(path)
        assert str(caught.value).endswith(f", {end}")


def test_text_that_looks_deep_is_not(tmp_path):
    text = '{"a": "' + "[" * 99 + '\\"{", "b": "\\u00e9\\ud83d\\ude00"}'
    (tmp_path / "a").write_text(text)
    assert read_json(tmp_path / "a") == {"a": "[" * 99 + '"{', "b": "é😀"}


def config_edit(edit):
    def spoil(data):
        values = json.loads(data)
        edit(values)
        return json.dumps(values).encode()

    return spoil


def lora(**fields):
    return config_edit(lambda values: values["recipe"]["methods"][0].update(fields))


MANY = [{"method": "unfreeze", "targets": "a"}] * 20_000
BAD_CONFIGS = {  # the edit, and the data in the message
    "format 4": (config_edit(lambda c: c.update(format=4)), "format=4", "1, 2, 3"),
    "no state": (config_edit(lambda c: c.update(format=2)), "format 2", "'state_tensors'"),
    "a state of nothing": (
        config_edit(lambda c: c.update(format=2, state_tensors=0)),
        "state_tensors=0",
    ),
    "state in words": (
        config_edit(lambda c: c.update(format=2, state_tensors="4")),
        "state_tensors='4'",
    ),
    "state in format 1": (config_edit(lambda c: c.update(state_tensors=1)), "'state_tensors'"),
    "format true": (config_edit(lambda c: c.update(format=True)), "format=True", 1),
    "no format": (config_edit(lambda c: c.pop("format")), "format=None", 1),
    "a new key": (config_edit(lambda c: c.update(x=1)), "'x'"),
    "no counts": (config_edit(lambda c: c.pop("tensors")), "'tensors'"),
    "a count in words": (config_edit(lambda c: c.update(parameters="4")), "parameters='4'"),
    "a negative count": (config_edit(lambda c: c.update(tensors=-1)), "tensors=-1"),
    "a version of a number": (config_edit(lambda c: c.update(adapters_jax=1)), "adapters_jax=1"),
    "a base in words": (config_edit(lambda c: c.update(base="x")), "base='x'"),
    "a base with more": (config_edit(lambda c: c["base"].update(more=1)), "base={"),
    "a long base": (config_edit(lambda c: c["base"].update(id="x" * 513)), "base={'id': 'xxx"),
    "half a hash": (config_edit(lambda c: c["base"].update(tree_sha256="ab")), "base={"),
    "recipe of a number": (config_edit(lambda c: c.update(recipe=5)), '"methods"'),
    "an unknown method": (lora(method="x" * 999), "'xxx", "characters", "bottleneck"),
    "a method of a list": (lora(method=["lora"]), "['lora']"),
    "many unknown keys": (lora(**{f"rank{i}": 1 for i in range(9000)}), 4096),
    "a huge rank": (lora(rank=10**19), f"rank={10**19}", 2**31),
    "a rank in words": (lora(rank="8"), "rank='8'"),
    "a rank that is true": (lora(rank=True), "rank=True"),
    "a flag in words": (lora(rank_stabilized="no"), "rank_stabilized='no'"),
    "a choice of a list": (lora(a_init=[{}]), "a_init=", "gaussian, uniform"),
    "slices of halves": (lora(slices=[[0.5, 2.5]]), "slices="),
    "slices of words": (lora(slices=["ab"]), "slices="),
    "a pattern of millions": (lora(targets="{a,b}" * 40), 65536),
    "an open brace": (lora(targets="{" * 3000), "{{{", "brace"),
    "patterns of millions": (lora(targets=[f"{i}{{a,b}}" * 9 for i in range(20)]), 65536),
    "many methods": (config_edit(lambda c: c["recipe"].update(methods=MANY)), 4096),
    "deep targets": (lora(targets=json.loads("[" * 40 + "]" * 40)), 32),
}


def test_counts_of_other_tensors_are_an_error(adapter, saved):
    for key, right, wrong in (("parameters", 24, 25), ("tensors", 4, 5)):
        config = saved[CONFIG].replace(f'"{key}": {right}'.encode(), f'"{key}": {wrong}'.encode())
        (adapter / CONFIG).write_bytes(config)
        fails(adapter, TENSORS, 24, 4, wrong, CONFIG)


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_bad_configurations_are_an_error(adapter, saved, kind):
    edit, *data = BAD_CONFIGS[kind]
    spoilt = edit(saved[CONFIG])
    assert spoilt != saved[CONFIG]
    (adapter / CONFIG).write_bytes(spoilt)
    fails(adapter, CONFIG, *data)


def test_limits_of_a_configuration_are_inclusive(adapter, saved):
    texts = [f"x{i}" for i in range(4096 - 4)]  # beside methods, method, unfreeze and targets
    values = json.loads(saved[CONFIG])
    values["base"]["id"] = "x" * 512
    values["recipe"] = {"methods": [{"method": "unfreeze", "targets": texts}]}
    assert Manifest.of_values(values, adapter / CONFIG).recipe == aj.Recipe(aj.Unfreeze(texts))
    texts.append("one more")
    with raises(aj.AdapterFileError, adapter / CONFIG, 4096):
        Manifest.of_values(values, adapter / CONFIG)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("edit", "data"),
    [
        (lora(rank=10**9), (10**9, "'attention/")),
        (lora(targets="*a" * 50 + "b"), ("LoRA", "'*a*a")),
        (lora(targets=["nowhere"] * 3000), ("LoRA", "'nowhere'")),
        (lora(targets="out", rank_pattern=[], slices=[[0, 2**30]]), ("slices", 2**30, "'out'")),
    ],
)
def test_a_recipe_that_asks_for_too_much_makes_nothing(adapter, saved, api, edit, data):
    base = linen_base() if api == "linen" else (nnx_base(), None)
    (adapter / CONFIG).write_bytes(edit(saved[CONFIG]))
    with raises(AdapterRecipeError, adapter, *data):
        aj.load_adapter(adapter, *base, X)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("fields", [{"bottleneck_dim": 2**30}, {"reduction_factor": 1e-30}])
def test_a_wide_bottleneck_is_compared_and_not_made(tmp_path, api, fields):
    directory = save(tmp_path, api, "bottleneck")
    none = {"bottleneck_dim": None, "reduction_factor": None}
    (directory / CONFIG).write_bytes(lora(**none | fields)((directory / CONFIG).read_bytes()))
    base = linen_base() if api == "linen" else (nnx_base(), None)
    with raises(aj.AdapterFileError, directory, "out"):
        aj.load_adapter(directory, *base, X)


NODES = {  # what is there instead of the file, and the data in the message
    "a directory": (lambda path: path.mkdir(), "ordinary"),
    "a pipe": (lambda path: os.mkfifo(path), "ordinary"),
    "a link out": (lambda path: path.symlink_to("../elsewhere"), "/elsewhere"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "/dev/zero"),
    "a link to nothing": (lambda path: path.symlink_to("x"), os.strerror(errno.ENOENT)),
    "a link to itself": (lambda path: path.symlink_to(path.name), os.strerror(errno.ELOOP)),
}


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
@pytest.mark.parametrize("kind", NODES)
def test_other_nodes_than_files_are_an_error(adapter, kind, name):
    make, datum = NODES[kind]
    (adapter.parent / "elsewhere").write_bytes((adapter / name).read_bytes())
    (adapter / name).unlink()
    make(adapter / name)
    fails(adapter, name, datum)


def test_links_within_a_directory_are_followed(adapter):
    (adapter / "real").mkdir()
    (adapter / TENSORS).rename(adapter / "real" / TENSORS)
    (adapter / TENSORS).symlink_to(f"real/{TENSORS}")
    (adapter.parent / "latest").symlink_to(adapter)
    assert read_adapter(adapter.parent / "latest")[0] == RECIPES["lora"]


SHA1, SHA256 = "a" * 40, "b" * 64


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(adapter):
    repository = adapter.parent / "hub" / "models--me--adapter"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    shared = adapter.parent / "hub" / "blobs" / "bb"
    for directory in (snapshot, blobs, shared):
        directory.mkdir(parents=True)
    (adapter / CONFIG).rename(blobs / SHA1)
    (adapter / TENSORS).rename(shared / SHA256)
    (blobs / SHA256).symlink_to(f"../../blobs/bb/{SHA256}")
    (snapshot / CONFIG).symlink_to(f"../../blobs/{SHA1}")
    (snapshot / TENSORS).symlink_to(f"../../blobs/{SHA256}")
    assert read_adapter(snapshot)[0] == RECIPES["lora"]
    (blobs / SHA1).rename(blobs / "passwords")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../blobs/passwords")
    fails(snapshot, CONFIG, blobs / "passwords")
    (repository.parent / "models--you--adapter" / "blobs").mkdir(parents=True)
    (blobs / "passwords").rename(repository.parent / "models--you--adapter" / "blobs" / SHA1)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(f"../../../models--you--adapter/blobs/{SHA1}")
    fails(snapshot, CONFIG, repository.parent / "models--you--adapter" / "blobs" / SHA1)


@pytest.mark.parametrize("tensors", [1, 8])
def test_reading_takes_at_most_twice_the_memory_of_the_file(tmp_path, tensors):
    arrays = {str(i): drawn((2**23 // tensors,)) for i in range(tensors)}
    save_file(arrays, tmp_path / TENSORS)
    size = (tmp_path / TENSORS).stat().st_size
    del arrays
    jnp.asarray(np.ones(2**10, np.float32))  # jax allocates once; that is not the file's memory
    tracemalloc.start()
    try:
        with open_tensors(tmp_path / TENSORS) as file:
            assert tracemalloc.get_traced_memory()[1] < 2**18
            arrays = file.read()
        made = {name: jnp.asarray(arrays.pop(name)) for name in list(arrays)}
        held = sum(x.nbytes for x in made.values())
        assert tracemalloc.get_traced_memory()[1] + held < 2 * size + 2**19
    finally:
        tracemalloc.stop()


def test_json_takes_at_most_32_times_its_size(tmp_path):
    size = 2**17  # of 2**20 at most
    (tmp_path / "a").write_text('{"a": [' + "{}," * (size // 3) + "0]}")
    tracemalloc.start()
    try:
        read_json(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 32 * size
    finally:
        tracemalloc.stop()


def test_nothing_of_a_model_changes_where_loading_fails_late(adapter, saved):
    (adapter / TENSORS).write_bytes(with_number(b"\0\0\x80\x7f")(saved[TENSORS]))
    model = nnx_base()
    before = jax.tree.map(np.asarray, nnx.state(model))
    with raises(aj.AdapterFileError, adapter / TENSORS, VALUE_B):
        aj.load_adapter(adapter, model, None, X)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    assert type(model.attention.query) is nnx.LinearGeneral
