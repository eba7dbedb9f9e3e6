"""Pictures, figures and animations made of arrays, written atomically."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apm.predictor import Percept
from apm.runtime.files import atomic_path

GAP, SIDE = 12, 448  # px
OPACITY = 0.55  # of islands over a picture
ISLANDS = "islands of agreement"


def panels(
    rows: Sequence[Mapping[str, np.ndarray]],
    shape: tuple[int, int] = (SIDE, SIDE),
    title: str = "",
) -> np.ndarray:
    """Labelled pictures on white, row under row.

    Args:
        rows: label -> picture ``(h, w, 3)``, uint8 or float in [0, 1].
        shape: (height, width) at which each is shown, in pixels.
        title: a line above all rows.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    height, width = shape
    size = max(max(shape) // 20, 12)
    font, line = ImageFont.load_default(size=size), 2 * size
    labels = [label for row in rows for label in row]
    cell = max(width, *(math.ceil(font.getlength(label)) for label in labels))
    head = line if title else 0
    across = GAP + max(map(len, rows)) * (cell + GAP)
    figure = Image.new("RGB", (across, head + len(rows) * (height + line + GAP)), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((across // 2, line // 2), title, fill="black", font=font, anchor="mm")
    for row, pictures in enumerate(rows):
        for column, (label, picture) in enumerate(pictures.items()):
            left, top = GAP + column * (cell + GAP), head + row * (height + line + GAP)
            centre = (left + cell // 2, top + line // 2)
            draw.text(centre, label, fill="black", font=font, anchor="mm")
            shown = Image.fromarray(enlarge(picture, shape))
            figure.paste(shown, (left + (cell - width) // 2, top + line))
    return np.asarray(figure)


def enlarge(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``(h, w, 3)``, uint8 or float in [0, 1] -> ``(*shape, 3)`` uint8, without smoothing."""
    if picture.dtype != np.uint8:
        picture = (picture * 255).round().astype(np.uint8)
    small = len(picture) < shape[0] or picture.shape[1] < shape[1]
    sampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(shape[::-1], sampling))


def overlay(picture: np.ndarray, islands: np.ndarray) -> np.ndarray:
    """Island colours ``(h, w, 3)`` in [0, 1] over a ``(H, W, 3)`` uint8 picture in grey: uint8."""
    grey = picture.mean(axis=-1, keepdims=True)
    mixed = OPACITY * enlarge(islands, picture.shape[:2]) + (1 - OPACITY) * grey
    return mixed.round().astype(np.uint8)


def shape_of(picture: np.ndarray, longest: int = SIDE) -> tuple[int, int]:
    """(height, width) at which a picture is shown, its longer side at so many pixels."""
    height, width = picture.shape[:2]
    share = longest / max(height, width)
    return max(1, round(share * height)), max(1, round(share * width))


def input_label(name: str, left_out: Mapping[str, float]) -> str:
    """The label of a picture as a model sees it, which may be a centre crop."""
    return f"{name} (centre crop)" if left_out else name


def island_row(view: Percept, islands: np.ndarray, label: str = ISLANDS) -> dict[str, np.ndarray]:
    """A row for ``panels``: what is seen, what is answered, its islands ``(h, w, 3)`` in [0, 1]."""
    seen = {input_label("input", view.left_out): view.picture}
    answered = {} if view.rgb is None else {"RGB reconstruction": view.rgb}
    over = {"islands over input": overlay(view.picture, islands)}
    return seen | answered | {label: islands} | over


def save_islands(
    path: Path, view: Percept, islands: np.ndarray, label: str = ISLANDS, *, arrays: bool = False
) -> dict[str, Any]:
    """Write the figure of one ``island_row``, and with ``arrays`` its numbers as ``.npz``.

    Returns the figure's path and what a crop left out, for ``results.json``.
    """
    save_picture(path, panels([island_row(view, islands, label)], shape_of(view.picture)))
    if arrays:
        rgb: dict[str, Any] = {} if view.rgb is None else {"rgb": view.rgb}
        with atomic_path(path.with_suffix(".npz")) as temporary:
            np.savez(temporary, features=view.features, islands=islands, **rgb)
    return {"figure": str(path), "left_out": view.left_out}


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write ``(H, W, 3)`` uint8 as an image file."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def save_gif(
    path: Path, frames: Sequence[np.ndarray], milliseconds: int = 120, back: bool = True
) -> None:
    """An endless animation of ``(H, W, 3)`` uint8 frames, there and ``back``."""
    images = [Image.fromarray(frame) for frame in (*frames, *(frames[-2:0:-1] if back else ()))]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=milliseconds, loop=0
        )


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of Matplotlib; the same figure gives the same bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def loss_figure(
    path: Path,
    history: Sequence[Mapping[str, float]],
    losses: Sequence[str] = ("feature_loss", "rgb_loss"),
    steps: str = "epoch",
) -> None:
    """A plot for each loss on a log axis: of training (``train_``), validation and ``null_``."""
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=(1 + 4 * len(losses), 3.5), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        for name in (f"train_{loss}", loss, f"null_{loss}"):
            if name in history[0]:
                values = [[row[column] for row in history] for column in (steps, name)]
                axes.plot(*values, label=name.replace("_", " "))
        axes.set(xlabel=steps, yscale="log")
        axes.legend()
    save_figure(path, figure)
