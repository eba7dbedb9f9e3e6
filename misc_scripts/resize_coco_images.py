"""Resize the shorter side of every image of a folder to 448 px and cut the centre to a square.

The first step of training: the features that 1_extract_coco_features.py makes and the images that
train.py reads are both of these squares. Sub-folders are kept; what is already there is skipped.
"""

import sys
from argparse import Namespace
from pathlib import Path

from apm.flags import OUTPUTS, make_parser, positive_int
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--limit", "--workers"),
        required=["--input"],
        example="misc_scripts/resize_coco_images.py --input data/coco/train2017 --workers 8",
        output=OUTPUTS / "resized",
        workers=2,
    )
    help = "side of the squares in pixels"
    parser.add("picture", "--image-size", type=positive_int, default=448, help=help)
    return parser.parse_args(argv)


answer_flags(__name__, parse)

from image_threads import for_each

from apm.data.images import image_names, load_image
from apm.preprocessing import Preprocessing
from apm.runtime.device import select_device
from apm.runtime.files import atomic_path, keep_settings, prepare_output


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    images = image_names(args.input, args.limit)
    output = prepare_output(args.output)
    settings = {"image_size": args.image_size, "input": str(args.input.resolve())}
    keep_settings(output / "settings.json", settings)
    preprocessing = Preprocessing(image_size=args.image_size)
    results = Results(args, select_device("cpu"))

    def resize(image: tuple[str, Path]) -> None:
        name, path = image
        target = output / f"{name}.jpg"
        if not target.exists():
            picture = preprocessing.picture(load_image(path))
            with atomic_path(target) as temporary:
                picture.save(temporary, quality=95)

    skipped = for_each(resize, images.items(), args.workers)
    count = len(images) - len(skipped)
    results.save(output, images=count, skipped=skipped)
    hint = f"next: misc_scripts/1_extract_coco_features.py --input {output}"
    print(f"{count} images in {output}, {len(skipped)} skipped; {hint}")


if __name__ == "__main__":
    sys.exit(main())
