"""Image classification: each image has one of a few labels.

Images are read with the preprocessing of the checkpoint, which has the size that its model reads.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import needed
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.images import home_of
from adapters_jax.finetune.data.mixing import Mixture
from adapters_jax.finetune.data.pixels import ImageBatches, ImageRow, checked
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.tasks.base import PARTS, Batch, Columns, Files, listed
from adapters_jax.finetune.tasks.classification import Classes, ClassPrediction
from adapters_jax.finetune.tasks.labelled import LabelledTask
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs

MARGIN = 8  # a crop moves an image by at most 1 / 8 of its side


@dataclass(frozen=True)
class ImagePrediction(ClassPrediction):
    """The class of an image, whose path is `text`."""

    def texts(self) -> dict[str, str]:
        """The path, as "image"."""
        return {"image": self.text}


@dataclass(frozen=True)
class ImageClasses(Classes):
    """A `NamedReadout` of the classes of images; the texts of rows are paths.

    Args:
        names: the names of the classes, in the order of their ids.
        augment: how training images are varied: "flip" from left to right, half of them; "crop"
            moves them by up to an eighth of their size, mirrored at the edge; or both.
    """

    augment: tuple[str, ...] = ()
    arrays = ("pixels",)
    unsaved = ("augment",)
    max_length = 2**31  # every image has the tokens of the model

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """The classes of a training set; raises MissingPackageError if augmenting needs dm-pix."""
        augment = setup.augment if setup else ()
        if augment:
            _pix()
        return cls(train.label_names, augment)

    def inputs(self, encoder: Any, texts: Sequence[Any], max_length: int) -> Inputs:
        """The images, which are read batch by batch."""
        return Inputs([ImageRow(path) for path, _ in texts], 0)

    def encoded(self, encoder: Any, texts: Sequence[Any], max_length: int) -> Inputs:
        """The images, after reading each one."""
        encoder.check_length(max_length)
        return Inputs(checked([path for path, _ in texts], encoder.preprocessing), 0)

    def checksums(self, inputs: Mapping[str, Inputs]) -> dict[str, str]:
        """That of all pixels: the texts are paths alone."""
        rows = (row for part in sorted(inputs) for row in inputs[part].rows)
        found = hashlib.sha256("".join(row.sha256 for row in rows).encode())
        return {"pixels_sha256": found.hexdigest()}

    def named(self, texts: Sequence[Any]) -> dict[str, str]:
        """The image's name and its folder's."""
        return {"image": "/".join(Path(texts[0]).parts[-2:])}

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The class of each image."""
        return [ImagePrediction(**vars(x)) for x in super().predictions(texts, outputs, where)]

    def batches(
        self, encoder: Any, rows: Sequence[Any], labels: Any, *plan: Any, mix: Mixture | None = None
    ) -> ImageBatches:
        """Batches of images."""
        size, seed, _ = plan
        return ImageBatches(rows, labels, size, seed, encoder.preprocessing, mix)

    def augmented(self, batch: Batch, key: Any) -> Batch:
        """A training batch, whose images are moved and flipped by a key; cached features stay."""
        if not self.augment or "pixels" not in batch:
            return batch
        pixels: Any = jnp.asarray(batch["pixels"])
        # The key is dropout's as well, so it is folded to draw other numbers.
        keys = jax.random.split(jax.random.fold_in(key, MARGIN), (2, len(pixels)))
        if "crop" in self.augment:
            gaps = [side // MARGIN for side in pixels.shape[1:3]]
            around = [(0, 0), *((gap, gap) for gap in gaps), (0, 0)]
            whole = jnp.pad(pixels, around, mode="reflect")
            crop = jax.vmap(lambda key, x: _pix().random_crop(key, x, pixels.shape[1:]))
            pixels = crop(keys[0], whole)
        if "flip" in self.augment:
            pixels = jax.vmap(_pix().random_flip_left_right)(keys[1], pixels)
        return {**batch, "pixels": pixels}


def _pix() -> Any:
    with needed("--augment", "dm-pix", "images"):
        import dm_pix
    return dm_pix


class ImageClassification(LabelledTask):
    """Classes of images."""

    name = "image-classification"
    kind = "vision"
    pipeline = "image-classification"
    head = "image_classification"
    metrics = ("accuracy", "f1", "matthews")
    defaults = ("accuracy", "f1")
    least_steps = 0  # a step on images takes many seconds on a processor
    columns: ClassVar[Columns] = {"image": "image", "label": "label"}
    flags = (*LabelledTask.flags, "augment")
    inputs = ("image",)
    readout = ImageClasses
    sample = ("image.png",)
    example = "--train DIR, with a folder of images for each class, or a table of paths and labels"

    def load(
        self, files: Mapping[str, Files], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads the paths of images, and their labels; see `Task.load`.

        The paths are absolute: a run that is resumed reads the same ones in any directory.
        """
        found = {
            part: [path.resolve() if path.exists() else path for path in listed(paths)]
            for part, paths in files.items()
        }
        data = super().load(found, columns, metrics)
        # Placed once rows are held out: what is drawn by paths is the same wherever they lie.
        parts = {part: getattr(data, part) for part in PARTS}
        placed = {p: replace(x, texts=_placed(Path(x.path), x.texts)) for p, x in parts.items()}
        return replace(data, **placed)

    def read_texts(self, rows: Rows, columns: Sequence[str]) -> Sequence[Any]:
        """The paths of images to predict."""
        return _placed(Path(rows.path), super().read_texts(rows, columns))


def _placed(table: Path, texts: Sequence[Any]) -> list[Any]:
    """Paths as they are from here; those of a directory or of a table's are from there.

    Raises:
        DataError: a table that is not a file has a path that is not absolute.
    """
    if not table.exists() and not all(Path(path).is_absolute() for path, _ in texts):
        raise DataError(
            f"{table.as_posix()}: paths of images in it are not absolute; give one table, which is "
            "beside the images, or a directory of images"
        )
    place = home_of(table)
    return [((place / path).as_posix(), pair) for path, pair in texts]
