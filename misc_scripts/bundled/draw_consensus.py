"""Draw the README's figure of consensus: islands after some steps, in one palette."""

import sys
from argparse import Namespace
from pathlib import Path

from apm.flags import OUTPUTS, ROOT, make_parser
from apm.runtime.cli import answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--grid", "--device", "--seed"),
        example="misc_scripts/bundled/draw_consensus.py --input photo.jpg",
        input=ROOT / "assets" / "coffee.jpg",
        output=OUTPUTS / "consensus",
        grid=128,
    )
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import numpy as np
from tqdm import tqdm

from apm import load_model
from apm.data.images import load_image
from apm.drawing import panels, save_picture, shape_of
from apm.islands import Palette
from apm.predictor import perceive
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import prepare_output

STEPS = (0, 1, 3)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    image = load_image(args.input)
    model = load_model(args.checkpoint, device)
    output: Path = prepare_output(args.output)
    seed_everything(args.seed)
    few, grids = (
        [
            perceive(model, image, grid=grid, fit="stretch", consensus=n)
            for n in tqdm(STEPS, "answers")
        ]
        for grid in (None, args.grid)
    )
    palette = Palette(np.stack([percept.features for percept in few]), seed=args.seed)
    row = {"input": grids[0].picture}
    for steps, percept in zip(STEPS, grids, strict=True):
        row[f"{steps} step{'s' * (steps != 1)} of consensus"] = palette(percept.features)
    save_picture(output / "consensus.png", panels([row], shape_of(grids[0].picture)))
    print(output / "consensus.png")


if __name__ == "__main__":
    sys.exit(main())
