import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

from apm.data.features import NpyStore
from apm.data.images import (
    DistillationDataset,
    PictureDataset,
    crop_features,
    find_images,
    image_names,
    load_image,
)
from apm.preprocessing import Preprocessing


def test_every_mode_becomes_upright_rgb(tmp_path):
    base = photograph()
    grey16 = np.asarray(base.convert("L")).astype(np.uint16) * 257
    images = {
        "rgb.png": base,
        "grey.png": base.convert("L"),
        "palette.gif": base.quantize(128),
        "one.png": base.convert("1"),
        "cmyk.jpg": base.convert("CMYK"),
        "sixteen.png": Image.fromarray(grey16),
        "float.tiff": Image.fromarray(np.asarray(base.convert("L")).astype(np.float32) / 255),
        "alpha.png": base.convert("RGBA"),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == base.size
        difference = np.asarray(loaded.convert("L"), int) - np.asarray(base.convert("L"), int)
        if name == "one.png":  # dithered: right on average only
            assert abs(difference.mean()) < 6
        else:
            assert np.abs(difference).mean() < 6, name


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == (10, 20, 30)
    assert loaded.getpixel((3, 3)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)


def test_bad_files_are_named(tmp_path):
    photograph().save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    for name, content in {
        "bomb.png": (tmp_path / "bomb.png").read_bytes(),
        "text.jpg": b"this is no image",
        "empty.png": b"",
        "truncated.jpg": data[: len(data) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_image(tmp_path / "absent.jpg")


def test_find_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", "notes.txt", "b/c.jpeg"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "c.jpeg", "z.JPG"]
    assert len(find_images(tmp_path, limit=2)) == 2
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    assert list(image_names(tmp_path)) == ["b/a", "b/c", "z"]
    with pytest.raises(FileNotFoundError, match="no image in this folder"):
        find_images(make_folder(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")


def test_no_two_images_have_one_name(tmp_path):
    for name in ("x.jpg", "x.png", "x.jpg.png", "y.jpg"):
        (tmp_path / name).touch()
    names = image_names(tmp_path)
    assert {name: path.name for name, path in names.items()} == {
        "x.jpg": "x.jpg",
        "x.png": "x.png",
        "x.jpg.png": "x.jpg.png",
        "y": "y.jpg",
    }


def make_folder(path):
    path.mkdir()
    return path


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    real = make_folder(tmp_path / "real")
    (real / "a.png").touch()
    (real / "loop").symlink_to(tmp_path)
    root = make_folder(tmp_path / "root")
    (root / "link").symlink_to(real)
    assert [p.name for p in find_images(root)].count("a.png") == 1


def test_cropped_features_lie_where_the_crop_lies():
    ramp = (torch.arange(8) + 0.5) / 8  # each location's centre as a share of the side
    features = torch.cartesian_prod(ramp, ramp)
    cropped = crop_features(features, left=0.25, top=0.125, side=0.5).view(8, 8, 2)
    expected = torch.stack(torch.meshgrid(0.125 + 0.5 * ramp, 0.25 + 0.5 * ramp, indexing="ij"), -1)
    torch.testing.assert_close(cropped, expected)


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
    data = DistillationDataset({"a": tmp_path / "a.png"}, Preprocessing(), store, augment=True)
    seen = []
    for data.epoch in range(12):
        image, features = data[0]
        assert (colours(image) - features).abs().mean() < 2
        seen.append(image)
    means = {image.float().mean().item() for image in seen}
    assert 3 <= len(means) <= 11  # some are cropped, some not
    data.epoch = 3
    assert torch.equal(data[0][0], seen[3])
    other = DistillationDataset({"a": tmp_path / "a.png"}, Preprocessing(), augment=True)
    other.epoch = 3
    image, features = other[0]  # without a store the same crop, for the teacher to look at
    assert torch.equal(image, seen[3]) and features.numel() == 0


def test_a_picture_that_cannot_be_read_is_black_and_says_why(tmp_path):
    photograph().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    paths = [tmp_path / name for name in ("good.png", "bad.png", "gone.png")]
    data = PictureDataset(paths, Preprocessing(image_size=28))
    assert data[0][0].shape == (3, 28, 28) and data[0][0].any() and data[0][1] == ""
    assert not data[1][0].any() and "bad.png: cannot be read" in data[1][1]
    assert not data[2][0].any() and "gone.png: no such file" in data[2][1]
