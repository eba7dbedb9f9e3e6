"""Islands of agreement: locations with like features get like colours (Hinton 2021, GLOM)."""

import numpy as np

METHODS = ("tsne", "pca", "kmeans")
CLUSTERS = 6  # of k-means


def island_colours(features: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """A colour for each location: ``(..., F)`` float -> ``(..., 3)`` float32 RGB in [0, 1].

    Colours compare within one call, also between images.

    Args:
        method: ``"tsne"`` embeds in three dimensions (the paper's), ``"pca"`` takes the first three
            principal components, ``"kmeans"`` gives each cluster a colour.
        seed: same seed, same colours.
    """
    points = features.reshape(-1, features.shape[-1]).astype(np.float32)
    points = points - points.mean(axis=0)
    if method == "tsne":
        colours = _to_unit_range(_tsne(points, seed))
    elif method == "pca":
        colours = _to_unit_range(principal_components(points, 3))
    elif method == "kmeans":
        colours = _cluster_colours(points, seed)
    else:
        raise ValueError(f"islands method {method!r} must be one of {METHODS}")
    return colours.reshape(*features.shape[:-1], 3).astype(np.float32)


def island_series(features: np.ndarray, channels: int = 3, seed: int = 0) -> np.ndarray:
    """The islands of one image at S times, or by S models, by t-SNE.

    ``(S, h, w, F)`` float -> ``(S, h, w, 3)`` float32 RGB in [0, 1]. Each embedding starts from the
    one before, so that an island that stays keeps its colour. One channel gives the greys of the
    paper's Figure 3.
    """
    embedding: np.ndarray | None = None
    series = []
    for points in features.reshape(len(features), -1, features.shape[-1]).astype(np.float32):
        embedding = _tsne(points - points.mean(axis=0), seed, channels, start=embedding)
        series.append(np.broadcast_to(_to_unit_range(embedding), (len(points), 3)))
    return np.stack(series).reshape(*features.shape[:-1], 3).astype(np.float32)


def principal_components(points: np.ndarray, dim: int) -> np.ndarray:
    """Centred points ``(N, F)`` on their first principal axes: ``(N, dim)``, signs fixed."""
    axes = np.linalg.svd(points.T @ points / len(points), hermitian=True)[2][:dim]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    projected = points @ (axes * np.sign(largest)).T
    return np.pad(projected, ((0, 0), (0, dim - projected.shape[1])))


def _tsne(
    points: np.ndarray, seed: int, dim: int = 3, start: np.ndarray | None = None
) -> np.ndarray:
    import openTSNE  # imports scikit-learn: a second that the other methods do not need

    points = principal_components(points, min(50, points.shape[1]))
    if np.ptp(points) == 0:  # a constant image has one island
        return np.zeros((len(points), dim), np.float32)
    fresh = start is None or np.ptp(start) == 0
    embedding = openTSNE.TSNE(
        n_components=dim,
        initialization="pca" if fresh else openTSNE.initialization.rescale(start),
        early_exaggeration_iter=250 if fresh else 0,  # it would move islands far away
        perplexity=min(30, (len(points) - 1) / 3),
        negative_gradient_method="bh",
        random_state=seed,
        # Coarser far-field forces and fewer steps: half the time, at a divergence 3 % higher.
        theta=0.8,
        n_iter=300,
        n_jobs=1,  # a second thread is twelve times slower where another job has its core
    )
    return np.asarray(embedding.fit(points), np.float32)


def _cluster_colours(points: np.ndarray, seed: int) -> np.ndarray:
    import matplotlib
    from sklearn.cluster import KMeans

    clusters = min(CLUSTERS, len(np.unique(points, axis=0)))
    labels = KMeans(clusters, n_init=4, random_state=seed).fit_predict(points)
    # Clusters are numbered along the first component: k-means' own order is arbitrary.
    first = principal_components(points, 1)[:, 0]
    order = np.argsort([first[labels == label].mean() for label in range(clusters)])
    return matplotlib.colormaps["tab20"](np.argsort(order)[labels])[:, :3]


def _to_unit_range(points: np.ndarray) -> np.ndarray:
    low, high = np.percentile(points, (1, 99), axis=0)
    return ((points - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
