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
from functools import partial
from itertools import product
from pathlib import Path

from apm.choices import CORRUPTIONS, SEVERITIES
from apm.flags import OUTPUTS, make_parser, positive_int
from apm.runtime.cli import Results, answer_flags, command


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
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--seed", "--limit", "--workers"),
        required=["--input"],
        example="misc_scripts/make_corruptions.py --input photographs --corruptions fog,snow",
        output=OUTPUTS / "make_corruptions",
        workers=2,
    )
    add = partial(parser.add, "picture")
    layouts = "folder: ImageNet-C's, an image a file. npy: CIFAR-10-C's, an array a corruption"
    add("--layout", choices=("folder", "npy"), default="folder", help=layouts)
    kinds = (
        "published parameters, made for images of 32 pixels (cifar) or of 224 (imagenet) (default: "
        "as the layout)"
    )
    add("--parameters", choices=("cifar", "imagenet"), help=kinds)
    names, levels = some_of(CORRUPTIONS), some_of(SEVERITIES)
    some = "some of these, with commas between"
    add("--corruptions", type=names, default=",".join(CORRUPTIONS), help=some)
    weak = f"{some}, 1 the weakest"
    add("--severities", type=levels, default=",".join(map(str, SEVERITIES)), help=weak)
    add("--frost-textures", type=Path, help="folder of photographs of frost, which frost needs")
    side = "side in pixels of the centre square that is taken (default: images as they are)"
    add("--image-size", type=positive_int, help=side)
    args = parser.parse_args(argv)
    args.parameters = args.parameters or {"npy": "cifar", "folder": "imagenet"}[args.layout]
    if "frost" in args.corruptions and args.frost_textures is None:
        raise ValueError(
            "frost needs photographs of frost: name their folder with --frost-textures, "
            "or list --corruptions without frost"
        )
    return args


answer_flags(__name__, parse)

import numpy as np
from corruption_layouts import (
    Recipe,
    cifar10_label,
    read_equal,
    write_array,
    write_folders,
    write_labels,
)

from apm.data.class_names import CIFAR10_CLASSES
from apm.data.images import Skipped, find_images, load_image
from apm.runtime.device import select_device
from apm.runtime.files import dated_sha256, keep_settings, prepare_output


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
        settings |= {"images": len(paths), "images_sha256": dated_sha256(paths)}
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
    root, name = args.output, "cifar10c"
    if args.layout == "folder":
        root, name = root / args.corruptions[0] / str(args.severities[0]), "imagefolder"
    print(f"{args.output}: {count} images, {len(skipped)} skipped")
    if name == "imagefolder" or args.severities == [*SEVERITIES]:
        print(f"next, if in classes: evaluate_tta.py --dataset {name} --data-root {root}")


if __name__ == "__main__":
    sys.exit(main())
