"""Valid adapters of several methods, and ways to spoil the files that hold them."""

import json
import os
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import adapters_jax as aj
from adapters_jax.io.adapter import TENSORS
from adapters_jax.io.manifest import CONFIG
from adapters_jax.nnx import AdapterParam
from helpers.arrays import drawn_like

X = np.ones((1, 3, 4), np.float32)
RECIPES = {
    "bottleneck": aj.Recipe(aj.Bottleneck("out", 2)),
    "lora": aj.Recipe(aj.LoRA("attention/{query,value}", 2, 3.0, rank_pattern={"**/value": 1})),
    "dora": aj.Recipe(aj.DoRA("out", 2), aj.Unfreeze("scale")),
    "llama": aj.Recipe(aj.LlamaAdapter("attention", 3)),
    "unfreeze": aj.Recipe(aj.Unfreeze(("**/bias", "!attention/**", "scale"))),
}


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (4,), jnp.bfloat16)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(4, name="out")(x) * scale.astype(x.dtype)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = nnx.Linear(4, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(4, jnp.bfloat16))

    def __call__(self, x):
        return self.out(self.attention(x)) * self.scale.astype(x.dtype)


def linen_base():
    """A linen model and its parameters, drawn."""
    model = LinenNet()
    return model, drawn_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])


def nnx_base():
    """The same in NNX."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    params, other = nnx.split_state(state, nnx.Param, ...)
    other = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Not(nnx.Param))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, drawn_like(params)), other)


def save(folder, api, name):
    """Saves a drawn adapter of a recipe on the base of an API; returns the directory."""
    recipe = RECIPES[name]
    if api == "linen":
        model, params = linen_base()
        shapes = jax.eval_shape(lambda x: x, params)
        whole = aj.init_adapters(aj.adapt(model, recipe), shapes, jax.random.key(0), X)
        adapters, base = aj.partition(whole, recipe)[0], aj.base_identity(params, id="tiny")
    else:
        model = nnx_base()
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.eval_shape(lambda x: x, state))
        model = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(X,))
        adapters, base = nnx.state(model, AdapterParam), aj.base_identity(model, id="tiny")
    return aj.save_adapter(folder / f"{api}-{name}", drawn_like(adapters, 1), recipe, base=base)


class Entries(list):
    """The pairs of a JSON object, duplicate keys included."""


def as_plain(value):
    return {k: as_plain(v) for k, v in value} if isinstance(value, Entries) else value


def taken_apart(data):
    """The entries of a safetensors header, all of them, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length], object_pairs_hook=Entries)
    return [(name, as_plain(entry)) for name, entry in entries], data[8 + length :]


def put_together(entries, body, length=None, spaces=0):
    """The inverse of `taken_apart`; keys may be duplicate, and the length may be wrong."""
    pairs = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in entries)
    header = ("{" + pairs + "}" + " " * spaces).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


