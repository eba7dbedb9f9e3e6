import numpy as np
import pytest

from apm import islands
from apm.choices import METHODS
from apm.islands import (
    Palette,
    interpolate,
    island_colours,
    island_series,
    principal_axes,
    sample_landmarks,
)


def two_islands(side=12, width=20, noise=0.05):
    random = np.random.default_rng(0)
    centres = random.normal(size=(2, width))
    labels = (np.arange(side * side) % side >= side // 2).astype(int)
    features = centres[labels] + noise * random.normal(size=(side * side, width))
    return features.reshape(side, side, width).astype(np.float32), labels.reshape(side, side)


@pytest.mark.parametrize("method", METHODS)
def test_like_features_get_like_colours(method, monkeypatch):
    monkeypatch.setattr(islands, "CLUSTERS", 2)
    features, labels = two_islands()
    colours = island_colours(features, method)
    assert colours.shape == (12, 12, 3) and colours.dtype == np.float32
    assert colours.min() >= 0 and colours.max() <= 1
    one, other = colours[labels == 0], colours[labels == 1]
    within = max(np.ptp(one, axis=0).min(), np.ptp(other, axis=0).min())
    assert np.linalg.norm(one.mean(0) - other.mean(0)) > within


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_colours(method):
    features, _ = two_islands(noise=1.0)
    first, second = (island_colours(features, method, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_image_is_one_island(method):
    colours = island_colours(np.ones((8, 8, 5), np.float32), method)
    assert np.isfinite(colours).all()
    assert np.ptp(colours.reshape(-1, 3), axis=0).max() == 0


def test_two_images_share_one_colour_space():
    features, _ = two_islands()
    colours = island_colours(np.stack([features, features[:, ::-1]]), "pca")
    np.testing.assert_allclose(colours[0], colours[1, :, ::-1], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_palette_gives_its_landmarks_their_own_colours_and_what_is_like_them_like_ones(method):
    coarse, _ = two_islands(noise=0.5)
    palette = Palette(coarse, method)
    own = island_colours(coarse, method)
    np.testing.assert_allclose(palette(coarse), own, atol=1e-4)
    fine = np.repeat(np.repeat(coarse, 3, axis=0), 3, axis=1)
    noisy = fine + np.random.default_rng(1).normal(scale=1e-4, size=fine.shape)
    np.testing.assert_allclose(palette(noisy)[::3, ::3], own, atol=0.02)


def test_interpolation_is_exact_at_known_points_and_between_its_neighbours_elsewhere():
    random = np.random.default_rng(0)
    known, values = random.normal(size=(50, 4)), random.random((50, 3))
    np.testing.assert_allclose(interpolate(known[::7], known, values), values[::7], atol=1e-5)
    distances = np.linalg.norm(known - 0.1, axis=1)
    nearest = distances.argsort()[:10]
    weights = distances[nearest] ** -2
    expected = weights @ values[nearest] / weights.sum()
    np.testing.assert_allclose(
        interpolate(np.full((1, 4), 0.1), known, values)[0], expected, rtol=1e-4
    )


def test_landmarks_are_places_of_every_picture(monkeypatch):
    monkeypatch.setattr(islands, "MOST_LANDMARKS", 12)
    pictures = [np.full((4, 4, 2), n) + np.arange(16).reshape(4, 4, 1) / 100 for n in range(2)]
    landmarks = sample_landmarks(pictures, 2)
    assert landmarks.shape == (12, 2) and len(np.unique(landmarks[:, 0])) == 12
    assert (landmarks[:6] < 1).all() and (landmarks[6:] >= 1).all()
    both = sample_landmarks([np.stack([grid, -grid]) for grid in pictures], 2)
    np.testing.assert_array_equal(both, [landmarks, -landmarks])  # of two models, the same places


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="umap"):
        island_colours(np.zeros((4, 4, 5)), "umap")


def test_principal_components_keep_all_the_variance_they_can():
    points = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [9, 5, 3, 1, 1, 1]
    points -= points.mean(0)
    projected = points @ principal_axes(points, 3)
    singular = np.linalg.svd(points, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(projected, axis=0), singular[:3], rtol=1e-4)
    assert principal_axes(points[:, :2], 3).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_island_that_stays_keeps_its_colour(channels):
    rng = np.random.default_rng(0)
    left = np.arange(12) < 6
    features = np.where(left[:, None], 1.0, -1.0) * np.ones((12, 12, 8))
    features = np.stack([features + 0.2 * rng.normal(size=features.shape) for _ in range(3)])
    # The features turn over: the islands stay, their first principal component changes its sign.
    features[1:] *= -1
    series = island_series(features, channels)
    assert series.shape == (3, 12, 12, 3) and series.min() >= 0 and series.max() <= 1
    assert (series == series[..., :1]).all() == (channels == 1)
    np.testing.assert_allclose(series, island_series(features, channels))
    features[0] = 1  # constant: no island yet
    assert np.isfinite(island_series(features, channels)).all()
    sides = series[:, :, left].mean(axis=(1, 2)), series[:, :, ~left].mean(axis=(1, 2))
    for now in (1, 2):
        for side, other in (sides, sides[::-1]):
            to_itself = np.abs(side[now] - side[0]).sum()
            assert to_itself < 0.5 * np.abs(side[now] - other[0]).sum()
