"""Interpolate between two images in the space of trigger columns (paper, Figure 6).

Every in-between is made from its interpolated column alone: pixels and local patches of the two
images are not mixed, and the two ends are their columns' percepts as well.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from apm import APM, load_model
from apm.data.images import load_image
from apm.drawing import enlarge, panels, save_gif, save_picture
from apm.islands import island_colours
from apm.predictor import as_grid, query_in_memory, undo_token_offset
from apm.runtime.cli import (
    OUTPUTS,
    ROOT,
    Results,
    command,
    make_parser,
    positive_int,
    precision,
    seed_everything,
    select_device,
)
from apm.runtime.files import prepare_output

FRAME_SIDE = 320


@torch.inference_mode()
def percepts(
    model: APM, ends: torch.Tensor, steps: int, chunk_size: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """RGB and features along the straight line between two images' columns.

    Args:
        ends: ``(2, 3, H, W)`` preprocessed images.

    Returns:
        ``(steps, h, w, 3)`` in [0, 1] and ``(steps, h, w, F)``; first and last are the ends.
    """
    with precision(ends.device, dtype):
        first, last = model.encode(ends)
        shares = torch.linspace(0, 1, steps, device=ends.device)
        columns = torch.lerp(first.float(), last.float(), shares[:, None])  # (steps, D)
        frames = [query_in_memory(model, column[None], chunk_size) for column in columns]
    offset = model.preprocessing.token_offset
    rgb = [model.preprocessing.to_rgb(as_grid(colours[0], model)).numpy() for _, colours in frames]
    features = [undo_token_offset(as_grid(answers[0], model), offset) for answers, _ in frames]
    return np.stack(rgb), np.stack(features)


def strip(pictures: list[np.ndarray], rgb: np.ndarray, islands: np.ndarray) -> np.ndarray:
    """All frames in two rows, the two input pictures at the sides."""
    shares = [f"{share:.2f}" for share in np.linspace(0, 1, len(rgb))]
    blank = np.full_like(pictures[0], 255)
    rows = [
        {"A": pictures[0]} | dict(zip(shares, rgb, strict=True)) | {"B": pictures[1]},
        {"": blank} | {f"islands {s}": i for s, i in zip(shares, islands, strict=True)},
    ]
    return panels(rows, side=160)


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--output", "--device", "--dtype", "--seed", "--chunk-size"),
        "--method",
        output=OUTPUTS / "interpolate",
        method="pca",
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        default=[ROOT / "assets" / "cat.jpg", ROOT / "assets" / "astronaut.jpg"],
        help="the two images",
    )
    parser.add_argument("--steps", type=positive_int, default=9, help="frames, both ends included")
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: at least 2, the two ends")
    device = select_device(args.device)
    images = [load_image(path) for path in args.input]
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    ends = torch.stack([model.preprocessing(image) for image in images]).to(device)
    rgb, features = percepts(model, ends, args.steps, args.chunk_size, args.dtype)
    islands = island_colours(features, args.method, args.seed)
    frames = [
        np.hstack([enlarge(picture, FRAME_SIDE) for picture in pair])
        for pair in zip(rgb, islands, strict=True)
    ]
    for step, frame in enumerate(frames):
        save_picture(output / f"frame_{step:03}.png", frame)
    pictures = [np.asarray(model.preprocessing.picture(image)) for image in images]
    save_picture(output / "strip.png", strip(pictures, rgb, islands))
    save_gif(output / "interpolation.gif", frames)
    results.save(output, frames=len(frames))
    print(output / "strip.png")


if __name__ == "__main__":
    sys.exit(main())
