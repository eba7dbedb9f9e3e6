"""Test sets of labelled images, by torchvision's own loaders and layouts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

# Name -> builder(root, download) of the split on which accuracies are reported.
TORCHVISION: dict[str, Callable[[Path, bool], Dataset]] = {
    "cifar10": lambda root, download: datasets.CIFAR10(root, train=False, download=download),
    "cifar100": lambda root, download: datasets.CIFAR100(root, train=False, download=download),
    "flowers102": lambda root, download: datasets.Flowers102(root, "test", download=download),
    "dtd": lambda root, download: datasets.DTD(root, "test", download=download),
    "oxford_pets": lambda root, download: datasets.OxfordIIITPet(root, "test", download=download),
    "caltech101": lambda root, download: datasets.Caltech101(root, download=download),
    "food101": lambda root, download: datasets.Food101(root, "test", download=download),
    "sun397": lambda root, download: datasets.SUN397(root, download=download),
    "fgvc_aircraft": lambda root, download: datasets.FGVCAircraft(root, "test", download=download),
    "eurosat": lambda root, download: datasets.EuroSAT(root, download=download),
    "imagefolder": lambda root, download: datasets.ImageFolder(root),
}
CIFAR10C = "cifar10c"
DATASETS = (*TORCHVISION, CIFAR10C)

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
        images: items are pairs of a PIL image and a class index.
        class_names: in the order of the indices, as a sentence would have them.
    """

    name: str
    images: Dataset
    class_names: tuple[str, ...]


def load_dataset(
    name: str,
    root: Path,
    *,
    download: bool = False,
    corruption: str = "gaussian_noise",
    severity: int = 5,
) -> LabelledImages:
    """A test set by its name.

    Args:
        root: folder in torchvision's layout; for ``imagefolder`` one folder a class, named as the
            class or by its WordNet id; for ``cifar10c`` the published ``.npy`` files.
        download: let torchvision fetch what is missing.
        corruption: of CIFAR-10-C.
        severity: of CIFAR-10-C, 1..5.

    Raises:
        ValueError: if the data are not there or not in the expected layout.
    """
    if name == CIFAR10C:
        images = CorruptedCIFAR10(root, corruption, severity)
        return LabelledImages(f"{name}-{corruption}-{severity}", images, CIFAR10_CLASSES)
    try:
        images = TORCHVISION[name](root, download)
    except (RuntimeError, OSError) as error:
        hint = "" if download or name == "imagefolder" else ", or --download"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{root}: no {name} there ({reason}); see --data-root{hint}") from error
    if name == "eurosat":
        return LabelledImages(name, images, EUROSAT_CLASSES)
    names = images.categories if name == "caltech101" else images.classes
    return LabelledImages(name, images, tuple(map(readable, names)))


def readable(class_name: str) -> str:
    """A class name as a sentence would have it: no underscores, no WordNet ids."""
    info = _imagenet()
    if class_name in info.label_names():
        class_name = info.label_name_to_description(class_name).split(",")[0]
    return class_name.strip("/").replace("/", " ").replace("_", " ").lower()


_imagenet = functools.cache(timm.data.ImageNetInfo)


class CorruptedCIFAR10(Dataset):
    """One corruption of CIFAR-10-C at one severity: 10,000 rows of its ``.npy`` file."""

    def __init__(self, root: Path, corruption: str, severity: int) -> None:
        if not 1 <= severity <= 5:
            raise ValueError(f"severity {severity} must be in 1..5")
        try:
            images = np.load(root / f"{corruption}.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(root / "labels.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{root}: no CIFAR-10-C with {corruption} there ({error})") from error
        if images.ndim != 4 or len(images) != len(labels) or len(images) % 5:
            raise ValueError(
                f"{root}: {corruption}.npy is {images.shape} with {len(labels)} labels, "
                "expected five severities of (N, H, W, 3)"
            )
        count = len(images) // 5
        rows = slice((severity - 1) * count, severity * count)
        self.images, self.labels = images[rows], labels[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])
