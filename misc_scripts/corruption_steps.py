"""What the corruptions are made of: streaks, magnifications, clouds, maps of the plane."""

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image
from scipy import ndimage


def to_bytes(image: ndarray) -> ndarray:
    """[0, 1] -> uint8, what lies beyond cut off."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def streak(image: ndarray, radius: int, sigma: float, angle: float) -> ndarray:
    """Smear ``(H, W)`` or ``(H, W, C)`` to one side, as a Gaussian that begins at each pixel.

    Args:
        image: what is smeared; beyond its border it goes on as at the border.
        radius: the streak is of ``2 * radius + 1`` pixels.
        sigma: standard deviation along it in pixels.
        angle: its direction in degrees, 0 along the row and 90 along the column.
    """
    height, width = image.shape[:2]
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    weights /= weights.sum()
    reach = 2 * radius
    padded = np.pad(image, ((reach, reach), (reach, reach)) + ((0, 0),) * (image.ndim - 2), "edge")
    down = reach + np.rint(distance * np.sin(np.deg2rad(angle))).astype(int)
    right = reach + np.rint(distance * np.cos(np.deg2rad(angle))).astype(int)
    return sum(
        weight * padded[top : top + height, left : left + width]
        for weight, top, left in zip(weights, down, right, strict=True)
    )


def magnify(image: ndarray, factor: float) -> ndarray:
    """Enlarge the centre of ``(H, W)`` or ``(H, W, C)`` by ``factor``, at least 1; same size."""
    height, width = image.shape[:2]
    centre = _cut_centre(image, int(np.ceil(height / factor)), int(np.ceil(width / factor)))
    factors = (factor, factor) + (1,) * (image.ndim - 2)
    return _cut_centre(ndimage.zoom(centre, factors, order=1), height, width)


def _cut_centre(image: ndarray, height: int, width: int) -> ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def enlarge(texture: ndarray, height: int, width: int) -> ndarray:
    """A texture of at least ``height`` x ``width`` pixels: itself or, if too small, resized."""
    present = texture.shape[:2]
    factor = max(height / present[0], width / present[1])
    if factor <= 1:
        return texture
    size = (int(np.ceil(present[1] * factor)), int(np.ceil(present[0] * factor)))
    return np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BILINEAR))


def plasma(side: int, smoothness: float, random: Generator) -> ndarray:
    """A fractal cloud by the diamond-square algorithm on a torus.

    Returns:
        A square in [0, 1] of the next power of two from ``side``, at least 2.
    """
    size = 1 << (max(side, 2) - 1).bit_length()
    cloud = np.zeros((size, size))
    step, roughness = size, 1.0
    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]
        noise = random.uniform(-roughness, roughness, (3, *corners.shape))
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        across = np.roll(right, -1, axis=0)
        centres = (corners + right + below + across) / 4 + noise[0]
        above, before = np.roll(centres, 1, axis=0), np.roll(centres, 1, axis=1)
        cloud[half::step, half::step] = centres
        cloud[::step, half::step] = (corners + right + centres + above) / 4 + noise[1]
        cloud[half::step, ::step] = (corners + below + centres + before) / 4 + noise[2]
        step, roughness = half, roughness / smoothness**2
    return (cloud - cloud.min()) / np.ptp(cloud)


def random_affine(height: int, width: int, largest_shift: float, random: Generator) -> ndarray:
    """A map from (row, column, 1) of the result to (row, column) of the image: ``(3, 2)``.

    It moves each of three points around the centre by up to ``largest_shift`` pixels an axis.
    """
    spread = max(min(height, width) // 3, 1)
    corners = np.array([(1, 1), (1, -1), (-1, -1)])
    points = np.array([height // 2, width // 2]) + spread * corners
    moved = points + random.uniform(-largest_shift, largest_shift, points.shape)
    return np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)


def sample(image: ndarray, positions: ndarray, mode: str) -> ndarray:
    """Colours of ``(H, W, C)`` at ``(2, h, w)`` rows and columns, bilinear: ``(h, w, C)``."""
    channels = [
        ndimage.map_coordinates(channel, positions, order=1, mode=mode)
        for channel in np.moveaxis(image, 2, 0)
    ]
    return np.stack(channels, axis=2)
