"""Test-time training of one image, with a CLIP with random weights."""

import json

import pytest
from conftest import ROOT, TINY, help_of, load_script, photograph, refused, save_tiny_clip
from PIL import Image

from apm import APMConfig

BUNDLED_TEACHER = ROOT / "checkpoints" / "clip_tiny.pt"


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny.pt")


@pytest.fixture(scope="module")
def main():
    return load_script("single_token_segmentation/train_tta.py").main


@pytest.fixture
def command(tiny_clip, tmp_path):
    photograph().save(tmp_path / "a.png")
    return [
        *("--input", str(tmp_path / "a.png"), "--teacher", str(tiny_clip)),
        *("--output", str(tmp_path / "out")),
    ]


@pytest.fixture
def small_student(monkeypatch):
    """56 px and a few thousand parameters instead of the paper's."""

    def tta(feature_dim, pooling):
        return APMConfig(**TINY | {"feature_dim": feature_dim, "pooling": pooling})

    monkeypatch.setattr(APMConfig, "tta", tta)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_one_image_from_whole_to_parts(main, small_student, command, tmp_path, capsys):
    output = tmp_path / "out"
    more = ["--classes", "cat,dog,cup of coffee", "--iterations", "4", "--every", "2"]
    assert main([*command, *more]) == 0
    assert "student:" in capsys.readouterr().out
    found = results(output)
    assert len(found["losses"]) == 1 + 4 and found["losses"][4] < found["losses"][0]
    assert set(found["probabilities"]["student"]) == {"cat", "dog", "cup of coffee"}
    with Image.open(output / "islands.gif") as animation:
        assert animation.n_frames == 2
    with Image.open(output / "islands.png") as picture:
        assert picture.width > 600
    assert (output / "loss.png").exists()
    page = (output / "index.html").read_text()
    assert f'"values": [2, 4], "losses": {json.dumps(found["losses"])}' in page
    assert "Test-time training on one image" in page and "after 4 iterations" in page


def test_the_bundled_teacher_needs_no_flags(main, tmp_path, capsys):
    assert main(["--iterations", "2", "--every", "2", "--output", str(tmp_path)]) == 0
    assert "teacher: cat" in capsys.readouterr().out
    assert BUNDLED_TEACHER.stat().st_size <= 14e6


@pytest.mark.parametrize(("iterations", "stops"), [(20, 5), (3, 3)])
def test_islands_every_fifth_of_the_iterations(
    main, small_student, command, tmp_path, iterations, stops
):
    assert main([*command, "--iterations", str(iterations)]) == 0
    with Image.open(tmp_path / "out" / "islands.png") as picture:
        assert (picture.width - 12) // (224 + 12) == 1 + stops
    assert results(tmp_path / "out")["arguments"]["every"] == iterations // stops


@pytest.mark.parametrize("classes", ["cat,,dog", "cat,dog,", " ", ""])
def test_an_empty_class_is_refused(main, command, capsys, classes):
    assert refused(main, [*command, "--classes", classes])
    printed = capsys.readouterr().err
    assert f"argument --classes: {classes!r} has an empty class name" in printed


def test_flags(main, command, capsys):
    printed = help_of(main, capsys)
    assert "steps for each image (default: 250)" in printed
    assert "(default: a fifth of --iterations)" in printed
    for more in (["--dataset", "cifar10"], ["--limit", "1"], ["--report-at", "1"]):
        assert refused(main, [*command, *more])


def test_bad_input_is_one_line_and_status_2(main, command, tmp_path, capsys):
    for extra, message in (
        (["--input", str(tmp_path / "none.jpg")], "none.jpg: no such file"),
        (["--teacher", "ViT-Z/99"], "ViT-Z/99"),
        (["--teacher-weights", "w.pth"], "only for a classifier of timm"),
        (
            ["--teacher", "vit_small_patch14_dinov2", "--teacher-weights", "w.pth"],
            "no linear head of the 1000 classes",
        ),
        (["--templates", str(tmp_path / "none.txt")], "none.txt: no such file of templates"),
        (["--classes", "cat,cat"], "'cat'"),
    ):
        assert main([*command, *extra]) == 2, extra
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("locations", ["0", "1025", "most"])
def test_locations_are_some_of_the_grid_or_all(main, command, capsys, locations):
    assert refused(main, [*command, "--locations", locations])
    assert "argument --locations" in capsys.readouterr().err
