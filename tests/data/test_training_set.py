import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

from apm.data.features import NpyStore
from apm.data.images import UnreadableImage, load_image
from apm.data.training_set import TrainingSet, crop_features, epoch_batches
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


def test_an_epoch_holds_each_image_once_and_no_part_of_a_batch():
    batches = epoch_batches(10, 3, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len({index for batch in batches for index in batch} & set(range(10))) == 9
    assert epoch_batches(10, 3, seed=0, epoch=0) == batches
    assert epoch_batches(10, 3, seed=0, epoch=1) != batches
