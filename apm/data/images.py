"""Image files: finding, reading and naming them, and what becomes of those that cannot be read."""

import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from apm.preprocessing import Preprocessing, to_pixels

IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
)


class UnreadableImage(ValueError):
    """An image that cannot be read. Its text is one line: the path and why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # both, for pickle

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class Skipped(dict[str, str]):
    """Images that were left out because they cannot be read: path -> the whole reason."""

    def add(self, error: UnreadableImage) -> None:
        """Report and keep one."""
        self[error.args[0]] = str(error)
        tqdm.write(f"skipped {error}", file=sys.stderr)

    def refuse_all(self, count: int) -> None:
        """Say that there was nothing to do.

        Raises:
            ValueError: if all of ``count`` images were skipped.
        """
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
    path = Path(path)
    if not os.path.lexists(path):
        raise UnreadableImage(path, "no such file")
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("a folder" if path.is_dir() else "a broken link or no regular file")
        with warnings.catch_warnings():
            # Large photographs are welcome; twice the size raises DecompressionBombError. Damaged
            # EXIF data is no reason to complain of a picture.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # decoders raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(path, f"cannot be read as an image ({reason})") from error


def load_labels(path: str | Path) -> Image.Image:
    """Read a label image, whose pixel values (or palette indices) are class ids.

    Raises:
        UnreadableImage: if the file cannot be read as an image with one channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if len(image.getbands()) != 1:
                raise ValueError(f"mode {image.mode}, expected one channel of class ids")
            return image.convert("I") if image.mode.startswith("I") else image
    except Exception as error:  # as in load_image
        raise UnreadableImage(path, f"cannot be read as a mask ({error})") from error


def load_images(paths: Mapping[str, Path], skipped: Skipped) -> Iterator[tuple[str, Image.Image]]:
    """Read named images one by one, with a progress bar; skip those that cannot be read.

    Raises:
        ValueError: at the end, if none could be read; for a single file at once.
    """
    for name, path in tqdm(paths.items(), unit="image", disable=len(paths) == 1):
        try:
            yield name, load_image(path)
        except UnreadableImage as error:
            if len(paths) == 1:
                raise
            skipped.add(error)
    skipped.refuse_all(len(paths))


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, np.float32), nan=0)
        scale = 255 / _white(image.mode, file_format, values)
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _white(mode: str, file_format: str | None, values: np.ndarray) -> float:
    """The value of white in an image with one channel of more than 8 bits.

    Where mode and format do not say it, it is guessed from all but the brightest thousandth of the
    pixels. The bounds lie between the ranges, so that a picture that is a little brighter or darker
    than its neighbour is read alike.
    """
    if mode.startswith("I;16") or file_format == "PNG":  # PNG has no more than 16 bits
        return 65535
    brightest = np.quantile(values, 0.999)
    if mode == "F" and brightest <= 2:
        return 1
    return next((white for white in (255, 65535) if brightest <= 2 * white), 2.0**31 - 1)


def find_images(source: str | Path, limit: int | None = None) -> list[Path]:
    """The image files named by ``source``: one file, or every image below a folder, sorted.

    Hidden files and folders are left out: thumbnails, notebooks' copies, half-written files.

    Raises:
        FileNotFoundError: if ``source`` does not exist or a folder holds no image.
    """
    source = Path(source)
    if not source.is_dir():
        if not os.path.lexists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        return [source]
    paths = sorted(path for path in _walk(source) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{source}: no image in this folder")
    return paths[:limit]


def find_classes(root: Path) -> dict[str, list[Path]]:
    """The images of each class, one folder a class: folder name -> images, both sorted.

    Raises:
        FileNotFoundError: if there is no folder of classes, or a class has no image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders:
        raise FileNotFoundError(f"{root}: no folder of a class in it")
    return {folder.name: find_images(folder) for folder in folders}


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder; linked folders are followed, each real folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in seen
        ]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def image_names(source: str | Path, limit: int | None = None) -> dict[str, Path]:
    """The images named by ``source`` under names for what is made of them.

    A name is the path below the folder without suffix; where two images would share it, each keeps
    its suffix.

    Raises:
        FileNotFoundError: as ``find_images``.
    """
    source, paths = Path(source), find_images(source, limit)
    folder = source if source.is_dir() else source.parent
    whole = [path.relative_to(folder) for path in paths]
    taken = Counter(str(path.with_suffix("")) for path in whole) + Counter(map(str, whole))
    names = [path.with_suffix("") for path in whole]
    return {
        str(name if taken[str(name)] == 1 else full): path
        for name, full, path in zip(names, whole, paths, strict=True)
    }


def file_sizes(images: Mapping[str, Path]) -> dict[str, int]:
    """Each image's size in bytes, which tells it from another of its name; 0 for a broken link."""
    return {name: path.stat().st_size if path.exists() else 0 for name, path in images.items()}


class PictureDataset(Dataset):
    """Images cut and resized by ``preprocessing``: ``(3, H, W)`` uint8 RGB."""

    def __init__(self, paths: Iterable[Path], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = list(paths), preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_pixels(self.preprocessing.picture(load_image(self.paths[index])))


class Batch(NamedTuple):
    """What could be read of a batch.

    Attributes:
        rows: places in the batch of what could be read.
        items: that, stacked; None if there is nothing.
        errors: why the rest could not be read.
    """

    rows: list[int]
    items: Any
    errors: list[Exception]


def load_batches(
    dataset: Dataset, batches: Sequence[Sequence[int]], workers: int
) -> Iterable[Batch]:
    """Read batches of a data set in worker processes; an item that raises does not end them."""
    return DataLoader(
        _Caught(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]  (any sequence will do)
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=_ignore_interrupts,
    )


class _Caught(Dataset):
    """Items, or the errors that reading them raised: a worker's would come with a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def _stack(items: Sequence[Any]) -> Batch:
    rows = [row for row, item in enumerate(items) if not isinstance(item, Exception)]
    errors = [item for item in items if isinstance(item, Exception)]
    return Batch(rows, default_collate([items[row] for row in rows]) if rows else None, errors)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


class Reader:
    """The items of batches that must be whole, and how long they were waited for.

    Attributes:
        seconds: of waiting, so far.

    Raises:
        UnreadableImage: from the loop, at an image that cannot be read.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        iterator, started = iter(self.batches), time.perf_counter()
        for batch in iterator:
            self.seconds += time.perf_counter() - started
            if batch.errors:
                raise batch.errors[0]
            yield batch.items
            started = time.perf_counter()
