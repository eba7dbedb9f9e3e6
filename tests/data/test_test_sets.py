import os

import numpy as np
import pytest
from conftest import photograph
from PIL import features
from tiny_clip_data import load_splits

from apm.choices import CORRUPTIONS, DATASETS
from apm.data.class_names import CIFAR10_CLASSES
from apm.data.images import UnreadableImage, find_images, spread
from apm.data.test_sets import load_dataset


def test_a_folder_of_class_folders(tmp_path):
    for name in ("n02123045", "sea_or_lake"):
        (tmp_path / name).mkdir()
        photograph().save(tmp_path / name / "a.png")
    data = load_dataset("imagefolder", tmp_path)
    assert data.class_names == ("tabby", "sea or lake")
    image, label = data[1]
    assert image.size == (80, 60) and label == 1


def labels(data):
    return [data[index][1] for index in range(len(data))]


def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path):
    for folder in ("cat", "dog", ".ipynb_checkpoints", "dog/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        photograph().save(tmp_path / folder / "a.png")
    data = load_dataset("imagefolder", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert labels(data) == [0, 1]


def test_every_format_that_is_read_elsewhere_is_read_here(tmp_path):
    (tmp_path / "cat").mkdir()
    suffixes = ("png", "jpg", "gif", "jp2", "webp", *(["avif"] if features.check("avif") else []))
    for suffix in suffixes:
        photograph().save(tmp_path / "cat" / f"a.{suffix}")
    data = load_dataset("imagefolder", tmp_path)
    assert len(data) == len(suffixes) == len(find_images(tmp_path))
    for index in range(len(suffixes)):
        image, label = data[index]
        assert image.mode == "RGB" and image.size == (80, 60) and label == 0


def test_hidden_folders_of_eurosat(tmp_path):
    for folder in (".ipynb_checkpoints", "AnnualCrop", "Forest"):
        path = tmp_path / "eurosat" / "2750" / folder / "a.jpg"
        path.parent.mkdir(parents=True)
        photograph().save(path)
    data = load_dataset("eurosat", tmp_path)
    assert [data.class_names[label] for label in labels(data)] == ["annual crop land", "forest"]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"a\.png: cannot be read"):
        load_dataset("imagefolder", tmp_path)[0]


def test_torchvisions_loaders_give_other_errors_and_modes(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    (tmp_path / "caltech101" / "Annotations").mkdir(parents=True)
    for name in ("BACKGROUND_Google", "emu", "yin_yang"):
        (folder / name).mkdir(parents=True)
    photograph().convert("L").save(folder / "emu" / "image_0001.jpg")
    (folder / "yin_yang" / "image_0001.jpg").write_text("no image")
    data = load_dataset("caltech101", tmp_path)
    assert data.class_names == ("emu", "yin yang")
    image, label = data[0]
    assert image.mode == "RGB" and label == 0
    with pytest.raises(UnreadableImage, match="caltech101, image 1: cannot identify"):
        data[1]


def test_a_changed_set_of_ones_own_is_another_set(tmp_path):
    path = tmp_path / "cat" / "b.png"
    path.parent.mkdir()
    photograph().save(path)

    def identity():
        return load_dataset("imagefolder", tmp_path).files_sha256

    found = [identity(), identity()]
    assert found[0] == found[1]
    os.utime(path, ns=(0, 0))  # rewritten
    found.append(identity())
    photograph().save(tmp_path / "cat" / "a.png")  # added: every index moves on
    found.append(identity())
    assert len(set(found)) == 3
    (tmp_path / "cat" / "dead.png").symlink_to(tmp_path / "nowhere")
    found.append(identity())
    assert len(set(found)) == 4


def test_a_published_set_has_its_own_files(tmp_path):
    path = tmp_path / "eurosat" / "2750" / "River" / "a.png"
    path.parent.mkdir(parents=True)
    photograph().save(path)
    before = load_dataset("eurosat", tmp_path)
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / "a.png").touch()  # of another set
    assert load_dataset("eurosat", tmp_path).files_sha256 == before.files_sha256
    os.utime(path, ns=(0, 0))
    assert load_dataset("eurosat", tmp_path).files_sha256 != before.files_sha256


def test_a_limit_is_spread_over_the_set():
    assert spread(10, None) == spread(10, 20) == list(range(10))
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    labels = [index // 100 for index in range(1000)]  # sorted by class, as folders are
    assert {labels[index] for index in spread(1000, 10)} == set(range(10))


def test_a_limit_takes_as_many_photographs_as_it_can_and_all_versions_alike():
    photographs, versions = 500, 15
    assert sorted(spread(7500, None, versions)) == list(range(7500))
    for limit in (10, 300, 450, 500, 1000, 7000):
        chosen = spread(7500, limit, versions)
        assert len(set(chosen)) == limit
        shown = [index % photographs for index in chosen]
        assert len(set(shown)) == min(limit, photographs)
        assert max(np.diff(shown)) <= -(-photographs // limit)  # from all of the set
        assert np.ptp(np.bincount([index // photographs for index in chosen], minlength=15)) <= 1


def test_a_training_set_and_its_test_set(tmp_path):
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / folder).mkdir(parents=True)
        photograph().save(tmp_path / folder / "a.png")
    train, test = load_splits(tmp_path)
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.images != test.images
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "fox")
    with pytest.raises(ValueError, match="different classes"):
        load_splits(tmp_path)


def test_cifar10c(tmp_path):
    images = np.arange(5 * 4, dtype=np.uint8).repeat(32 * 32 * 3).reshape(20, 32, 32, 3)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile([3, 1, 4, 1], 5))
    data = load_dataset("cifar10c", tmp_path, corruption="fog", severity=2)
    assert data.class_names == CIFAR10_CLASSES and len(data) == 4
    image, label = data[2]
    assert image.getpixel((0, 0)) == (6, 6, 6) and label == 4
    for name in CORRUPTIONS:
        np.save(tmp_path / f"{name}.npy", images)
    everything = load_dataset("cifar10c", tmp_path, severity=5)
    fog = load_dataset("cifar10c", tmp_path, corruption="fog")
    os.utime(tmp_path / "snow.npy", ns=(0, 0))
    assert load_dataset("cifar10c", tmp_path).files_sha256 != everything.files_sha256
    again = load_dataset("cifar10c", tmp_path, corruption="fog")
    assert again.files_sha256 == fog.files_sha256
    assert len(everything) == 15 * 4 and everything.name == "cifar10c-all-5"
    assert (everything.versions, fog.versions) == (15, 1)
    assert [everything.photograph(index) for index in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [everything[index][1] for index in range(8)] == [3, 1, 4, 1] * 2
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity"):
            load_dataset("cifar10c", tmp_path, corruption="fog", severity=severity)
    with pytest.raises(ValueError, match=r"drizzle\.npy: cannot be read"):
        load_dataset("cifar10c", tmp_path, corruption="drizzle")
    for odd in (images[:7], images / 255, images.transpose(0, 3, 1, 2), images[..., [0, 1, 2, 0]]):
        np.save(tmp_path / "odd.npy", odd)
        with pytest.raises(ValueError, match="five severities"):
            load_dataset("cifar10c", tmp_path, corruption="odd")
    np.save(tmp_path / "labels.npy", np.full(20, 10))
    with pytest.raises(ValueError, match="labels 0 to 9"):
        load_dataset("cifar10c", tmp_path, corruption="fog")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "cifar10c"])
def test_missing_data_are_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=f"no {name} there") as error:
        load_dataset(name, tmp_path)
    assert "\n" not in str(error.value)
