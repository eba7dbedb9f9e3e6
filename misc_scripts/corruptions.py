"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, for images of any size.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv:1903.12261, section 4.1. The parameters are those of the published
sets; the random numbers are not, so where chance plays a part images agree with the published ones
in kind, not pixel by pixel.

``corrupt`` is the way in. Every corruption is a function of an image ``(H, W, 3)`` RGB in [0, 1], a
generator and the parameters of one severity; it returns an image that may leave [0, 1].
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from corruption_steps import enlarge, magnify, plasma, random_affine, sample, streak, to_bytes
from numpy import ndarray
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

FUNCTIONS: dict[str, Callable[..., ndarray]] = {}  # in the published order
PARAMETERS: dict[str, dict[str, Sequence[Any]]] = {}


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
        corruption: one of ``FUNCTIONS``.
        severity: 1, the weakest, to 5.
        random: where all chance comes from.
        parameters: ``"cifar"`` or ``"imagenet"``, the published set whose parameters are taken.
        frost_textures: for ``"frost"``, photographs of frost, ``(h, w, 3)`` uint8 RGB.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    values = PARAMETERS[corruption][parameters][severity - 1]
    arguments = values if isinstance(values, tuple) else (values,)
    if corruption == "frost":
        arguments += (frost_textures,)
    return to_bytes(FUNCTIONS[corruption](image / 255, random, *arguments))


def published(cifar: Sequence[Any], imagenet: Sequence[Any]) -> Callable:
    """Give a corruption its parameters, one entry a severity.

    Lengths are in pixels, ``cifar`` meant for images of 32 pixels and ``imagenet`` for 224; they do
    not change with the image's size.
    """

    def register(function: Callable[..., ndarray]) -> Callable[..., ndarray]:
        FUNCTIONS[function.__name__] = function
        PARAMETERS[function.__name__] = {"cifar": cifar, "imagenet": imagenet}
        return function

    return register


