import os
import pickle

import numpy as np
import pytest
import torch
from conftest import photograph
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from apm.data.images import (
    IMAGE_SUFFIXES,
    Skipped,
    UnreadableImage,
    file_sizes,
    find_classes,
    find_images,
    image_names,
    load_batches,
    load_image,
    load_images,
    load_labels,
)
from apm.data.training_set import TrainingSet
from apm.preprocessing import Preprocessing
from apm.runtime.files import LOCK


def make_folder(path):
    path.mkdir()
    return path


# Reading


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


def seen(path, values):
    """What is read of an image with one channel."""
    Image.fromarray(values).save(path)
    return np.asarray(load_image(path), float)[..., 0]


RAMP = np.linspace(0, 1, 4800, dtype=np.float32).reshape(60, 80)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [(60, 80), (5, 4)])
def test_one_pixel_that_is_no_number_does_not_change_the_others(tmp_path, bad, size):
    values = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size)
    values[size[0] // 2, 1] = bad
    expected = np.nan_to_num(values, posinf=0, neginf=0) * 255
    assert np.abs(seen(tmp_path / "a.tiff", values) - expected).max() <= 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_float_image_with_a_pixel_that_is_no_number_has_its_mean(tmp_path, bad):
    values = RAMP.copy()
    values[30, 40] = bad
    assert seen(tmp_path / "a.tiff", values).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize(("white", "highest"), [(1, 1.02), (255, 260), (1, 0.9), (255, 240)])
def test_a_float_image_a_little_brighter_or_darker_is_read_alike(tmp_path, white, highest):
    values = RAMP * white
    values[0, 0] = highest
    expected = (values / white).clip(0, 1) * 255
    assert np.abs(seen(tmp_path / "a.tiff", values) - expected).max() <= 0.5


def test_a_dark_16_bit_image_is_dark(tmp_path):
    values = (RAMP * 200).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        assert seen(tmp_path / name, values).max() <= 1


def test_32_bit_integers_in_the_range_of_16_bits(tmp_path):
    values = (RAMP * 65535).astype(np.int32)
    assert np.abs(seen(tmp_path / "a.tiff", values) - RAMP * 255).max() <= 1


def test_bad_files_are_named(tmp_path):
    photograph().save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, content in {
        "bomb.png": (tmp_path / "bomb.png").read_bytes(),
        "text.jpg": b"this is no image",
        "empty.png": b"",
        "truncated.jpg": data[: len(data) // 2],
        "pipe.jpg": None,
        "folder.jpg": None,
    }.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        elif name == "folder.jpg":
            (tmp_path / name).mkdir()
        with pytest.raises(UnreadableImage, match=f"{name}: cannot be read as an image") as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # of a worker
    with pytest.raises(UnreadableImage, match=r"absent\.jpg: no such file"):
        load_image(tmp_path / "absent.jpg")


def test_labels_keep_their_numbers(tmp_path):
    ids = np.arange(300, dtype=np.uint16).reshape(15, 20)
    Image.fromarray(ids).save(tmp_path / "many.png")
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "few.png")
    Image.fromarray(ids.astype(np.uint8)).convert("P").save(tmp_path / "palette.png")
    assert (np.asarray(load_labels(tmp_path / "many.png")) == ids).all()
    assert (np.asarray(load_labels(tmp_path / "few.png")) == ids.astype(np.uint8)).all()
    assert load_labels(tmp_path / "palette.png").mode == "P"
    photograph().save(tmp_path / "colours.png")
    with pytest.raises(UnreadableImage, match=r"colours\.png: cannot be read as a mask .*RGB"):
        load_labels(tmp_path / "colours.png")


# Images that cannot be read


def test_what_cannot_be_read_is_skipped_reported_and_counted(tmp_path, capsys):
    photograph().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    skipped = Skipped()
    assert [name for name, _ in load_images(image_names(tmp_path), skipped)] == ["good"]
    assert list(skipped) == [str(tmp_path / "bad.png")]
    assert f"skipped {skipped[str(tmp_path / 'bad.png')]}\n" in capsys.readouterr().err


def test_a_single_bad_image_is_raised_and_many_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"a\.png: cannot be read"):
        list(load_images(image_names(tmp_path / "a.png"), Skipped()))
    with pytest.raises(ValueError, match=r"none of 2 images could be read: .*a\.png: "):
        list(load_images(image_names(tmp_path), Skipped()))


