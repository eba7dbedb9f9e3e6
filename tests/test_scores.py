import numpy as np
import pytest
import torch
from PIL import Image
from test_islands import two_islands

from apm.consensus import COLOUR
from apm.data.images import UnreadableImage
from apm.preprocessing import Preprocessing
from apm.scores import (
    checkerboard,
    island_scores,
    mask_labels,
    mean_scores,
    pair_with_masks,
    upsampled,
)


def test_scores_of_perfect_and_of_useless_features():
    features, labels = two_islands()
    ari, nmi = island_scores(features.reshape(144, -1), labels.ravel() + 1)
    assert ari == pytest.approx(1) and nmi == pytest.approx(1)
    noise = np.random.default_rng(1).normal(size=(144, 8))
    ari, _ = island_scores(noise, labels.ravel() + 1)
    assert abs(ari) < 0.1


def test_unlabelled_places_and_small_classes_do_not_count():
    features, labels = two_islands()
    labels = labels.ravel() + 1
    labels[:6] = 0  # would be wrong if they counted
    features = features.reshape(144, -1)
    features[:6] = features[-1]
    assert island_scores(features, labels)[0] == pytest.approx(1)
    labels[20:21] = 9  # 1 of 144 locations: no third cluster is made for it
    assert island_scores(features, labels)[0] > 0.85
    assert island_scores(features, np.where(labels == 2, 0, 1)) is None


def test_a_patch_has_its_majoritys_label(tmp_path):
    mask = np.zeros((42, 42), np.uint8)
    mask[:14, :14] = 5
    mask[:14, 14:20] = 7
    mask[14:28, 30:] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    labels = mask_labels(tmp_path / "mask.png", (42, 42), Preprocessing(image_size=42), 3)
    assert labels.tolist() == [5, 0, 0, 0, 0, 200, 0, 0, 0]


def test_labels_of_a_mask_are_those_of_the_crop(tmp_path):
    mask = np.zeros((28, 56), np.uint8)
    mask[:, :28], mask[:, 28:] = 3, 4  # the crop is the middle half
    Image.fromarray(mask).save(tmp_path / "mask.png")
    labels = mask_labels(tmp_path / "mask.png", (56, 28), Preprocessing(image_size=28), 2)
    assert labels.tolist() == [3, 4, 3, 4]
    (tmp_path / "mask.png").write_text("no mask")
    with pytest.raises(UnreadableImage, match=r"mask\.png: cannot be read as a mask"):
        mask_labels(tmp_path / "mask.png", (56, 28), Preprocessing(image_size=28), 2)


def test_a_mask_of_another_shape_than_its_photograph_is_refused(tmp_path):
    Image.new("L", (56, 28), 1).save(tmp_path / "mask.png")
    for size in ((28, 56), (50, 28)):
        with pytest.raises(UnreadableImage, match=r"another shape.*56 x 28"):
            mask_labels(tmp_path / "mask.png", size, Preprocessing(image_size=28), 2)
    for size in ((113, 56), (640, 320)):  # another size of the same
        mask_labels(tmp_path / "mask.png", size, Preprocessing(image_size=28), 2)
    for wrong in (-1.0, float("nan")):
        Image.fromarray(np.full((28, 28), wrong, np.float32)).save(tmp_path / "mask.tiff")
        with pytest.raises(UnreadableImage, match=r"mask\.tiff.*expected class ids"):
            mask_labels(tmp_path / "mask.tiff", (28, 28), Preprocessing(image_size=28), 2)


def test_few_places_are_scored_too():
    features = np.random.default_rng(0).normal(size=(3, 3, 50))
    features[:, 2] += 10
    assert island_scores(features, np.array([1, 1, 2] * 3)) == (1, 1)


def test_images_and_masks_are_paired_by_name(tmp_path):
    for name in ("images/a.jpg", "images/b.jpg", "masks/b.png", "masks/c.png", "others/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert pair_with_masks(images, masks) == {"b": (images / "b.jpg", masks / "b.png")}
    with pytest.raises(ValueError, match="others: no mask"):
        pair_with_masks(images, tmp_path / "others")


def test_mean_scores_leave_out_pictures_that_could_not_be_scored():
    scored = [{"student": (0.2, 0.4)}, {}, {"student": (0.4, 0.8)}]
    means = mean_scores(scored)["student"]
    expected = {"ari": 0.3, "ari_error": 0.1, "nmi": 0.6, "gain": 0, "gain_error": 0, "images": 2}
    assert means == pytest.approx(expected)
    assert mean_scores([{}]) == {}
    assert "ari_error" not in mean_scores(scored[:1])["student"]


def test_gains_are_paired_over_the_pictures():
    rows = [
        {"student": (0.1 * n, 0), "other": (0.1 * n + gain, 0)} for n, gain in ((1, 0.1), (5, 0.2))
    ]
    other = mean_scores(rows)["other"]
    assert other["gain"] == pytest.approx(0.15) and other["gain_error"] == pytest.approx(0.05)
    assert other["ari_error"] == pytest.approx(0.25)


def test_a_checkerboard_is_seen_and_noise_has_none():
    random = np.random.default_rng(0)
    smooth = random.normal(size=(64, 64, 20)).cumsum(axis=0).cumsum(axis=1)
    assert checkerboard(smooth, 4) == pytest.approx(1, abs=0.3)
    every_fourth = np.where(np.arange(64) % 4 == 1, smooth.std() / 3, 0)
    assert checkerboard(smooth + every_fourth[:, None], 4) > 3
    assert checkerboard(smooth + every_fourth[:, None, None], 4) > 3
    assert checkerboard(smooth + every_fourth[:, None], 8) < 1.3


def test_other_ways_to_a_finer_grid():
    """Joint bilateral upsampling against its formula, place by place."""
    random = np.random.default_rng(0)
    features = random.normal(size=(6, 6, 3)).astype(np.float32)
    coarse, fine = (torch.from_numpy(0.2 * random.random((n, n, 3), np.float32)) for n in (6, 12))
    ways = upsampled(features, coarse, fine)
    np.testing.assert_array_equal(ways["nearest"], features.repeat(2, axis=0).repeat(2, axis=1))
    third = upsampled(features, coarse, torch.zeros(4, 4, 3))["nearest"]  # middles: 0.25, 1.75, ...
    np.testing.assert_array_equal(third, features[[0, 2, 3, 5]][:, [0, 2, 3, 5]])
    between = 0.75 * features[1] + 0.25 * features[2]
    expected = 0.25 * between[1] + 0.75 * between[2]
    np.testing.assert_allclose(ways["bilinear"][3, 4], expected, atol=1e-5)
    for row, column in ((0, 0), (5, 8)):
        total, weights = np.zeros(3), 0.0
        middle = [(x + 0.5) / 2 - 0.5 for x in (row, column)]
        near = [round(x) for x in middle]
        for down in range(near[0] - 2, near[0] + 3):
            for right in range(near[1] - 2, near[1] + 3):
                if 0 <= down < 6 and 0 <= right < 6:
                    distance = (down - middle[0]) ** 2 + (right - middle[1]) ** 2
                    colour = (coarse[down, right] - fine[row, column]).square().sum().item()
                    weight = np.exp(-distance / 2 - colour / (2 * COLOUR**2))
                    total, weights = total + weight * features[down, right], weights + weight
        np.testing.assert_allclose(ways["joint bilateral"][row, column], total / weights, atol=1e-4)
