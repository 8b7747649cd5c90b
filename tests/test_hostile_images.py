"""What a hostile image may try: each is an error that names the file, before a pixel is read."""

import io
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.errors import raises
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from adapters_jax.errors import UserError
from adapters_jax.finetune.data import pixels
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.pixels import FORMATS, Preprocessing, read_image

pytestmark = pytest.mark.hostile
LOADERS = (ImageFile.ImageFile, Image.Image)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unread(monkeypatch):
    """No pixel is read."""

    def load(image):
        pytest.fail(f"pixels of {image.size} are read")

    def go(*_):
        for each in LOADERS:
            monkeypatch.setattr(each, "load", load)

    return go


def write(name, data):
    Path(name).write_bytes(data)
    return name


def saved(kind, mode="RGB", size=(16, 16), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width, height, *chunks, row=b"\0" * 13, rows=4):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(row * rows))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return head + b"".join(chunks) + body + chunk(b"IEND", b"")


def tiff(**tags):
    """A TIFF file of 16 x 16 grey pixels in one deflated tile or strip, with these tags."""
    data = zlib.compress(bytes(256))
    numbers = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1}
    numbers |= {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    at = 8 + 2 + 12 * (len(numbers) + 2) + 4
    places = (324, 325) if 322 in numbers else (273, 279)
    numbers |= dict(zip(places, (at, len(data)), strict=True))
    entries = [struct.pack("<HHII", tag, 4, 1, numbers[tag]) for tag in sorted(numbers)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack("<I", 0) + data


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_never_runs(monkeypatch):
    """Not even where Ghostscript is installed, which Pillow finds in the path."""
    monkeypatch.setattr(shutil, "which", lambda name, *_, **__: "/bin/false")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program ran"))
    with raises(DataError, "a.png", "PNG", "TIFF"):
        read_image(write("a.png", EPS))


@pytest.mark.parametrize("kind", ["DDS", "ICO", "ICNS", "AVIF", "PPM", "TGA", "PCX", "SGI", "BLP"])
def test_other_formats_are_not_opened(kind):
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {kind}")
    data = saved(kind, "P" if kind == "BLP" else "RGB" if kind != "DDS" else "RGBA")
    Image.open(io.BytesIO(data)).load()
    for part in (data, data[: len(data) // 2]):
        with raises(DataError, "a.png", *FORMATS):
            read_image(write("a.png", part))


def test_the_formats_are_those_of_the_suffixes_whatever_the_suffix():
    suffixes = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
    assert {*FORMATS} == {*suffixes, "TIFF"}
    for kind in FORMATS:
        assert read_image(write("a.gif", saved(kind))).size == (16, 16)


CLAIMS = {
    "a PNG": lambda: png(4097, 4097),
    "a PNG that Pillow refuses": lambda: png(20_000, 20_000),
    "a GIF": lambda: saved("GIF", "P").replace(b"\x10\0\x10\0", b"\xff\xff\xff\xff"),
    "a BMP": lambda: saved("BMP").replace(
        struct.pack("<ii", 16, 16), struct.pack("<ii", 9999, 9999)
    ),
    "a WebP": lambda: saved("WEBP", size=(4500, 4500), lossless=True),
    "a TIFF": lambda: tiff(tag256=5000, tag257=5000),
    "a tile of a TIFF": lambda: tiff(tag322=40_000, tag323=40_000),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_few_bytes_do_not_become_many_pixels(kind, unread):
    name = write("a.png", CLAIMS[kind]())
    size = os.path.getsize(name)
    assert size < 10_000
    unread()
    with raises(DataError, "a.png", f" {2**24 + 32 * size} pixels", f" {size} bytes"):
        read_image(name)


def test_the_limit_of_pixels_grows_with_the_bytes(monkeypatch):
    data = saved("PNG", size=(100, 50))
    monkeypatch.setattr(pixels, "MOST_PIXELS", 5000 - 32 * len(data))
    assert read_image(write("a.png", data)).size == (100, 50)
    monkeypatch.setattr(pixels, "MOST_PIXELS", 4999 - 32 * len(data))
    with raises(DataError, "a.png", 4999, len(data)):
        read_image("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with raises(DataError, "a.png", 3000):
        read_image("a.png")


def test_a_jpeg_has_few_scans(unread):
    """Each passes over all pixels: 160 KB took 17 s."""
    data = saved("JPEG", "L", (2048, 2048), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert read_image(write("a.jpg", data[:-2] + last * 5 + data[-2:])).size == (2048, 2048)
    name = write("b.jpg", data[:-2] + last * 2000 + data[-2:])
    unread()
    with raises(DataError, "b.jpg", data.count(b"\xff\xda") + 2000, 2**32):
        read_image(name)


PACKED = zlib.compress(b"a" * 2**22, 9)
DAMAGED = {
    "a text of a PNG that unfolds": png(4, 4, chunk(b"zTXt", b"a\0\0" + PACKED)),
    "an international text that unfolds": png(4, 4, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)),
    "a profile that unfolds": png(4, 4, chunk(b"iCCP", b"a\0\0" + PACKED)),
    "many texts that unfold": png(
        4, 4, *[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(b"a" * 2**20, 9)) for i in range(65)]
    ),
    "a PNG that is cut off": png(4, 4, row=b"\0" * 13, rows=4)[:-30],
    "a damaged chunk": png(4, 4).replace(b"IDAT", b"IDAU"),
    "a strip beyond the file": tiff(tag278=2**31),
    "a tile in words": tiff(tag322=16, tag323=16).replace(
        struct.pack("<HHI", 322, 4, 1), struct.pack("<HHI", 322, 2, 1)
    ),
    "a GIF that is cut off": saved("GIF", "P")[:-8],
    "a WebP that is cut off": saved("WEBP")[:-8],
    "a JPEG that is cut off": saved("JPEG")[:-40],
    "a BMP that is cut off": saved("BMP")[:-40],
    "only a beginning": b"\x89PNG\r\n\x1a\n",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_an_error_that_names_the_file(kind):
    with raises(DataError, "a.png") as caught:
        read_image(write("a.png", DAMAGED[kind]))
    assert "0x" not in str(caught.value)  # no address of an object, which changes


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, MemoryError, struct.error, AssertionError]
)
@pytest.mark.parametrize("where", [(ImageFile.ImageFile, "load"), (ImageOps, "exif_transpose")])
def test_errors_of_any_class_are_ours(monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    name = write("a.png", saved("PNG"))
    monkeypatch.setattr(*where, fail)
    with raises(DataError, "a.png", error.__name__):
        read_image(name)


def test_damaged_notes_beside_good_pixels_are_no_error(recwarn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a" * 40
    data = saved("JPEG", size=(32, 16), exif=exif)
    assert read_image(write("a.jpg", data)).size == (16, 32)
    count = struct.pack("<HHI", ExifTags.Base.Make, 2, 41)
    little = count if count in data else struct.pack(">HHI", ExifTags.Base.Make, 2, 41)
    assert little in data
    cut = data.replace(little, little[:4] + b"\x7f\x7f\x7f\x7f")
    assert read_image(write("b.jpg", cut)).size in {(16, 32), (32, 16)}
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_images_are_the_same_whole_and_in_strips(monkeypatch, mode):
    drawn = np.random.default_rng(0).integers(0, 256, (23, 7, 4)).astype(np.uint8)
    Image.fromarray(drawn, "RGBA").convert(mode).save("a.png")
    with Image.open("a.png") as image:
        image = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    for strip in (1, 20, 10**6):
        monkeypatch.setattr(pixels, "_STRIP", strip)
        np.testing.assert_array_equal(read_image("a.png"), whole)


def test_pipes_folders_and_odd_names_are_errors():
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "absent.png", "a" * 5000 + ".png", "\0.png"):
        with raises(DataError, Path(name).as_posix()[:50]):
            read_image(name)


def test_a_preprocessing_does_not_ask_for_huge_images():
    for size in ({"height": 5000, "width": 4}, {"shortest_edge": 10**6}, 10**9):
        with raises(UserError, "preprocessor_config.json", 4096):
            Preprocessing.from_dict({"size": size})
    assert Preprocessing.from_dict({"size": 4096}).size == (4096, 4096)


def test_pillow_reads_what_we_refuse():
    """Otherwise the tests above would hold without our limits."""
    with Image.open(io.BytesIO(CLAIMS["a PNG"]())) as image:
        assert image.size == (4097, 4097)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(EPS), formats=FORMATS)