@published(cifar=(0.04, 0.06, 0.08, 0.09, 0.10), imagenet=(0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(image: ndarray, random: Generator, sigma: float) -> ndarray:
    """Noise of low light: one normal number for every value."""
    return image + random.normal(scale=sigma, size=image.shape)


@published(cifar=(500, 250, 100, 75, 50), imagenet=(60, 25, 12, 5, 3))
def shot_noise(image: ndarray, random: Generator, photons: float) -> ndarray:
    """Noise of counting photons, so many at full brightness: a Poisson number for every value."""
    return random.poisson(image * photons) / photons


@published(cifar=(0.01, 0.02, 0.03, 0.05, 0.07), imagenet=(0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(image: ndarray, random: Generator, amount: float) -> ndarray:
    """Salt and pepper: a share of values, not whole pixels, that turn black or white equally."""
    chance = random.random(image.shape)
    return np.where(chance < amount / 2, 0, np.where(chance < amount, 1, image))


@published(
    cifar=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    imagenet=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
)
def defocus_blur(image: ndarray, random: Generator, radius: float, softness: float) -> ndarray:
    """The mean over a disc whose edge is softened by a blur of standard deviation ``softness``."""
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2).astype(float)
    soften = 1 if radius <= 8 else 2  # pixels to each side
    disc = ndimage.gaussian_filter(disc / disc.sum(), softness, mode="mirror", radius=soften)
    return ndimage.convolve(image, disc[..., None], mode="mirror")


@published(
    cifar=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    imagenet=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
)
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


@published(
    cifar=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    imagenet=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
)
def motion_blur(image: ndarray, random: Generator, radius: int, sigma: float) -> ndarray:
    """A moving camera: streaks within 45 degrees of the horizontal."""
    return streak(image, radius, sigma, random.uniform(-45, 45))


@published(
    cifar=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    imagenet=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
)
def zoom_blur(image: ndarray, random: Generator, end: float, step: float) -> ndarray:
    """A camera that nears its object: the mean of the image and its magnifications."""
    magnifications = np.arange(1, end, step)
    total = sum(magnify(image, factor) for factor in magnifications)
    return (image + total) / (len(magnifications) + 1)


@published(
    cifar=(
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    imagenet=(
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
)
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
    flakes = magnify(random.normal(mean, spread, image.shape[:2]), magnification)
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    flakes = streak(flakes, radius, sigma, random.uniform(-135, -45))[..., None]
    grey = image @ (0.299, 0.587, 0.114)
    whitened = np.maximum(image, 1.5 * grey[..., None] + 0.5)
    scene = image_weight * image + (1 - image_weight) * whitened
    return scene + flakes + flakes[::-1, ::-1]


@published(
    cifar=((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
    imagenet=((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
)
def frost(
    image: ndarray,
    random: Generator,
    image_weight: float,
    frost_weight: float,
    stride: int,
    textures: Sequence[ndarray],
) -> ndarray:
    """Ice on the lens: a random piece of a random photograph of frost, added to the image.

    Every ``stride``-th pixel of it is taken. The published sets draw from frost1 to frost5 of their
    six photographs.
    """
    height, width, _ = image.shape
    photograph = textures[int(random.integers(len(textures)))]
    texture = enlarge(photograph, height * stride, width * stride)
    top = random.integers(texture.shape[0] - height * stride + 1)
    left = random.integers(texture.shape[1] - width * stride + 1)
    piece = texture[top::stride, left::stride][:height, :width] / 255
    return image_weight * image + frost_weight * piece


@published(
    cifar=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    imagenet=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
)
def fog(image: ndarray, random: Generator, thickness: float, smoothness: float) -> ndarray:
    """A fractal cloud added to the image, which is then dimmed to its former brightest value."""
    height, width, _ = image.shape
    cloud = plasma(max(height, width), smoothness, random)[:height, :width, None]
    brightest = image.max()
    return (image + thickness * cloud) * brightest / (brightest + thickness)


@published(cifar=(0.05, 0.1, 0.15, 0.2, 0.3), imagenet=(0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(image: ndarray, random: Generator, added: float) -> ndarray:
    """Daylight: a higher value at the same hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    # Black has no hue: it turns grey.
    return np.divide(image * brighter, value, out=brighter.repeat(3, axis=2), where=value > 0)


@published(cifar=(0.75, 0.5, 0.4, 0.3, 0.15), imagenet=(0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(image: ndarray, random: Generator, remaining: float) -> ndarray:
    """Each channel drawn towards its mean."""
    mean = image.mean(axis=(0, 1))
    return mean + remaining * (image - mean)


@published(
    cifar=((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    imagenet=(
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ),
)
def elastic_transform(
    image: ndarray, random: Generator, strength: float, smoothness: float, largest_shift: float
) -> ndarray:
    """A random affine map of the whole image, then smooth random moves of small regions.

    ``largest_shift`` is that of the affine map, ``strength`` and ``smoothness`` are the moves'.
    """
    height, width, _ = image.shape
    grid = np.mgrid[:height, :width].astype(float)
    affine = random_affine(height, width, largest_shift, random)
    mapped = np.tensordot(affine[:2].T, grid, axes=1) + affine[2, :, None, None]
    image = sample(image, mapped, mode="mirror")
    moves = ndimage.gaussian_filter(
        random.uniform(-1, 1, grid.shape), (0, smoothness, smoothness), mode="reflect", truncate=3
    )
    return sample(image, grid + strength * moves, mode="reflect")


@published(cifar=(0.95, 0.9, 0.85, 0.75, 0.65), imagenet=(0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(image: ndarray, random: Generator, share: float) -> ndarray:
    """Blocks of one colour: the image reduced to a share of its side, and enlarged again."""
    height, width, _ = image.shape
    small = (max(int(width * share), 1), max(int(height * share), 1))
    picture = Image.fromarray(to_bytes(image)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)) / 255


@published(cifar=(80, 65, 58, 50, 40), imagenet=(25, 18, 15, 10, 7))
def jpeg_compression(image: ndarray, random: Generator, quality: int) -> ndarray:
    """The traces of lossy compression, at Pillow's quality."""
    file = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return np.asarray(picture) / 255
