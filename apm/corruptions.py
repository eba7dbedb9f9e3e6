"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, for images of any size.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv:1903.12261, section 4.1. The parameters are those of the published
sets; the random numbers are not, so where chance plays a part images agree with the published ones
in kind, not pixel by pixel.

Every corruption is a function of an image ``(H, W, 3)`` RGB in [0, 1], a generator and the
parameters of one severity; it returns an image that may leave [0, 1]. ``corrupt`` is the way in.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)

# For every corruption and parameter set one entry a severity. Lengths are in pixels, "cifar" meant
# for images of 32 pixels and "imagenet" for 224; they do not change with the image's size.
PARAMETERS: dict[str, dict[str, Any]] = {
    # standard deviation, as a share of the full range
    "gaussian_noise": {
        "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
        "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    # photons at full brightness
    "shot_noise": {
        "cifar": (500, 250, 100, 75, 50),
        "imagenet": (60, 25, 12, 5, 3),
    },
    # share of the values that turn black or white
    "impulse_noise": {
        "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
        "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    # radius of the disc, standard deviation of the blur that softens its edge
    "defocus_blur": {
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    # standard deviation of the blur, largest move, rounds of moves
    "glass_blur": {
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    # half the streak's length, standard deviation along it
    "motion_blur": {
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    # end of the magnifications, step from one to the next
    "zoom_blur": {
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    # flakes: mean, standard deviation, magnification, threshold, half the streak's length, standard
    # deviation along it; last the weight of the image against its whitened self
    "snow": {
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    # weights of image and texture, every n-th pixel of the texture
    "frost": {
        "cifar": ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        "imagenet": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    },
    # thickness, smoothness
    "fog": {
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    # what is added to the value of hue, saturation and value
    "brightness": {
        "cifar": (0.05, 0.1, 0.15, 0.2, 0.3),
        "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    # what is left of the contrast
    "contrast": {
        "cifar": (0.75, 0.5, 0.4, 0.3, 0.15),
        "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    # strength and smoothness of the local moves, largest move of the affine map's three points
    "elastic_transform": {
        "cifar": ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6))
        + ((3.2, 0.96, 0.96),),
        "imagenet": ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88))
        + ((17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    },
    # side of the reduced image as a share of the image's
    "pixelate": {
        "cifar": (0.95, 0.9, 0.85, 0.75, 0.65),
        "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
    },
    # Pillow's quality
    "jpeg_compression": {
        "cifar": (80, 65, 58, 50, 40),
        "imagenet": (25, 18, 15, 10, 7),
    },
}


def corrupt(
    image: ndarray,
    corruption: str,
    severity: int,
    random: Generator,
    *,
    parameters: str = "imagenet",
    frost_textures: Sequence[ndarray] = (),
) -> ndarray:
    """Corrupt one image.

    Args:
        image: ``(H, W, 3)`` uint8 RGB, of any size.
        corruption: one of ``PARAMETERS``.
        severity: 1, the weakest, to 5.
        random: where all chance comes from.
        parameters: ``"cifar"`` or ``"imagenet"``, the published set whose parameters are taken.
        frost_textures: for ``"frost"``, photographs of frost, ``(h, w, 3)`` uint8 RGB.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ValueError: if the image or an argument is none of these.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    if corruption not in PARAMETERS:
        raise ValueError(f"corruption {corruption!r} must be one of {', '.join(PARAMETERS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} must be one of {SEVERITIES}")
    if parameters not in PARAMETERS[corruption]:
        raise ValueError(f"parameters {parameters!r} must be cifar or imagenet")
    values = PARAMETERS[corruption][parameters][severity - 1]
    arguments = values if isinstance(values, tuple) else (values,)
    if corruption == "frost":
        if not frost_textures:
            raise ValueError("frost needs at least one texture, a photograph of frost")
        arguments += (frost_textures,)
    return _to_bytes(_FUNCTIONS[corruption](image / 255, random, *arguments))


def gaussian_noise(image: ndarray, random: Generator, sigma: float) -> ndarray:
    """Noise of low light: one normal number for every value."""
    return image + random.normal(scale=sigma, size=image.shape)


def shot_noise(image: ndarray, random: Generator, photons: float) -> ndarray:
    """Noise of counting photons: a Poisson number for every value."""
    return random.poisson(image * photons) / photons


def impulse_noise(image: ndarray, random: Generator, amount: float) -> ndarray:
    """Salt and pepper: values, not whole pixels, that turn black or white in equal shares."""
    chance = random.random(image.shape)
    return np.where(chance < amount / 2, 0, np.where(chance < amount, 1, image))


def defocus_blur(image: ndarray, random: Generator, radius: float, softness: float) -> ndarray:
    """The mean over a disc with a softened edge."""
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2).astype(float)
    soften = 1 if radius <= 8 else 2  # pixels to each side
    disc = ndimage.gaussian_filter(disc / disc.sum(), softness, mode="mirror", radius=soften)
    return ndimage.convolve(image, disc[..., None], mode="mirror")


def glass_blur(image: ndarray, random: Generator, sigma: float, reach: int, rounds: int) -> ndarray:
    """Frosted glass: blur, let pixels take the colours of random neighbours, blur again."""
    height, width, _ = image.shape
    rows = np.arange(height - reach, reach, -1)[:, None]
    columns = np.arange(width - reach, reach, -1)
    pixels = rows * width + columns
    source = list(range(height * width))
    for _ in range(rounds):
        down, right = random.integers(-reach, reach, (2, *pixels.shape))
        neighbours = pixels + down * width + right
        # One after the other: a pixel can pass on what it has just taken.
        pairs = zip(pixels.ravel().tolist(), neighbours.ravel().tolist(), strict=True)
        for pixel, neighbour in pairs:
            source[pixel] = source[neighbour]
    blurred = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    moved = blurred.reshape(-1, 3)[source].reshape(image.shape)
    return ndimage.gaussian_filter(moved, (sigma, sigma, 0), mode="nearest")


def motion_blur(image: ndarray, random: Generator, radius: int, sigma: float) -> ndarray:
    """A moving camera: streaks within 45 degrees of the horizontal."""
    return _streak(image, radius, sigma, random.uniform(-45, 45))


def zoom_blur(image: ndarray, random: Generator, end: float, step: float) -> ndarray:
    """A camera that nears its object: the mean of the image and its magnifications."""
    magnifications = np.arange(1, end, step)
    total = sum(_magnify(image, factor) for factor in magnifications)
    return (image + total) / (len(magnifications) + 1)


def snow(
    image: ndarray,
    random: Generator,
    mean: float,
    spread: float,
    magnification: float,
    threshold: float,
    radius: int,
    sigma: float,
    image_weight: float,
) -> ndarray:
    """Falling flakes, and their mirror image, over a whitened scene."""
    flakes = _magnify(random.normal(mean, spread, image.shape[:2]), magnification)
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    flakes = _streak(flakes, radius, sigma, random.uniform(-135, -45))[..., None]
    grey = image @ (0.299, 0.587, 0.114)
    whitened = np.maximum(image, 1.5 * grey[..., None] + 0.5)
    scene = image_weight * image + (1 - image_weight) * whitened
    return scene + flakes + flakes[::-1, ::-1]


def frost(
    image: ndarray,
    random: Generator,
    image_weight: float,
    frost_weight: float,
    stride: int,
    textures: Sequence,
) -> ndarray:
    """Ice on the lens: a random piece of a random photograph of frost, added to the image.

    The published sets draw from frost1 to frost5 of their six photographs.
    """
    height, width, _ = image.shape
    photograph = textures[int(random.integers(len(textures)))]
    texture = _enlarge(photograph, height * stride, width * stride)
    top = random.integers(texture.shape[0] - height * stride + 1)
    left = random.integers(texture.shape[1] - width * stride + 1)
    piece = texture[top::stride, left::stride][:height, :width] / 255
    return image_weight * image + frost_weight * piece


def fog(image: ndarray, random: Generator, thickness: float, smoothness: float) -> ndarray:
    """A fractal cloud added to the image, which is then dimmed to its former brightest value."""
    height, width, _ = image.shape
    cloud = _plasma(max(height, width), smoothness, random)[:height, :width, None]
    brightest = image.max()
    return (image + thickness * cloud) * brightest / (brightest + thickness)


def brightness(image: ndarray, random: Generator, added: float) -> ndarray:
    """Daylight: a higher value at the same hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    # Black has no hue: it turns grey.
    return np.divide(image * brighter, value, out=brighter.repeat(3, axis=2), where=value > 0)


def contrast(image: ndarray, random: Generator, remaining: float) -> ndarray:
    """Each channel drawn towards its mean."""
    mean = image.mean(axis=(0, 1))
    return mean + remaining * (image - mean)


def elastic_transform(
    image: ndarray, random: Generator, strength: float, smoothness: float, largest_shift: float
) -> ndarray:
    """A random affine map of the whole image, then smooth random moves of small regions."""
    height, width, _ = image.shape
    grid = np.mgrid[:height, :width].astype(float)
    affine = _random_affine(height, width, largest_shift, random)
    mapped = np.tensordot(affine[:2].T, grid, axes=1) + affine[2, :, None, None]
    image = _sample(image, mapped, mode="mirror")
    moves = ndimage.gaussian_filter(
        random.uniform(-1, 1, grid.shape), (0, smoothness, smoothness), mode="reflect", truncate=3
    )
    return _sample(image, grid + strength * moves, mode="reflect")


def pixelate(image: ndarray, random: Generator, share: float) -> ndarray:
    """A low-resolution image enlarged: blocks of one colour."""
    height, width, _ = image.shape
    small = (max(int(width * share), 1), max(int(height * share), 1))
    picture = Image.fromarray(_to_bytes(image)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(image: ndarray, random: Generator, quality: int) -> ndarray:
    """The traces of lossy compression."""
    file = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return np.asarray(picture) / 255


_FUNCTIONS = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, impulse_noise),
        *(defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, brightness),
        *(contrast, elastic_transform, pixelate, jpeg_compression),
    )
}


def _to_bytes(image: ndarray) -> ndarray:
    """[0, 1] -> uint8, what lies beyond cut off."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _streak(image: ndarray, radius: int, sigma: float, angle: float) -> ndarray:
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


def _magnify(image: ndarray, factor: float) -> ndarray:
    """Enlarge the centre of ``(H, W)`` or ``(H, W, C)`` by ``factor``, at least 1; same size."""
    height, width = image.shape[:2]
    centre = _cut_centre(image, int(np.ceil(height / factor)), int(np.ceil(width / factor)))
    factors = (factor, factor) + (1,) * (image.ndim - 2)
    return _cut_centre(ndimage.zoom(centre, factors, order=1), height, width)


def _cut_centre(image: ndarray, height: int, width: int) -> ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _enlarge(texture: ndarray, height: int, width: int) -> ndarray:
    """A texture of at least ``height`` x ``width`` pixels: itself or, if too small, resized."""
    present = texture.shape[:2]
    factor = max(height / present[0], width / present[1])
    if factor <= 1:
        return texture
    size = (int(np.ceil(present[1] * factor)), int(np.ceil(present[0] * factor)))
    return np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BILINEAR))


def _plasma(side: int, smoothness: float, random: Generator) -> ndarray:
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


def _random_affine(height: int, width: int, largest_shift: float, random: Generator) -> ndarray:
    """A map from (row, column, 1) of the result to (row, column) of the image: ``(3, 2)``.

    It moves each of three points around the centre by up to ``largest_shift`` pixels an axis.
    """
    spread = max(min(height, width) // 3, 1)
    corners = np.array([(1, 1), (1, -1), (-1, -1)])
    points = np.array([height // 2, width // 2]) + spread * corners
    moved = points + random.uniform(-largest_shift, largest_shift, points.shape)
    return np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)


def _sample(image: ndarray, positions: ndarray, mode: str) -> ndarray:
    """Colours of ``(H, W, C)`` at ``(2, h, w)`` rows and columns, bilinear: ``(h, w, C)``."""
    channels = [
        ndimage.map_coordinates(channel, positions, order=1, mode=mode)
        for channel in np.moveaxis(image, 2, 0)
    ]
    return np.stack(channels, axis=2)
