"""What a hostile adapter file may try, one by one, with what is said to it."""

import json
import os
import re
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn
from helpers.hostile import RAW, RECIPES, X, linen_base, nnx_base, put_together, save, taken_apart
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.io.adapter import TENSORS, read_adapter
from adapters_jax.io.manifest import CONFIG
from adapters_jax.io.tensors import open_tensors, read_tensors
from adapters_jax.io.untrusted import read_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of LoRA on query and value, four tensors."""
    directory = save(tmp_path_factory.mktemp("saved"), "linen", "lora")
    return {name: (directory / name).read_bytes() for name in (TENSORS, CONFIG)}


@pytest.fixture
def place(tmp_path, saved):
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, data in saved.items():
        (directory / name).write_bytes(data)
    return directory


def refused(directory, message, name=""):
    """Reading is refused, with this in the message after the file's path."""
    with pytest.raises(aj.AdapterFileError) as error:
        read_adapter(directory)
    text = str(error.value)
    assert text.startswith(str(directory / name)) and re.search(message, text), text
    assert len(text) < 1200 and text.isprintable()


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


BAD_TENSORS = {
    "cut in the data": (lambda d: d[:-3], "damaged: its tensors end at byte 424, and .* 421$"),
    "cut in the header": (lambda d: d[:90], "has 90 bytes and says that 320 of them are its head"),
    "cut in the length": (lambda d: d[:5], "has 5 bytes and says that"),
    "empty": (lambda d: b"", "has 0 bytes and says that 0 of them are its header"),
    "more data": (lambda d: d + b"x", "its tensors end at byte 424, and the file has 425"),
    "a huge header": (
        lambda d: struct.pack("<Q", 2**63) + d[8:],
        "says that 9223372036854775808 of",
    ),
    "a long header": (
        lambda d: struct.pack("<Q", 2**21) + b"{" + b" " * 2**21,
        "has a header of 2097152 bytes, expected at most 1048576",
    ),
    "a flipped brace": (lambda d: d[:8] + b"[" + d[9:], "its header is no JSON object"),
    "a flipped quote": (lambda d: d[:9] + b"'" + d[10:], "damaged: Expecting property name"),
    "a deep header": (deep, "damaged: its JSON is nested more than 32 deep"),
    "an overlap": (
        entry_edit("attention/value/lora/a", data_offsets=[0, 16]),
        "attention/query/lora/a overlaps another tensor: it begins at [0-9]+, expected [0-9]+$",
    ),
    "a hole": (
        entry_edit("attention/value/lora/b", data_offsets=[96, 112]),
        "value/lora/b leaves a hole before it: it begins at [0-9]+, expected [0-9]+$",
    ),
    "offsets that go back": (
        entry_edit(data_offsets=[32, 0]),
        "32 bytes, and has the place of -32",
    ),
    "huge offsets": (
        entry_edit(data_offsets=[2**62, 2**62 + 32]),
        r"query/lora/b leaves a hole before it",
    ),
    "huger offsets": (
        entry_edit(data_offsets=[0, 2**64]),
        r"data_offsets \[0, 1844.*, expected two",
    ),
    "three offsets": (
        entry_edit(data_offsets=[0, 16, 32]),
        "data_offsets .*, expected two numbers",
    ),
    "a number with a point": (
        entry_edit(shape=[4.0, 2]),
        r"the shape \[4.0, 2\], expected a list of",
    ),
    "a shape too large": (
        entry_edit(shape=[4, 3]),
        r"F32\[4, 3\], 48 bytes, and has the place of 32",
    ),
    "a shape of petabytes": (entry_edit(shape=[2**30, 2**30]), r"the shape \[1073741824, 10737"),
    "an empty shape of petabytes": (entry_edit(shape=[0, 2**30, 2**30]), r"the shape \[0, 107"),
    "a negative shape": (entry_edit(shape=[-4, -2]), r"the shape \[-4, -2\], expected a list"),
    "no shape": (entry_edit(shape=None), "the shape None, expected a list of sizes"),
    "another dtype": (entry_edit(dtype="F16"), r"F16\[4, 2\], 16 bytes, and has the place of 32"),
    "an unknown dtype": (
        entry_edit(dtype="F4"),
        "has the dtype 'F4', expected one of F64, F32, F16,",
    ),
    "an integer": (entry_edit(dtype="I32"), "has int32 in attention/query/lora/a, expected floats"),
    "64 bits": (
        entry_edit(dtype="F64", shape=[2, 2]),
        "has float64 in attention/query/lora/a, expected floats that jax keeps: call jax",
    ),
    "more in an entry": (entry_edit(more=1), "no entry of dtype, shape and data_offsets alone"),
    "notes of numbers": (
        entry_edit(new="__metadata__"),
        "its __metadata__ is no mapping from text to text",
    ),
    "a name twice": (twice, "damaged: the key 'attention/query/lora/a' is there twice"),
    "a name that goes up": (
        entry_edit(new="../../etc/passwd"),
        r"damaged: the name '../../etc/passwd' is no plain path",
    ),
    "an absolute name": (entry_edit(new="/etc/passwd"), "name '/etc/passwd' is no plain path"),
    "a name in Windows": (entry_edit(new="..\\a"), "is no plain path"),
    "an empty name": (entry_edit(new=""), "the name '' is no plain path"),
    "an empty part": (entry_edit(new="a//b"), "the name 'a//b' is no plain path"),
    "a control character": (
        entry_edit(new="a\x1b[2Jb"),
        r"the name 'a\\x1b\[2Jb' is no plain path",
    ),
    "a text turned round": (entry_edit(new="a\u202eb"), r"the name 'a\\u202eb' is no plain path"),
    "half a character": (entry_edit(new="a\ud800"), "damaged: .*surrogates not allowed"),
    "a long name": (entry_edit(new="a" * 600), r"a\.\.\. .602 characters. is no plain path"),
    "NaN": (with_number(b"\0\0\xc0\x7f"), "numbers that are not finite in attention/value/lora/b$"),
    "signalling NaN": (with_number(b"\x01\0\x80\xff"), "not finite in attention/value/lora/b$"),
    "infinity": (
        with_number(b"\0\0\x80\xff", "attention/query/lora/a"),
        "not finite in attention/qu",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_are_refused(place, saved, kind):
    edit, message = BAD_TENSORS[kind]
    (place / TENSORS).write_bytes(edit(saved[TENSORS]))
    refused(place, message, TENSORS)


def test_a_name_that_the_recipe_does_not_train_is_unexpected(place, saved):
    edit = entry_edit(new="attention/query/lora/z")
    (place / TENSORS).write_bytes(edit(saved[TENSORS]))
    with pytest.raises(aj.MismatchError, match=r"1 missing: .*/a; 1 unexpected: .*/z\. Load") as e:
        aj.load_adapter(place, *linen_base(), X)
    assert isinstance(e.value, aj.AdapterFileError)


def test_all_tensors_with_bad_numbers_are_named(place, saved):
    edit = with_number(b"\0\0\x80\x7f", "attention/query/lora/b")
    (place / TENSORS).write_bytes(edit(with_number(b"\0\0\x80\x7f")(saved[TENSORS])))
    refused(place, "not finite in attention/query/lora/b, attention/value/lora/b$", TENSORS)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64"]
)
def test_bad_numbers_of_every_dtype(tmp_path, dtype):
    array = np.ones(70_000).astype(jnp.dtype(dtype))
    save_file({"a": array}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a"].tobytes() == array.tobytes()
    array[69_999] = np.nan
    save_file({"a": array}, tmp_path / "a.safetensors")
    with pytest.raises(aj.AdapterFileError, match="not finite in a$"):
        read_tensors(tmp_path / "a.safetensors")


BAD_JSON = {
    b'{"format": NaN}': "damaged: NaN is no number that such a file may hold",
    b'{"format": 1e999}': "damaged: 1e999 is no number",
    b'{"format": 1, "format": 1}': "damaged: the key 'format' is there twice",
    b"\xef\xbb\xbf{}": "damaged: Unexpected UTF-8 BOM",
    b'{"a": "\xff"}': "damaged: 'utf-8' codec can't decode byte 0xff in position 7",
    b'{"a": "\\ud800"}': "damaged: .*surrogates not allowed",
    b'"' + b'\\"' * 9000: "damaged: Unterminated string",
    b"[" * 20_000: "damaged: its JSON is nested more than 32 deep",
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000: "damaged: its JSON is nested more than 32 deep",
    b'{"format": ' + b"9" * 9000 + b"}": "damaged: 99999.* .9000 characters. is no number",
    b"[" + b"0," * 9000 + b"0]": "holds a list, expected a JSON object",
    b" " * (2**20 + 1): "has 1048577 bytes, expected at most 1048576 of JSON",
    b"": "damaged: Expecting value",
    b"null": "holds a NoneType, expected a JSON object",
}


@pytest.mark.parametrize("number", range(len(RAW)))
def test_what_is_not_our_json_is_refused(place, number):
    (place / CONFIG).write_bytes(RAW[number])
    refused(place, BAD_JSON[RAW[number]], CONFIG)


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
BAD_CONFIGS = {
    "format 2": (
        config_edit(lambda c: c.update(format=2)),
        "format 1, it says format=2; it needs an",
    ),
    "format true": (config_edit(lambda c: c.update(format=True)), "it says format=True; it needs"),
    "no format": (config_edit(lambda c: c.pop("format")), "it says format=None; it needs another"),
    "a new key": (config_edit(lambda c: c.update(x=1)), "not of format 1: unknown key 'x'$"),
    "no counts": (config_edit(lambda c: c.pop("tensors")), "format 1: 'tensors' is missing"),
    "a count in words": (
        config_edit(lambda c: c.update(parameters="4")),
        "parameters='4', expected a number",
    ),
    "a base in words": (
        config_edit(lambda c: c.update(base="x")),
        "base='x', expected null or an obj",
    ),
    "half a hash": (
        config_edit(lambda c: c["base"].update(tree_sha256="ab")),
        "base=.*, expected null or an object of a base's identity",
    ),
    "recipe of a number": (
        config_edit(lambda c: c.update(recipe=5)),
        "no usable recipe: .*one key",
    ),
    "an unknown method": (
        lora(method="x" * 999),
        r"method 'xxx.* characters., expected one of bottleneck",
    ),
    "a method of a list": (lora(method=["lora"]), r"method \['lora'\], expected one of"),
    "many unknown keys": (
        lora(**{f"rank{i}": 1 for i in range(9000)}),
        "its patterns are too many, over 4096",
    ),
    "a huge rank": (
        lora(rank=10**19),
        "rank=10000000000000000000, expected a whole .* < 2147483648",
    ),
    "a rank in words": (lora(rank="8"), "LoRA: rank='8', expected a whole number >= 1"),
    "a rank that is true": (lora(rank=True), "LoRA: rank=True, expected a whole number >= 1"),
    "a flag in words": (lora(rank_stabilized="no"), "rank_stabilized='no', expected True or False"),
    "a choice of a list": (lora(a_init=[{}]), "LoRA: a_init=.*, expected one of gaussian, uniform"),
    "slices of halves": (lora(slices=[[0.5, 2.5]]), "slices=.*, expected ranges in order"),
    "slices of words": (lora(slices=["ab"]), "slices=.*, expected ranges in order"),
    "a pattern of millions": (lora(targets="{a,b}" * 40), "too many patterns, of over 65536 char"),
    "an open brace": (
        lora(targets="{" * 3000),
        r"\{'\.*.*characters. has an unbalanced brace|brace",
    ),
    "patterns of millions": (
        lora(targets=[f"{i}{{a,b}}" * 9 for i in range(20)]),
        "stand for over 655",
    ),
    "many methods": (
        config_edit(lambda c: c["recipe"].update(methods=MANY)),
        "its patterns are too many, over 4096",
    ),
    "deep targets": (
        lora(targets=json.loads("[" * 40 + "]" * 40)),
        "damaged: its JSON is nested more than 32 deep",
    ),
    "no such many parameters": (
        lambda d: d.replace(b'"parameters": 24', b'"parameters": 25'),
        "holds 24 parameters in 4 tensors, and adapter_config.json says 25 in 4; they are not of",
    ),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_configurations_are_refused(place, saved, kind):
    edit, message = BAD_CONFIGS[kind]
    spoilt = edit(saved[CONFIG])
    assert spoilt != saved[CONFIG]
    (place / CONFIG).write_bytes(spoilt)
    refused(place, message)


@pytest.mark.parametrize("door", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lora(rank=10**9), "rank 1000000000 at 'attention/.*' exceeds min"),
        (
            lora(targets="*a" * 50 + "b"),
            r"does not fit this model: LoRA: target '\*a.* matches nothing",
        ),
        (lora(targets=["nowhere"] * 3000), "LoRA: other targets fail as well$"),
        (lora(targets="out", rank_pattern=[], slices=[[0, 2**30]]), "slices .* do not fit 'out'"),
    ],
)
def test_a_recipe_that_asks_for_too_much_makes_nothing(place, saved, door, edit, message):
    base = linen_base() if door == "linen" else (nnx_base(), None)
    (place / CONFIG).write_bytes(edit(saved[CONFIG]))
    with pytest.raises(aj.TargetError, match=message) as error:
        aj.load_adapter(place, *base, X)
    assert isinstance(error.value, aj.AdapterFileError)
    assert str(error.value).startswith(
        f"the recipe of the adapter in {place} does not fit this mod"
    )


@pytest.mark.parametrize("door", ["linen", "nnx"])
@pytest.mark.parametrize("fields", [{"bottleneck_dim": 2**30}, {"reduction_factor": 1e-300}])
def test_a_wide_bottleneck_is_compared_and_not_made(tmp_path, door, fields):
    directory = save(tmp_path, door, "bottleneck")
    none = {"bottleneck_dim": None, "reduction_factor": None}
    (directory / CONFIG).write_bytes(lora(**none | fields)((directory / CONFIG).read_bytes()))
    base = linen_base() if door == "linen" else (nnx_base(), None)
    with pytest.raises(aj.AdapterFileError, match="does not fit"):
        aj.load_adapter(directory, *base, X)


NODES = {
    "a directory": (lambda path: path.mkdir(), " is no ordinary file; put the file itself there"),
    "a pipe": (lambda path: os.mkfifo(path), " is no ordinary file; put the file itself there"),
    "a link out": (
        lambda path: path.symlink_to("../elsewhere"),
        " is a link to .*elsewhere, out of",
    ),
    "a link to a device": (
        lambda path: path.symlink_to("/dev/zero"),
        " is a link to /dev/zero, out",
    ),
    "a link to nothing": (lambda path: path.symlink_to("x"), " cannot be read: No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), " cannot be read: Too many"),
}


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
@pytest.mark.parametrize("kind", NODES)
def test_what_is_no_file_is_refused(place, kind, name):
    make, message = NODES[kind]
    (place.parent / "elsewhere").write_bytes((place / name).read_bytes())
    (place / name).unlink()
    make(place / name)
    refused(place, message, name)


def test_links_within_a_directory_are_followed(place):
    (place / "real").mkdir()
    (place / TENSORS).rename(place / "real" / TENSORS)
    (place / TENSORS).symlink_to(f"real/{TENSORS}")
    (place.parent / "latest").symlink_to(place)
    assert read_adapter(place.parent / "latest")[0] == RECIPES["lora"]


SHA1, SHA256 = "a" * 40, "b" * 64


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(place):
    repository = place.parent / "hub" / "models--me--adapter"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    shared = place.parent / "hub" / "blobs" / "bb"
    for directory in (snapshot, blobs, shared):
        directory.mkdir(parents=True)
    (place / CONFIG).rename(blobs / SHA1)
    (place / TENSORS).rename(shared / SHA256)
    (blobs / SHA256).symlink_to(f"../../blobs/bb/{SHA256}")
    (snapshot / CONFIG).symlink_to(f"../../blobs/{SHA1}")
    (snapshot / TENSORS).symlink_to(f"../../blobs/{SHA256}")
    assert read_adapter(snapshot)[0] == RECIPES["lora"]
    (blobs / SHA1).rename(blobs / "passwords")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../blobs/passwords")
    refused(snapshot, "is a link to .*passwords, out of its directory", CONFIG)
    (repository.parent / "models--you--adapter" / "blobs").mkdir(parents=True)
    (blobs / "passwords").rename(repository.parent / "models--you--adapter" / "blobs" / SHA1)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(f"../../../models--you--adapter/blobs/{SHA1}")
    refused(snapshot, "is a link to .*, out of its directory", CONFIG)


@pytest.mark.parametrize("tensors", [1, 8])
def test_reading_takes_at_most_twice_the_memory_of_the_file(tmp_path, tensors):
    arrays = {str(i): drawn((2**23 // tensors,)) for i in range(tensors)}
    save_file(arrays, tmp_path / TENSORS)
    size = (tmp_path / TENSORS).stat().st_size
    del arrays
    jnp.asarray(np.ones(2**10, np.float32))  # what jax makes once is not the file's
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


def test_nothing_of_a_model_changes_where_loading_fails_late(place, saved):
    (place / TENSORS).write_bytes(with_number(b"\0\0\x80\x7f")(saved[TENSORS]))
    model = nnx_base()
    before = jax.tree.map(np.asarray, nnx.state(model))
    with pytest.raises(aj.AdapterFileError, match="not finite"):
        aj.load_adapter(place, model, None, X)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    assert type(model.attention.query) is nnx.LinearGeneral
