"""Islands of one picture or of each picture in a folder: flags, figures and report of a script."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apm.data.images import image_names, load_image, load_images
from apm.drawing import overlay, panels, save_picture
from apm.islands import island_colours
from apm.predictor import Percept, View
from apm.runtime.cli import ROOT, Results, make_parser
from apm.runtime.files import atomic_path


def island_parser(description: str, *flags: str, output: Path) -> ArgumentParser:
    """A parser with the flags that ``draw_islands`` uses, and more of the shared ``flags``."""
    parser = make_parser(
        description,
        *flags,
        *("--input", "--output", "--device", "--dtype", "--seed", "--limit", "--method"),
        input=ROOT / "assets" / "cat.jpg",
        output=output,
    )
    parser.add_argument(
        "--save-features",
        action="store_true",
        help="also write features, islands and answered colours as .npz",
    )
    return parser


def input_images(args: Namespace) -> dict[str, Path]:
    """The images that ``--input`` names; a single bad file is refused before anything is made.

    Raises:
        FileNotFoundError: as ``image_names``.
        ValueError: if the only file is no image.
    """
    paths = image_names(args.input, args.limit)
    if len(paths) == 1:
        load_image(*paths.values())
    return paths


def draw_islands(
    paths: dict[str, Path],
    look: Callable[[Image.Image], View],
    output: Path,
    args: Namespace,
    results: Results,
    note: str = "",
) -> None:
    """Write a figure for each image, ``NAME_islands.png``, and ``results.json``; print where.

    Args:
        paths: images by name, from ``input_images``.
        look: what the model makes of a picture.
        args: with ``method``, ``seed`` and ``save_features``.
        note: what must be said above the islands, beside what they are.
    """
    skipped: dict[str, str] = {}
    images = [
        {"image": str(paths[name])}
        | _draw_one(look, image, output / f"{name}_islands.png", args, note)
        for name, image in load_images(paths, skipped)
    ]
    results.save(output, images=images, skipped=skipped)
    if len(paths) == 1:
        print(images[0]["figure"])
    else:
        print(f"{output}: {len(images)} images, {len(skipped)} skipped")


def island_row(
    picture: np.ndarray, islands: np.ndarray, rgb: np.ndarray | None, note: str = ""
) -> dict[str, np.ndarray]:
    """The panels of a picture, as for ``panels``: itself, what is answered, its islands.

    Args:
        picture: ``(H, W, 3)`` uint8 RGB.
        islands: ``(h, w, 3)`` float32 RGB in [0, 1].
        rgb: ``(h, w, 3)`` float32 RGB in [0, 1]; None where a model answers no colours.
        note: as of ``draw_islands``.
    """
    row = {"input": picture}
    if rgb is not None:
        row["RGB reconstruction"] = rgb
    row[f"islands of agreement{note}"] = islands
    row["islands over input"] = overlay(picture, islands)
    return row


def _draw_one(
    look: Callable[[Image.Image], View],
    image: Image.Image,
    target: Path,
    args: Namespace,
    note: str,
) -> dict[str, Any]:
    """One picture's figure, and the seconds of each part."""
    started = time.perf_counter()
    view = look(image)
    answered = time.perf_counter()
    islands = island_colours(view.features, args.method, args.seed)
    coloured = time.perf_counter()
    rgb = view.rgb if isinstance(view, Percept) else None
    save_picture(target, panels([island_row(view.picture, islands, rgb, note)]))
    if args.save_features:
        arrays = {name: array for name, array in vars(view).items() if name != "picture"}
        with atomic_path(target.with_suffix(".npz")) as temporary:
            np.savez(temporary, islands=islands, **arrays)
    return {
        "figure": str(target),
        "query_seconds": answered - started,
        "islands_seconds": coloured - answered,
        "figure_seconds": time.perf_counter() - coloured,
    }
