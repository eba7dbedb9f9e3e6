"""How well islands agree with human masks: k-means on the locations against the mask's classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from apm.data.images import image_names, load_labels
from apm.preprocessing import Preprocessing

UNLABELLED = 0
MIN_LOCATIONS = 10
PCA_DIM = 32


def pair_with_masks(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """The images of a folder that have a mask of their name in another: name -> image, mask."""
    found = image_names(masks)
    pairs = {
        name: (path, found[name]) for name, path in image_names(images).items() if name in found
    }
    if not pairs:
        raise ValueError(f"{masks}: no mask has the name of an image of {images}")
    return pairs


def mask_labels(mask: Path, preprocessing: Preprocessing, patch_size: int) -> np.ndarray:
    """The majority class of a mask in each of a model's patches: ``(N,)`` int, row by row.

    Raises:
        UnreadableImage: if the mask cannot be read.
    """
    labels = preprocessing.labels(load_labels(mask))  # (H, H)
    side = len(labels) // patch_size
    patches = labels.reshape(side, patch_size, side, patch_size).swapaxes(1, 2)
    return np.array([np.bincount(patch).argmax() for patch in patches.reshape(side**2, -1)])


def island_scores(
    features: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """Cluster the locations' features, ``(..., F)``, and compare the clusters with ``(N,)`` labels.

    Features are centred and reduced to 32 dimensions; k is the number of classes with at least 10
    locations; unlabelled locations (0) take part in the clustering but not in the comparison.

    Returns:
        Adjusted Rand index (at most 1, 0 by chance) and normalised mutual information (0..1);
        None where fewer than two classes are large enough.
    """
    labelled = labels != UNLABELLED
    k = int((np.bincount(labels[labelled]) >= MIN_LOCATIONS).sum())
    if k < 2:
        return None
    points = features.reshape(len(labels), -1)
    points = points.astype(np.float32) - points.mean(axis=0, dtype=np.float32)
    if points.shape[1] > PCA_DIM:
        points = PCA(PCA_DIM, random_state=seed).fit_transform(points)
    clusters = KMeans(k, n_init=4, random_state=seed).fit_predict(points)
    return (
        adjusted_rand_score(labels[labelled], clusters[labelled]),
        normalized_mutual_info_score(labels[labelled], clusters[labelled]),
    )


def mean_scores(
    scored: Sequence[Mapping[str, tuple[float, float]]],
) -> dict[str, dict[str, float]]:
    """Mean ``island_scores`` of each kind of features; pictures without any do not count."""
    rows, means = [row for row in scored if row], {}
    for name in rows[0] if rows else ():
        ari, nmi = np.mean([row[name] for row in rows], axis=0).tolist()
        means[name] = {"ari": ari, "nmi": nmi, "images": len(rows)}
    return means
