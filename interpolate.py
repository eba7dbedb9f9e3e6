"""Interpolate between two images in the space of trigger columns (paper, Figure 6).

Every in-between is made from its interpolated column alone: pixels and local patches of the two
images are not mixed, and the two ends are their columns' percepts as well. A page to explore them
in, index.html, has a slider over the frames.
"""

import sys
from argparse import Namespace
from pathlib import Path

from apm.flags import OUTPUTS, ROOT, make_parser, positive_int
from apm.runtime.cli import Results, answer_flags, command

EXAMPLES = (ROOT / "assets" / "cat.jpg", ROOT / "assets" / "astronaut.jpg")


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--output", "--device", "--dtype", "--seed", "--chunk-size", "--grid"),
        "--method",
        example="interpolate.py --input a.jpg b.jpg --steps 30",
        output=OUTPUTS / "interpolate",
        method="pca",
    )
    ends = {"nargs": 2, "metavar": ("A", "B"), "help": "the two image files"}
    parser.add("input and output", "--input", type=Path, default=EXAMPLES, **ends)
    help = "frames, both ends included: 2 or more"
    parser.add("picture", "--steps", type=positive_int, default=9, help=help)
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: expected at least 2, the two ends")
    return args


answer_flags(__name__, parse)

import numpy as np
import torch
from tqdm import tqdm

from apm import APM, load_model
from apm.data.images import load_image
from apm.drawing import enlarge, input_label, panels, save_gif, save_picture
from apm.islands import Palette, sample_landmarks
from apm.page import Page, size_caption
from apm.predictor import answer_grid, crop_report, left_out
from apm.runtime.device import precision, seed_everything, select_device
from apm.runtime.files import prepare_output

FRAME_SIDE = 320
TITLE = "RGB and islands from the column alone: no pixels, no local patches"


@torch.no_grad()
def percepts(
    model: APM,
    ends: torch.Tensor,
    steps: int,
    chunk_size: int | None,
    dtype: str,
    grid: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and RGB along the straight line between two images' columns.

    Args:
        ends: ``(2, 3, H, W)`` preprocessed images.

    Returns:
        ``(steps, h, w, F)`` and ``(steps, h, w, 3)`` in [0, 1]; first and last are the ends.
    """
    with precision(ends.device, dtype):
        first, last = model.encode(ends)
        shares = torch.linspace(0, 1, steps, device=ends.device)
        columns = torch.lerp(first.float(), last.float(), shares[:, None])  # (steps, D)
        frames = [
            answer_grid(model, column[None], grid=grid, chunk_size=chunk_size)
            for column in tqdm(columns, desc="answers", unit="frame")
        ]
    features, rgb = (np.concatenate(arrays) for arrays in zip(*frames, strict=True))
    return features, rgb


def strip(inputs: dict[str, np.ndarray], rgb: np.ndarray, islands: np.ndarray) -> np.ndarray:
    """All frames in two rows, the two input pictures at the sides."""
    (first, start), (last, end) = inputs.items()
    shares = [f"{share:.2f}" for share in np.linspace(0, 1, len(rgb))]
    rows = [
        {first: start} | dict(zip(shares, rgb, strict=True)) | {last: end},
        {"": np.full_like(start, 255)}
        | {f"islands {share}": colours for share, colours in zip(shares, islands, strict=True)},
    ]
    return panels(rows, (160, 160), TITLE)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    images = [load_image(path) for path in args.input]
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)
    said = vars(args) | {"grid": args.grid or model.config.grid_size}
    page = Page(output, "Interpolation of two trigger columns", said, joint=True)

    preprocessing = model.preprocessing
    ends = torch.stack([preprocessing(image) for image in images]).to(device)
    features, rgb = percepts(model, ends, args.steps, args.chunk_size, args.dtype, args.grid)
    # t-SNE of all places of all frames would take minutes.
    some = sample_landmarks(features, args.steps, args.seed) if args.method == "tsne" else features
    islands = Palette(some, args.method, args.seed)(features)
    frames = [
        np.hstack([enlarge(picture, (FRAME_SIDE, FRAME_SIDE)) for picture in pair])
        for pair in zip(rgb, islands, strict=True)
    ]
    for step, frame in enumerate(frames):
        save_picture(output / f"frame_{step:03}.png", frame)
    save_gif(output / "interpolation.gif", frames)

    crops = [left_out(image, preprocessing) for image in images]
    inputs = {
        input_label(name, crop): np.asarray(preprocessing.picture(image))
        for name, crop, image in zip("AB", crops, images, strict=True)
    }
    save_picture(output / "strip.png", strip(inputs, rgb, islands))
    sizes = [size_caption(image.size, crop) for image, crop in zip(images, crops, strict=True)]
    shares = [round(share, 4) for share in np.linspace(0, 1, args.steps).tolist()]
    shown_at = zip(shares, features, rgb, islands, strict=True)
    for share, places, answered, colours in tqdm(shown_at, "page", args.steps, unit="frame"):
        shown = {"reconstruction": answered, "islands": colours} | inputs
        caption = f"{TITLE}; A: {sizes[0]}; B: {sizes[1]}"
        page.add(f"{share:g} of the way from A to B", shown, {"student": places}, caption)
    errors = page.save(shares, "share of B")
    results.save(output, frames=len(frames), left_out=crops, page_cosine_error=errors)
    if line := crop_report(dict(zip(map(str, args.input), crops, strict=True))):
        print(line)
    print(page)
    print(f"{output / 'strip.png'}; to explore, open {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
