"""Test-time training on one image's CLS token (paper, section 3.2 and Figure 3).

A student that knows nothing learns the teacher's embedding of the image: its islands as it learns,
its loss, and what teacher and student say the image shows. A page to explore them in, index.html,
has a slider over the iterations.
"""

import math
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tta_flags import make_tta_parser

from apm.flags import OUTPUTS, ROOT, positive_int
from apm.runtime.cli import Results, answer_flags, command


def class_list(text: str) -> tuple[str, ...]:
    """An argparse type: class names, separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ArgumentTypeError(f"{text!r} has an empty class name")
    return names


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    example = "single_token_segmentation/train_tta.py --input photo.jpg --classes cat,dog,frog"
    parser = make_tta_parser(__doc__, example=example, output=OUTPUTS / "train_tta", iterations=250)
    photograph = ROOT / "assets" / "cat.jpg"
    parser.add("input and output", "--input", type=Path, default=photograph, help="image file")
    add = partial(parser.add, "test-time training")
    names = "class names, with commas between (default: CIFAR-10's, of a classifier ImageNet's)"
    add("--classes", type=class_list, help=names)
    steps = "iterations from islands to islands (default: a fifth of --iterations)"
    add("--every", type=positive_int, help=steps)
    args = parser.parse_args(argv)
    args.every = args.every or math.ceil(args.iterations / 5)
    return args


answer_flags(__name__, parse)

import numpy as np
import torch
from tqdm import tqdm
from tta_setup import build_teacher, build_trainer, embed

from apm.data.class_names import CIFAR10_CLASSES, imagenet_names, load_templates
from apm.data.images import load_image
from apm.drawing import loss_figure, panels, save_gif, save_picture
from apm.islands import island_series
from apm.page import Page, size_caption
from apm.predictor import left_out
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import prepare_output
from apm.token_teachers import ClassifierTeacher

TILE = 224  # px, of a picture in the figures


def draw_series(
    output: Path, picture: np.ndarray, grids: Mapping[int, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Islands after each number of steps, as a picture and as an animation.

    Args:
        picture: ``(H, W, 3)`` uint8, the image as the student sees it.
        grids: number of steps -> features ``(h, w, F)``.

    Returns:
        The islands in grey and in colour, ``(S, h, w, 3)`` in [0, 1].
    """
    series = np.stack(list(grids.values()))
    greys, colours = (island_series(series, channels, seed) for channels in (1, 3))
    upper, lower = {"input": picture}, {"": np.full_like(picture, 255)}
    frames = []
    for step, grey, colour in zip(grids, greys, colours, strict=True):
        upper[f"{step} iterations"], lower[f"{step}, in colour"] = grey, colour
        frame = {"input": picture, f"{step} iterations": grey, "in colour": colour}
        frames.append(panels([frame], (TILE, TILE)))
    save_picture(output / "islands.png", panels([upper, lower], (TILE, TILE)))
    save_gif(output / "islands.gif", frames, milliseconds=600)
    return greys, colours


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    templates = load_templates(args.templates)
    image = load_image(args.input)
    results = Results(args, device)
    seed_everything(args.seed)
    teacher = build_teacher(args, device)
    trainer = build_trainer(args, teacher, device, args.locations)
    class_names = args.classes or (
        imagenet_names() if isinstance(teacher, ClassifierTeacher) else CIFAR10_CLASSES
    )
    classes = teacher.embed_classes(class_names, templates).cpu()
    target = embed(teacher, image, device)
    output = prepare_output(args.output)
    said = vars(args) | {"method": "tsne", "grid": trainer.model.config.grid_size}
    page = Page(output, "Test-time training on one image", said, joint=True)

    trainer.reset(args.seed)
    preprocessing, side = trainer.model.preprocessing, trainer.model.config.grid_size
    kept = [*range(args.every, args.iterations, args.every), args.iterations]
    started = time.perf_counter()
    with tqdm(total=args.iterations, desc="training", unit="step") as progress:
        adapted = trainer.adapt(preprocessing(image), target, kept, progress.update)
    seconds = time.perf_counter() - started

    grids = {step: adapted.features_at[step].view(side, side, -1).numpy() for step in kept}
    picture = np.asarray(preprocessing.picture(image))
    greys, colours = draw_series(output, picture, grids, args.seed)
    # After 0, 1, 2, ... steps; each but the last of the places that the next step asks.
    losses = [*adapted.losses, (adapted.pooled - target).square().mean().item()]
    history = [{"iteration": steps, "loss": loss} for steps, loss in enumerate(losses)]
    loss_figure(output / "loss.png", history, ["loss"], steps="iteration")

    logits = teacher.logits(torch.stack([target, adapted.pooled]), classes)
    probabilities = {
        name: dict(zip(class_names, row, strict=True))
        for name, row in zip(("teacher", "student"), logits.softmax(dim=1).tolist(), strict=True)
    }
    crop = left_out(image, preprocessing)
    for step, grey, colour in zip(kept, greys, colours, strict=True):
        shown = {"photograph": picture, "islands": colour, "in grey": grey}
        caption = size_caption(image.size, crop)
        page.add(f"after {step} iterations", shown, {"student": grids[step]}, caption)
    errors = page.save(kept, "iterations", losses)
    results.save(
        output,
        losses=losses,
        adapt_seconds=seconds,
        probabilities=probabilities,
        page_cosine_error=errors,
    )
    print(f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {args.iterations} steps, {seconds:.1f} s")
    for name, shares in probabilities.items():
        best = max(shares, key=shares.__getitem__)
        print(f"{name}: {best} ({shares[best]:.3f})")
    print(page)
    print(f"{output / 'islands.png'}; to explore, open {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
