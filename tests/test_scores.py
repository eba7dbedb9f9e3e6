import numpy as np
import pytest
from PIL import Image
from test_islands import two_islands

from apm.data.images import UnreadableImage
from apm.preprocessing import Preprocessing
from apm.scores import (
    island_scores,
    mask_labels,
    mean_scores,
    pair_with_masks,
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
    labels[20:25] = 9  # 5 locations: no third cluster is made for them
    assert island_scores(features, labels)[0] > 0.85
    assert island_scores(features, np.where(labels == 2, 0, 1)) is None


def test_a_patch_has_its_majoritys_label(tmp_path):
    mask = np.zeros((42, 42), np.uint8)
    mask[:14, :14] = 5
    mask[:14, 14:20] = 7
    mask[14:28, 30:] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    labels = mask_labels(tmp_path / "mask.png", Preprocessing(image_size=42), 14)
    assert labels.tolist() == [5, 0, 0, 0, 0, 200, 0, 0, 0]


def test_labels_of_a_mask_are_those_of_the_crop(tmp_path):
    mask = np.zeros((28, 56), np.uint8)
    mask[:, :28], mask[:, 28:] = 3, 4  # the crop is the middle half
    Image.fromarray(mask).save(tmp_path / "mask.png")
    labels = mask_labels(tmp_path / "mask.png", Preprocessing(image_size=28), 14)
    assert labels.tolist() == [3, 4, 3, 4]
    (tmp_path / "mask.png").write_text("no mask")
    with pytest.raises(UnreadableImage, match=r"mask\.png: cannot be read as a mask"):
        mask_labels(tmp_path / "mask.png", Preprocessing(image_size=28), 14)


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
    assert means == pytest.approx({"ari": 0.3, "nmi": 0.6, "images": 2})
    assert mean_scores([{}]) == {}
