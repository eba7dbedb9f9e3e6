"""Pictures, figures, animations and galleries made of arrays, written atomically."""

import html
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apm.data.images import Skipped, load_images
from apm.predictor import Percept, View, crop_report
from apm.runtime.files import atomic_path

if TYPE_CHECKING:
    # Matplotlib takes half a second to import. Functions that need it import it themselves.
    from matplotlib.figure import Figure

GAP = 12
ISLANDS = "islands of agreement"


def panels(
    rows: Sequence[Mapping[str, np.ndarray]], side: int = 448, title: str = ""
) -> np.ndarray:
    """Labelled pictures on white, row under row.

    Args:
        rows: each a mapping from label to ``(h, w, 3)`` picture, uint8 or float in [0, 1], enlarged
            to ``side`` pixels without smoothing where it is smaller.
        title: a line above all rows.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    size = max(side // 20, 12)
    font, line = ImageFont.load_default(size=size), 2 * size
    head = line if title else 0
    width = GAP + max(map(len, rows)) * (side + GAP)
    figure = Image.new("RGB", (width, head + len(rows) * (side + line + GAP)), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((width // 2, line // 2), title, fill="black", font=font, anchor="mm")
    for row, pictures in enumerate(rows):
        for column, (label, picture) in enumerate(pictures.items()):
            left, top = GAP + column * (side + GAP), head + row * (side + line + GAP)
            centre = (left + side // 2, top + line // 2)
            draw.text(centre, label, fill="black", font=font, anchor="mm")
            figure.paste(Image.fromarray(enlarge(picture, side)), (left, top + line))
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
    import matplotlib

    return matplotlib.colormaps["magma"](values)[..., :3]


def input_label(name: str, left_out: Mapping[str, float]) -> str:
    """The label of a picture as a model sees it, which may be a centre crop."""
    return f"{name} (centre crop)" if left_out else name


def island_row(view: View, islands: np.ndarray, label: str = ISLANDS) -> dict[str, np.ndarray]:
    """A row for ``panels``: the picture, what is answered, its islands.

    Args:
        islands: ``(h, w, 3)`` float RGB in [0, 1].
        label: of the islands.
    """
    seen = {input_label("input", view.left_out): view.picture}
    answered = {"RGB reconstruction": view.rgb} if isinstance(view, Percept) else {}
    over = {"islands over input": overlay(view.picture, islands)}
    return seen | answered | {label: islands} | over


def draw_islands(
    paths: Mapping[str, Path],
    skipped: Skipped,
    look: Callable[[Image.Image], View],
    colour: Callable[[np.ndarray], np.ndarray],
    output: Path,
    *,
    label: str = ISLANDS,
    save_features: bool = False,
) -> list[dict[str, Any]]:
    """Write a figure for each image that can be read, ``NAME_islands.png``.

    Args:
        paths: images by name.
        skipped: takes those that cannot be read.
        look: what a model makes of a picture.
        colour: features ``(h, w, F)`` -> island colours ``(h, w, 3)`` in [0, 1].
        output: folder of the figures.
        label: of the islands.
        save_features: also write features, islands and answered colours as ``NAME_islands.npz``.

    Returns:
        For each figure its image, its path, what a crop left out, and the seconds of each part.
    """
    rows = []
    for name, image in load_images(paths, skipped):
        target = output / f"{name}_islands.png"
        started = time.perf_counter()
        view = look(image)
        answered = time.perf_counter()
        islands = colour(view.features)
        coloured = time.perf_counter()
        save_picture(target, panels([island_row(view, islands, label)]))
        if save_features:
            rgb: dict[str, Any] = {"rgb": view.rgb} if isinstance(view, Percept) else {}
            with atomic_path(target.with_suffix(".npz")) as temporary:
                np.savez(temporary, features=view.features, islands=islands, **rgb)
        row = {
            "image": str(paths[name]),
            "figure": str(target),
            "left_out": view.left_out,
            "query_seconds": answered - started,
            "islands_seconds": coloured - answered,
            "figure_seconds": time.perf_counter() - coloured,
        }
        rows.append(row)
    return rows


def islands_report(rows: Sequence[Mapping[str, Any]], skipped: Skipped, output: Path) -> str:
    """What ``draw_islands`` did with its images: what crops left out, and where the figures are."""
    crops = crop_report({row["image"]: row["left_out"] for row in rows})
    if len(rows) + len(skipped) == 1:
        done = rows[0]["figure"]
    else:
        done = f"{output}: {len(rows)} images, {len(skipped)} skipped"
    return f"{crops}\n{done}" if crops else done


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write ``(H, W, 3)`` uint8 as an image file."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def save_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 120) -> None:
    """An endless animation there and back of ``(H, W, 3)`` uint8 frames."""
    images = [Image.fromarray(frame) for frame in (*frames, *frames[-2:0:-1])]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=milliseconds, loop=0
        )


def save_gallery(path: Path, title: str, figures: Sequence[Path]) -> None:
    """An HTML page of figures, loaded as they are scrolled to; opens from disk.

    Args:
        figures: paths relative to the page's folder.
    """
    title = html.escape(title)
    items = "\n".join(
        f'<figure><img loading="lazy" src="{quote(os.fsencode(figure.as_posix()))}" '
        f'alt="{title}: {name}"><figcaption>{name}</figcaption></figure>'
        for figure in figures
        for name in [html.escape(figure.stem)]
    )
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; }}
img {{ width: 100%; min-height: 12rem; }}
figure {{ margin: 0 0 2rem; }}
</style>
<h1>{title}</h1>
{items}
</html>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a Matplotlib figure; the same figure gives the same bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def loss_figure(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Feature and RGB losses of training and validation against the epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, loss in zip(figure.subplots(1, 2), ("feature_loss", "rgb_loss"), strict=True):
        for name in (f"train_{loss}", loss, f"null_{loss}"):
            if name in history[0]:
                axes.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
        axes.set(xlabel="epoch", yscale="log")
        axes.legend()
    save_figure(path, figure)


def log_loss_figure(path: Path, losses: Sequence[float]) -> None:
    """One image's loss against the iteration, on a log axis (paper, Figure 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="iteration", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3)
    save_figure(path, figure)
