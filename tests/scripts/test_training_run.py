"""What a training run starts from: images held out, images that have features, statistics."""

from argparse import Namespace

import pytest
import torch
from conftest import photograph
from training_run import feature_statistics, training_sets

from apm.config import TrainConfig
from apm.data.training_set import TrainingSet
from apm.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=28)


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


def split(tmp_path, store=None, *, held_out=2, limit=None, seed=0):
    args = Namespace(input=tmp_path, validation_images=held_out, limit=limit)
    return training_sets(args, TrainConfig(seed=seed), SMALL, store)


def test_images_are_held_out_by_the_seed(tmp_path, images):
    training, validation = split(tmp_path)
    assert sorted(training.names + validation.names) == list("abcdef")
    assert len(validation) == 2
    assert [part.names for part in split(tmp_path)] == [training.names, validation.names]
    assert split(tmp_path, seed=1)[1].names != validation.names
    few = split(tmp_path, limit=4)
    assert few[1].names == validation.names and few[0].names == training.names[:2]
    with pytest.raises(ValueError, match="2 images to learn from, expected more than the 2"):
        split(tmp_path, limit=2)


def test_only_images_with_features_of_the_same_file_are_taken(tmp_path, images):
    sizes = {name: images[name].stat().st_size for name in "abc"} | {"x": 3}
    training, validation = split(tmp_path, Store(sizes), held_out=1)
    assert sorted(training.names + validation.names) == list("abc")
    name = training.names[0]
    assert training[0][1].eq(ord(name)).all()
    assert len(split(tmp_path, Store(dict.fromkeys("abc")), held_out=1)[0]) == 2  # sizes unknown
    with pytest.raises(ValueError, match=r"b\.png: \d+ bytes, but --features .* image of 7;"):
        split(tmp_path, Store(sizes | {"b": 7}))


def test_statistics_of_stored_features_and_of_a_teachers(images):
    data = TrainingSet(images, SMALL, Store({}))
    mean, std = feature_statistics(data, None, torch.device("cpu"))
    letters = torch.tensor([float(ord(name)) for name in images])
    torch.testing.assert_close(mean, letters.mean().expand(2))
    torch.testing.assert_close(std, letters.repeat_interleave(4).std().expand(2))

    def teacher(pixels):
        assert pixels.shape == (1, 3, 28, 28) and pixels.max() <= 1
        return torch.tensor([[[1.0], [3.0]]])

    mean, _ = feature_statistics(TrainingSet(images, SMALL), teacher, torch.device("cpu"))
    assert mean == 2
    one = TrainingSet({"a": images["a"]}, SMALL, Store({}))  # whose channels are constant
    assert feature_statistics(one, None, torch.device("cpu"))[1].tolist() == [1, 1]


def test_images_held_out_are_seen_as_they_are(tmp_path, images):
    args = Namespace(input=tmp_path, validation_images=2, limit=None)
    training, validation = training_sets(
        args, TrainConfig(augment=True), SMALL, Store(dict.fromkeys("abcdef"))
    )
    for data, changes in ((training, True), (validation, False)):
        seen = []
        for data.epoch in range(4):
            seen.append(data[0][0])
        assert changes == any(not torch.equal(seen[0], other) for other in seen)
