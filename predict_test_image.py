"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture; for all of
them a page to explore them in, index.html, which opens from disk. With --gif also an animation: of
each picture, how its percept comes into being, place by place in any --order, before any consensus;
of a folder with --joint, if its pictures have one shape, these one after the other, as a video.
"""

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from apm.choices import ORDERS
from apm.flags import OUTPUTS, ROOT, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--grid", "--fit", "--consensus", "--method"),
        *("--joint", "--save-features", "--device", "--dtype", "--seed", "--chunk-size", "--limit"),
        example="predict_test_image.py --input photo.jpg --grid 128 --consensus 1",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "predict_test_image",
        fit="stretch",
    )
    add = partial(parser.add, "picture")
    add("--gif", action="store_true", help="also write animations")
    add("--order", choices=ORDERS, default="random", help="in which --gif asks the places")
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import numpy as np
import torch
from PIL import Image

from apm import APM, load_model
from apm.data.images import Skipped, image_names, load_image, load_images
from apm.drawing import enlarge, save_gif, save_islands, shape_of
from apm.islands import Palette, sample_landmarks
from apm.page import Page
from apm.predictor import answer_in_turn, crop_report, perceive, view_of, visiting_order
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import prepare_output

FRAMES = 24  # of a percept that comes into being
TILE = 256  # px, of a picture's longer side in animations
NOT_YET = 0.9  # grey of places that have not been asked


def animate(
    path: Path, model: APM, image: Image.Image, palette: Palette, grid: int, args: Namespace
) -> np.ndarray:
    """Ask the places in turn, show what is known after each part, and return all the features."""
    view = view_of(model, image, args.fit)
    order = visiting_order(grid, args.order, args.seed)
    shape = shape_of(view.picture, TILE)
    parts = torch.from_numpy(order).tensor_split(min(FRAMES, grid**2))
    features = np.zeros((grid**2, model.config.feature_dim), np.float32)
    shown = np.full((2, grid**2, 3), NOT_YET, np.float32)
    frames = []
    for places, (answers, rgb) in zip(parts, answer_in_turn(model, view, grid, parts), strict=True):
        index = places.numpy()  # a tensor of one place would be a number, not an index
        features[index] = answers
        shown[:, index] = rgb, palette(answers)
        pictures = shown.reshape(2, grid, grid, 3)
        frames.append(np.hstack([enlarge(picture, shape) for picture in pictures]))
    save_gif(path, frames, back=False)
    return features.reshape(grid, grid, -1)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    paths = image_names(args.input, args.limit)
    if len(paths) == 1:
        load_image(*paths.values())  # refused before anything is made
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    look = partial(perceive, model, fit=args.fit, chunk_size=args.chunk_size, dtype=args.dtype)
    grid = args.grid or model.config.grid_size
    few = min(grid, model.config.grid_size)  # t-SNE of many places would take minutes
    palette = None
    if args.joint:
        images = (image for _, image in load_images(paths, Skipped()))
        grids = (look(image, grid=few, consensus=args.consensus).features for image in images)
        landmarks = sample_landmarks(grids, len(paths), args.seed)
        palette = Palette(landmarks, args.method, args.seed)
    page = Page(output, "Islands of agreement", vars(args) | {"grid": grid}, joint=args.joint)
    rows, skipped = [], Skipped()
    before: np.ndarray | None = None  # the islands of the picture before
    changes: list[float] = []  # mean absolute change of colour from picture to picture
    frames: list[np.ndarray] = []  # all pictures' islands, for an animation
    for name, image in load_images(paths, skipped):
        started = time.perf_counter()
        percept = look(image, grid=grid, consensus=args.consensus)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"image": str(paths[name]), "query_seconds": seconds}
        if not args.joint:
            own = percept
            if args.method == "tsne" and grid > few:
                own = look(image, grid=few, consensus=args.consensus)
            palette = Palette(own.features, args.method, args.seed)
        assert palette is not None
        islands = palette(percept.features)
        figure = output / f"{name}_islands.png"
        row |= save_islands(figure, percept, islands, arrays=args.save_features)
        if args.gif:
            features = animate(
                output / f"{name}_{args.order}.gif", model, image, palette, grid, args
            )
            at_once = (look(image, grid=grid) if args.consensus else percept).features
            row["difference_to_all_at_once"] = float(np.abs(features - at_once).max())
        page.add_percept(name, image.size, percept, islands)
        if before is not None:
            changes.append(float(np.abs(islands - before).mean()))
        before = islands
        if args.gif and args.joint:
            frames.append(enlarge(islands, shape_of(percept.picture, TILE)))
        rows.append(row)
    if len(frames) > 1 and len({frame.shape for frame in frames}) == 1:
        save_gif(output / "islands.gif", frames, back=False)
    errors = page.save()
    results.save(
        output, images=rows, skipped=skipped, colour_changes=changes, page_cosine_error=errors
    )
    if line := crop_report({row["image"]: row["left_out"] for row in rows}):
        print(line)
    if changes:
        print(f"islands' colours change by {np.mean(changes):.3f} from picture to picture")
    print(page)
    made = figure if len(paths) == 1 else f"{output}: {len(rows)} images, {len(skipped)} skipped"
    print(f"{made}; to explore, open {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
