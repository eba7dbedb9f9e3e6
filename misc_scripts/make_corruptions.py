"""Make the 15 corruptions of ImageNet-C and CIFAR-10-C, at five severities, of a folder of images.

--layout folder is ImageNet-C's: <corruption>/<severity>/<path below --input>. JPEG files stay JPEG,
of quality 85 as in ImageNet-C; all others become PNG. --layout npy is CIFAR-10-C's: for every
corruption one <corruption>.npy, uint8 (5 N, H, W, 3) RGB, all N images at severity 1, then at 2 and
so on; labels.npy has the class of each, which is the rank of its sub-folder's name. What is already
there is skipped, so run it again after an interruption.
"""

import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from apm.corruptions import PARAMETERS, SEVERITIES, corrupt
from apm.data.images import find_images, load_image, load_images
from apm.preprocessing import Preprocessing
from apm.runtime.cli import OUTPUTS, Results, command, make_parser, positive_int, select_device
from apm.runtime.files import atomic_path, dated_sha256, prepare_output, read_array, read_json

JPEG_QUALITY = 85
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")


def corruptions(text: str) -> list[str]:
    """An argparse type: names with commas between, put in the published order."""
    names = text.split(",")
    for name in names:
        if name not in PARAMETERS:
            raise ArgumentTypeError(f"{name!r} must be one of {', '.join(PARAMETERS)}")
    return [name for name in PARAMETERS if name in names]


def severities(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between, put in order."""
    levels = {int(level) for level in text.split(",")}
    if not levels.issubset(SEVERITIES):
        raise ArgumentTypeError(f"{text} must be of {SEVERITIES[0]} to {SEVERITIES[-1]}")
    return sorted(levels)


def parse(argv: list[str] | None) -> Namespace:
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--seed", "--limit", "--workers"),
        output=OUTPUTS / "make_corruptions",
        workers=2,
    )
    add = parser.add_argument
    add("--layout", choices=("folder", "npy"), default="folder", help="how results are laid out")
    add(
        "--parameters",
        choices=("cifar", "imagenet"),
        default="imagenet",
        help="published parameters, made for images of 32 or of 224 pixels",
    )
    add("--corruptions", type=corruptions, default=",".join(PARAMETERS), help="some of these")
    add("--severities", type=severities, default="1,2,3,4,5", help="some of these")
    add("--frost-textures", type=Path, help="folder of photographs of frost, which frost needs")
    add("--image-size", type=positive_int, help="side of the centre square (default: as it is)")
    args = parser.parse_args(argv)
    if args.input is None:
        raise ValueError("--input is needed: a folder of images")
    if "frost" in args.corruptions and args.frost_textures is None:
        raise ValueError(
            "frost needs photographs of frost: name their folder with --frost-textures, "
            "or list --corruptions without frost"
        )
    return args


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
    frost_textures: list[np.ndarray]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The clean image: ``(H, W, 3)`` uint8 RGB."""
        if self.image_size is not None:
            image = Preprocessing(image_size=self.image_size).picture(image)
        return np.asarray(image)

    def version(self, pixels: np.ndarray, name: str, corruption: str, severity: int) -> np.ndarray:
        """The image corrupted: ``(H, W, 3)`` uint8 RGB, the same whatever else is made."""
        which = f"{corruption}/{severity}/{name}".encode(errors="surrogateescape")
        entropy = (self.seed % 2**32, *which)
        return corrupt(
            pixels,
            corruption,
            severity,
            np.random.default_rng(entropy),
            parameters=self.parameters,
            frost_textures=self.frost_textures,
        )


def start(args: Namespace, results: Results, **more: Any) -> None:
    """Open the output folder, unless it holds corruptions made otherwise.

    Args:
        args: the script's.
        results: where the settings are kept.
        more: settings besides the arguments; one that is None does not matter this time.

    Raises:
        ValueError: if it does, or cannot be written to.
    """
    names = ("input", "layout", "parameters", "image_size", "seed")
    settings = {name: results.content["arguments"][name] for name in names} | more
    path = args.output / "results.json"
    if path.is_file():
        former = read_json(path).get("settings")
        for name, value in settings.items():
            present = former.get(name) if isinstance(former, dict) else None
            if name in more and None in (present, value):
                settings[name] = value or present
            elif present != value:
                raise ValueError(
                    f"{args.output}: holds corruptions with {name} {present}, "
                    f"not {value}; choose another --output"
                )
    prepare_output(args.output)
    results.save(args.output, settings=settings)


def run(work: Callable[[Any], None], items: Sequence, workers: int, description: str) -> None:
    """Do the work on every item, with a progress bar."""
    with ThreadPool(max(workers, 1)) as pool:
        done = pool.imap_unordered(work, items)
        for _ in tqdm(done, desc=description, total=len(items), unit="image"):
            pass


def write_files(
    paths: dict[str, Path], args: Namespace, recipe: Recipe, skipped: dict[str, str]
) -> None:
    """Write ImageNet-C's layout.

    Args:
        paths: images by their path below the input folder.
        args: the script's.
        recipe: how versions are made.
        skipped: where files that cannot be read are added, path to reason.

    Raises:
        ValueError: if none can be read.
    """

    def write_versions(name: str) -> None:
        file = name if Path(name).suffix.lower() in KEPT_SUFFIXES else f"{name}.png"
        targets = {
            (corruption, severity): args.output / corruption / str(severity) / file
            for corruption, severity in product(args.corruptions, args.severities)
        }
        missing = {version: target for version, target in targets.items() if not target.exists()}
        if not missing:
            return
        try:
            pixels = recipe.pixels(load_image(paths[name]))
        except (ValueError, FileNotFoundError) as error:
            skipped[str(paths[name])] = str(error)
            return
        for version, target in missing.items():
            with atomic_path(target) as temporary:
                picture = Image.fromarray(recipe.version(pixels, name, *version))
                picture.save(temporary, quality=JPEG_QUALITY)  # of no effect on PNG

    run(write_versions, list(paths), args.workers, "all corruptions")
    if len(skipped) == len(paths):
        raise ValueError(next(iter(skipped.values())))
    for reason in skipped.values():
        print(f"skipped {reason}", file=sys.stderr)


def read_equal(
    paths: dict[str, Path], recipe: Recipe, skipped: dict[str, str]
) -> dict[str, np.ndarray]:
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
    corruption: str, images: dict[str, np.ndarray], args: Namespace, recipe: Recipe
) -> None:
    """Write one file of CIFAR-10-C's layout, unless it is there."""
    target = args.output / f"{corruption}.npy"
    if target.exists():
        return
    versions = list(product(args.severities, images))
    shape = (len(versions), *next(iter(images.values())).shape)
    with atomic_path(target) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)

        def fill(row: int) -> None:
            severity, name = versions[row]
            array[row] = recipe.version(images[name], name, corruption, severity)

        run(fill, range(len(versions)), args.workers, corruption)
        array.flush()


