"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture.
"""

import sys
from functools import partial

from apm import load_model
from apm.island_figures import draw_islands, input_images, island_parser
from apm.predictor import perceive
from apm.runtime.cli import OUTPUTS, Results, command, seed_everything, select_device
from apm.runtime.files import prepare_output


@command
def main(argv: list[str] | None = None) -> None:
    parser = island_parser(
        __doc__, "--checkpoint", "--chunk-size", output=OUTPUTS / "predict_test_image"
    )
    args = parser.parse_args(argv)
    device = select_device(args.device)
    paths = input_images(args)
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)
    look = partial(perceive, model, chunk_size=args.chunk_size, dtype=args.dtype)
    draw_islands(paths, look, output, args, results)


if __name__ == "__main__":
    sys.exit(main())
