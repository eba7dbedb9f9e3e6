"""Pictures made of pictures: labelled panels, overlays, animations, galleries."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apm.runtime.files import atomic_path

GAP = 12


def panels(rows: Sequence[Mapping[str, np.ndarray]], side: int = 448) -> np.ndarray:
    """Labelled pictures on white, row under row.

    Args:
        rows: each a mapping from label to ``(h, w, 3)`` picture, uint8 or float in [0, 1], enlarged
            to ``side`` pixels without smoothing where it is smaller.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    font = ImageFont.load_default(size=max(side // 20, 12))
    title = 2 * max(side // 20, 12)
    width = GAP + max(map(len, rows)) * (side + GAP)
    figure = Image.new("RGB", (width, len(rows) * (side + title + GAP)), "white")
    draw = ImageDraw.Draw(figure)
    for row, pictures in enumerate(rows):
        for column, (label, picture) in enumerate(pictures.items()):
            left, top = GAP + column * (side + GAP), row * (side + title + GAP)
            centre = (left + side // 2, top + title // 2)
            draw.text(centre, label, fill="black", font=font, anchor="mm")
            figure.paste(Image.fromarray(enlarge(picture, side)), (left, top + title))
    return np.asarray(figure)


def enlarge(picture: np.ndarray, side: int) -> np.ndarray:
    """``(h, w, 3)``, uint8 or float in [0, 1] -> ``(side, side, 3)`` uint8, without smoothing."""
    if picture.dtype != np.uint8:
        picture = (picture * 255).round().astype(np.uint8)
    small = len(picture) < side
    sampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize((side, side), sampling))


def overlay(picture: np.ndarray, islands: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Island colours ``(h, w, 3)`` in [0, 1] laid over a ``(H, H, 3)`` uint8 picture, as uint8.

    The picture keeps its brightness in grey, so that its outlines show through the colours.
    """
    grey = picture.mean(axis=-1, keepdims=True)
    mixed = opacity * enlarge(islands, len(picture)) + (1 - opacity) * grey
    return mixed.round().astype(np.uint8)


def heat_map(values: np.ndarray) -> np.ndarray:
    """``(h, w)`` in [0, 1] -> ``(h, w, 3)`` float colours, dark to bright."""
    import matplotlib  # half a second that pictures without a heat map do not need

    return matplotlib.colormaps["magma"](values)[..., :3]


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
        f'<figure><img loading="lazy" src="{quote(os.fsencode(figure.as_posix()))}" alt="">'
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
        temporary.write_text(page, encoding="utf-8", errors="replace")
