"""Picture in, features and colours out, as arrays ready to show, save and score."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.model import APM
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.device import precision


@dataclass(frozen=True)
class Percept:
    """A picture ``(H, W, 3)`` uint8 RGB as a model saw it, and what the model makes of it."""

    picture: np.ndarray
    features: np.ndarray  # (h, w, F)
    left_out: Mapping[str, float]  # shares of the photograph's sides that were not seen
    rgb: np.ndarray | None = None  # (h, w, 3) in [0, 1]; other models than an APM answer none


@torch.inference_mode()
def perceive(
    model: APM,
    image: Image.Image,
    *,
    chunk_size: int | None = None,
    dtype: str = "float32",
    local: bool = True,
) -> Percept:
    """Fold an RGB image and answer every location, ``chunk_size`` at a time (default all).

    Args:
        dtype: of the matrix products, ``"float32"`` or ``"bfloat16"``.
        local: give the model local patches, if it has them; else the column alone answers.
    """
    picture = model.preprocessing.picture(image)
    images = model.preprocessing.normalise(to_pixels(picture))[None].to(model.device)
    with precision(model.device, dtype):
        column = model.encode(images)
        features, rgb = answer_grid(model, column, images if local else None, chunk_size=chunk_size)
    crop = left_out(image, model.preprocessing)
    return Percept(np.asarray(picture), features[0], crop, rgb[0])


@torch.inference_mode()
def answer_grid(
    model: APM, column: Tensor, images: Tensor | None = None, *, chunk_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As ``model.query``: features ``(B, h, w, F)`` and RGB ``(B, h, w, 3)`` in [0, 1], float32."""
    answers = model.query(column, chunk_size=chunk_size, images=images)
    side = model.config.grid_size
    features, rgb = (answer.float().cpu().unflatten(1, (side, side)) for answer in answers)
    features = undo_token_offset(features, model.preprocessing.token_offset)
    return features.numpy(), model.preprocessing.to_rgb(rgb).numpy()


def undo_token_offset(features: Tensor, offset: int) -> Tensor:
    """Move features ``(..., h, w, F)`` of a model that learnt them ``offset`` places late."""
    height, width = features.shape[-3:-1]
    learnt = height * width - offset
    tokens = features.flatten(-3, -2).roll(-offset, dims=-2)  # (..., h * w, F)
    # The last places were never learnt: they repeat the row above.
    tokens[..., learnt:, :] = tokens[..., learnt - width : -width, :]
    return tokens.view_as(features)


def left_out(image: Image.Image, preprocessing: Preprocessing) -> dict[str, float]:
    """The share of its width or height that an image loses to a centre crop, if over a pixel."""
    if preprocessing.fit == "stretch":
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
