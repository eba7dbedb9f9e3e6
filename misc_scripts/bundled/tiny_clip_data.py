"""A training set and its test set for the bundled CLIP."""

from pathlib import Path

from torchvision import datasets

from apm.data.test_sets import LabelledImages, load_dataset


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
