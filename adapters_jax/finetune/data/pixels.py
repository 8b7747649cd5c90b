"""Images as arrays, with the preprocessing that a checkpoint was trained with.

Pillow reads and resizes, as transformers' image processors do. What is laid under a transparent
image is white; an animation is its first frame; a photo is turned as its EXIF data say.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from adapters_jax.errors import UserError, first_few, needed
from adapters_jax.finetune.data.batches import StepBatches
from adapters_jax.finetune.data.files import DataError, read_whole
from adapters_jax.finetune.data.mixing import Mixture

if TYPE_CHECKING:
    from PIL import Image

KEPT = 2**30  # bytes of decoded images that are kept; the others are decoded at each step
# Pillow has 40 formats more, among them EPS, for which it runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS, PIXELS_PER_BYTE = 2**24, 32  # an image of n bytes has at most 2^24 + 32 n pixels
LARGEST_SIDE = 2**12  # of a resized image
_MOST_SCANNED = 2**32  # pixels of all scans of a JPEG file; a scan of a few bytes passes over each
_STRIP = 2**20  # pixels that are laid on white at a time
_TILE = (322, 323)  # width and length, by their tags of TIFF
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
_BILINEAR = 2  # Pillow's number, which files have
_OF_SHORTER_SIDE = ("CLIP", "Bit")  # processors that mean the shorter side by a size of one number
_THEIRS = {  # what these do where a file does not say it
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint's images are resized and normalised, as `preprocessor_config.json` says.

    Args:
        size: height and width that images are resized to; None leaves their size.
        shortest: the length that their shorter side is resized to, instead of both.
        crop: height and width of the middle that is cut out; None cuts nothing.
        resample: Pillow's number of the filter.
        scale: the factor of the bytes.
        mean: is subtracted from each channel.
        std: divides each channel.

    Example:
        >>> pixels = Preprocessing(size=(2, 2)).normalised(np.full((1, 2, 2, 3), 255, np.uint8))
        >>> pixels.shape, pixels.max().item()
        ((1, 2, 2, 3), 1.0)
    """

    size: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    resample: int = _BILINEAR
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Takes the settings from a parsed `preprocessor_config.json`.

        Raises:
            UserError: image processors of ViT, CLIP and DINOv2 do not have such a setting.
        """
        found: dict[str, Any] = {"scale": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        try:
            kinds = [values.get(f"{x}_type") for x in ("image_processor", "feature_extractor")]
            shorter = str(kinds[0] or kinds[1]).startswith(_OF_SHORTER_SIDE)
            values = {**_THEIRS, **values} if shorter else values
            if values.get("do_resize", True):
                found |= _size_of(values.get("size", 224), shorter)
                found["resample"] = int(values.get("resample", _BILINEAR))
            if values.get("do_center_crop", False):
                found["crop"] = _sides(values["crop_size"])
            if values.get("do_rescale", True):
                found["scale"] = float(values.get("rescale_factor", 1 / 255))
            if values.get("do_normalize", True):
                for name in ("mean", "std"):
                    found[name] = tuple(map(float, values.get(f"image_{name}", (0.5,) * 3)))
            good = [len(found[name]) == 3 and all(found["std"]) for name in ("mean", "std")]
            if not all(good) or not 0 <= found.get("resample", 0) <= 5:
                raise ValueError("three numbers in image_mean and image_std, and a filter")
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"preprocessor_config.json has {error}; expected size, crop_size, resample, "
                "rescale_factor, image_mean and image_std, as a ViT's image processor writes them"
            ) from error
        return cls(**found)

    @property
    def sides(self) -> tuple[int, int] | None:
        """The height and width of its images; None if they have several."""
        return self.crop or self.size

    def check(self, height: int, width: int) -> None:
        """Raises UserError unless its images have the size that a model reads."""
        if self.sides != (height, width):
            raise UserError(
                f"the checkpoint's preprocessing gives images of {self.sides}, and its model reads "
                f"{(height, width)}; give a checkpoint whose preprocessor_config.json has that size"
            )

    def read(self, path: str | Path) -> UInt8[np.ndarray, "height width 3"]:
        """Reads an image, resized and cut out.

        Raises:
            DataError: the file is no image, is cut off, or has too many pixels.
        """
        image = read_image(path)
        width, height = image.size
        if self.shortest:
            short = min(width, height)
            long = int(self.shortest * max(width, height) / short)
            if long * self.shortest > MOST_PIXELS:
                raise DataError(
                    f"{Path(path).as_posix()}: so narrow that it would have "
                    f"{long * self.shortest} pixels once its shorter side is resized, more than "
                    f"{MOST_PIXELS}; cut it"
                )
            sides = (long, self.shortest) if width > height else (self.shortest, long)
            image = image.resize(sides, self.resample)
        elif self.size:
            image = image.resize(self.size[::-1], self.resample)
        pixels = np.asarray(image)
        return _middle(pixels, self.crop) if self.crop else pixels

    def normalised(self, pixels: UInt8[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
        """The bytes as the model reads them."""
        # In float32, as transformers does it: float64 gives other last digits.
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std


def _size_of(size: Any, shorter: bool) -> dict[str, Any]:
    """The size of one number is that of the shorter side, or else of both."""
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return {"shortest": _length(size["shortest_edge"])}
    if isinstance(size, int) and shorter:
        return {"shortest": _length(size)}
    return {"size": _sides(size)}


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, of a number or of both."""
    if isinstance(size, Mapping):
        size = size["height"], size["width"]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return _length(height), _length(width)


