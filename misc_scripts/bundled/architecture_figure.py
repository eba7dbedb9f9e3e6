"""The architecture figure: fold, unfold, answer; the teacher beside it."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from apm import APM, APMConfig
from apm.positional_encoding import sincos_2d
from apm.predictor import Percept

WIDTH, HEIGHT, DPI = 12.0, 5.3, 150  # inches, the units of every coordinate below
# Three locations, (row, column), each with its colour (Okabe and Ito, for the colour-blind).
LOCATIONS = {(8, 7): "#D55E00", (14, 17): "#0072B2", (23, 26): "#009E73"}
MIDDLES = (3.62, 2.77, 1.92)  # heights of the three queries
COLOURS, FEATURES = 3.86, 1.68  # heights of the two answers
INK, GREY, LEARNT, FROZEN = "#222222", "#767676", "#E3ECF7", "#EEEEEE"
Place = tuple[float, float, float, float]  # left, bottom, width, height
STYLE: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "size": 12.5}


def text(axes: Axes, x: float, y: float, words: str, **style: Any) -> None:
    """Words centred at a point."""
    axes.text(x, y, words, **STYLE | style)


def box(axes: Axes, place: Place, words: str, **style: Any) -> None:
    """A rounded box with words in it."""
    x, y, width, height = place
    look: dict[str, Any] = {"facecolor": LEARNT, "edgecolor": INK, "linewidth": 1.2} | style
    rounded = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=rounded, **look))
    text(axes, x + width / 2, y + height / 2, words)


def arrow(axes: Axes, *points: tuple[float, float], dashed: bool = False) -> None:
    """A line through the points, with a head at the last."""
    look: dict[str, Any] = {"color": GREY if dashed else INK, "linewidth": 1.3}
    look["linestyle"] = (0, (4, 3)) if dashed else "-"
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, solid_capstyle="round", **look)
    look |= {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(points[-2], points[-1], **look))


def frame(axes: Axes, place: Place, colour: str, line: float) -> None:
    """An empty rectangle."""
    axes.add_patch(Rectangle(place[:2], *place[2:], fill=False, edgecolor=colour, lw=line))


def picture(axes: Axes, values: np.ndarray, place: Place, **style: Any) -> None:
    """An image or a strip of numbers, framed."""
    x, y, width, height = place
    smooth = "nearest" if len(values) < 100 else "antialiased"
    look: dict[str, Any] = {"cmap": "gray", "interpolation": smooth, "aspect": "auto"} | style
    axes.imshow(values, extent=(x, x + width, y, y + height), **look)
    frame(axes, place, INK, 0.9)


def mark(axes: Axes, x: float, y: float, side: float, grid: int) -> None:
    """The three locations on a picture of the grid, as squares of two by two cells."""
    cell = side / grid
    for (row, column), colour in LOCATIONS.items():
        left, low = x + cell * (column - 0.5), y + side - cell * (row + 1.5)
        for line, width in (("white", 3.2), (colour, 1.8)):
            frame(axes, (left, low, 2 * cell, 2 * cell), line, width)


def draw_fold(axes: Axes, percept: Percept, column: np.ndarray, grid: int) -> None:
    """Left: the photograph, and the trigger column that it is folded into."""
    left, low, side = 0.25, 1.62, 2.3
    picture(axes, percept.picture, (left, low, side, side))
    steps = np.linspace(0, side, grid // 2 + 1)
    axes.vlines(left + steps, low, low + side, "white", linewidth=0.3, alpha=0.6)
    axes.hlines(low + steps, left, left + side, "white", linewidth=0.3, alpha=0.6)
    mark(axes, left, low, side, grid)
    arrow(axes, (2.6, 2.77), (3.24, 2.77))
    text(axes, 2.92, 3.0, "fold", style="italic")
    picture(axes, column[:, None], (3.3, low, 0.26, side))
    text(axes, 3.43, 4.1, "$T$", size=15)
    text(axes, 3.43, 1.28, "trigger\ncolumn")


def draw_queries(axes: Axes, percept: Percept, column: np.ndarray, config: APMConfig) -> None:
    """Middle: one query for each location, unfolded from the same trigger column."""
    patch, border = config.patch_size, config.local_size // 2
    padded = np.pad(percept.picture, ((border, border), (border, border), (0, 0)), mode="edge")
    height = 0.54
    for middle, (location, colour) in zip(MIDDLES, LOCATIONS.items(), strict=True):
        arrow(axes, (3.62, 2.77), (4.32, middle))
        low = middle - height / 2
        picture(axes, column[None], (4.4, low, 1.1, height))
        top, start = (patch * at + patch // 2 for at in location)
        local = padded[top : top + 2 * border, start : start + 2 * border]
        picture(axes, local, (5.5, low, height, height))
        encoding = sincos_2d(torch.tensor([location]), 32).view(2, 8, 2)
        waves = encoding.transpose(1, 2).reshape(1, -1).numpy()  # sines, then cosines
        after = (5.5 + height, low, 0.9, height)
        picture(axes, waves, after, cmap="PuOr", vmin=-1.5, vmax=1.5)
        frame(axes, (4.4, low, 2.0 + height, height), colour, 2.6)
        arrow(axes, (7.0, middle), (7.5, middle))
    text(axes, 3.87, 3.52, "unfold", style="italic")
    for x, words in ((4.95, "$T$"), (5.77, "$I_{xy}$"), (6.49, "$p_{xy}$")):
        text(axes, x, 4.1, words, size=15)
    text(axes, 5.67, 1.28, "one query per location:\nimage, local patch, position")


def draw_answers(axes: Axes, percept: Percept, islands: np.ndarray, grid: int) -> None:
    """Right: the shared MLP, the two heads and what they answer."""
    box(axes, (7.55, 1.35, 0.95, 2.84), "shared\nMLP")
    arrow(axes, (8.5, FEATURES), (8.88, FEATURES))
    box(axes, (8.93, FEATURES - 0.33, 0.92, 0.66), "feature\nhead")
    # The RGB head is given [feature ; query].
    arrow(axes, (9.39, FEATURES + 0.33), (9.39, COLOURS - 0.37))
    axes.plot(7.2, MIDDLES[0], "o", color=INK, markersize=4)
    arrow(axes, (7.2, MIDDLES[0]), (7.2, 4.5), (9.39, 4.5), (9.39, COLOURS + 0.37))
    box(axes, (8.93, COLOURS - 0.33, 0.92, 0.66), "RGB\nhead")
    side, left = 1.5, 10.3
    for middle, answers in ((COLOURS, np.asarray(percept.rgb)), (FEATURES, islands)):
        arrow(axes, (9.85, middle), (left - 0.05, middle))
        picture(axes, answers, (left, middle - side / 2, side, side))
        mark(axes, left, middle - side / 2, side, grid)
    text(axes, left + side / 2, COLOURS - side / 2 - 0.17, "colours")
    text(axes, left + side / 2, FEATURES + side / 2 + 0.17, "features (islands)")


def draw_training(axes: Axes) -> None:
    """Above and below: what the answers are compared with."""
    arrow(axes, (1.4, 3.95), (1.4, 5.0), (11.05, 5.0), (11.05, 4.66), dashed=True)
    arrow(axes, (1.4, 1.58), (1.4, 0.4), (4.35, 0.4), dashed=True)
    box(axes, (4.4, 0.1, 2.54, 0.6), "teacher (frozen ViT)", facecolor=FROZEN, linestyle="--")
    arrow(axes, (6.94, 0.4), (11.05, 0.4), (11.05, 0.88), dashed=True)
    style = {"color": GREY, "backgroundcolor": "white"}
    for height in (5.0, 0.4):
        text(axes, 2.75, height, "training only", **style)
    text(axes, 5.67, 5.0, "mean colour of each patch", **style)
    text(axes, 8.95, 5.0, "distance to the colours", **style)
    text(axes, 8.95, 0.4, "distance to the teacher's tokens", **style)


def architecture(model: APM, percept: Percept, column: np.ndarray, islands: np.ndarray) -> Figure:
    """The whole figure; the column as one number a row, islands as RGB in [0, 1]."""
    config = model.config
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_training(axes)
    draw_fold(axes, percept, column, config.grid_size)
    draw_queries(axes, percept, column, config)
    draw_answers(axes, percept, islands, config.grid_size)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    return figure