def test_only_unreadable_images_are_skipped():
    skipped = Skipped()
    with pytest.raises(OSError, match="no space"):
        skipped.add(OSError("no space"))
    with pytest.raises(ValueError, match="a mistake"):
        skipped.add(ValueError("a mistake"))
    assert not skipped


@pytest.fixture
def damaged_set(tmp_path):
    """Five images of which the second and the last cannot be read."""
    paths = {name: tmp_path / f"{name}.png" for name in "abcde"}
    for seed, path in enumerate(paths.values()):
        photograph(seed=seed).save(path)
    paths["b"].write_text("no image")
    paths["e"].unlink()
    return TrainingSet(paths, Preprocessing(image_size=28))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_can_be_read(damaged_set, workers):
    skipped = Skipped()
    batches = list(load_batches(damaged_set, [[0, 1], [4], [3, 2]], workers, skipped))
    assert [found for found, _ in batches] == [[0], [], [3, 2]]
    assert batches[1][1] is None
    pixels, _ = batches[2][1]
    assert torch.equal(pixels, torch.stack([damaged_set[3][0], damaged_set[2][0]]))
    assert [reason.split(": ")[1][:20] for reason in skipped.values()] == [
        "cannot be read as an",
        "no such file",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_a_batch_that_must_be_whole_is_raised(damaged_set, workers):
    with pytest.raises(UnreadableImage, match=r"b\.png: cannot be read"):
        list(load_batches(damaged_set, [[0], [2, 1]], workers))


# Finding


def test_find_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", "notes.txt", "b/c.jpeg"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "c.jpeg", "z.JPG"]
    assert [p.name for p in find_images(tmp_path, limit=2)] == ["a.png", "c.jpeg"]
    for index in range(7):
        (tmp_path / f"{index}.png").touch()  # before the others
    assert [p.name for p in find_images(tmp_path, limit=5)] == [
        *("0.png", "2.png", "4.png", "6.png", "c.jpeg")
    ]
    for index in range(7):
        (tmp_path / f"{index}.png").unlink()
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    assert list(image_names(tmp_path)) == ["b/a", "b/c", "z"]
    (tmp_path / "b" / LOCK).touch()  # of a run that wrote there
    assert list(image_names(tmp_path)) == ["z"]
    assert list(image_names(tmp_path / "b")) == ["a", "c"]
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


words = st.text("ab.", min_size=1, max_size=3).filter(lambda word: word[0] != ".")


@given(st.sets(st.tuples(words, st.sampled_from((".png", ".jpg"))).map("".join)))
def test_names_are_as_many_as_images(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("named")
    for name in files | {"at least one.png"}:
        (folder / name).touch()
    assert sorted(image_names(folder).values()) == find_images(folder)
    assert len(find_images(folder)) == len(files) + 1


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    real = make_folder(tmp_path / "real")
    (real / "a.png").touch()
    (real / "loop").symlink_to(tmp_path)
    root = make_folder(tmp_path / "root")
    (root / "link").symlink_to(real)
    assert [p.name for p in find_images(root)].count("a.png") == 1


def test_classes_are_the_folders_that_are_not_hidden(tmp_path):
    for name in ("dog/.thumbs/a.png", ".git/a.png", "cat/.a.png", "cat/b.gif", "dog/sub/a.jp2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loose.png").touch()
    assert {"a", "b"} == {path.stem for paths in find_classes(tmp_path).values() for path in paths}
    assert list(find_classes(tmp_path)) == ["cat", "dog"]
    make_folder(tmp_path / "fox")
    with pytest.raises(FileNotFoundError, match="fox: no image"):
        find_classes(tmp_path)
    for root in (tmp_path / "nowhere", tmp_path / "fox"):
        with pytest.raises(FileNotFoundError, match="no such folder, or no folder of a class"):
            find_classes(root)


def test_every_suffix_that_pillow_reads_is_an_image():
    assert {".gif", ".webp", ".tif", ".bmp", ".jpeg"} <= IMAGE_SUFFIXES
    assert (".jp2" in IMAGE_SUFFIXES) == features.check("jpg_2000")
    assert (".avif" in IMAGE_SUFFIXES) == features.check("avif")
    assert not {".txt", ".npy", ".html"} & IMAGE_SUFFIXES


def test_sizes_of_files_and_broken_links(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")
    (tmp_path / "b.png").symlink_to("nothing")
    assert file_sizes(image_names(tmp_path)) == {"a": 5, "b": 0}
