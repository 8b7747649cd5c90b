"""Hostile GGUF files raise only our own errors, in little time and memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from helpers.errors import raises
from test_gguf import CONFIG as SHAPE
from test_gguf import build, tensors_of, write

from adapters_jax.errors import BaseFileError
from adapters_jax.finetune.base_files.gguf import read_gguf
from adapters_jax.finetune.models.decoder import DecoderConfig

pytestmark = pytest.mark.hostile

U32, F32, BOOL, TEXT, LIST = 4, 6, 7, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def entry(name, shape=(4, 2), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def file_of(fields=(), tensors=(), data=b"", version=3, counts=None):
    """The bytes of a file."""
    many, few = counts or (len(tensors), len(fields))
    header = b"GGUF" + struct.pack("<IQQ", version, many, few) + b"".join((*fields, *tensors))
    return header + bytes(-len(header) % 32) + data


ARCHITECTURE = field("general.architecture", TEXT, text("llama"))
TWO = (entry("a"), entry("b", offset=32))
HOSTILE = {  # the file, and the data in the message
    "no magic": (b"GGML" + bytes(99), "magic"),
    "a version": (file_of(version=1), "version 1", "(2, 3)"),
    "fields without end": (file_of(counts=(0, 2**60)), 13 * 2**60),
    "tensors without end": (file_of(counts=(2**60, 0)), 25 * 2**60),
    "a long text": (file_of([field("a", TEXT, struct.pack("<Q", 2**62))]), 2**62),
    "a long name": (file_of([struct.pack("<Q", 2**40) + bytes(16)]), 2**40),
    "a name that is no text": (file_of([field(b"\xff", U32, bytes(4))]), "utf-8"),
    "many numbers": (file_of([field("a", LIST, struct.pack("<IQ", U32, 10**7))]), 10**7),
    "numbers of 29 kB": (
        file_of([field("a", LIST, struct.pack("<IQ", U32, 10**6) + bytes(29_000))]),
        4 * 10**6,
    ),
    "many texts": (file_of([field("a", LIST, struct.pack("<IQ", TEXT, 10**6))]), 8 * 10**6),
    "many lists": (file_of([field("a", LIST, struct.pack("<IQ", U32, 2**63))]), 2**63),
    "lists of lists": (file_of([field("a", LIST, struct.pack("<IQ", LIST, 1))]), "'a'", "arrays"),
    "an unknown type": (file_of([field("a", 13, bytes(8))]), "'a'", "type 13"),
    "an unknown type in a list": (file_of([field("a", LIST, struct.pack("<IQ", 99, 1))]), 99),
    "neither true nor false": (file_of([field("a", BOOL, b"\x02")]), "'a'"),
    "a field twice": (file_of([ARCHITECTURE, ARCHITECTURE]), "'general.architecture'", "twice"),
    "an alignment": (
        file_of([field("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment=24",
    ),
    "no alignment": (file_of([field("general.alignment", U32, bytes(4))]), "alignment=0"),
    "an alignment of a text": (
        file_of([field("general.alignment", TEXT, text("32"))]),
        "general.alignment='32'",
    ),
    "a name that goes up": (file_of([], [entry("../a")], bytes(32)), "'../a'"),
    "a tensor twice": (file_of([], [entry("a"), entry("a", offset=32)], bytes(64)), "'a'", "twice"),
    "no axes": (file_of([], [entry("a", ())], bytes(32)), "0 axes"),
    "nine axes": (file_of([], [entry("a", (1,) * 9)], bytes(32)), "9 axes"),
    "no elements": (file_of([], [entry("a", (4, 0))], bytes(32)), "a", [0, 4]),
    "many elements": (file_of([], [entry("a", (2**40, 2**40))], bytes(32)), "a", [2**40, 2**40]),
    "half a block": (file_of([], [entry("a", (16, 2), kind=2)], bytes(32)), "a", [2, 16]),
    "a type of tensors": (file_of([], [entry("a", kind=99)], bytes(32)), "a", 99),
    "beyond the end": (file_of([], [entry("a", (9, 9))], bytes(32)), "a", 324),
    "an offset beyond the end": (file_of([], [entry("a", offset=2**50)], bytes(32)), 2**50 + 96),
    "an overlap": (file_of([], [entry("a"), entry("b", offset=16)], bytes(64)), "b"),
    "one place": (file_of([], [entry("a"), entry("b")], bytes(64)), "b"),
    "a hole": (file_of([], [entry("a"), entry("b", offset=64)], bytes(96)), "b"),
    "no architecture": (file_of([], TWO, bytes(64)), "general.architecture"),
    "an architecture of a number": (
        file_of([field("general.architecture", U32, bytes(4))]),
        "general.architecture=0",
    ),
    "an architecture of a list": (
        file_of([field("general.architecture", LIST, struct.pack("<IQ", U32, 0))]),
        "general.architecture=[]",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_that_names_it(name, tmp_path):
    data, *shown = HOSTILE[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with raises(BaseFileError, path, *shown) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_file_by_hand_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    numbers = np.arange(16, dtype=np.float32)
    path.write_bytes(file_of([ARCHITECTURE], TWO, numbers.tobytes()))
    stored = read_gguf(path).stored
    assert [(x.name, x.shape) for x in stored.values()] == [("a", (2, 4)), ("b", (2, 4))]
    got = stored["b"].bytes().view(np.float32)
    np.testing.assert_array_equal(got, numbers[8:].reshape(2, 4))


def test_links_out_of_the_directory_are_errors(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "a.gguf").write_bytes(file_of([ARCHITECTURE], TWO, bytes(64)))
    (tmp_path / "base" / "a.gguf").symlink_to("../a.gguf")
    with raises(BaseFileError, tmp_path / "base" / "a.gguf", "link"):
        read_gguf(tmp_path / "base" / "a.gguf")


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(build(SHAPE))


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"tokenizer.ggml.eos_token_id": 10**9}, ["eos=1000000000"]),
        ({"tokenizer.ggml.eos_token_id": "0"}, ["eos='0'"]),
        ({"tokenizer.ggml.eos_token_id": [0]}, ["eos=[0]"]),
        ({"tokenizer.ggml.tokens": 5}, ["tokenizer.ggml.tokens=5"]),
        ({"tokenizer.ggml.tokens": [1, 2]}, ["tokenizer.ggml.tokens=[1, 2]"]),
        ({"tokenizer.ggml.merges": [1]}, ["tokenizer.ggml.merges=[1]"]),
        ({"tokenizer.ggml.token_type": ["a"]}, ["tokenizer.ggml.token_type=['a']"]),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ["twice"]),
        ({"tokenizer.chat_template": 5}, ["tokenizer.chat_template=5"]),
    ],
)
def test_bad_fields_of_the_tokenizer_are_named(tmp_path, tensors, changes, data):
    path = write(tmp_path / "a.gguf", tensors, **changes)
    with raises(BaseFileError, path, *data):
        used(path)


def test_numbers_that_are_not_finite_are_named(tmp_path, tensors):
    changed = tensors | {"output_norm.weight": np.full(16, np.nan, np.float32)}
    opened = read_gguf(write(tmp_path / "a.gguf", changed))
    with raises(BaseFileError, opened.path, "output_norm.weight", "finite"):
        np.asarray(opened.tensors()["model.norm.weight"])


def used(path):
    """All that the library takes from a file."""
    opened = read_gguf(path)
    DecoderConfig.of_file(opened.config, path)
    opened.tokenizer()
    opened.token("eos")
    assert isinstance(opened.chat_template, str | None)
    return sum(np.asarray(tensor).size for tensor in opened.tensors().values())
