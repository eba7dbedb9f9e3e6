"""How well islands agree with human masks: k-means on the locations against the mask's classes."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from apm.consensus import COLOUR, agree
from apm.data.images import UnreadableImage, image_names, load_labels, spread
from apm.preprocessing import Preprocessing

UNLABELLED = 0
MIN_SHARE = 10 / 32**2  # of a picture's locations, that a class must have to count
PCA_DIM = 32


def pair_with_masks(
    images: Path, masks: Path, limit: int | None = None
) -> dict[str, tuple[Path, Path]]:
    """The images of a folder that have a mask of their name in another: name -> image, mask.

    ``limit`` as of ``find_images``.
    """
    found = image_names(masks)
    pairs = {
        name: (path, found[name]) for name, path in image_names(images).items() if name in found
    }
    if not pairs:
        raise ValueError(f"{masks}: no mask has the name of an image of {images}")
    names = [*pairs]
    return {names[index]: pairs[names[index]] for index in spread(len(names), limit)}


def mask_labels(
    mask: Path, size: tuple[int, int], preprocessing: Preprocessing, grid: int
) -> np.ndarray:
    """The majority class of a mask in each cell of a grid: ``(N,)`` int, row by row.

    Raises:
        UnreadableImage: if the mask cannot be read, or has another shape than the photograph, whose
            width and height are ``size``.
    """
    image, (width, height) = load_labels(mask), size
    if abs(image.width * height - image.height * width) > width + height:  # more than a pixel
        shape = f"{image.width} x {image.height}, its photograph {width} x {height}"
        raise UnreadableImage(mask, f"another shape than its photograph ({shape})")
    fine = -(-preprocessing.image_size // grid)  # pixels along a side of a cell
    labels = preprocessing.labels(image, fine * grid)
    cells = labels.reshape(grid, fine, grid, fine).swapaxes(1, 2).reshape(grid**2, fine**2)
    return np.array([np.bincount(cell).argmax() for cell in cells])


def island_scores(
    features: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """Cluster the locations' features, ``(..., F)``, and compare the clusters with ``(N,)`` labels.

    Features are centred and reduced to 32 dimensions; k is the number of classes with at least one
    in a hundred locations (10 of 32 x 32); unlabelled ones (0) take part in the clustering but not
    in the comparison.

    Returns:
        Adjusted Rand index (at most 1, 0 by chance) and normalised mutual information (0..1);
        None where fewer than two classes are large enough.
    """
    labelled = labels != UNLABELLED
    k = int((np.bincount(labels[labelled]) >= MIN_SHARE * len(labels)).sum())
    if k < 2:
        return None
    points = features.reshape(len(labels), -1)
    points = points.astype(np.float32) - points.mean(axis=0, dtype=np.float32)
    if points.shape[1] > PCA_DIM:
        points = PCA(min(PCA_DIM, len(points)), random_state=seed).fit_transform(points)
    clusters = KMeans(k, n_init=4, random_state=seed).fit_predict(points)
    return (
        adjusted_rand_score(labels[labelled], clusters[labelled]),
        normalized_mutual_info_score(labels[labelled], clusters[labelled]),
    )


def ways_to(
    name: str,
    features: np.ndarray,
    colours: Tensor,
    consensus: int,
    few: np.ndarray,
    few_colours: Tensor,
    aspect: float = 1.0,
) -> dict[str, np.ndarray]:
    """Features of a grid and other ways to such features, by names that begin with ``name``.

    Args:
        features: ``(h, w, F)``, asked on the grid.
        colours: ``(h, w, 3)`` float in [0, 1], mean colours of its cells.
        consensus: steps, 0 for none.
        few, few_colours: the same of the model's own grid. Where it is as fine there is no other
            way but consensus.
        aspect: height / width of the picture, for consensus.
    """
    ways = {name: features}
    if few.shape != features.shape:
        found = upsampled(few, few_colours, colours)
        ways |= {f"{name}, {way}": values for way, values in found.items()}
    if consensus:
        agreed = agree(torch.from_numpy(features), colours, consensus, aspect)
        ways[f"{name}, consensus {consensus}"] = agreed.numpy()
    return ways


def upsampled(features: np.ndarray, coarse: Tensor, fine: Tensor) -> dict[str, np.ndarray]:
    """Other ways to a finer grid, by name: ``(h, w, F)`` float32 -> ``(H, W, F)``.

    Nearest neighbour, bilinear, and joint bilateral upsampling (Kopf et al. 2007): the mean of the
    5 x 5 nearest places, weighted by distance and by how like the new place's their colour is.

    Args:
        coarse, fine: ``(h, w, 3)`` and ``(H, W, 3)`` float in [0, 1], mean colours of the cells.
    """
    maps, shape = torch.from_numpy(features).permute(2, 0, 1)[None], fine.shape[:2]
    modes = {"nearest": "nearest-exact", "bilinear": "bilinear"}
    ways = {way: F.interpolate(maps, shape, mode=mode)[0] for way, mode in modes.items()}
    places = [  # in units of the coarse grid
        (torch.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(shape, coarse.shape[:2], strict=True)
    ]
    total, weights = torch.zeros(*shape, features.shape[-1]), torch.zeros(*shape, 1)
    for offset in product(range(-2, 3), repeat=2):
        near = [place.round() + step for place, step in zip(places, offset, strict=True)]
        rows, columns = ((n - place) ** 2 for n, place in zip(near, places, strict=True))
        index = [n.long().clamp(0, m - 1) for n, m in zip(near, coarse.shape[:2], strict=True)]
        inside = [n == i for n, i in zip(near, index, strict=True)]
        there = (index[0][:, None], index[1])
        colour = (coarse[there] - fine).square().sum(dim=-1)
        weight = torch.exp(-(rows[:, None] + columns) / 2 - colour / (2 * COLOUR**2))
        weight += 1e-30  # where no place is alike, all count
        weight = (weight * (inside[0][:, None] & inside[1]))[..., None]
        total += weight * torch.from_numpy(features)[there]
        weights += weight
    ways["joint bilateral"] = (total / weights).permute(2, 0, 1)
    return {name: way.permute(1, 2, 0).numpy() for name, way in ways.items()}


def checkerboard(features: np.ndarray, period: int) -> float:
    """How much a feature map ``(N, N, F)`` repeats itself every ``period`` places; 1: no more than
    at other lengths.

    The spectral power along rows and columns at that period, divided by the mean at the three
    frequencies below and the three above, one further away than a Hann window smears.
    """
    side = len(features)
    centred = features - features.mean(axis=(0, 1))
    window = np.hanning(side + 1)[:side]
    power = np.zeros(side // 2 + 1)
    for axis in (0, 1):
        shape = np.expand_dims(window, (1 - axis, 2))
        spectrum = np.abs(np.fft.rfft(centred * shape, axis=axis)) ** 2
        power += spectrum.mean(axis=(1 - axis, 2))
    k = side // period
    return float(power[k] / np.mean([*power[k - 4 : k - 1], *power[k + 2 : k + 5]]))


def mean_scores(
    scored: Sequence[Mapping[str, tuple[float, float]]],
) -> dict[str, dict[str, float]]:
    """Mean ``island_scores`` of each kind of features; pictures without any do not count.

    ``gain`` is the mean difference of its ARI to that of the first kind, paired over the pictures;
    ``*_error`` are standard errors, which a single picture has none of.
    """
    rows, means = [row for row in scored if row], {}
    for name in rows[0] if rows else ():
        ari, nmi = np.array([row[name] for row in rows]).T
        gain = ari - [next(iter(row.values()))[0] for row in rows]
        numbers = {"ari": ari, "nmi": nmi, "gain": gain}
        means[name] = {key: float(values.mean()) for key, values in numbers.items()}
        for key in ("ari", "gain") if len(rows) > 1 else ():
            spread = float(numbers[key].std(ddof=1))
            means[name][f"{key}_error"] = spread / len(rows) ** 0.5
        means[name]["images"] = len(rows)
    return means
