"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

from apm import APM, load_model
from apm.cli import OUTPUTS, ROOT, Results, command, make_parser, seed_everything, select_device
from apm.data import image_names, load_image, load_images
from apm.files import atomic_path, prepare_output
from apm.islands import METHODS, island_colours
from apm.percept import Percept, perceive
from apm.pictures import overlay, panels, save_picture


def draw(percept: Percept, islands: np.ndarray, path: Path) -> None:
    """Write one picture's figure."""
    pictures = {
        "input": percept.picture,
        "RGB reconstruction": percept.rgb,
        "islands of agreement": islands,
        "islands over input": overlay(percept.picture, islands),
    }
    save_picture(path, panels([pictures]))


def predict(
    model: APM, image: Image.Image, target: Path, args: Namespace
) -> dict[str, float | str]:
    """One picture's figure, and the seconds of each part."""
    started = time.perf_counter()
    percept = perceive(model, image, chunk_size=args.chunk_size, dtype=args.dtype)
    answered = time.perf_counter()
    islands = island_colours(percept.features, args.method, args.seed)
    coloured = time.perf_counter()
    draw(percept, islands, target)
    if args.save_features:
        with atomic_path(target.with_suffix(".npz")) as temporary:
            np.savez(temporary, features=percept.features, rgb=percept.rgb, islands=islands)
    return {
        "figure": str(target),
        "query_seconds": answered - started,
        "islands_seconds": coloured - answered,
        "figure_seconds": time.perf_counter() - coloured,
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--device", "--dtype", "--seed", "--chunk-size"),
        "--limit",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "predict_test_image",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="tsne", help="how islands are coloured"
    )
    parser.add_argument(
        "--save-features", action="store_true", help="also write features, RGB and islands as .npz"
    )
    args = parser.parse_args(argv)
    device = select_device(args.device)
    paths = image_names(args.input, args.limit)
    if len(paths) == 1:
        load_image(*paths.values())  # a bad file is refused before anything is made
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    skipped: dict[str, str] = {}
    images = [
        {"image": str(paths[name])} | predict(model, image, output / f"{name}_islands.png", args)
        for name, image in load_images(paths, skipped)
    ]
    results.save(output, images=images, skipped=skipped)
    if len(paths) == 1:
        print(images[0]["figure"])
    else:
        print(f"{output}: {len(images)} images, {len(skipped)} skipped")


if __name__ == "__main__":
    sys.exit(main())
