"""Draw the architecture figure: fold, unfold, answer; the teacher beside it.

Everything in it that looks like data is the bundled checkpoint's on a bundled photograph.
"""

import sys
from argparse import Namespace
from pathlib import Path

from apm.flags import OUTPUTS, ROOT, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--seed"),
        example="misc_scripts/bundled/draw_architecture.py --input assets/coffee.jpg",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "draw_architecture",
    )
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import torch
from architecture_figure import architecture
from matplotlib.figure import Figure
from PIL import Image

from apm import load_model
from apm.data.images import load_image
from apm.islands import island_colours
from apm.predictor import perceive
from apm.runtime.files import atomic_path, prepare_output


def save_small(path: Path, figure: Figure) -> None:
    """A PNG of 256 colours: a third of the size."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
        picture = Image.open(temporary).convert("RGB").quantize(256, kmeans=5)
        picture.save(temporary, optimize=True)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    image = load_image(args.input)
    model = load_model(args.checkpoint)
    if not model.config.local_size:
        raise ValueError(f"{args.checkpoint}: sees no local patches, which the figure shows")
    output = prepare_output(args.output)
    results = Results(args, torch.device("cpu"))
    percept = perceive(model, image)
    islands = island_colours(percept.features, seed=args.seed)
    column = model.encode(model.preprocessing(image)[None])[0].detach()
    rows = column.unflatten(0, (model.config.grid_size, -1)).mean(dim=1)  # one number a row
    path = output / "architecture.png"
    save_small(path, architecture(model, percept, rows.numpy(), islands))
    results.save(output, figure=path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
