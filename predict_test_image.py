"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture.
"""

import sys
from functools import partial

from apm import load_model
from apm.data.images import Skipped, image_names, load_image
from apm.drawing import draw_islands, islands_report
from apm.islands import METHODS, island_colours
from apm.predictor import perceive
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
    skipped = Skipped()
    images = draw_islands(
        paths,
        skipped,
        partial(perceive, model, chunk_size=args.chunk_size, dtype=args.dtype),
        partial(island_colours, method=args.method, seed=args.seed),
        output,
        save_features=args.save_features,
    )
    results.save(output, images=images, skipped=skipped)
    print(islands_report(images, skipped, output))


if __name__ == "__main__":
    sys.exit(main())
