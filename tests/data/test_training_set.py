import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

from apm.data.features import NpyStore
from apm.data.images import UnreadableImage, load_image
from apm.data.training_set import (
    TrainingSet,
    crop_features,
    epoch_batches,
    feature_statistics,
    training_sets,
)
from apm.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=28)


def test_cropped_features_lie_where_the_crop_lies():
    ramp = (torch.arange(8) + 0.5) / 8  # each location's centre as a share of the side
    features = torch.cartesian_prod(ramp, ramp)
    cropped = crop_features(features, left=0.25, top=0.125, side=0.5).view(8, 8, 2)
    expected = torch.stack(torch.meshgrid(0.125 + 0.5 * ramp, 0.25 + 0.5 * ramp, indexing="ij"), -1)
    torch.testing.assert_close(cropped, expected)
    flipped = crop_features(features, left=0.25, top=0.125, side=0.5, flip=True).view(8, 8, 2)
    torch.testing.assert_close(flipped, expected.flip(1))


def test_image_and_features_are_cropped_and_flipped_alike(tmp_path):
    # Features that are the image's own colours must still be so after augmentation.
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((448, 448), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    picture = torch.from_numpy(np.asarray(load_image(tmp_path / "a.png")).copy())

    def colours(image):
        return torch.nn.functional.avg_pool2d(image.float(), 14).flatten(1).T

    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "a.npy", colours(picture.permute(2, 0, 1)).numpy())
    store = NpyStore(tmp_path / "features")
    data = TrainingSet({"a": tmp_path / "a.png"}, Preprocessing(), store, augment=True)
    seen = []
    for data.epoch in range(12):
        image, features = data[0]
        assert (colours(image) - features).abs().mean() < 2
        seen.append(image)
    means = {image.float().mean().item() for image in seen}
    assert 3 <= len(means) <= 11  # some are cropped, some not
    data.epoch = 3
    assert torch.equal(data[0][0], seen[3])
    other = TrainingSet({"a": tmp_path / "a.png"}, Preprocessing(), augment=True)
    other.epoch = 3
    image, features = other[0]  # without a store the same crop, for the teacher to look at
    assert torch.equal(image, seen[3]) and features.numel() == 0


def test_a_picture_that_cannot_be_read_says_why(tmp_path):
    photograph().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    data = TrainingSet({n: tmp_path / f"{n}.png" for n in ("good", "bad", "gone")}, SMALL)
    assert len(data) == 3 and data[0][0].shape == (3, 28, 28) and data[0][0].any()
    with pytest.raises(UnreadableImage, match=r"bad\.png: cannot be read"):
        data[1]
    with pytest.raises(UnreadableImage, match=r"gone\.png: no such file"):
        data[2]


@pytest.fixture
def images(tmp_path):
    paths = {name: tmp_path / f"{name}.png" for name in "abcdef"}
    for seed, path in enumerate(paths.values()):
        photograph(seed=seed).save(path)
    return paths


class Store:
    """Features of some images: the letter's number."""

    def __init__(self, sizes):
        self.sizes = sizes

    def read(self, name):
        return torch.full((4, 2), float(ord(name)))


def split(images, store=None, *, held_out=2, limit=None, seed=0):
    choice = {"held_out": held_out, "limit": limit, "augment": False, "seed": seed}
    return training_sets(images, SMALL, store, **choice)


def test_images_are_held_out_by_the_seed(images):
    training, validation = split(images)
    assert sorted(training.names + validation.names) == list("abcdef")
    assert len(validation) == 2
    again = split(dict(reversed(images.items())))  # the order of the files does not matter
    assert [part.names for part in again] == [training.names, validation.names]
    assert split(images, seed=1)[1].names != validation.names
    few = split(images, limit=4)
    assert few[1].names == validation.names and few[0].names == training.names[:2]
    with pytest.raises(ValueError, match="2 images to learn from, expected more than the 2"):
        split(images, limit=2)


def test_only_images_with_features_of_the_same_file_are_taken(images):
    sizes = {name: images[name].stat().st_size for name in "abc"} | {"x": 3}
    training, validation = split(images, Store(sizes), held_out=1)
    assert sorted(training.names + validation.names) == list("abc")
    name = training.names[0]
    assert training[0][1].eq(ord(name)).all()
    assert len(split(images, Store(dict.fromkeys("abc")), held_out=1)[0]) == 2  # sizes unknown
    with pytest.raises(ValueError, match=r"b\.png: \d+ bytes, but --features .* image of 7;"):
        split(images, Store(sizes | {"b": 7}))


def test_an_epoch_holds_each_image_once_and_no_part_of_a_batch():
    batches = epoch_batches(10, 3, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len({index for batch in batches for index in batch} & set(range(10))) == 9
    assert epoch_batches(10, 3, seed=0, epoch=0) == batches
    assert epoch_batches(10, 3, seed=0, epoch=1) != batches


def test_statistics_of_stored_features_and_of_a_teachers(images):
    data = TrainingSet(images, SMALL, Store({}))
    mean, std = feature_statistics(data, None)
    letters = torch.tensor([float(ord(name)) for name in images])
    torch.testing.assert_close(mean, letters.mean().expand(2))
    torch.testing.assert_close(std, letters.repeat_interleave(4).std().expand(2))

    def teacher(pixels):
        assert pixels.shape == (1, 3, 28, 28) and pixels.max() <= 1
        return torch.tensor([[[1.0], [3.0]]])

    mean, _ = feature_statistics(TrainingSet(images, SMALL), teacher)
    assert mean == 2
