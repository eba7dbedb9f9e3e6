"""Resize the shorter side of every image of a folder to 448 px and cut the centre to a square.

The first step of training: the features that 1_extract_coco_features.py makes and the images that
train.py reads are both of these squares. Sub-folders are kept; what is already there is skipped.
"""

import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from apm.cli import OUTPUTS, command, make_parser, positive_int
from apm.data import image_names, load_image
from apm.files import atomic_path, prepare_output
from apm.preprocessing import Preprocessing


def resize(item: tuple[str, Path], preprocessing: Preprocessing, output: Path) -> str | None:
    """Write one resized image; return a line about it if the image cannot be read."""
    name, path = item
    target = output / f"{name}.jpg"
    if target.exists():
        return None
    try:
        picture = preprocessing.picture(load_image(path))
    except ValueError as error:
        return str(error)
    with atomic_path(target) as temporary:
        picture.save(temporary, quality=95)
    return None


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--input", "--output", "--limit", "--workers", workers=2)
    parser.set_defaults(output=OUTPUTS / "resized")
    parser.add_argument("--image-size", type=positive_int, default=448, help="side in pixels")
    args = parser.parse_args(argv)
    if args.input is None:
        raise ValueError("--input is needed: a folder of images")
    items = image_names(args.input, args.limit)
    output = prepare_output(args.output)
    work = partial(resize, preprocessing=Preprocessing(image_size=args.image_size), output=output)
    with ThreadPool(max(args.workers, 1)) as pool:
        problems = list(
            filter(
                None,
                tqdm(pool.imap_unordered(work, items.items(), 16), total=len(items), unit="image"),
            )
        )
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    print(f"{len(items) - len(problems)} images in {output}, {len(problems)} skipped")


if __name__ == "__main__":
    sys.exit(main())
