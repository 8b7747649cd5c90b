"""Ways to spoil files; each takes its choices from a `random.Random`.

`Choices` is one whose numbers are the bytes that a fuzzer gives, so that coverage can guide them.
"""

import json
import os
import random
import struct
from typing import NamedTuple

MOST = 2**15  # bytes of a file that has become longer


class Choices(random.Random):
    """Random numbers that are made of bytes; after these, they follow from the bytes as a seed."""

    def __init__(self, data):
        super().__init__(data)
        self._data, self._at = data, 0

    def getrandbits(self, k):
        size = -(-k // 8)
        taken = self._data[self._at : self._at + size]
        self._at += size
        if len(taken) < size:
            return super().getrandbits(k)
        return int.from_bytes(taken, "big") >> (8 * size - k)

    def random(self):
        return self.getrandbits(53) / 2**53


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
    *("\ud800", "x" * 600, "out/lora/zzz", "\u202ereversed", "C:\\a", "a/b/", "scale/x"),
    "ä/lora/a",
)
NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63, 2**64, 10**19, 1.5, 1e300, True, None, "4", [], [[1]])
DTYPES = ("F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "C64", "F4", "", "f32", None, 7, ["F32"])
JUNK = (
    *(None, True, -1, 0, 10**9, 2**31, 1e308, 1e-320, "", "**", "*a" * 60 + "b", "{a,b}" * 40),
    *("{" * 50, "../..", [], [[]], {}, {"a": 1}, [1, 2], ["out"], "x" * 3000, ["out", "!out"]),
    *([["out", 10**9]], [[0, 4]], [[-1, 2**40]], [[0.5, 1.5]], ["*"] * 5000, "gelu", "pissa"),
    *(3, 0.5, 10**39, "\x1b[2J", "\u202e", ["a", None], [{}], {"": []}, "(a+)+$" + "a" * 40),
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
COUNTS = (0, 1, 2, 3, 4, 7, 8, 9, 12, 32, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


# Any bytes.


def flipped(chance, data, words=()):
    """Bytes with up to eight bits flipped."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 8) if data else 0):
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def spliced(chance, data, words=()):
    """Bytes with a part removed, repeated or replaced."""
    start, stop = sorted(chance.randint(0, len(data)) for _ in range(2))
    new = chance.choice((b"", data[start:stop] * 2, chance.randbytes(chance.randint(0, 40))))
    return data[:start] + new + data[stop:]


def swollen(chance, data, words=()):
    """Bytes with a short part repeated many times."""
    start = chance.randint(0, len(data))
    part = data[start : start + chance.choice((1, 2, 8, 64))] or b"("
    count = min(chance.choice((30, 1000, 10_000)), MOST // len(part))
    return data[:start] + part * count + data[start:]


def cut(chance, data, words=()):
    """The beginning of some bytes."""
    return data[: chance.randint(0, max(0, len(data) - 1))]


def overwritten(chance, data, words=(), end=None):
    """Bytes with a number of four or eight bytes somewhere replaced."""
    layout = chance.choice(("<I", "<Q"))
    size = struct.calcsize(layout)
    at = chance.randint(0, len(data) if end is None else end)
    return (
        data[:at] + struct.pack(layout, chance.choice(COUNTS) % 2 ** (8 * size)) + data[at + size :]
    )


def worded(chance, data, words=()):
    """Bytes with a word of the format put in, or in place of some others."""
    word = chance.choice(words or ("\n", '"', ",", "0", "\x00")).encode("utf-8", "surrogatepass")
    at = chance.randint(0, len(data))
    return data[:at] + word + data[at + chance.choice((0, 0, 1, 4, len(word))) :]


# JSON.


def at_random(chance, value, change):
    """A JSON value with one part of it changed, wherever that is."""
    if isinstance(value, dict | list) and value and chance.randint(0, 3):
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = at_random(chance, copy[key], change)
        return copy
    return change(value)


def bad_json(chance, data, words=()):
    """JSON in which something is changed, new, missing or nested deeply, or that is none."""
    what = chance.choice(("raw", "junk", "junk", "junk", "gone", "new", "deep"))
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):  # of an earlier round
        what = "raw"
    if what == "raw" or not isinstance(values, dict | list):
        return chance.choice(RAW)
    if what == "gone" and values and isinstance(values, dict):
        values.pop(chance.choice(sorted(values)))
    elif what == "new" and isinstance(values, dict):
        new = chance.choice(("extra", "Recipe", "\ud800", "x" * 5000, *words))
        values[new] = chance.choice((1, *JUNK))
    elif what == "deep":
        deep = 1
        for _ in range(chance.randint(20, 400)):
            deep = [deep]
        values = at_random(chance, values, lambda _: deep)
    else:
        junk = (*JUNK, *words)
        values = at_random(chance, values, lambda _: chance.choice(junk))
    return json.dumps(values).encode()


def bad_recipe(chance, data, words=()):
    """JSON whose recipe, under that key or itself, is changed somewhere."""
    values = json.loads(data)
    whole = values if "recipe" in values else {"recipe": values}
    news = (*JUNK, 1, 2, 3, 10**6, "attention", "attention/*", "out", "**/bias", *words)
    whole["recipe"] = at_random(chance, whole["recipe"], lambda _: chance.choice(news))
    methods = whole["recipe"].get("methods") if isinstance(whole["recipe"], dict) else None
    if chance.randint(0, 1) and isinstance(methods, list) and methods:
        methods.append(chance.choice(methods))
    return json.dumps(values if whole is values else whole["recipe"]).encode()


def bad_line(chance, data, words=()):
    """JSON lines of which one is spoilt."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = bad_json(chance, lines[at], words)
    return b"\n".join(lines)


def equal_json(chance, data, words=()):
    """Other bytes with the same content."""
    values = json.loads(data)
    order = chance.sample(list(values), len(values))
    indent = chance.choice((None, 0, 4))
    return json.dumps({key: values[key] for key in order}, indent=indent).encode()


# safetensors.


def bad_length(chance, data, words=()):
    """A header of another length than it says."""
    length = chance.choice((chance.getrandbits(64), chance.randint(0, 4000)))
    return struct.pack("<Q", length) + data[8:]


def bad_entry(chance, data, words=()):
    """A header in which one entry is wrong."""
    entries, body = taken_apart(data)
    index = chance.choice([i for i, (name, _) in enumerate(entries) if name != "__metadata__"])
    name, entry = entries[index]
    entry = dict(entry)
    what = chance.choice(
        ("name", "twice", "dtype", "shape", "offsets", "moved", "key", "gone", "junk")
    )
    if what == "name":
        name = chance.choice(NAMES)
    elif what == "twice":
        entries.append(entries[index - 1])
    elif what == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif what == "shape":
        axes = chance.randint(0, chance.choice((4, 20)))
        entry["shape"] = [chance.choice((*NUMBERS, 2, 3, 4)) for _ in range(axes)]
    elif what == "offsets":
        ends = (*NUMBERS, *(chance.randint(0, len(body) + 8) for _ in range(len(NUMBERS))))
        entry["data_offsets"] = [chance.choice(ends) for _ in range(chance.randint(1, 3))]
    elif what == "moved":
        by = chance.choice((-16, -8, -4, 4, 8, 16, 2**40))
        entry["data_offsets"] = [end + by for end in entry["data_offsets"]]
    elif what == "key":
        entry[chance.choice(("more", "Shape", "dtype "))] = 1
    elif what == "gone":
        del entry[chance.choice(sorted(entry))]
    else:
        entry = chance.choice(JUNK)
    entries[index] = (name, entry)
    return put_together(entries, body)


def bad_numbers(chance, data, words=()):
    """NaN, quiet or signalling, or infinity in some tensor."""
    entries, body = taken_apart(data)
    kinds = {"F32": (4, 0x7F800000), "BF16": (2, 0x7F80)}
    entries_of_floats = [e for _, e in entries if e.get("dtype") in kinds]
    entry = chance.choice(entries_of_floats)
    start, stop = entry["data_offsets"]
    size, first = kinds[entry["dtype"]]
    bits = first + chance.choice((0, 1, 2**6, first // 0x7F80 * 2**6))
    bits += chance.randint(0, 1) << (8 * size - 1)
    at = start + size * chance.randint(0, (stop - start) // size - 1)
    return put_together(entries, body[:at] + bits.to_bytes(size, "little") + body[at + size :])


def equal_tensors(chance, data, words=()):
    """Other bytes with the same content."""
    entries, body = taken_apart(data)
    entries = chance.sample(entries, len(entries))
    if chance.randint(0, 1) and "__metadata__" not in dict(entries):
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    return put_together(entries, body, spaces=chance.randint(0, 64))


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
ORDINARY = ("directory", "link to itself", "link to nothing", "nothing")  # not endless
ANYWHERE = (flipped, spliced, cut, swollen, "other", "node")
WAYS = {
    ".safetensors": (*ANYWHERE, bad_length, *(bad_entry,) * 3, bad_numbers, equal_tensors),
    ".json": (*ANYWHERE, worded, *(bad_json,) * 4, equal_json),
    ".jsonl": (*ANYWHERE, worded, worded, bad_line, bad_line),
    ".gguf": (*ANYWHERE, overwritten, overwritten, overwritten),
}
OTHERWISE = (*ANYWHERE, worded, worded, worded)  # of texts and packed files
EQUAL = {".safetensors": equal_tensors, ".json": equal_json}


class Fixed(str):
    """The content of a file that is never spoilt."""


class Spoilt(NamedTuple):
    """Files by name, spoilt in some way; a text in place of bytes is a key of `NODES`."""

    seed: str
    ways: tuple
    files: dict

    @property
    def is_equal(self):
        """Whether the files have the content of valid ones."""
        return all(way in EQUAL.values() for way in self.ways)

    def __repr__(self):
        files = {name: (len(content), content[:80]) for name, content in self.files.items()}
        ways = [getattr(way, "__name__", way) for way in self.ways]
        return f"Spoilt({self.seed!r}, {ways}, {files})"


# What a way raises of files that an earlier round has spoilt.
_OF_WAYS = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


def spoilt(chance, seeds, words=(), more=None, rounds=3, nodes=tuple(sorted(NODES))):
    """Some of the valid files, spoilt once or a few times.

    Args:
        chance: makes the choices.
        seeds: valid files by name, by the name of the seed.
        words: words of the format, to put in.
        more: further ways by suffix.
        rounds: how many times at most.
        nodes: the keys of `NODES` that may take a file's place.
    """
    key = chance.choice(sorted(seeds))
    files, ways = dict(seeds[key]), []
    for _ in range(max(1, min(rounds, chance.randint(-5, rounds)))):
        name = chance.choice([n for n in sorted(files) if isinstance(seeds[key][n], bytes)])
        content = files[name]
        if isinstance(content, str):  # it is a node by now
            continue
        suffix = os.path.splitext(name)[1]
        way = chance.choice((*WAYS.get(suffix, OTHERWISE), *(more or {}).get(suffix, ())))
        if way == "other":
            other = chance.choice([x for x in seeds.values() if name in x])
            files[name] = other[name]
        elif way == "node":
            files[name] = chance.choice(nodes)
        else:
            try:
                files[name] = way(chance, content, words)
            except (*_OF_WAYS, struct.error):
                way = flipped  # an earlier round left nothing that this one could read
                files[name] = flipped(chance, content)
        ways.append(way)
    return Spoilt(key, tuple(ways), files)