NAMES = (
    *("../../etc/passwd", "/etc/passwd", "a//b", "", "a/./b", "a\x00b", "a\nb", "..", "a\\..\\b"),
    *(
        "\ud800",
        "x" * 600,
        "out/lora/zzz",
        "\u202ereversed",
        "C:\\a",
        "a/b/",
        "scale/x",
        "ä/lora/a",
    ),
)
NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63, 2**64, 10**19, 1.5, 1e300, True, None, "4", [], [[1]])
DTYPES = ("F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "C64", "F4", "", "f32", None, 7, ["F32"])
JUNK = (
    *(None, True, -1, 0, 10**9, 2**31, 1e308, 1e-320, "", "**", "*a" * 60 + "b", "{a,b}" * 40),
    *("{" * 50, "../..", [], [[]], {}, {"a": 1}, [1, 2], ["out"], "x" * 3000, ["out", "!out"]),
    *([["out", 10**9]], [[0, 4]], [[-1, 2**40]], [[0.5, 1.5]], ["*"] * 5000, "gelu", "pissa"),
)
RAW = (
    b'{"format": NaN}',
    b'{"format": 1e999}',
    b'{"format": 1, "format": 1}',
    b"\xef\xbb\xbf{}",
    b'{"a": "\xff"}',
    b'{"a": "\\ud800"}',
    b'"' + b'\\"' * 9000,
    b"[" * 20_000,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b'{"format": ' + b"9" * 9000 + b"}",
    b"[" + b"0," * 9000 + b"0]",
    b" " * (2**20 + 1),
    b"",
    b"null",
)


def at_random(draw, value, change):
    """A JSON value with one part of it changed, wherever that is."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = at_random(draw, copy[key], change)
        return copy
    return change(value)


def flipped(draw, data):
    """Bytes with up to eight bits flipped."""
    data = bytearray(data)
    for bit in draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=8)):
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def spliced(draw, data):
    """Bytes with a part removed, repeated or replaced."""
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    new = draw(st.one_of(st.just(b""), st.just(data[start:stop] * 2), st.binary(max_size=40)))
    return data[:start] + new + data[stop:]


def bad_entry(draw, tensors):
    """A header in which one entry is wrong."""
    entries, body = taken_apart(tensors)
    index = draw(st.integers(0, len(entries) - 1))
    name, entry = entries[index]
    entry = dict(entry)
    what = draw(
        st.sampled_from(
            ("name", "twice", "dtype", "shape", "offsets", "moved", "key", "gone", "junk")
        )
    )
    if what == "name":
        name = draw(st.sampled_from(NAMES))
    elif what == "twice":
        entries.append(entries[index - 1])
    elif what == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif what == "shape":
        entry["shape"] = draw(st.lists(st.sampled_from((*NUMBERS, 2, 3, 4)), max_size=20))
    elif what == "offsets":
        ends = st.one_of(st.sampled_from(NUMBERS), st.integers(0, len(body) + 8))
        entry["data_offsets"] = draw(st.lists(ends, min_size=1, max_size=3))
    elif what == "moved":
        by = draw(st.sampled_from((-16, -8, -4, 4, 8, 16, 2**40)))
        entry["data_offsets"] = [end + by for end in entry["data_offsets"]]
    elif what == "key":
        entry[draw(st.sampled_from(("more", "Shape", "dtype ")))] = 1
    elif what == "gone":
        del entry[draw(st.sampled_from(sorted(entry)))]
    else:
        entry = draw(st.sampled_from(JUNK))
    entries[index] = (name, entry)
    return put_together(entries, body)


def bad_numbers(draw, tensors):
    """NaN, quiet or signalling, or infinity in some tensor."""
    entries, body = taken_apart(tensors)
    _, entry = draw(st.sampled_from(entries))
    start, stop = entry["data_offsets"]
    size, first = {"F32": (4, 0x7F800000), "BF16": (2, 0x7F80)}[entry["dtype"]]
    bits = first + draw(st.sampled_from((0, 1, 2**6, first // 0x7F80 * 2**6)))
    bits += draw(st.booleans()) << (8 * size - 1)
    at = start + size * draw(st.integers(0, (stop - start) // size - 1))
    return put_together(entries, body[:at] + bits.to_bytes(size, "little") + body[at + size :])


def equal_tensors(draw, tensors):
    """Other bytes with the same content."""
    entries, body = taken_apart(tensors)
    entries = draw(st.permutations(entries))
    if draw(st.booleans()):
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    return put_together(entries, body, spaces=draw(st.integers(0, 64)))


def bad_config(draw, config):
    """A configuration in which something is changed, new, missing or not JSON."""
    values = json.loads(config)
    what = draw(st.sampled_from(("raw", "junk", "junk", "junk", "gone", "new", "deep")))
    if what == "raw":
        return draw(st.sampled_from(RAW))
    if what == "junk":
        values = at_random(draw, values, lambda _: draw(st.sampled_from(JUNK)))
    elif what == "gone":
        del values[draw(st.sampled_from(sorted(values)))]
    elif what == "new":
        values[draw(st.sampled_from(("extra", "Recipe", "\ud800", "x" * 5000)))] = 1
    else:
        deep = 1
        for _ in range(draw(st.integers(20, 400))):
            deep = [deep]
        values = at_random(draw, values, lambda _: deep)
    return json.dumps(values).encode()


def bad_recipe(draw, config):
    """A configuration whose recipe is valid JSON, changed somewhere."""
    values = json.loads(config)
    news = st.sampled_from((*JUNK, 1, 2, 3, 10**6, "attention", "attention/*", "out", "**/bias"))
    values["recipe"] = at_random(draw, values["recipe"], lambda _: draw(news))
    others = [row for recipe in RECIPES.values() for row in json.loads(recipe.to_json())["methods"]]
    methods = values["recipe"].get("methods") if isinstance(values["recipe"], dict) else None
    if draw(st.booleans()) and isinstance(methods, list):
        methods.append(draw(st.sampled_from(others)))
    return json.dumps(values).encode()


def equal_config(draw, config):
    """Other bytes with the same content."""
    values = json.loads(config)
    order = draw(st.permutations(list(values)))
    indent = draw(st.sampled_from((None, 0, 4)))
    return json.dumps({key: values[key] for key in order}, indent=indent).encode()


def _link(directory, path):
    os.symlink(directory.parent / "elsewhere", path)


NODES = {
    "directory": lambda directory, path: path.mkdir(),
    "pipe": lambda directory, path: os.mkfifo(path),
    "link out": _link,
    "link up": lambda directory, path: os.symlink("../elsewhere", path),
    "link to nothing": lambda directory, path: os.symlink("nothing", path),
    "link to itself": lambda directory, path: os.symlink(path.name, path),
    "device": lambda directory, path: os.symlink("/dev/zero", path),
    "nothing": lambda directory, path: None,
}


class Spoilt(NamedTuple):
    """The files of an adapter by name, spoilt in some way; a text is a key of `NODES`."""

    adapter: str
    way: str
    files: dict
    is_equal: bool

    def __repr__(self):
        files = {name: (len(content), content[:80]) for name, content in self.files.items()}
        return f"Spoilt({self.adapter!r}, {self.way!r}, {files})"


_ANYWHERE = (flipped, spliced, "cut", "length", "other", "node")
WAYS = {
    TENSORS: (*_ANYWHERE, bad_entry, bad_entry, bad_entry, bad_numbers, equal_tensors),
    CONFIG: (*_ANYWHERE, bad_config, bad_config, bad_recipe, bad_recipe, equal_config),
}


@st.composite
def spoilt(draw, adapters):
    """One of several adapters, each the bytes of its two files by name, spoilt in some way."""
    key = draw(st.sampled_from(sorted(adapters)))
    files = dict(adapters[key])
    name = draw(st.sampled_from((TENSORS, CONFIG)))
    way = draw(st.sampled_from(WAYS[name]))
    if way == "cut":
        files[name] = files[name][: draw(st.integers(0, len(files[name]) - 1))]
    elif way == "length":
        length = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4000)))
        files[TENSORS] = struct.pack("<Q", length) + files[TENSORS][8:]
    elif way == "other":
        files[name] = adapters[draw(st.sampled_from(sorted(adapters)))][name]
    elif way == "node":
        files[name] = draw(st.sampled_from(sorted(NODES)))
    else:
        files[name] = way(draw, files[name])
    return Spoilt(key, getattr(way, "__name__", way), files, way in (equal_tensors, equal_config))
