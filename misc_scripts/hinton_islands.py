"""Islands of agreement from a video transformer, without an APM: torchvision's MViTv2-S.

"A static image is a rather boring video": it is repeated to a clip of 16 frames, and the first
frame's tokens after an early block are coloured. For each picture a figure: input, islands,
islands over the picture.
"""

import sys
from argparse import Namespace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from apm.island_figures import draw_islands, input_images, island_parser
from apm.predictor import View
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.cli import (
    FLAGS,
    OUTPUTS,
    Results,
    command,
    precision,
    seed_everything,
    select_device,
)
from apm.runtime.files import prepare_output
from apm.video import VideoTeacher, load_video_teacher


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = island_parser(__doc__, output=OUTPUTS / "hinton_islands")
    parser.add_argument(
        "--block", type=int, default=0, help="block to take tokens from, 0..15 or -1 the last"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--teacher-weights", **FLAGS["--teacher-weights"])
    weights.add_argument(
        "--random-weights", action="store_true", help="learnt nothing: to try the script offline"
    )
    return parser.parse_args(argv)


def look(teacher: VideoTeacher, image: Image.Image, *, device: torch.device, dtype: str) -> View:
    """The picture as the transformer sees it, and its tokens."""
    square = Preprocessing(image_size=teacher.transforms.resize_size[0]).picture(image)
    with precision(device, dtype):
        tokens = teacher(to_pixels(square)[None].to(device))[0]
    seen = center_crop(square, teacher.transforms.crop_size)
    return View(np.asarray(seen), tokens.cpu().numpy())


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    paths = input_images(args)
    seed_everything(args.seed)  # the seed of random weights, too
    teacher = load_video_teacher(
        args.teacher_weights, random_weights=args.random_weights, block=args.block
    ).to(device)
    output = prepare_output(args.output)
    results = Results(args, device)
    draw_islands(
        paths,
        partial(look, teacher, device=device, dtype=args.dtype),
        output,
        args,
        results,
        note=" (random weights)" if args.random_weights else "",
    )


if __name__ == "__main__":
    sys.exit(main())
