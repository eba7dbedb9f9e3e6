"""make_corruptions.py writes what readers of ImageNet-C and CIFAR-10-C expect."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script, photograph
from PIL import Image

from apm.choices import CORRUPTIONS
from apm.data.class_names import CIFAR10_CLASSES
from apm.data.images import spread
from apm.data.test_sets import load_dataset

corruptions = load_script("misc_scripts/corruptions.py")
LAYOUTS = ("npy", "folder")


def texture(height: int, width: int) -> np.ndarray:
    """Bright needles on a dark ground, in place of a photograph of frost."""
    needles = np.random.default_rng(3).random((height, width, 1)) ** 2
    return (needles * (200, 220, 255)).astype(np.uint8)


def contrast(image: Image.Image, severity: int) -> np.ndarray:
    """What chance plays no part in."""
    return corruptions.corrupt(
        np.asarray(image), "contrast", severity, np.random.default_rng(0), parameters="imagenet"
    )


@pytest.fixture
def images(tmp_path):
    """Five images in three classes."""
    folder = tmp_path / "images"
    for index, name in enumerate(["cat/b", "cat/a", "dog/x", "frog/c", "frog/d"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(24, 24, index).save(path)
    return folder


@pytest.fixture
def run(images, tmp_path):
    main = load_script("misc_scripts/make_corruptions.py").main
    (tmp_path / "frost").mkdir()
    for index in range(2):
        Image.fromarray(texture(130, 130 + index)).save(tmp_path / "frost" / f"{index}.png")
    common = ["--input", str(images), "--frost-textures", str(tmp_path / "frost")]

    def run(output, *arguments):
        return main([*common, "--output", str(tmp_path / output), *arguments]), tmp_path / output

    return run


def arrays(folder):
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def test_npy_has_the_layout_of_cifar_10_c(run):
    status, output = run("out", "--layout", "npy", "--parameters", "cifar")
    assert status == 0
    stacks = arrays(output)
    assert stacks.pop("labels").tolist() == [3, 3, 5, 6, 6] * 5
    assert set(stacks) == set(CORRUPTIONS)
    for stack in stacks.values():
        assert stack.shape == (25, 24, 24, 3) and stack.dtype == np.uint8
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == list(CIFAR10_CLASSES) and results["images"] == 5
    assert [path.name for path in output.glob(".*")] == [".lock"]


def test_cifar10c_reads_each_image_with_its_class(run, images):
    for path in images.rglob("*.png"):
        shade = CIFAR10_CLASSES.index(path.parent.name) * 20
        Image.new("RGB", (24, 24), (shade, shade, shade)).save(path)
    (images / ".ipynb_checkpoints").mkdir()
    photograph().save(images / ".ipynb_checkpoints" / "a.png")
    status, output = run("out", "--layout", "npy", "--corruptions", "contrast")
    assert status == 0
    data = load_dataset("cifar10c", output, corruption="contrast", severity=3)
    shades = [np.asarray(data.images[index][0]).mean() for index in range(5)]
    assert shades == [data.images[index][1] * 20 for index in range(5)]
    names = [data.class_names[data.images[index][1]] for index in range(5)]
    assert names == ["cat", "cat", "dog", "frog", "frog"]


def test_a_limit_takes_images_of_every_class(run):
    for layout in LAYOUTS:
        arguments = ["--layout", layout, "--corruptions", "contrast", "--limit", "3"]
        status, output = run(layout, *arguments)
        assert status == 0
    assert np.load(output.parent / "npy" / "labels.npy").tolist() == [3, 3, 6] * 5
    settings = (json.loads((output.parent / f"{n}/settings.json").read_text()) for n in LAYOUTS)
    assert [made["parameters"] for made in settings] == ["cifar", "imagenet"]
    assert {path.parent.name for path in output.glob("contrast/1/*/*")} == {"cat", "frog"}


def test_npy_takes_no_classes_but_those_of_cifar_10(run, images, tmp_path, capsys):
    (images / "dog").rename(images / "zebra")
    for parameters in ("cifar", "imagenet"):
        arguments = ["--corruptions", "contrast", "--parameters", parameters]
        assert run("out", "--layout", "npy", *arguments)[0] == 2
        printed = capsys.readouterr().err
        assert f"{images / 'zebra'}: " in printed and "--layout folder" in printed
        assert printed.count("\n") == 1 and not (tmp_path / "out").exists()
    assert run("out", "--layout", "folder", *arguments)[0] == 0


def test_npy_stacks_severities_in_order_and_images_by_path(run, images):
    arguments = ["--corruptions", "contrast", "--severities", "4,2", "--parameters", "imagenet"]
    _, output = run("out", "--layout", "npy", *arguments)
    paths = sorted(images.rglob("*.png"))
    stack = np.load(output / "contrast.npy")
    assert len(stack) == len(np.load(output / "labels.npy")) == 10
    for index, (severity, path) in enumerate([(s, p) for s in (2, 4) for p in paths]):
        assert np.array_equal(stack[index], contrast(Image.open(path), severity))


def test_an_image_is_the_same_whatever_else_is_made(run):
    _, output = run("all", "--layout", "npy", "--workers", "1")
    everything = arrays(output)
    few = ["--corruptions", "snow,frost,gaussian_noise", "--severities", "5,2"]
    _, output = run("few", "--layout", "npy", "--workers", "3", "--limit", "3", *few)
    _, files = run("files", "--workers", "3", "--parameters", "cifar", *few)
    for name in ("snow", "frost", "gaussian_noise"):
        by_severity = everything[name].reshape(5, 5, 24, 24, 3)
        assert np.array_equal(
            np.load(output / f"{name}.npy").reshape(2, 3, 24, 24, 3),
            by_severity[[1, 4]][:, spread(5, 3)],
        )
        assert np.array_equal(
            np.asarray(Image.open(files / name / "5" / "dog" / "x.png")), by_severity[4, 2]
        )
    _, output = run("other", "--layout", "npy", "--seed", "1", *few)
    assert not np.array_equal(np.load(output / "snow.npy")[0], everything["snow"][5])


def test_images_differ_in_their_noise(run, images):
    for path in images.rglob("*.png"):
        Image.new("RGB", (24, 24), (128, 128, 128)).save(path)
    _, output = run("out", "--layout", "npy", "--corruptions", "gaussian_noise")
    noise = np.load(output / "gaussian_noise.npy").reshape(25, -1) - 128.0
    correlation = np.corrcoef(noise) - np.eye(25)
    assert np.abs(correlation).max() < 0.15


def test_folder_layout_keeps_paths_and_jpeg_at_the_published_quality(run, images):
    photograph(40, 30).save(images / "dog" / "y.JPEG", quality=95)
    photograph(40, 30).save(images / "loose.bmp")
    status, output = run("out", "--corruptions", "fog,frost", "--severities", "1,5")
    assert status == 0
    names = {path.relative_to(images).as_posix() for path in images.rglob("*.*")}
    names = names - {"loose.bmp"} | {"loose.bmp.png"}
    for version in ("fog/1", "fog/5", "frost/1", "frost/5"):
        present = {
            path.relative_to(output / version).as_posix()
            for path in (output / version).rglob("*.*")
        }
        assert present == names
    reference = io.BytesIO()
    photograph().save(reference, "JPEG", quality=85)
    with Image.open(output / "fog" / "1" / "dog" / "y.JPEG") as image:
        assert image.size == (40, 30)
        assert image.quantization == Image.open(reference).quantization


def test_image_size_cuts_the_centre_square(run, images):
    wide = photograph(80, 40)
    wide.save(images / "dog" / "x.png")
    arguments = ["--image-size", "20", "--corruptions", "contrast", "--parameters", "imagenet"]
    _, output = run("out", "--layout", "npy", *arguments)
    square = wide.crop((20, 0, 60, 40)).resize((20, 20), Image.Resampling.BICUBIC)
    expected = contrast(square, 1).astype(int)
    assert np.abs(np.load(output / "contrast.npy")[2] - expected).max() <= 3  # the cut's border


@pytest.mark.parametrize("layout", ["npy", "folder"])
def test_what_is_there_is_kept_and_what_is_missing_is_made(run, layout):
    arguments = ["--layout", layout, "--corruptions", "snow,fog", "--severities", "1,3"]
    _, output = run("out", *arguments)
    files = [path for path in output.rglob("*.*") if "snow" in str(path) or "fog" in str(path)]
    content = {path: path.read_bytes() for path in files}
    lost, kept = files[0], files[1:]
    lost.unlink()
    for path in kept:
        path.write_bytes(b"mine")
    status, _ = run("out", *arguments)
    assert status == 0
    assert lost.read_bytes() == content[lost]
    assert all(path.read_bytes() == b"mine" for path in kept)
    assert not [path for path in output.rglob("*") if ".part" in path.name]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("folder", ["--seed", "1"], "seed 0, not 1"),
        ("folder", ["--parameters", "cifar"], "parameters 'imagenet', not 'cifar'"),
        ("npy", ["--limit", "4"], "images 5, not 4"),
        ("folder", ["--limit", "4"], "images 5, not 4"),
        ("npy", ["--parameters", "imagenet"], "parameters 'cifar', not 'imagenet'"),
        ("npy", ["--severities", "1"], "severities [1, 2, 3, 4, 5], not [1]"),
    ],
)
def test_results_of_other_settings_are_not_mixed(run, capsys, layout, change, message):
    arguments = ["--layout", layout, "--corruptions", "contrast"]
    _, output = run("out", *arguments)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run("out", *arguments, *change)[0] == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_other_images_and_other_frost_are_not_mixed(run, images, tmp_path, capsys):
    arguments = ["--layout", "npy", "--severities", "1", "--corruptions"]
    assert run("out", *arguments, "contrast")[0] == 0
    assert run("out", *arguments, "frost")[0] == 0
    assert run("out", *arguments, "fog")[0] == 0
    photograph(130, 130, seed=5).save(tmp_path / "frost" / "1.png")
    assert run("out", *arguments, "snow")[0] == 0  # of no frost
    assert run("out", *arguments, "frost,snow")[0] == 2
    assert "frost_textures_sha256" in capsys.readouterr().err
    (images / "cat" / "a.png").rename(images / "frog" / "a.png")
    (images / "dog" / "x.png").rename(images / "cat" / "x.png")
    assert run("out", *arguments, "contrast")[0] == 2
    assert "images_sha256" in capsys.readouterr().err


def test_a_name_need_not_be_text(run, images):
    path = os.fsencode(images / "cat") + b"/caf\xe9.png"
    os.link(images / "cat" / "a.png", path)
    status, output = run("out", "--corruptions", "fog", "--severities", "1")
    made = os.fsdecode(os.fsencode(output / "fog/1/cat") + b"/caf\xe9.png")
    assert status == 0 and Path(made).exists()


@pytest.mark.parametrize("layout", ["npy", "folder"])
def test_bad_files_are_reported_and_skipped(run, images, layout, capsys):
    (images / "cat" / "bad.png").write_text("no image")
    status, output = run("out", "--layout", layout, "--corruptions", "contrast")
    assert status == 0
    assert "skipped" in (printed := capsys.readouterr()).err and "bad.png: cannot" in printed.err
    assert "5 images, 1 skipped" in printed.out
    skipped = json.loads((output / "results.json").read_text())["skipped"]
    assert list(skipped) == [str(images / "cat" / "bad.png")]
    if layout == "npy":
        assert np.load(output / "labels.npy").tolist() == [3, 3, 5, 6, 6] * 5
        before = (output / "labels.npy").stat().st_mtime_ns
        assert run("out", "--layout", layout, "--corruptions", "contrast,fog")[0] == 0
        assert (output / "labels.npy").stat().st_mtime_ns == before
        assert len(np.load(output / "contrast.npy")) == 25


def test_bad_input_is_one_line_and_status_2(run, images, tmp_path, capsys):
    main = load_script("misc_scripts/make_corruptions.py").main
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    without_frost = ["--corruptions", "contrast", "--output", str(output)]

    def refused(arguments, message):
        try:
            status = main(arguments)
        except SystemExit as exit:  # argparse's own refusals
            status = exit.code
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line and "image/s" not in line]
        assert status == 2, arguments
        assert message in printed and len(lines) == 1, printed
        assert not output.exists()

    given = ["--input", str(images), "--output", str(output)]
    refused(without_frost, "required: --input")
    refused(["--input", str(tmp_path / "none"), *without_frost], "none: no such file")
    refused(["--input", str(tmp_path / "empty"), *without_frost], "empty: no image")
    refused(given, "--frost-textures")
    refused([*given, "--corruptions", "fog,frost"], "list --corruptions without frost")
    refused([*given, "--frost-textures", str(tmp_path / "empty")], "empty: no image")
    refused([*given, "--corruptions", "fog,rain"], "'rain' must be one of gaussian_noise")
    refused(
        [*given, "--corruptions", "fog", "--severities", "0,1"], "'0' must be one of 1, 2, 3, 4, 5"
    )
    photograph(24, 25).save(images / "frog" / "odd.png")
    npy = ["--input", str(images), "--layout", "npy", *without_frost]
    refused(npy, "odd.png: 24 x 25 pixels, unlike")
    photograph(24, 24).save(images / "loose.png")
    refused(npy, "loose.png: --layout npy takes folders of CIFAR-10's classes")
