"""Test sets of labelled images, by torchvision's own loaders and layouts."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets

from apm.corruptions import PARAMETERS
from apm.data.images import load_image
from apm.runtime.files import dated_sha256, read_array
from apm.teachers import imagenet_index, imagenet_names


class Images(Protocol):
    """Pairs of a PIL image and a class index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


# Name -> folder of its files below the root, and builder(root, download) of the split on which
# accuracies are reported; of the whole set where torchvision has no split (Caltech101, SUN397,
# EuroSAT).
TORCHVISION: dict[str, tuple[str, Callable[[Path, bool], Any]]] = {
    "cifar10": (
        "cifar-10-batches-py",
        lambda root, download: datasets.CIFAR10(root, train=False, download=download),
    ),
    "cifar100": (
        "cifar-100-python",
        lambda root, download: datasets.CIFAR100(root, train=False, download=download),
    ),
    "flowers102": (
        "flowers-102",
        lambda root, download: datasets.Flowers102(root, "test", download=download),
    ),
    "dtd": ("dtd", lambda root, download: datasets.DTD(root, "test", download=download)),
    "oxford_pets": (
        "oxford-iiit-pet",
        lambda root, download: datasets.OxfordIIITPet(root, "test", download=download),
    ),
    "caltech101": (
        "caltech101",
        lambda root, download: datasets.Caltech101(root, download=download),
    ),
    "food101": (
        "food-101",
        lambda root, download: datasets.Food101(root, "test", download=download),
    ),
    "sun397": ("SUN397", lambda root, download: datasets.SUN397(root, download=download)),
    "fgvc_aircraft": (
        "fgvc-aircraft-2013b",
        lambda root, download: datasets.FGVCAircraft(root, "test", download=download),
    ),
    "eurosat": ("eurosat", lambda root, download: datasets.EuroSAT(root, download=download)),
    "imagefolder": ("", lambda root, download: datasets.ImageFolder(root, loader=load_image)),
}
CIFAR10C = "cifar10c"
DATASETS = (*TORCHVISION, CIFAR10C)
ALL = "all"

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
EUROSAT_CLASSES = (
    "annual crop land",
    "forest",
    "herbaceous vegetation land",
    "highway or road",
    "industrial buildings",
    "pasture land",
    "permanent crop land",
    "residential buildings",
    "river",
    "sea or lake",
)


@dataclass(frozen=True)
class LabelledImages:
    """A test set.

    Attributes:
        name: what it is, for tables and caches.
        images: images with their labels.
        class_names: in the order of the indices, as a sentence would have them.
        files_sha256: changes with its files, by their names, sizes and dates.
    """

    name: str
    images: Images
    class_names: tuple[str, ...]
    files_sha256: str


def load_dataset(
    name: str,
    root: Path,
    *,
    download: bool = False,
    corruption: str = ALL,
    severity: int = 5,
) -> LabelledImages:
    """A test set by its name.

    Args:
        root: folder in torchvision's layout; for ``imagefolder`` one folder a class, named as the
            class or by its WordNet id; for ``cifar10c`` the published ``.npy`` files.
        download: let torchvision fetch what is missing.
        corruption: of CIFAR-10-C, or ``"all"`` of its 15, one after the other.
        severity: of CIFAR-10-C, 1..5.

    Raises:
        ValueError: if the data are not there or not in the expected layout.
    """
    if name == CIFAR10C:
        chosen = tuple(PARAMETERS) if corruption == ALL else (corruption,)
        parts = [CorruptedCIFAR10(root, part, severity) for part in chosen]
        corrupted: Any = ConcatDataset(parts)
        files = [root / "labels.npy", *(root / f"{part}.npy" for part in chosen)]
        title = f"{name}-{corruption}-{severity}"
        return LabelledImages(title, corrupted, CIFAR10_CLASSES, _identity(files, root))
    folder, build = TORCHVISION[name]
    try:
        images = build(root, download)
    except (RuntimeError, OSError) as error:
        hint = "" if download or name == "imagefolder" else ", or --download"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{root}: no {name} there ({reason}); see --data-root{hint}") from error
    if name == "imagefolder":
        files = [Path(path) for path, _ in images.samples]
    else:
        files = [path for path in (root / folder).rglob("*") if path.is_file()]
    names = images.categories if name == "caltech101" else images.classes
    class_names = EUROSAT_CLASSES if name == "eurosat" else tuple(map(readable, names))
    return LabelledImages(name, images, class_names, _identity(files, root))


def _identity(files: Iterable[Path], root: Path) -> str:
    return dated_sha256({file.relative_to(root).as_posix(): file for file in files})


def load_splits(root: Path, *, download: bool = False) -> tuple[LabelledImages, LabelledImages]:
    """A training set and its test set: folders ``train`` and ``test``, or torchvision's CIFAR-10.

    Args:
        root: with ``train`` and ``test``, one folder a class in each; else CIFAR-10's folder.
        download: let torchvision fetch CIFAR-10.

    Raises:
        ValueError: if the data are not there, or the two sets differ in their classes.
    """
    if not (root / "train").is_dir():
        test = load_dataset("cifar10", root, download=download)
        images = datasets.CIFAR10(root, train=True)
        return LabelledImages("cifar10", images, test.class_names, test.files_sha256), test
    train, test = (load_dataset("imagefolder", root / split) for split in ("train", "test"))
    if train.class_names != test.class_names:
        raise ValueError(f"{root}: train and test have different classes")
    return train, test


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most ``limit`` of ``count`` images, evenly spread: sets are sorted by class."""
    chosen = min(count, limit or count)
    return [index * count // chosen for index in range(chosen)]


def readable(class_name: str) -> str:
    """A class name as a sentence would have it: no underscores, no WordNet ids."""
    info = _imagenet()
    if class_name in info.label_names():
        class_name = imagenet_names()[imagenet_index(class_name)]
    return class_name.strip("/").replace("/", " ").replace("_", " ").lower()


_imagenet = functools.cache(timm.data.ImageNetInfo)


class CorruptedCIFAR10(Dataset):
    """One corruption of CIFAR-10-C at one severity: 10,000 rows of its ``.npy`` file."""

    def __init__(self, root: Path, corruption: str, severity: int) -> None:
        if not 1 <= severity <= 5:
            raise ValueError(f"severity {severity} must be in 1..5")
        try:
            images = read_array(root / f"{corruption}.npy", mmap_mode="r")
            labels = read_array(root / "labels.npy")
        except ValueError as error:
            raise ValueError(f"{root}: no CIFAR-10-C with {corruption} there ({error})") from error
        sound = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
        sound &= labels.shape == images.shape[:1] and len(labels) % 5 == 0
        if not sound or not np.isin(labels, range(len(CIFAR10_CLASSES))).all():
            raise ValueError(
                f"{root}: {corruption}.npy is {images.dtype} {images.shape} with labels "
                f"{labels.shape}, expected five severities of uint8 (N, H, W, 3) and labels 0 to 9"
            )
        count = len(images) // 5
        rows = slice((severity - 1) * count, severity * count)
        self.images, self.labels = images[rows], labels[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])
