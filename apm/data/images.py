"""Image files: finding, naming and reading them, and what becomes of those that cannot be read."""

import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from apm.runtime.files import LOCK

IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
)


class UnreadableImage(ValueError):
    """An image that cannot be read: its path and the reason."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class Skipped(dict[str, str]):
    """Images that were left out because they cannot be read: path -> the whole reason."""

    def add(self, error: Exception) -> None:
        """Report and keep an ``UnreadableImage``; raise any other error."""
        if not isinstance(error, UnreadableImage):
            raise error
        self[str(error.args[0])] = str(error)
        tqdm.write(f"skipped {error}", file=sys.stderr)

    def refuse_all(self, count: int) -> None:
        """Raise a ``ValueError`` if all of ``count`` images were skipped."""
        if count and len(self) == count:
            reason = next(iter(self.values()))
            raise ValueError(f"none of {count} images could be read: {reason}")


def load_image(path: str | Path) -> Image.Image:
    """Read any image file that Pillow reads as an upright 8-bit RGB image.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float images are scaled
    to 8 bits, and of an animation the first frame is taken.

    Raises:
        UnreadableImage: if there is no such file, or it is no image.
    """
    with _opened(path, "an image") as image:
        return _to_rgb(ImageOps.exif_transpose(image), image.format)


def load_labels(path: str | Path) -> Image.Image:
    """Read a label image, whose pixel values (or palette indices) are class ids.

    Raises:
        UnreadableImage: if the file cannot be read as an image with one channel.
    """
    with _opened(path, "a mask") as image:
        if len(image.getbands()) != 1:
            raise ValueError(f"mode {image.mode}, expected one channel of class ids")
        image.load()
        if not (np.asarray(image) >= 0).all():
            raise ValueError("values below 0 or none, expected class ids")
        return image.convert("I") if image.mode.startswith("I") else image


def load_images(paths: Mapping[str, Path], skipped: Skipped) -> Iterator[tuple[str, Image.Image]]:
    """Read named images one by one, with a progress bar; skip those that cannot be read.

    A single one is not skipped but raised, and where all were skipped there is an error at the end.
    """
    for name, path in tqdm(paths.items(), unit="image", disable=len(paths) == 1):
        try:
            yield name, load_image(path)
        except UnreadableImage as error:
            if len(paths) == 1:
                raise
            skipped.add(error)
    skipped.refuse_all(len(paths))


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong in the block becomes ``UnreadableImage``."""
    if not os.path.lexists(path):
        raise UnreadableImage(path, "no such file")
    try:
        if not Path(path).is_file():  # reading a pipe would wait for ever
            raise ValueError("no regular file")
        with warnings.catch_warnings():
            # Large photographs are welcome: at twice the size Pillow does not warn but refuse.
            # Damaged EXIF data does no harm.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except Exception as error:  # decoders raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(path, f"cannot be read as {kind} ({reason})") from error


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        scaled = values * (255 / _white(image.mode, file_format, values))
        image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _white(mode: str, file_format: str | None, values: np.ndarray) -> float:
    """The value of white in an image with one channel of more than 8 bits.

    Where mode and format do not say it, it is guessed from all but the brightest thousandth of the
    pixels. The bounds lie between the ranges, so that pictures of like brightness are read alike.
    """
    if mode.startswith("I;16") or file_format == "PNG":  # PNG has no more than 16 bits
        return 65535
    brightest = np.quantile(values, 0.999)
    whites = (1, 255, 65535) if mode == "F" else (255, 65535)
    return next((white for white in whites if brightest <= 2 * white), 2.0**31 - 1)


def find_images(source: str | Path, limit: int | None = None) -> list[Path]:
    """The image files named by ``source``: one file, or every image below a folder, sorted.

    Of more than ``limit`` so many are taken, spread over all. Hidden files and folders are left
    out: thumbnails, notebooks' copies, half-written files. So are folders below that a run wrote
    to, whose pictures were made of these. Linked folders are followed, each real folder once. Where
    there is no image, there is an error.
    """
    source = Path(source)
    if not source.is_dir():
        if not os.path.lexists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        return [source]
    paths: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(source, followlinks=True):
        made = LOCK in files and Path(parent) != source
        if made or (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{source}: no image in this folder")
    return [paths[index] for index in spread(len(paths), limit)]


def spread(count: int, limit: int | None, versions: int = 1) -> list[int]:
    """Indices of at most ``limit`` of ``count`` images, evenly spread, as sets are sorted by class.

    Of a set of several versions of its photographs (all in one version, then all in the next),
    photographs are spread evenly, and versions taken in turn.
    """
    chosen, photographs = min(count, limit or count), count // versions
    return [k % versions * photographs + k * photographs // chosen for k in range(chosen)]


def find_classes(root: Path) -> dict[str, list[Path]]:
    """The images of each class, one folder a class: folder name -> images, both sorted."""
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"{root}: no such folder, or no folder of a class in it")
    return {folder.name: find_images(folder) for folder in folders}


def image_names(source: str | Path, limit: int | None = None) -> dict[str, Path]:
    """The images named by ``source`` under names for what is made of them.

    A name is the path below the folder without suffix; where two images would share it, each keeps
    its suffix.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    paths = {path.relative_to(folder): path for path in find_images(source, limit)}
    taken = Counter(name for full in paths for name in (full, full.with_suffix("")))
    return {
        str(full if taken[full.with_suffix("")] > 1 else full.with_suffix("")): path
        for full, path in paths.items()
    }


def file_sizes(images: Mapping[str, Path]) -> dict[str, int]:
    """Each image's size in bytes, which tells it from another of its name; 0 for a broken link."""
    return {name: path.stat().st_size if path.exists() else 0 for name, path in images.items()}


def load_batches(
    dataset: Dataset, batches: Sequence[Sequence[int]], workers: int, skipped: Skipped | None = None
) -> Iterator[tuple[list[int], Any]]:
    """Read batches of a data set in worker processes: indices, and their items stacked.

    Images that cannot be read are raised, or left out and put into ``skipped``. Of a batch in which
    nothing is left the items are None.
    """
    loader = DataLoader(
        _Batches(dataset),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
    )
    for indices, items, errors in loader:
        for error in errors:
            if skipped is None:
                raise error
            skipped.add(error)
        yield indices, items


class _Batches(Dataset):
    """What of a batch can be read, and the errors, which would leave a worker with a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: Sequence[int]) -> tuple[list[int], Any, list[Exception]]:
        found: dict[int, Any] = {}
        errors: list[Exception] = []
        for index in batch:
            try:
                found[index] = self.dataset[index]
            except (ValueError, OSError) as error:
                errors.append(error)
        return list(found), default_collate([*found.values()]) if found else None, errors


def _ignore_interrupts(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # which are the main process's to answer
        signal.signal(number, signal.SIG_IGN)
