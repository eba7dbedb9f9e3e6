"""Image files in; pairs of images and teacher features out."""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from apm.preprocessing import Preprocessing, to_pixels

if TYPE_CHECKING:
    from apm.data.features import FeatureStore, NpyStore

IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
)


def load_image(path: str | Path) -> Image.Image:
    """Read any image file that Pillow reads as an upright 8-bit RGB image.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float images are scaled
    to 8 bits, and of an animation the first frame is taken.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read as an image.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("a folder" if path.is_dir() else "a broken link or no regular file")
        with warnings.catch_warnings():
            # Large photographs are welcome; twice the size raises DecompressionBombError. Damaged
            # EXIF data is no reason to complain of a picture.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever the bytes provoke
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from error


def load_images(
    paths: Mapping[str, Path], skipped: dict[str, str]
) -> Iterator[tuple[str, Image.Image]]:
    """Read named images one by one, with a progress bar.

    A file that cannot be read is reported and added to ``skipped``, path to reason.

    Raises:
        ValueError: at the end, if none could be read; for a single file, with its own reason.
    """
    for name, path in tqdm(paths.items(), unit="image", disable=len(paths) == 1):
        try:
            image = load_image(path)
        except (ValueError, FileNotFoundError) as error:  # it may have gone since it was listed
            skipped[str(path)] = str(error)
            if len(paths) > 1:
                tqdm.write(f"skipped {error}", file=sys.stderr)
        else:
            yield name, image
    if len(skipped) == len(paths):
        reason = next(iter(skipped.values()))
        raise ValueError(
            reason if len(paths) == 1 else f"none of {len(paths)} images could be read: {reason}"
        )


def load_labels(path: str | Path) -> Image.Image:
    """Read a label image, whose pixel values (or palette indices) are class ids.

    Raises:
        ValueError: if the file cannot be read as an image with one channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if len(image.getbands()) != 1:
                raise ValueError(f"mode {image.mode}, expected one channel of class ids")
            return image.convert("I") if image.mode.startswith("I") else image
    except Exception as error:  # as in load_image
        raise ValueError(f"{path}: cannot be read as a mask ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values: np.ndarray = np.asarray(image, np.float32)
        if values.max() > 255:  # 16 bits
            values = values / 257
        elif image.mode == "F" and values.max() <= 1:
            values = values * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def find_images(source: str | Path, limit: int | None = None) -> list[Path]:
    """The image files named by ``source``: one file, or every image below a folder, sorted.

    Hidden files and folders are left out: thumbnails, and what a killed run left half-written.

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


class PictureDataset(Dataset):
    """Images for a teacher, cut and resized by ``preprocessing``.

    An item is ``(3, H, W)`` uint8 RGB and an empty string; for an image that cannot be read, black
    and the reason.
    """

    def __init__(self, paths: Iterable[Path], preprocessing: Preprocessing) -> None:
        self.paths = list(paths)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return to_pixels(self.preprocessing.picture(load_image(self.paths[index]))), ""
        except (ValueError, FileNotFoundError) as error:
            side = self.preprocessing.image_size
            return torch.zeros(3, side, side, dtype=torch.uint8), str(error)


class DistillationDataset(Dataset):
    """Images with their teacher features, cropped and flipped alike.

    An item is the image ``(3, H, W)`` uint8 RGB and its features ``(N, F)`` float16, row by row;
    without a store the features are empty, for the teacher to make from the image. With
    ``augment``, half of the pictures are cropped to a random square of at least half the side and
    resized to the full size, and half are flipped; the features are sampled at the crop's
    locations. The crop is a function of seed, ``epoch`` and index.
    """

    def __init__(
        self,
        images: Mapping[str, Path],
        preprocessing: Preprocessing,
        store: "FeatureStore | NpyStore | None" = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.names, self.paths = list(images), list(images.values())
        self.preprocessing, self.store = preprocessing, store
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.preprocessing.picture(load_image(self.paths[index]))
        features = self.store.read(self.names[index]) if self.store else torch.empty(0)
        if not self.augment:
            return to_pixels(picture), features.half()
        random = np.random.default_rng((self.seed % 2**32, self.epoch, index))
        side = min(random.uniform(0.5, 1.5), 1)  # of the crop, as a share of the picture's
        left, top = random.uniform(0, 1 - side, size=2)
        flip = random.random() < 0.5
        box = picture.width * np.array([left, top, left + side, top + side])
        image = to_pixels(picture.resize(picture.size, Image.Resampling.BILINEAR, box=tuple(box)))
        if self.store:
            features = crop_features(features, left, top, side, flip)
        return image.flip(-1) if flip else image, features.half()


def crop_features(
    features: Tensor, left: float, top: float, side: float, flip: bool = False
) -> Tensor:
    """Features of a square crop, from those of the whole picture by bilinear sampling.

    Args:
        features: ``(N, F)`` on a square grid, row by row.
        left, top, side: the crop, as shares of the picture's side.
        flip: whether the crop is mirrored, left to right.

    Returns:
        ``(N, F)``: the crop's own grid.
    """
    grid_size = round(len(features) ** 0.5)
    theta = torch.tensor(
        [
            [-side if flip else side, 0, 2 * left + side - 1],
            [0, side, 2 * top + side - 1],
        ],
        dtype=torch.float32,
    )
    grid = F.affine_grid(theta[None], [1, 1, grid_size, grid_size], align_corners=False)
    maps = features.T.reshape(1, -1, grid_size, grid_size)
    cropped = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return cropped[0].flatten(1).T
