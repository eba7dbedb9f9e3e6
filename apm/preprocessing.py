"""From a picture to the tensor a checkpoint expects, and back. Each checkpoint carries its own."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a checkpoint wants its images.

    Attributes:
        image_size: side of the square input in pixels.
        fit: ``"crop"`` resizes the shorter side and crops the centre; ``"stretch"`` resizes both.
        channels: colour order of the tensor, ``"RGB"`` or ``"BGR"``.
        scaling: ``"unit"`` divides by 255; ``"min-max"`` maps each image's own range to [0, 1];
            ``"imagenet"`` subtracts ImageNet's mean and divides by its standard deviation.
        token_offset: by how many places the checkpoint's feature grid is shifted, because its
            teacher's leading tokens were never cut off. 0 for a checkpoint without that fault.
    """

    image_size: int = 448
    fit: str = "crop"
    channels: str = "RGB"
    scaling: str = "unit"
    token_offset: int = 0

    def __post_init__(self) -> None:
        for name, choices in {
            "fit": ("crop", "stretch"),
            "channels": ("RGB", "BGR"),
            "scaling": ("unit", "min-max", "imagenet"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be one of {choices}")
        for name, least in (("image_size", 1), ("token_offset", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} {value!r:.80} must be a whole number of at least {least}")

    def picture(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image of any size to ``image_size``, keeping its mode.

        Label images (modes L, I and P) are resized with nearest-neighbour sampling through
        ``labels`` instead.
        """
        return image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC, box=self._box(image))

    def labels(self, mask: Image.Image) -> np.ndarray:
        """A label image cut and resized as its photograph is: ``(H, W)`` int64."""
        side = (self.image_size,) * 2
        return np.asarray(
            mask.resize(side, Image.Resampling.NEAREST, box=self._box(mask)), np.int64
        )

    def _box(self, image: Image.Image) -> tuple[float, float, float, float]:
        # The crop is taken first, so that a 1 x 5000 image does not become 448 x 2,240,000.
        width, height = image.size
        if self.fit == "stretch":
            return (0, 0, width, height)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image of any size -> ``(3, image_size, image_size)`` float32."""
        return self.normalise(to_pixels(self.picture(image)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(..., 3, H, W)`` uint8 RGB -> the same in float32 and the checkpoint's colours."""
        colours = self.colours(pixels)
        if self.scaling == "imagenet":
            mean, std = self.statistics().to(colours.device)[..., None, None]
            colours = (colours - mean) / std
        return colours

    def statistics(self) -> Tensor:
        """``(2, 3)``: what ``normalise`` subtracts from the ``colours``, and divides them by."""
        if self.scaling != "imagenet":
            return torch.tensor([[0.0] * 3, [1.0] * 3])
        order = -1 if self.channels == "BGR" else 1
        return torch.tensor([IMAGENET_MEAN[::order], IMAGENET_STD[::order]])

    def colours(self, pixels: Tensor) -> Tensor:
        """What the RGB head answers for ``(..., 3, H, W)`` uint8 RGB: [0, 1], before ImageNet's."""
        pixels = pixels.float()
        if self.scaling == "min-max":
            low = pixels.amin(dim=(-3, -2, -1), keepdim=True)
            high = pixels.amax(dim=(-3, -2, -1), keepdim=True)
            # A constant image has no range: it becomes black rather than a division by zero.
            pixels = (pixels - low) / (high - low).clamp_min(1)
        else:
            pixels = pixels / 255
        return pixels.flip(-3) if self.channels == "BGR" else pixels

    def to_rgb(self, colours: Tensor) -> Tensor:
        """The RGB head's answers ``(..., 3)`` -> colours for display, RGB in [0, 1]."""
        return (colours.flip(-1) if self.channels == "BGR" else colours).float().clamp(0, 1)


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture -> ``(3, H, W)`` uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
