"""Make the 15 corruptions of ImageNet-C and CIFAR-10-C, at five severities, of a folder of images.

--layout folder is ImageNet-C's: <corruption>/<severity>/<path below --input>. JPEG files stay JPEG,
of quality 85 as in ImageNet-C; all others become PNG. --layout npy is CIFAR-10-C's, for a folder
with one sub-folder for each class of CIFAR-10: for every corruption one <corruption>.npy, uint8
(5 N, H, W, 3) RGB, all N images at severity 1, then at 2 and so on; labels.npy has CIFAR-10's
number of the class of each. What is there is skipped, so run it again after an interruption.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
from corruption_layouts import (
    Recipe,
    cifar10_label,
    read_equal,
    write_array,
    write_folders,
    write_labels,
)
from corruptions import FUNCTIONS, SEVERITIES

from apm.data.class_names import CIFAR10_CLASSES
from apm.data.images import Skipped, find_images, load_image
from apm.runtime.cli import FLAGS, OUTPUTS, Results, command, make_parser, positive_int
from apm.runtime.device import select_device
from apm.runtime.files import dated_sha256, keep_settings, prepare_output


def some_of(choices: Iterable[object]) -> Callable[[str], list]:
    """An argparse type: some of the choices, with commas between; put in the choices' order."""
    known = {str(choice): choice for choice in choices}

    def parse(text: str) -> list:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} must be one of {', '.join(known)}")
        return [known[name] for name in known if name in names]

    return parse


def parse(argv: list[str] | None) -> Namespace:
    output = OUTPUTS / "make_corruptions"
    flags = ("--output", "--seed", "--limit", "--workers")
    parser = make_parser(__doc__, *flags, output=output, workers=2)
    add = parser.add_argument
    add("--input", required=True, **FLAGS["--input"])
    add("--layout", choices=("folder", "npy"), default="folder", help="how results are laid out")
    kinds = "published parameters, made for images of 32 or of 224 pixels"
    add("--parameters", choices=("cifar", "imagenet"), default="imagenet", help=kinds)
    names, levels = some_of(FUNCTIONS), some_of(SEVERITIES)
    add("--corruptions", type=names, default=",".join(FUNCTIONS), help="some of these")
    add("--severities", type=levels, default="1,2,3,4,5", help="some of these")
    add("--frost-textures", type=Path, help="folder of photographs of frost, which frost needs")
    add("--image-size", type=positive_int, help="side of the centre square (default: as it is)")
    args = parser.parse_args(argv)
    if "frost" in args.corruptions and args.frost_textures is None:
        raise ValueError(
            "frost needs photographs of frost: name their folder with --frost-textures, "
            "or list --corruptions without frost"
        )
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = args.input if args.input.is_dir() else args.input.parent
    found = find_images(args.input, args.limit)
    paths = {path.relative_to(folder).as_posix(): path for path in found}
    textures = find_images(args.frost_textures) if "frost" in args.corruptions else []
    recipe = Recipe(
        image_size=args.image_size,
        parameters=args.parameters,
        seed=args.seed,
        frost_textures=[np.asarray(load_image(path)) for path in textures],
    )
    results, skipped = Results(args, select_device("cpu")), Skipped()
    kept = ("layout", "parameters", "image_size", "seed")
    settings = {name: getattr(args, name) for name in kept}
    if args.layout == "folder":
        settings["input"] = str(args.input.resolve())
    else:
        labels = {name: cifar10_label(name, folder) for name in paths}
        images = read_equal(paths, recipe, skipped)
        settings |= {"severities": args.severities, "images": len(images)}
        settings["images_sha256"] = dated_sha256({name: paths[name] for name in images})
    prepare_output(args.output)
    keep_settings(args.output / "settings.json", settings)
    if textures:
        sha256 = dated_sha256({path.name: path for path in textures})
        keep_settings(args.output / "frost.json", {"frost_textures_sha256": sha256})
    if args.layout == "folder":
        versions = list(product(args.corruptions, args.severities))
        skipped = write_folders(args.output, paths, versions, recipe, args.workers)
    else:
        present = [labels[name] for name in images]
        write_labels(args.output / "labels.npy", np.tile(present, len(args.severities)))
        for corruption in args.corruptions:
            target = args.output / f"{corruption}.npy"
            write_array(target, images, args.severities, recipe, args.workers)
        results.content["classes"] = CIFAR10_CLASSES
    count = len(paths) - len(skipped)
    results.save(args.output, images=count, skipped=skipped)
    print(f"{args.output}: {count} images, {len(skipped)} skipped")


if __name__ == "__main__":
    sys.exit(main())
