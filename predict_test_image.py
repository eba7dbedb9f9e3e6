"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture.
"""

import sys
import time
from typing import Any

from apm import load_model
from apm.data.images import Skipped, image_names, load_image, load_images
from apm.drawing import save_islands
from apm.islands import METHODS, island_colours
from apm.predictor import crop_report, perceive
from apm.runtime.cli import OUTPUTS, Results, command, make_parser
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import ROOT, prepare_output


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--device", "--dtype", "--seed", "--chunk-size"),
        "--limit",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "predict_test_image",
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="tsne", help="how islands are coloured")
    add("--save-features", action="store_true", help="also write all arrays as .npz")
    args = parser.parse_args(argv)
    device = select_device(args.device)
    paths = image_names(args.input, args.limit)
    if len(paths) == 1:
        load_image(*paths.values())  # refused before anything is made
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)
    rows, skipped = [], Skipped()
    for name, image in load_images(paths, skipped):
        started = time.perf_counter()
        percept = perceive(model, image, chunk_size=args.chunk_size, dtype=args.dtype)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"image": str(paths[name]), "query_seconds": seconds}
        islands = island_colours(percept.features, args.method, args.seed)
        figure = output / f"{name}_islands.png"
        rows.append(row | save_islands(figure, percept, islands, arrays=args.save_features))
    results.save(output, images=rows, skipped=skipped)
    if line := crop_report({row["image"]: row["left_out"] for row in rows}):
        print(line)
    print(figure if len(paths) == 1 else f"{output}: {len(rows)} images, {len(skipped)} skipped")


if __name__ == "__main__":
    sys.exit(main())
