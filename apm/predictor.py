"""What a model makes of one picture, as arrays ready to show, save and score."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.model import APM
from apm.preprocessing import to_pixels
from apm.runtime.cli import is_out_of_memory, precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """A picture and what a transformer or a student makes of it on an ``h x w`` grid.

    Attributes:
        picture: ``(H, W, 3)`` uint8 RGB, as the model saw it.
        features: ``(h, w, F)`` float32.
    """

    picture: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Percept(View):
    """A student's view, with the colours it answers.

    Attributes:
        rgb: ``(h, w, 3)`` float32 in [0, 1].
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
        local: give the model the local patches, if it has them; else from the column alone.
    """
    picture = model.preprocessing.picture(image)
    images = model.preprocessing.normalise(to_pixels(picture))[None]
    images = images.to(model.device)
    with precision(images.device, dtype):
        column = model.encode(images)
        answers = query_in_memory(model, column, chunk_size, images if local else None)
    features, rgb = (as_grid(answer[0], model) for answer in answers)
    tokens = undo_token_offset(features, model.preprocessing.token_offset)
    return Percept(np.asarray(picture), tokens, model.preprocessing.to_rgb(rgb).numpy())


def query_in_memory(
    model: APM, column: Tensor, chunk_size: int | None = None, images: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``model.query`` of the whole grid, in ever smaller chunks while the device has no memory."""
    chunk_size = chunk_size or model.config.column_dim
    while True:
        try:
            return model.query(column, chunk_size=chunk_size, images=images)
        except (RuntimeError, MemoryError) as error:
            if chunk_size == 1 or not is_out_of_memory(error):
                raise
        chunk_size //= 2  # outside the handler: what the exception refers to is free again
        logger.warning("out of memory, answering %d locations at a time", chunk_size)


def as_grid(answers: Tensor, model: APM) -> Tensor:
    """``(N, C)`` answers of the whole grid -> ``(h, w, C)`` float32 on the CPU."""
    return answers.float().cpu().unflatten(0, (model.config.grid_size, -1))


def undo_token_offset(features: Tensor, offset: int) -> np.ndarray:
    """Put features back in their places where a checkpoint learnt them ``offset`` places late.

    The last ``offset`` places were never learnt: they repeat the row above.

    Args:
        features: ``(h, w, F)``.
    """
    if offset:
        height, width, _ = features.shape
        tokens = features.flatten(0, 1).roll(-offset, dims=0)
        tokens[-offset:] = tokens[-offset - width : -width]
        features = tokens.unflatten(0, (height, width))
    return features.numpy()