def _length(side: Any) -> int:
    if not 1 <= int(side) <= LARGEST_SIDE:
        raise ValueError(f"a side of {side} (1 to {LARGEST_SIDE} are possible)")
    return int(side)


def _middle(
    pixels: UInt8[np.ndarray, "height width 3"], sides: tuple[int, int]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The middle of an image, with black around it where the image is smaller."""
    gaps = [max(side - have, 0) for side, have in zip(sides, pixels.shape[:2], strict=True)]
    padded = np.pad(pixels, [*((-(-gap // 2), gap // 2) for gap in gaps), (0, 0)])
    top, left = ((have - side) // 2 for have, side in zip(padded.shape, sides, strict=False))
    return padded[top : top + sides[0], left : left + sides[1]]


def read_image(path: str | Path) -> Image.Image:
    """Reads an image of any mode as RGB, turned as its EXIF data say.

    Raises:
        DataError: the file is no image of one of `FORMATS`, is cut off, or has too many pixels: a
            few bytes can claim, and unpack to, as many as they like. The limit is 2^24, and 32 for
            each byte of the file, and Pillow's `MAX_IMAGE_PIXELS`.
        MissingPackageError: Pillow is not installed.
    """
    with needed("reading images", "pillow", "images"):
        from PIL import Image, ImageOps, UnidentifiedImageError
    path = Path(path)
    data = read_whole(path)
    try:
        with warnings.catch_warnings():
            # Of damaged EXIF data beside good pixels, as many photos have them.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(path, image, data)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(path, image)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, len(data)) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path.as_posix()}: not an image of the formats {', '.join(FORMATS)}; save it as one"
        ) from None
    except Exception as error:  # the readers of the formats raise errors of any class
        problem = str(error) or type(error).__name__
        raise DataError(
            f"{path.as_posix()}: not an image that opens: {problem}; save it anew"
        ) from None


def _check_pixels(path: Path, image: Image.Image, data: bytes) -> None:
    """Raises DataError unless the pixels of an image, none of them read yet, fit its bytes."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    tile_width, tile_height = (tags.get(tag) or 1 for tag in _TILE)  # an image may be part of one
    if max(width * height, tile_width * tile_height) > _most_pixels(len(data)):
        raise _too_large(path, len(data))
    # Two bytes that may stand elsewhere too, so this counts at least the scans.
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
    if scans * width * height > _MOST_SCANNED:
        raise DataError(
            f"{path.as_posix()}: a JPEG file whose {width} x {height} pixels are in {scans} scans, "
            f"more than the limit of {_MOST_SCANNED} pixels of all scans; save it anew"
        )


def _most_pixels(size: int) -> int:
    """The most pixels that an image may have, by the bytes of its file."""
    from PIL import Image

    return min(MOST_PIXELS + PIXELS_PER_BYTE * size, Image.MAX_IMAGE_PIXELS or 2**63)


def _too_large(path: Path, size: int) -> DataError:
    return DataError(
        f"{path.as_posix()}: more than the limit of {_most_pixels(size)} pixels for its {size} "
        "bytes; make it smaller"
    )


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in _SIXTEEN:  # convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path.as_posix()}: an image of the mode {image.mode}, whose numbers have no known "
            "range; save it with 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    whole, rows = Image.new("RGB", image.size), max(_STRIP // width, 1)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, "white")
        whole.paste(Image.alpha_composite(ground, strip).convert("RGB"), (0, top))
    return whole


class ImageRow(NamedTuple):
    """An image, whose pixels may be kept.

    Attributes:
        kept: its pixels as `Preprocessing.read` returns them; None reads them anew.
        sha256: their checksum; empty if they were not read yet.
    """

    path: str
    kept: np.ndarray | None = None
    sha256: str = ""


def checked(paths: Sequence[str], preprocessing: Preprocessing) -> list[ImageRow]:
    """Reads all images once, and keeps the pixels of as many as `KEPT` allows.

    Raises:
        DataError: images do not open; the message names the first.
    """
    rows, wrong, room = [], [], KEPT
    for path in paths:
        try:
            pixels = preprocessing.read(path)
        except DataError as error:
            wrong.append(str(error))
            continue
        room -= pixels.nbytes
        # Of the pixels, not the file: a run is the same whatever format they are stored in.
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        rows.append(ImageRow(path, pixels if room >= 0 else None, digest))
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(paths)} images cannot be used: {first_few(wrong)}; remove them, "
            "or save them anew"
        )
    return rows


class ImageBatches(StepBatches):
    """`StepBatches` of images; they have `pixels`, float32 `(batch, height, width, 3)`.

    Args:
        rows: the images.
        labels, batch_size, seed, mix: as for `StepBatches`.
    """

    def __init__(
        self,
        rows: Sequence[ImageRow],
        labels: np.ndarray | None,
        batch_size: int,
        seed: int | None,
        preprocessing: Preprocessing,
        mix: Mixture | None = None,
    ) -> None:
        super().__init__([np.arange(len(rows))], labels, batch_size, seed, mix)
        self.rows, self.preprocessing = rows, preprocessing

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The pixels of images."""
        images, read = [self.rows[i] for i in rows], self.preprocessing.read
        pixels = [read(each.path) if each.kept is None else each.kept for each in images]
        return {"pixels": self.preprocessing.normalised(np.stack(pixels))}
