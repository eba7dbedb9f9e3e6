"""Islands of agreement from a video transformer, without an APM: torchvision's MViTv2-S.

"A static image is a rather boring video": it is repeated to a clip of 16 frames, and the first
frame's tokens after an early block are coloured. For each picture a figure: input, islands,
islands over the picture; for all of them a page to explore them in, index.html.
"""

import sys
import time
from argparse import Namespace
from typing import Any

from apm.flags import FLAGS, OUTPUTS, ROOT, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--limit", "--save-features", "--method"),
        *("--device", "--dtype", "--seed"),
        example="misc_scripts/hinton_islands.py --input photo.jpg",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "hinton_islands",
    )
    help = "block to take tokens from, 0 to 15, or -1 the last; the deeper, the coarser"
    parser.add("model", "--block", type=int, default=0, help=help)
    weights = parser.groups["model"].add_mutually_exclusive_group()
    weights.add_argument("--teacher-weights", **FLAGS["model"]["--teacher-weights"])
    weights.add_argument(
        "--random-weights", action="store_true", help="learnt nothing: to try the script offline"
    )
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop
from video_teacher import VideoTeacher, load_video_teacher

from apm.data.images import Skipped, image_names, load_image, load_images
from apm.drawing import save_islands
from apm.islands import island_colours
from apm.page import Page
from apm.predictor import Percept, crop_report, left_out
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.device import precision, seed_everything, select_device
from apm.runtime.files import prepare_output


def look(teacher: VideoTeacher, image: Image.Image, device: torch.device, dtype: str) -> Percept:
    """The picture as the transformer sees it, and its tokens."""
    resized, seen = teacher.transforms.resize_size[0], teacher.transforms.crop_size[0]
    preprocessing = Preprocessing(image_size=resized)
    square = preprocessing.picture(image)
    with precision(device, dtype):
        tokens = teacher(to_pixels(square)[None].to(device))[0]
    crop = left_out(image, preprocessing)
    lost = {side: 1 - seen / resized * (1 - crop.get(side, 0)) for side in ("width", "height")}
    return Percept(np.asarray(center_crop(square, [seen])), tokens.cpu().numpy(), lost)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    paths = image_names(args.input, args.limit)
    if len(paths) == 1:
        load_image(*paths.values())  # refused before anything is made
    seed_everything(args.seed)  # the seed of random weights, too
    teacher = load_video_teacher(
        args.teacher_weights, random_weights=args.random_weights, block=args.block
    ).to(device)
    output = prepare_output(args.output)
    results = Results(args, device)
    label = f"islands after block {teacher.block}" + " (random weights)" * args.random_weights
    page = Page(output, label.capitalize(), vars(args))
    rows, skipped = [], Skipped()
    for name, image in load_images(paths, skipped):
        started = time.perf_counter()
        view = look(teacher, image, device, args.dtype)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"image": str(paths[name]), "query_seconds": seconds}
        islands = island_colours(view.features, args.method, args.seed)
        figure = output / f"{name}_islands.png"
        page.add_percept(name, image.size, view, islands, "video transformer")
        rows.append(row | save_islands(figure, view, islands, label, arrays=args.save_features))
    errors = page.save()
    results.save(
        output, block=teacher.block, images=rows, skipped=skipped, page_cosine_error=errors
    )
    if line := crop_report({row["image"]: row["left_out"] for row in rows}):
        print(line)
    print(page)
    made = figure if len(paths) == 1 else f"{output}: {len(rows)} images, {len(skipped)} skipped"
    print(f"{made}; to explore, open {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
