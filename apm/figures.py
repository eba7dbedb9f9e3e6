"""Figures: islands beside their photograph, loss curves, strips, animations, galleries."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from apm.files import atomic_path


def save_figure(path: Path, figure: Figure, dpi: int = 100) -> None:
    """Write a figure atomically; the same figure gives the same bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})


def enlarge(grid: np.ndarray, side: int) -> np.ndarray:
    """A small ``(h, w, 3)`` colour grid in [0, 1] as ``(side, side, 3)`` uint8, no smoothing."""
    image = Image.fromarray((grid * 255).round().astype(np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.NEAREST))


def overlay(picture: np.ndarray, islands: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Island colours ``(h, w, 3)`` in [0, 1] laid over a ``(H, H, 3)`` uint8 picture, as uint8.

    The picture keeps its brightness in grey, so that its outlines show through the colours.
    """
    grey = picture.mean(axis=-1, keepdims=True)
    mixed = opacity * enlarge(islands, len(picture)) + (1 - opacity) * grey
    return mixed.round().astype(np.uint8)


def panel_figure(panels: Mapping[str, np.ndarray], title: str = "", rows: int = 1) -> Figure:
    """Labelled pictures side by side.

    Args:
        panels: by label, ``(H, W, 3)`` uint8 or ``(H, W)`` float in [0, 1], drawn as a heat map.
    """
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(4 * columns, 4.3 * rows + 0.3 * bool(title)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, (label, panel) in zip(grid, panels.items(), strict=False):
        axes.imshow(panel, interpolation="nearest", cmap="magma", vmin=0, vmax=1)
        axes.set_title(label, fontsize=13)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure


def loss_figure(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Feature and RGB losses of training and validation against the epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, loss in zip(figure.subplots(1, 2), ("feature_loss", "rgb_loss"), strict=True):
        for name in (f"train_{loss}", loss, f"null_{loss}"):
            if name in history[0]:
                axes.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
        axes.set(xlabel="epoch", yscale="log")
        axes.legend()
    save_figure(path, figure)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write ``(H, W, 3)`` uint8 as an image file, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def save_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 120) -> None:
    """An endless animation there and back of ``(H, W, 3)`` uint8 frames."""
    images = [Image.fromarray(frame) for frame in (*frames, *frames[-2:0:-1])]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=milliseconds, loop=0
        )


def save_gallery(path: Path, title: str, figures: Sequence[Path], table: str = "") -> None:
    """An HTML page of figures, loaded as they are scrolled to; opens from disk.

    Args:
        figures: paths relative to the page's folder.
        table: lines of text shown above the figures.
    """
    items = "\n".join(
        f'<figure><img loading="lazy" src="{html.escape(figure.as_posix())}" alt="">'
        f"<figcaption>{html.escape(figure.stem)}</figcaption></figure>"
        for figure in figures
    )
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; }}
img {{ width: 100%; min-height: 12rem; }}
figure {{ margin: 0 0 2rem; }}
</style>
<h1>{html.escape(title)}</h1>
<pre>{html.escape(table)}</pre>
{items}
</html>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