def write_labels(target: Path, labels: np.ndarray) -> None:
    """Write the labels, unless they are there: the file's date tells users of another set."""
    if not target.exists() or not np.array_equal(read_array(target), labels):
        with atomic_path(target) as temporary:
            np.save(temporary, labels)


def class_of(name: str) -> str:
    """The sub-folder of the input folder in which an image lies.

    Raises:
        ValueError: if it lies in none.
    """
    folder, separator, _ = name.partition("/")
    if not separator:
        raise ValueError(f"{name}: lies in no sub-folder, whose name --layout npy takes as class")
    return folder


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = args.input if args.input.is_dir() else args.input.parent
    everything = {path.relative_to(folder).as_posix(): path for path in find_images(args.input)}
    paths = dict(islice(everything.items(), args.limit))
    textures = find_images(args.frost_textures) if "frost" in args.corruptions else []
    recipe = Recipe(
        image_size=args.image_size,
        parameters=args.parameters,
        seed=args.seed,
        frost_textures=[np.asarray(load_image(path)) for path in textures],
    )
    frost = dated_sha256({path.name: path for path in textures}) if textures else None
    results = Results(args, select_device("cpu"))
    skipped: dict[str, str] = {}
    if args.layout == "folder":
        start(args, results, frost_textures_sha256=frost)
        write_files(paths, args, recipe, skipped)
    else:
        classes = sorted({class_of(name) for name in everything})
        images = read_equal(paths, recipe, skipped)
        start(
            args,
            results,
            severities=args.severities,
            images=len(images),
            images_sha256=dated_sha256({name: paths[name] for name in images}),
            frost_textures_sha256=frost,
        )
        labels = [classes.index(class_of(name)) for name in images]
        write_labels(args.output / "labels.npy", np.tile(labels, len(args.severities)))
        for corruption in args.corruptions:
            write_array(corruption, images, args, recipe)
        results.content["classes"] = classes
    count = len(paths) - len(skipped)
    results.save(args.output, images=count, skipped=skipped)
    print(f"{args.output}: {count} images, {len(skipped)} skipped")


if __name__ == "__main__":
    sys.exit(main())
