"""From a picture to the tensor a checkpoint expects, and back. Each checkpoint carries its own."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.choices import FITS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CHOICES = {
    "fit": FITS,
    "channels": ("RGB", "BGR"),
    "scaling": ("unit", "min-max", "imagenet"),
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a checkpoint wants its images."""

    image_size: int = 448  # side of the square input in pixels
    fit: str = "crop"  # of the centre, when the shorter side is resized; "stretch": both are
    channels: str = "RGB"  # colour order of the tensor, or "BGR"
    # "unit" divides by 255, "min-max" maps each image's own range to [0, 1], "imagenet" subtracts
    # ImageNet's mean and divides by its standard deviation.
    scaling: str = "unit"
    # Places by which the feature grid is shifted: its teacher's leading tokens were not cut off.
    token_offset: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be one of {choices}")
        numbers = (self.image_size, self.token_offset)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"image_size and token_offset must be whole numbers, got {numbers}")

    def picture(self, image: Image.Image) -> Image.Image:
        """A photograph of any size as a square of side ``image_size``."""
        # The crop is taken first, so that a 1 x 5000 image does not become 448 x 2,240,000.
        size = (self.image_size,) * 2
        return image.resize(size, Image.Resampling.BICUBIC, box=self._box(image))

    def labels(self, mask: Image.Image, side: int) -> np.ndarray:
        """A label image as its photograph, of another size: ``(side, side)`` int64."""
        size = (side,) * 2
        labels = mask.resize(size, Image.Resampling.NEAREST, box=self._box(mask))
        return np.asarray(labels, np.int64)

    def _box(self, image: Image.Image) -> tuple[float, float, float, float] | None:
        """(left, top, right, bottom) of the centre crop; None where all is kept."""
        if self.fit != "crop":
            return None
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image of any size -> ``(3, image_size, image_size)`` float32."""
        return self.normalise(to_pixels(self.picture(image)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(..., 3, H, W)`` uint8 RGB -> the same in float32 and the checkpoint's colours."""
        colours = self.colours(pixels)
        mean, std = self.statistics().to(colours.device)[..., None, None]
        return (colours - mean) / std

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


def to_pixels(picture: Image.Image | np.ndarray) -> Tensor:
    """An RGB picture -> ``(3, H, W)`` uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
