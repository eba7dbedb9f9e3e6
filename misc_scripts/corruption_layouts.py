"""The layouts of corrupted images: ImageNet-C's folders and CIFAR-10-C's arrays."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Event

import numpy as np
from corruptions import corrupt
from image_threads import for_each
from PIL import Image

from apm.data.class_names import CIFAR10_CLASSES
from apm.data.images import Skipped, load_image, load_images
from apm.preprocessing import Preprocessing
from apm.runtime.files import atomic_path, read_array

JPEG_QUALITY = 85
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How any version of any image is made.

    Attributes:
        image_size: side of the centre square, None to leave images as they are.
        parameters: ``"cifar"`` or ``"imagenet"``.
        seed: of all versions of all images.
        frost_textures: ``(h, w, 3)`` uint8 RGB each.
    """

    image_size: int | None
    parameters: str
    seed: int
    frost_textures: Sequence[np.ndarray]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The clean image: ``(H, W, 3)`` uint8 RGB."""
        if self.image_size is not None:
            image = Preprocessing(image_size=self.image_size).picture(image)
        return np.asarray(image)

    def version(self, pixels: np.ndarray, name: str, corruption: str, severity: int) -> np.ndarray:
        """The image corrupted: ``(H, W, 3)`` uint8 RGB, the same whatever else is made."""
        which = f"{corruption}/{severity}/{name}".encode(errors="surrogateescape")
        return corrupt(
            pixels,
            corruption,
            severity,
            np.random.default_rng((self.seed % 2**32, *which)),
            parameters=self.parameters,
            frost_textures=self.frost_textures,
        )


def write_folders(
    output: Path,
    paths: dict[str, Path],
    versions: Sequence[tuple[str, int]],
    recipe: Recipe,
    workers: int,
) -> Skipped:
    """Write ImageNet-C's layout, except what is there; return what could not be read.

    Args:
        output: gets ``<corruption>/<severity>/<name>``.
        paths: images by their names.
        versions: corruptions and severities.
        recipe: how versions are made.
        workers: number of threads.

    Raises:
        ValueError: if no image can be read.
    """

    ended = Event()

    def write_versions(name: str) -> None:
        file = name if Path(name).suffix.lower() in KEPT_SUFFIXES else f"{name}.png"
        targets = {version: output / version[0] / str(version[1]) / file for version in versions}
        missing = {version: target for version, target in targets.items() if not target.exists()}
        if not missing:
            return
        pixels = recipe.pixels(load_image(paths[name]))
        for version, target in missing.items():
            if ended.is_set():
                return
            with atomic_path(target) as temporary:
                picture = Image.fromarray(recipe.version(pixels, name, *version))
                picture.save(temporary, quality=JPEG_QUALITY)  # of no effect on PNG

    return for_each(write_versions, paths, workers, "all corruptions", ended)


def cifar10_label(name: str, folder: Path) -> int:
    """CIFAR-10's number of the class whose sub-folder of ``folder`` an image lies in.

    Raises:
        ValueError: if it lies in no such folder.
    """
    first = name.partition("/")[0]
    if first not in CIFAR10_CLASSES:
        raise ValueError(
            f"{folder / first}: --layout npy takes folders of CIFAR-10's classes "
            f"({', '.join(CIFAR10_CLASSES)}) and nothing else; use --layout folder"
        )
    return CIFAR10_CLASSES.index(first)


def read_equal(paths: dict[str, Path], recipe: Recipe, skipped: Skipped) -> dict[str, np.ndarray]:
    """The images that can be read: each ``(H, W, 3)`` uint8 RGB, of one size.

    Raises:
        ValueError: if their sizes differ, or none can be read.
    """
    images: dict[str, np.ndarray] = {}
    for name, image in load_images(paths, skipped):
        images[name] = pixels = recipe.pixels(image)
        first = next(iter(images))
        if pixels.shape != images[first].shape:
            height, width, _ = pixels.shape
            raise ValueError(
                f"{paths[name]}: {width} x {height} pixels, unlike {paths[first]}; "
                "--layout npy needs equal sizes, which --image-size makes"
            )
    return images


def write_array(
    target: Path,
    images: dict[str, np.ndarray],
    severities: Sequence[int],
    recipe: Recipe,
    workers: int,
) -> None:
    """Write one file of CIFAR-10-C's layout, named by its corruption, unless it is there."""
    if target.exists():
        return
    versions = list(product(severities, images))
    shape = (len(versions), *next(iter(images.values())).shape)
    with atomic_path(target) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)

        def fill(row: int) -> None:
            severity, name = versions[row]
            array[row] = recipe.version(images[name], name, target.stem, severity)

        for_each(fill, range(len(versions)), workers, target.stem)
        array.flush()


def write_labels(target: Path, labels: np.ndarray) -> None:
    """Write the labels, unless they are there: the file's date tells users of another set."""
    if not target.exists() or not np.array_equal(read_array(target), labels):
        with atomic_path(target) as temporary:
            np.save(temporary, labels)
