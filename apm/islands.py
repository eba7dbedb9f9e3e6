"""Islands of agreement: locations with like features get like colours (Hinton 2021, GLOM)."""

from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from apm.choices import METHODS

CLUSTERS = 6  # of k-means
MOST_LANDMARKS = 2048  # of many pictures: twice the points of one, a few seconds of t-SNE


class Palette:
    """Which colour a feature has, fitted to landmarks: one picture's features, or those of many.

    Args:
        landmarks: ``(..., F)`` float.
        method: ``"tsne"`` embeds them in three dimensions (the paper's), ``"pca"`` takes the first
            three principal components, ``"kmeans"`` gives each cluster a colour.
        seed: same seed, same colours.
        channels: of t-SNE's colours: 3, or 1 for greys.
        start: a palette of as many landmarks, at whose embedding t-SNE begins: what stays like
            itself keeps its colour.
    """

    def __init__(
        self,
        landmarks: np.ndarray,
        method: str = "tsne",
        seed: int = 0,
        channels: int = 3,
        start: "Palette | None" = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"islands method {method!r} must be one of {METHODS}")
        self.method, points = method, _flat(landmarks)
        self.centre = points.mean(axis=0)
        points = points - self.centre
        if method == "kmeans":
            self._fit_clusters(points, seed)
        elif method == "pca":
            self.axes = principal_axes(points, 3)
            self.range = np.percentile(points @ self.axes, (1, 99), axis=0)
        else:
            self.axes = principal_axes(points, min(50, points.shape[1]))
            self.landmarks = points @ self.axes
            before = start.embedding if start else None
            self.embedding: np.ndarray = _tsne(self.landmarks, seed, channels, before)
            self.range = np.percentile(self.embedding, (1, 99), axis=0)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """A colour for each location: ``(..., F)`` float -> ``(..., 3)`` float32 RGB in [0, 1]."""
        points = _flat(features) - self.centre
        if self.method == "kmeans":
            colours = self.colours[self.kmeans.predict(points)]
        else:
            points = points @ self.axes
            if self.method == "tsne":
                points = interpolate(points, self.landmarks, self.embedding)
            low, high = self.range
            colours = ((points - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        shape = (*features.shape[:-1], 3)
        return np.broadcast_to(colours, (len(points), 3)).reshape(shape).astype(np.float32)

    def _fit_clusters(self, points: np.ndarray, seed: int) -> None:
        import matplotlib
        from sklearn.cluster import KMeans

        clusters = min(CLUSTERS, len(np.unique(points, axis=0)))
        self.kmeans = KMeans(clusters, n_init=4, random_state=seed).fit(points)
        # Clusters are numbered along the first component: k-means' own order is arbitrary.
        order = np.argsort((self.kmeans.cluster_centers_ @ principal_axes(points, 1))[:, 0])
        self.colours = matplotlib.colormaps["tab20"](np.argsort(order))[:, :3]


def island_colours(features: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """The features' colours by the palette of their own: ``(..., F)`` -> ``(..., 3)`` in [0, 1]."""
    return Palette(features, method, seed)(features)


def island_series(features: np.ndarray, channels: int = 3, seed: int = 0) -> np.ndarray:
    """The islands of one image at S times, by t-SNE: an island that stays keeps its colour.

    ``(S, h, w, F)`` float -> ``(S, h, w, 3)`` float32 RGB in [0, 1]. One channel gives the greys of
    the paper's Figure 3.
    """
    chain = palette_chain(tqdm(features, "islands", unit="picture"), channels, seed)
    return np.stack([palette(step) for palette, step in zip(chain, features, strict=True)])


def palette_chain(landmarks: Iterable[np.ndarray], channels: int, seed: int) -> list[Palette]:
    """A t-SNE palette for each set of landmarks, each embedding begun at the one before."""
    chain: list[Palette] = []
    for points in landmarks:
        start = chain[-1] if chain else None
        chain.append(Palette(points, "tsne", seed, channels, start))
    return chain


def sample_landmarks(grids: Iterable[np.ndarray], pictures: int, seed: int = 0) -> np.ndarray:
    """Some places of each of many pictures, for a palette of all: ``(..., M, F)``.

    Grids are ``(..., h, w, F)``. There are about 2,048 landmarks, at least 4 of each picture.
    """
    random = np.random.default_rng(seed)
    share = max(4, MOST_LANDMARKS // max(pictures, 1))
    samples = []
    for grid in grids:
        points = grid.reshape(*grid.shape[:-3], -1, grid.shape[-1])
        samples.append(points[..., random.permutation(points.shape[-2])[:share], :])
    return np.concatenate(samples, axis=-2)


def interpolate(points: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values ``(M, C)`` of ``(M, F)`` known points at ``(N, F)`` others: Shepard's interpolation.

    The mean of the ten nearest, each weighted by 1 / its squared distance: exact where it is zero.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(10, len(known)), algorithm="brute").fit(known)
    distances, nearest = search.kneighbors(points)
    scale = np.square(known).sum(axis=1).mean() or 1
    weights = 1 / (np.square(distances) / scale + 1e-9)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nk,nkc->nc", weights, values[nearest])


def _flat(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1]).astype(np.float32, copy=False)


def principal_axes(points: np.ndarray, dim: int) -> np.ndarray:
    """The first principal axes of centred points ``(N, F)``: ``(F, dim)``, signs fixed.

    Axes that the points do not have are zero.
    """
    axes = np.linalg.svd(points.T @ points / len(points), hermitian=True)[2][:dim]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    axes = (axes * np.sign(largest)).T
    return np.pad(axes, ((0, 0), (0, dim - axes.shape[1])))


def _tsne(
    points: np.ndarray, seed: int, dim: int = 3, start: np.ndarray | None = None
) -> np.ndarray:
    import openTSNE  # imports scikit-learn: a second that the other methods do not need

    if np.ptp(points) == 0:  # a constant image has one island
        return np.zeros((len(points), dim), np.float32)
    fresh = start is None or np.ptp(start) == 0
    steps, some = (250 if fresh else 0, 300), 50
    progress = tqdm(total=sum(steps), desc="t-SNE", unit="step", delay=3, leave=False)

    def after_some(*_: object) -> None:
        progress.update(some)

    tsne = openTSNE.TSNE(
        n_components=dim,
        initialization="pca" if fresh else openTSNE.initialization.rescale(start),
        early_exaggeration_iter=steps[0],  # 0: it would move islands far away
        perplexity=min(30, (len(points) - 1) / 3),
        negative_gradient_method="bh",
        random_state=seed,
        # Coarser far-field forces and fewer steps: half the time, at a divergence 3 % higher.
        theta=0.8,
        n_iter=steps[1],
        n_jobs=1,  # a second thread is twelve times slower where another job has its core
        callbacks=after_some,
        callbacks_every_iters=some,
    )
    with progress:
        return np.asarray(tsne.fit(points), np.float32)
