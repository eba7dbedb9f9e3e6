"""Names of classes, and the sentences about them for teachers that read."""

import difflib
import functools
from collections import Counter
from pathlib import Path

import timm.data

from apm.runtime.files import ROOT

SINGLE = ("a photo of a {}",)  # the released script's
CLIP80 = ROOT / "single_token_segmentation" / "clip80.txt"
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
EUROSAT_CLASSES = (
    *("annual crop land", "forest", "herbaceous vegetation land", "highway or road"),
    *("industrial buildings", "pasture land", "permanent crop land", "residential buildings"),
    *("river", "sea or lake"),
)
_imagenet = functools.cache(timm.data.ImageNetInfo)


def load_templates(choice: str) -> tuple[str, ...]:
    """Templates with ``{}`` where the class name goes.

    ``choice``: ``"single"``, ``"clip80"`` (CLIP's 80 for ImageNet, behind the paper's accuracies),
    or a text file with one template a line.
    """
    if choice == "single":
        return SINGLE
    path = CLIP80 if choice == "clip80" else Path(choice)
    if not path.is_file():
        raise FileNotFoundError(f"--templates {path}: no such file of templates; or single, clip80")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text ({error})") from error
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise ValueError(f"{path}: {template[:80]!r} is no template with exactly one {{}}")
    return templates


def readable(class_name: str) -> str:
    """A class name as a sentence would have it: no underscores, no WordNet ids."""
    if class_name in _imagenet().label_names():
        class_name = imagenet_names()[imagenet_index(class_name)]
    return class_name.strip("/").replace("/", " ").replace("_", " ").lower()


@functools.cache
def _imagenet_synonyms() -> list[list[str]]:
    info = _imagenet()
    return [info.index_to_description(i).lower().split(", ") for i in range(info.num_classes())]


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """A name for each class of ImageNet-1k, no two alike."""
    synonyms = _imagenet_synonyms()
    first = Counter(names[0] for names in synonyms)
    chosen = [
        names[0] if first[names[0]] == 1 else next((n for n in names if n not in first), names[0])
        for names in synonyms
    ]
    chosen[134], chosen[517] = "crane bird", "construction crane"  # "crane" both, and nothing else
    return tuple(chosen)


@functools.cache
def _imagenet_indices() -> dict[str, int]:
    indices = dict[str, int]()
    for index, synonyms in reversed(list(enumerate(_imagenet_synonyms()))):
        indices |= dict.fromkeys(synonyms, index)  # of two classes with one synonym the first one's
    indices |= {name: index for index, name in enumerate(imagenet_names())}
    return indices | {label: index for index, label in enumerate(_imagenet().label_names())}


def imagenet_index(name: str) -> int:
    """The index of an ImageNet-1k class, by its name, one of its synonyms or its WordNet id."""
    indices, key = _imagenet_indices(), name.lower().replace("_", " ")
    if key not in indices:
        near = difflib.get_close_matches(key, indices, n=3)
        raise ValueError(f"{name!r} is no class of ImageNet-1k (near: {', '.join(near) or 'none'})")
    return indices[key]
