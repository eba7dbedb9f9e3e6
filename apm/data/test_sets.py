"""Test sets of labelled images, by torchvision's own loaders and layouts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from tqdm import tqdm

from apm.choices import ALL, CORRUPTIONS, SEVERITIES, TORCHVISION
from apm.data.class_names import CIFAR10_CLASSES, EUROSAT_CLASSES, readable
from apm.data.images import Skipped, UnreadableImage, find_classes, load_batches, load_image
from apm.runtime.files import dated_sha256, read_array


class FolderImages(list[tuple[Path, int]]):
    """Images in one folder a class; labels are in the order of the folders' names."""

    def __init__(self, root: Path) -> None:
        found = find_classes(root)
        self.classes = list(found)
        super().__init__((path, at) for at, paths in enumerate(found.values()) for path in paths)


def _eurosat(root: Path, download: bool) -> FolderImages:
    if download:
        datasets.EuroSAT(root, download=True)
    return FolderImages(root / "eurosat" / "2750")  # torchvision takes hidden folders for classes


@dataclass(frozen=True)
class LabelledImages(Dataset):
    """A test set: pairs of an RGB image and its label.

    Attributes:
        images: pairs of an image (of Pillow, a path, or ``(H, W, 3)`` uint8) and a label.
        class_names: what the labels count, as a sentence would have it.
        files_sha256: changes with the names, sizes and dates of the set's files.
        versions: of each photograph: the set holds all photographs, all again in the next version.
        prepare: what is made of each RGB image, if anything.
    """

    name: str
    images: Any
    class_names: tuple[str, ...]
    files_sha256: str
    versions: int = 1
    prepare: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def photograph(self, index: int) -> int:
        """Which photograph an image shows."""
        return index % (len(self) // self.versions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One pair, or ``UnreadableImage``."""
        try:
            image, label = self.images[index]
            if isinstance(image, Path):
                image = load_image(image)
            elif isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            image = image.convert("RGB")
        except (UnreadableImage, MemoryError):
            raise
        except Exception as error:  # decoders raise many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"{self.name}, image {index}", reason) from error
        return self.prepare(image) if self.prepare else image, int(label)


def load_dataset(
    name: str, root: Path, *, download: bool = False, corruption: str = ALL, severity: int = 5
) -> LabelledImages:
    """A test set by its name, one of ``choices.DATASETS``.

    ``root`` has torchvision's layout; for ``imagefolder`` one folder a class, named as the class or
    by its WordNet id; for ``cifar10c`` the published files, of which ``corruption`` is one or
    ``"all"`` of the 15, and ``severity`` 1..5. ``download`` lets torchvision fetch what is missing.
    """
    if name == "cifar10c":
        return _cifar10c(root, corruption, severity)
    folder, loader, split = TORCHVISION.get(name, ("", "", {}))
    images: Any
    try:
        if name == "imagefolder":
            images = FolderImages(root)
        elif name == "eurosat":
            images = _eurosat(root, download)
        else:
            images = getattr(datasets, loader)(root, download=download, **split)
    except (RuntimeError, OSError, ValueError) as error:  # of torchvision's loaders
        hint = "" if download or name == "imagefolder" else ", or --download"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{root}: no {name} there ({reason}); see --data-root{hint}") from error
    files: Iterable[Path] = (root / folder).rglob("*")
    if name == "imagefolder":
        files = [path for path, _ in images]
    names = images.categories if name == "caltech101" else images.classes
    class_names = EUROSAT_CLASSES if name == "eurosat" else tuple(map(readable, names))
    return LabelledImages(name, images, class_names, _identity(files, root))


def _cifar10c(root: Path, corruption: str, severity: int) -> LabelledImages:
    """CIFAR-10-C at one severity: a fifth of the rows of each corruption's file."""
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} must be in 1..5")
    files = [root / f"{part}.npy" for part in (CORRUPTIONS if corruption == ALL else [corruption])]
    labels = read_array(root / "labels.npy")
    pairs: list[tuple[np.ndarray, int]] = []
    for file in files:
        images = read_array(file, mmap_mode="r")
        sound = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
        sound &= labels.shape == images.shape[:1] and len(labels) % 5 == 0
        if not sound or not np.isin(labels, range(len(CIFAR10_CLASSES))).all():
            raise ValueError(
                f"{file} is {images.dtype} {images.shape} with labels {labels.shape}, expected "
                "five severities of uint8 (N, H, W, 3) and labels 0 to 9"
            )
        rows = (np.split(array, 5)[severity - 1] for array in (images, labels))
        pairs.extend(zip(*rows, strict=True))
    identity = _identity([root / "labels.npy", *files], root)
    name = f"cifar10c-{corruption}-{severity}"
    return LabelledImages(name, pairs, CIFAR10_CLASSES, identity, versions=len(files))


def _identity(files: Iterable[Path], root: Path) -> str:
    files = (file for file in files if not file.is_dir())
    return dated_sha256({file.relative_to(root).as_posix(): file for file in files})


def read_batches(
    data: LabelledImages,
    prepare: Callable[[Image.Image], Tensor],
    indices: Sequence[int],
    batch_size: int,
    skipped: Skipped,
    workers: int = 0,
    title: str | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Images of a test set, prepared to ``(3, h, w)``, in batches, with a progress bar.

    Yields, of what can be read of a batch: indices, images ``(B, 3, h, w)`` and labels ``(B,)``.
    """
    batches = [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)]
    reader = load_batches(replace(data, prepare=prepare), batches, workers, skipped)
    with tqdm(total=len(indices), desc=title, unit="image", disable=not indices) as progress:
        for batch, (found, items) in zip(batches, reader, strict=True):
            if found:
                yield found, *items
            progress.update(len(batch))
