"""Hostile files made by hand: each of them once took too long or too much, or ended in a traceback.

An entry is a line of `CORPUS`: the reader, the name of a file, and what is in it instead: bytes, a
key of `mutators.NODES`, or a function that returns either from the valid content. `forked` reads
each in a process of its own, which has to end in a `UserError` within the bounds.
"""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One hostile file among valid ones.

    Attributes:
        target: a key of `targets.TARGETS`.
        name: the file's name.
        content: bytes, a key of `NODES`, or a function of the valid content (None if it is new).
        seed: the valid files that it is among; by default the target's first, or none of them if
            they lack the name.
        readable: whether it may be read as well, within the bounds.
    """

    target: str
    name: str
    content: bytes | str | Callable[[Any], bytes]
    seed: str | None = None
    readable: bool = False


# Rows.


def _table(kind: str, **columns: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    table, file = pyarrow.table(columns), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, file, compression="zstd")
    else:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


def _repeated(kind: str, length: int, rows: int) -> Callable[[Any], bytes]:
    """Rows that all point to one long text."""

    def make(_: Any) -> bytes:
        import numpy as np
        import pyarrow

        texts = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["a" * length])
        return _table(kind, text=texts, label=texts)

    return make


def _retyped(_: Any) -> bytes:
    """A column of bytes, whose schema says floats; asking pyarrow of it ends the process."""
    made = _table("parquet", text=[b"a", b"b"], label=[b"c", b"d"])
    kind = b"\x15\x0c\x25\x02\x18\x04text"  # in Thrift: the type of bytes, optional, the name
    assert kind in made
    return made.replace(kind, b"\x15\x08" + kind[2:])


def _required(_: Any) -> bytes:
    """A column with counts of missing values, which the schema excludes; pyarrow ends there too."""
    made = _table("parquet", text=["a", None], label=["c", "d"])
    kind = b"\x15\x0c\x25\x02\x18\x04text"  # its third and fourth byte: optional
    assert kind in made
    return made.replace(kind, kind[:2] + b"\x25\x00" + kind[4:])


def _run_ends(rows: int) -> Callable[[Any], bytes]:
    """Runs of one text, without an end."""

    def make(_: Any) -> bytes:
        import pyarrow

        ends = pyarrow.array([rows], pyarrow.int64())
        return _table("arrow", text=pyarrow.RunEndEncodedArray.from_arrays(ends, ["a"]))

    return make


def _views(lists: int, items: int) -> Callable[[Any], bytes]:
    """Lists that are all views of the same items."""

    def make(_: Any) -> bytes:
        import numpy as np
        import pyarrow

        begin, size = np.zeros(lists, np.int32), np.full(lists, items, np.int32)
        same = pyarrow.array(np.arange(items))
        return _table("arrow", text=pyarrow.ListViewArray.from_arrays(begin, size, same))

    return make


def _zipped(head: bytes, row: bytes, rows: int) -> Callable[[Any], bytes]:
    return lambda _: gzip.compress(head + row * rows)


def _wide(columns: int) -> bytes:
    return ",".join(f"a{i}" for i in range(columns)).encode() + b"\n" + b"," * (columns - 1)


def _keys(_: Any) -> bytes:
    return json.dumps({f"a{i}": i for i in range(10**6)}).encode()


# Images.


def _png(width: int, height: int, rows: int) -> bytes:
    """An image of black and white dots, of which the first rows are there."""

    def part(kind: bytes, data: bytes) -> bytes:
        seal = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + seal

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((1 + -(-width // 8)) * rows), 9)
    parts = part(b"IHDR", head) + part(b"IDAT", body) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\n"
_DDS_FORMAT = struct.pack("<8I", 32, 0x4, 0x20202020, 0, 0, 0, 0, 0)
DDS = b"DDS " + struct.pack("<7I44x", 124, 0x1007, 9, 9, 0, 0, 0) + _DDS_FORMAT + bytes(20)
BLP = b"BLP2" + struct.pack("<iBBBBII", 1, 9, 9, 9, 0, 9, 9) + struct.pack("<32I", *range(32))
_ICON = struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 32, 0, 0, 0, 0, 0, 0)
ICO = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(_ICON), 22) + _ICON
AVIF = struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1miaf" + struct.pack(">I", 99) + b"meta" * 9
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(12)


# Tokenizers and configurations.


def _edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda valid: json.dumps({**json.loads(valid), **changes}).encode()


def _padding(length: Any, multiple: int | None = None) -> Callable[[bytes], bytes]:
    words = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    return _edited(padding={"strategy": length, "pad_to_multiple_of": multiple, **words})


_ONE = [{"SpecialToken": {"id": "[ABSENT]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_UNKNOWN = {"type": "TemplateProcessing", "single": _ONE, "pair": _ONE, "special_tokens": {}}
_EMPTY_IDS = {"[ABSENT]": {"id": "[ABSENT]", "ids": [], "tokens": []}}
_BPE = {"seed": "bpe"}


def _twice(valid: bytes) -> bytes:
    return valid.rstrip()[:-1] + b"," + valid.lstrip()[1:]


CORPUS: dict[str, Entry] = {
    # Files that unfold.
    "parquet: rows of one long text": Entry(
        "parquet", "rows.parquet", _repeated("parquet", 2**21, 2000)
    ),
    "parquet: 20,000 columns": Entry(
        "parquet",
        "rows.parquet",
        lambda _: _table("parquet", **{f"a{i}": ["x"] for i in range(20_000)}),
        readable=True,
    ),
    "parquet: bytes as floats": Entry("parquet", "rows.parquet", _retyped),
    "parquet: missing values of a required column": Entry("parquet", "rows.parquet", _required),
    "arrow: rows of one long text": Entry("arrow", "rows.arrow", _repeated("arrow", 2**21, 2000)),
    "arrow: a run that does not end": Entry("arrow", "rows.arrow", _run_ends(2**31 - 2)),
    "arrow: views of the same items": Entry("arrow", "rows.arrow", _views(10**5, 10**5)),
    "csv: gzip of short rows": Entry("csv", "rows.csv.gz", _zipped(b"t,l\n", b"a,b\n", 2**20)),
    "csv: gzip of empty rows": Entry("csv", "rows.csv.gz", _zipped(b"t,l\n", b"\n", 2**24)),
    "jsonl: gzip of short rows": Entry(
        "jsonl", "rows.jsonl.gz", _zipped(b"", b'{"text":"a"}\n', 2**19)
    ),
    "csv: a million columns": Entry("csv", "rows.csv", lambda _: _wide(10**6)),
    "csv: a cell of 100 MB": Entry(
        "csv", "rows.csv", lambda _: b"text,label\n" + b"a" * 10**8, readable=True
    ),
    "jsonl: a million keys": Entry("jsonl", "rows.jsonl", _keys),
    "jsonl: a cell of 100 MB": Entry(
        "jsonl", "rows.jsonl", lambda _: b'{"text":"' + b"a" * 10**8 + b'"}'
    ),
    "jsonl: a key twice": Entry("jsonl", "rows.jsonl", b'{"text":"a","text":"b","label":"c"}\n'),
    "json: a key twice": Entry("json", "rows.json", b'[{"text":"a","text":"b","label":"c"}]'),
    # Images.
    "pixels: EPS": Entry("pixels", "cats/a.png", EPS),
    "pixels: DDS": Entry("pixels", "cats/a.png", DDS),
    "pixels: BLP": Entry("pixels", "cats/a.png", BLP),
    "pixels: ICO": Entry("pixels", "cats/a.png", ICO),
    "pixels: AVIF": Entry("pixels", "cats/a.png", AVIF),
    "pixels: PSD": Entry("pixels", "cats/a.png", PSD),
    "pixels: a pipe": Entry("pixels", "cats/a.png", "pipe"),
    "pixels: a device": Entry("pixels", "cats/a.png", "device"),
    "pixels: 81 million in 10 KB": Entry("pixels", "cats/a.png", lambda _: _png(9000, 9000, 9000)),
    "pixels: 10^18 claimed": Entry("pixels", "cats/a.png", _png(10**9, 10**9, 0)),
    # Tokenizers.
    "tokenizer: padding to 10^7": Entry(
        "tokenizer", "tokenizer.json", _padding({"Fixed": 10**7}), **_BPE, readable=True
    ),
    "tokenizer: padding to 10^10": Entry(
        "tokenizer", "tokenizer.json", _padding({"Fixed": 10**10}), **_BPE, readable=True
    ),
    "tokenizer: padding to a multiple of 10^10": Entry(
        "tokenizer", "tokenizer.json", _padding("BatchLongest", 10**10), **_BPE, readable=True
    ),
    "tokenizer: an unknown special token": Entry(
        "tokenizer", "tokenizer.json", _edited(post_processor=_UNKNOWN), **_BPE
    ),
    "tokenizer: a special token without ids": Entry(
        "tokenizer",
        "tokenizer.json",
        _edited(post_processor={**_UNKNOWN, "special_tokens": _EMPTY_IDS}),
        **_BPE,
        readable=True,
    ),
    "tokenizer: a key twice": Entry("tokenizer", "tokenizer.json", _twice, **_BPE, readable=True),
    # Nodes that are no files.
    **{
        f"{target}: {name} is a {node}": Entry(target, name, node)
        for target, name, node in (
            ("adapter", "adapter.safetensors", "pipe"),
            ("config", "config.json", "link out"),
            ("diffusers", "a.safetensors", "pipe"),
            ("gguf", "a.gguf", "device"),
            ("peft", "adapter_config.json", "link out"),
            ("pickle", "a.bin", "pipe"),
            ("tokenizer", "tokenizer.json", "pipe"),
            ("run", "config.json", "pipe"),
        )
    },
    # JSON.
    "config: a key twice": Entry("config", "config.json", _twice),
    "peft: a type that is a list": Entry(
        "peft", "adapter_config.json", _edited(peft_type=[["LORA"]])
    ),
}
