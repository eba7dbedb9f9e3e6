"""Show the islands of agreement of any photograph, or of every photograph in a folder.

For each picture a figure: input, RGB reconstruction, islands, islands over the picture.
"""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from apm import APM, load_model
from apm.cli import OUTPUTS, ROOT, Results, command, make_parser, seed_everything, select_device
from apm.data import find_images, load_image
from apm.figures import enlarge, overlay, panel_figure, save_figure
from apm.files import atomic_path, prepare_output
from apm.islands import METHODS, island_colours
from apm.percept import Percept, perceive


def draw(percept: Percept, islands: np.ndarray, path: Path) -> None:
    """Write one picture's figure."""
    side = len(percept.picture)
    panels = {
        "input": percept.picture,
        "RGB reconstruction": enlarge(percept.rgb, side),
        "islands of agreement": enlarge(islands, side),
        "islands over input": overlay(percept.picture, islands),
    }
    save_figure(path, panel_figure(panels))


def predict(model: APM, path: Path, target: Path, args) -> dict[str, float]:
    """One picture from file to figure; seconds of each part."""
    image = load_image(path)
    started = time.perf_counter()
    percept = perceive(model, image, chunk_size=args.chunk_size, dtype=args.dtype)
    answered = time.perf_counter()
    islands = island_colours(percept.features, args.method, args.seed)
    coloured = time.perf_counter()
    draw(percept, islands, target)
    if args.save_features:
        with atomic_path(target.with_suffix(".npz")) as temporary:
            np.savez(temporary, features=percept.features, rgb=percept.rgb, islands=islands)
    return {
        "query_seconds": answered - started,
        "islands_seconds": coloured - answered,
        "figure_seconds": time.perf_counter() - coloured,
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--device", "--dtype", "--seed", "--chunk-size"),
        "--limit",
        input=ROOT / "assets" / "cat.jpg",
        output=OUTPUTS / "predict_test_image",
    )
    parser.add_argument("--method", choices=METHODS, default="tsne", help="how islands are coloured")
    parser.add_argument(
        "--save-features", action="store_true", help="also write features, RGB and islands as .npz"
    )
    args = parser.parse_args(argv)
    device = select_device(args.device)
    paths = find_images(args.input, args.limit)
    alone = args.input.is_file()
    if alone:
        load_image(args.input)  # a bad file is refused before the model loads
    model = load_model(args.checkpoint, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    images, skipped = [], {}
    for path in tqdm(paths, unit="image", disable=alone):
        name = Path(path.name) if alone else path.relative_to(args.input)
        target = output / name.with_name(f"{name.stem}_islands.png")
        try:
            images.append({"image": str(path), "figure": str(target)} | predict(model, path, target, args))
        except ValueError as error:
            if alone:
                raise
            skipped[str(path)] = str(error)
            tqdm.write(f"skipped {error}", file=sys.stderr)
    results.save(output, images=images, skipped=skipped)
    if not images:
        raise ValueError(f"{args.input}: none of its {len(paths)} files could be read as an image")
    print(f"{len(images)} images, {len(skipped)} skipped" if not alone else images[0]["figure"])


if __name__ == "__main__":
    sys.exit(main())
