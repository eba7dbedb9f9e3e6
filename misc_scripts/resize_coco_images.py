"""Resize the shorter side of every image of a folder to 448 px and cut the centre to a square.

The first step of training: the features that 1_extract_coco_features.py makes and the images that
train.py reads are both of these squares. Sub-folders are kept; what is already there is skipped.
"""

import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from apm.data.images import image_names, load_image
from apm.preprocessing import Preprocessing
from apm.runtime.cli import OUTPUTS, Results, command, make_parser, positive_int, select_device
from apm.runtime.files import atomic_path, prepare_output


def resize(item: tuple[str, Path], preprocessing: Preprocessing, output: Path) -> dict[str, str]:
    """Write one resized image; return path and reason if the image cannot be read.

    Raises:
        ValueError: if it is there in another size.
    """
    name, path = item
    target, side = output / f"{name}.jpg", preprocessing.image_size
    if target.exists():
        with Image.open(target) as present:
            if present.size != (side, side):
                raise ValueError(
                    f"{target}: {present.width} x {present.height} pixels, not {side} x {side}; "
                    "choose another --output"
                )
        return {}
    try:
        picture = preprocessing.picture(load_image(path))
    except (ValueError, FileNotFoundError) as error:
        return {str(path): str(error)}
    with atomic_path(target) as temporary:
        picture.save(temporary, quality=95)
    return {}


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
    results = Results(args, select_device("cpu"))
    skipped: dict[str, str] = {}
    with ThreadPool(max(args.workers, 1)) as pool:
        done = pool.imap_unordered(work, items.items(), 16)
        for unreadable in tqdm(done, total=len(items), unit="image"):
            skipped |= unreadable
    if len(skipped) == len(items):
        raise ValueError(next(iter(skipped.values())))
    for reason in skipped.values():
        print(f"skipped {reason}", file=sys.stderr)
    results.save(output, images=len(items) - len(skipped), skipped=skipped)
    print(f"{len(items) - len(skipped)} images in {output}, {len(skipped)} skipped")


if __name__ == "__main__":
    sys.exit(main())
