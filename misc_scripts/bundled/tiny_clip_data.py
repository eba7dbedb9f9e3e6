"""A training set and its test set for the bundled CLIP."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from apm.data.images import Skipped, spread
from apm.data.test_sets import LabelledImages, load_dataset, read_batches
from apm.preprocessing import to_pixels


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


def read_pixels(
    data: LabelledImages, size: int, limit: int | None, skipped: Skipped
) -> tuple[Tensor, Tensor]:
    """All images resized to a square, ``(N, 3, size, size)`` uint8 RGB, and labels ``(N,)``.

    Args:
        data: the set.
        size: side in pixels.
        limit: at most this many images, evenly spread; None for all.
        skipped: takes those that cannot be read.

    Raises:
        ValueError: if none can be read.
    """
    chosen = spread(len(data), limit)

    def prepare(image: Image.Image) -> Tensor:
        return to_pixels(image.resize((size, size)))

    batches = read_batches(data, prepare, chosen, 100, skipped, title="training images")
    parts = [(images, labels) for _, images, labels in batches]
    skipped.refuse_all(len(chosen))
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
