"""resize_coco_images.py, and the threads that it shares with make_corruptions.py."""

import json
import threading
import time

import numpy as np
import pytest
from conftest import load_script, photograph
from PIL import Image

from apm.data.images import UnreadableImage

image_threads = load_script("misc_scripts/image_threads.py")


@pytest.fixture
def resize(tmp_path):
    main = load_script("misc_scripts/resize_coco_images.py").main
    (tmp_path / "images" / "sub").mkdir(parents=True)
    common = ["--input", str(tmp_path / "images"), "--output", str(tmp_path / "out")]

    def resize(*arguments):
        return main([*common, *arguments]), tmp_path / "out"

    return resize


@pytest.fixture
def images(tmp_path, resize):
    for index, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        photograph(60 + 30 * index, 60, seed=index).save(tmp_path / "images" / name)
    return tmp_path / "images"


def add_bad(folder):
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "broken.jpg").symlink_to("nothing")
    return {str(folder / name) for name in ("text.jpg", "empty.png", "broken.jpg")}


def test_the_centre_square_of_every_image_under_its_path(resize, images, capsys):
    status, output = resize()
    assert status == 0 and f"3 images in {output}, 0 skipped" in capsys.readouterr().out
    made = {path.relative_to(output).as_posix() for path in output.rglob("*.jpg")}
    assert made == {"a.jpg", "b.jpg", "sub/c.jpg"}
    with Image.open(output / "sub" / "c.jpg") as image:
        assert image.size == (448, 448)
        cut = photograph(120, 60, seed=2).crop((30, 0, 90, 60)).resize((448, 448))
        assert np.abs(np.asarray(image, int) - np.asarray(cut)).mean() < 4


def test_what_is_there_is_kept_and_another_size_is_refused(resize, images, capsys):
    _, output = resize("--image-size", "56")
    (output / "a.jpg").write_bytes(b"mine")
    (output / "b.jpg").unlink()
    assert resize("--image-size", "56")[0] == 0
    assert (output / "a.jpg").read_bytes() == b"mine" and (output / "b.jpg").exists()
    capsys.readouterr()
    assert resize("--image-size", "28")[0] == 2
    printed = capsys.readouterr().err
    assert "image_size 56, not 28" in printed and printed.count("\n") == 1
    assert Image.open(output / "b.jpg").size == (56, 56)


def test_bad_images_are_reported_counted_and_skipped(resize, images, capsys):
    bad = add_bad(images)
    status, output = resize("--image-size", "56", "--workers", "2")
    printed = capsys.readouterr()
    assert status == 0 and f"3 images in {output}, 3 skipped" in printed.out
    results = json.loads((output / "results.json").read_text())
    assert results["images"] == 3 and set(results["skipped"]) == bad
    for path in bad:
        assert f"skipped {path}: cannot be read" in printed.err
    assert [path.name for path in output.rglob(".*")] == [".lock"]


def test_bad_images_alone_are_status_2(resize, tmp_path, capsys):
    bad = add_bad(tmp_path / "images")
    assert resize()[0] == 2
    assert f"none of {len(bad)} images could be read" in capsys.readouterr().err


def test_the_input_must_be_named_and_be_there(resize, tmp_path, capsys):
    main = load_script("misc_scripts/resize_coco_images.py").main
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "required: --input" in capsys.readouterr().err
    assert resize()[0] == 2
    assert "no image in this folder" in capsys.readouterr().err
    assert main(["--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_waits_for_what_has_begun_and_begins_no_more():
    ended, begun, done = threading.Event(), [], []

    def work(item):
        begun.append(item)
        if item == 3:
            raise OSError("no space")
        time.sleep(0.02)
        done.append(item)

    with pytest.raises(OSError, match="no space"):
        image_threads.for_each(work, range(100), 4, ended=ended)
    assert ended.is_set() and {*begun} == {*done, 3} and len(begun) < 50


def test_a_single_image_that_cannot_be_read_is_raised():
    def work(item):
        raise UnreadableImage(item, "no image")

    with pytest.raises(UnreadableImage, match=r"a\.png: no image"):
        image_threads.for_each(work, ["a.png"], 1)
