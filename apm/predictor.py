"""Picture in, features and colours out, as arrays ready to show, save and score."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.consensus import agree
from apm.model import APM
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.device import precision

CHUNK = 4096  # locations answered at a time, unless told otherwise: 0.1 GB of the largest model


@dataclass(frozen=True)
class View:
    """What a model sees of a photograph, in the photograph's shape."""

    picture: np.ndarray  # (H, W, 3) uint8 RGB
    images: Tensor  # (1, 3, S, S), preprocessed, on the model's device
    left_out: Mapping[str, float]  # shares of the photograph's sides that are not seen


@dataclass(frozen=True)
class Percept:
    """What a model makes of a photograph; picture and left_out as of ``View``."""

    picture: np.ndarray
    features: np.ndarray  # (h, w, F)
    left_out: Mapping[str, float]
    rgb: np.ndarray | None = None  # (h, w, 3) in [0, 1]; other models than an APM answer none


@torch.no_grad()
def perceive(
    model: APM,
    image: Image.Image,
    *,
    grid: int | None = None,
    fit: str | None = None,
    consensus: int = 0,
    chunk_size: int | None = None,
    dtype: str = "float32",
    local: bool = True,
) -> Percept:
    """Fold an RGB image and answer every location, ``chunk_size`` at a time.

    Args:
        grid: locations along a side, each answered exactly where it is; default the model's own.
        fit: how the photograph becomes a square, one of ``choices.FITS``; default the
            model's own.
        consensus: steps in which like neighbours agree (``apm.consensus``).
        dtype: of the matrix products, ``"float32"`` or ``"bfloat16"``.
        local: give the model local patches, if it has them; else the column alone answers.
    """
    view = view_of(model, image, fit)
    with precision(model.device, dtype):
        column = model.encode(view.images)
        seen = view.images if local else None
        features, rgb = answer_grid(model, column, seen, grid=grid, chunk_size=chunk_size)
    agreed = agreeing(features[0], view.picture, consensus)
    return Percept(view.picture, agreed, view.left_out, rgb[0])


def agreeing(features: np.ndarray, picture: np.ndarray, consensus: int) -> np.ndarray:
    """Features ``(h, h, F)`` of a picture, uint8, after steps of ``apm.consensus``."""
    if not consensus:
        return features
    colours, (height, width, _) = mean_colours(picture, len(features)), picture.shape
    return agree(torch.from_numpy(features), colours, consensus, height / width).numpy()


@torch.no_grad()
def answer_in_turn(
    model: APM, view: View, grid: int, places: Sequence[Tensor]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The answers of ``perceive``, some ``(n,)`` places of the grid at a time.

    Features ``(n, F)`` and RGB ``(n, 3)`` in [0, 1] of each of ``places``.
    """
    column, positions = model.encode(view.images), model.grid_positions(grid)
    for some in places:
        features, rgb = _answer(model, column, positions[some], view.images)
        yield features[0].numpy(), rgb[0].numpy()


def visiting_order(grid: int, order: str, seed: int = 0) -> np.ndarray:
    """Indices of a grid's places, row by row, in one of ``choices.ORDERS``: ``(grid * grid,)``."""
    if order == "random":
        return np.random.default_rng(seed).permutation(grid**2)
    if order == "raster":
        return np.arange(grid**2)
    down, right = np.indices((grid, grid)).reshape(2, -1) - (grid - 1) / 2
    ring = np.maximum(np.abs(down), np.abs(right))
    return np.lexsort((np.arctan2(down, right), ring))  # a spiral from the middle outwards


def view_of(model: APM, image: Image.Image, fit: str | None = None) -> View:
    """How a model sees a photograph; arguments as of ``perceive``."""
    preprocessing = replace(model.preprocessing, fit=fit or model.preprocessing.fit)
    square = preprocessing.picture(image)
    images = preprocessing.normalise(to_pixels(square))[None].to(model.device)
    if preprocessing.fit == "stretch":
        share = preprocessing.image_size / max(image.size)
        width, height = (max(1, round(share * side)) for side in image.size)
        square = square.resize((width, height))
    return View(np.asarray(square), images, left_out(image, preprocessing))


@torch.no_grad()
def answer_grid(
    model: APM,
    column: Tensor,
    images: Tensor | None = None,
    *,
    grid: int | None = None,
    chunk_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As ``model.query``: features ``(B, h, w, F)`` and RGB ``(B, h, w, 3)`` in [0, 1], float32.

    ``grid`` = h = w, default the model's own.
    """
    grid = grid or model.config.grid_size
    answers = _answer(model, column, model.grid_positions(grid), images, chunk_size)
    features, rgb = (answer.unflatten(1, (grid, grid)).numpy() for answer in answers)
    return features, rgb


def _answer(
    model: APM,
    column: Tensor,
    positions: Tensor,
    images: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    ask = partial(model.query, column, chunk_size=chunk_size or CHUNK, images=images)
    features, rgb = ask(positions)
    if offset := model.preprocessing.token_offset:
        features, _ = ask(undo_token_offset(positions, offset, model.config.grid_size))
    return features.float().cpu(), model.preprocessing.to_rgb(rgb.cpu())


def undo_token_offset(positions: Tensor, offset: int, grid_size: int) -> Tensor:
    """Where a model answers features of ``(N, 2)`` positions that it learnt ``offset`` late."""
    rows, columns = positions.unbind(dim=1)
    late = columns + offset + 0.5
    rows = rows + late.div(grid_size, rounding_mode="floor")
    # The last places were never learnt: they repeat the row above.
    rows = rows - (rows - (grid_size - 0.5)).ceil().clamp_min(0)
    return torch.stack([rows, late.remainder(grid_size) - 0.5], dim=1)


def mean_colours(picture: np.ndarray, grid: int) -> Tensor:
    """Mean colours of the cells of a picture, uint8: ``(grid, grid, 3)`` float32 in [0, 1]."""
    cells = Image.fromarray(picture).resize((grid, grid), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(cells, np.float32) / 255)


def left_out(image: Image.Image, preprocessing: Preprocessing) -> dict[str, float]:
    """The share of its width or height that an image loses to a centre crop, if over a pixel."""
    if preprocessing.fit != "crop":
        return {}
    sizes, side = {"width": image.width, "height": image.height}, min(image.size)
    return {name: 1 - side / length for name, length in sizes.items() if length - side > 1}


def crop_report(images: Mapping[str, Mapping[str, float]]) -> str:
    """A line on what centre crops left out of images, by their names; empty if nothing."""
    cropped = {name: shares for name, shares in images.items() if shares}
    if not cropped:
        return ""
    if len(images) == 1:
        [(name, shares)] = cropped.items()
        parts = " and ".join(f"{100 * share:.3g} % of the {side}" for side, share in shares.items())
        return f"{name}: centre crop, {parts} left out"
    most = 100 * max(max(shares.values()) for shares in cropped.values())
    count = f"{len(cropped)} of {len(images)} images"
    return f"centre crop of {count}, up to {most:.3g} % of a side left out"
