"""Picture in, features and colours out, as arrays ready to show, save and score."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.model import APM
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.device import precision


@dataclass(frozen=True)
class View:
    """A picture and a model's features of it on an ``h x w`` grid.

    Attributes:
        picture: ``(H, W, 3)`` uint8 RGB, as the model saw it.
        features: ``(h, w, F)`` float32.
        left_out: the shares of the photograph's ``"width"`` and ``"height"`` that a centre crop
            left out; empty if the model saw all of it.
    """

    picture: np.ndarray
    features: np.ndarray
    left_out: Mapping[str, float] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Percept(View):
    """An APM's view, with the colours that it answers.

    Attributes:
        rgb: ``(h, w, 3)`` float32 RGB in [0, 1].
    """

    rgb: np.ndarray


@torch.inference_mode()
def perceive(
    model: APM,
    image: Image.Image,
    *,
    chunk_size: int | None = None,
    dtype: str = "float32",
    local: bool = True,
) -> Percept:
    """Fold an RGB image and answer every location.

    Args:
        chunk_size: locations answered at a time.
        dtype: precision of the matrix products, ``"float32"`` or ``"bfloat16"``.
        local: give the model the local patches, if it has them; else answer from the column alone.
    """
    picture = model.preprocessing.picture(image)
    images = model.preprocessing.normalise(to_pixels(picture))[None].to(model.device)
    with precision(model.device, dtype):
        column = model.encode(images)
        features, rgb = answer_grid(model, column, images if local else None, chunk_size=chunk_size)
    return Percept(
        np.asarray(picture), features[0], rgb[0], left_out=left_out(image, model.preprocessing)
    )


@torch.inference_mode()
def answer_grid(
    model: APM, column: Tensor, images: Tensor | None = None, *, chunk_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``model.query`` of the whole grid, as arrays.

    Args:
        column: ``(B, D)`` trigger columns.
        images: ``(B, 3, H, H)`` preprocessed; None answers from the columns alone.
        chunk_size: locations answered at a time.

    Returns:
        Features ``(B, h, w, F)`` float32 and colours ``(B, h, w, 3)`` float32 RGB in [0, 1].
    """
    answers = model.query(column, chunk_size=chunk_size, images=images)
    side = model.config.grid_size
    features, rgb = (answer.float().cpu().unflatten(1, (side, side)) for answer in answers)
    features = undo_token_offset(features, model.preprocessing.token_offset)
    return features.numpy(), model.preprocessing.to_rgb(rgb).numpy()


def undo_token_offset(features: Tensor, offset: int) -> Tensor:
    """Move features ``(..., h, w, F)`` of a model that learnt them ``offset`` places late.

    The last ``offset`` places were never learnt: they repeat the row above.
    """
    if not offset:
        return features
    width = features.shape[-2]
    tokens = features.flatten(-3, -2).roll(-offset, dims=-2)  # (..., h * w, F)
    tokens[..., -offset:, :] = tokens[..., -offset - width : -width, :]
    return tokens.view_as(features)


def left_out(image: Image.Image, preprocessing: Preprocessing, seen: float = 1) -> dict[str, float]:
    """The shares of an image's sides that a model does not see; empty for at most a pixel.

    Args:
        seen: the share of the preprocessed square's side that the model sees, from its centre.
    """
    if preprocessing.fit == "stretch":
        return {}
    part = seen * min(image.size)
    sizes = zip(("width", "height"), image.size, strict=True)
    return {name: 1 - part / length for name, length in sizes if length - part > 1}


def crop_report(images: Mapping[str, Mapping[str, float]]) -> str:
    """A line on what centre crops left out of images, by name; empty if nothing.

    Args:
        images: name of each image -> ``left_out``.
    """
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
