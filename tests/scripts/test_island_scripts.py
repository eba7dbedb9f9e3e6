"""Islands of photographs and interpolation from end to end, as a user calls them."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script, make_model, photograph
from PIL import Image

from apm import drawing, save_model
from apm.comparison import directions
from apm.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def page_of(folder):
    """What a page shows."""
    text = (folder / "index.html").read_text()
    return json.loads(re.search(r'type="application/json" id="run">(.*)</script>', text)[1])


def no_leftovers(folder):
    return not [path for path in folder.rglob("*") if ".part" in path.name]


@pytest.fixture
def labels(monkeypatch):
    """The labels of every figure that is drawn, row by row."""
    drawn = []
    panels = drawing.panels

    def noting(rows, *arguments, **options):
        drawn.append([list(row) for row in rows])
        return panels(rows, *arguments, **options)

    monkeypatch.setattr(drawing, "panels", noting)
    return drawn


@pytest.fixture
def predict(checkpoint, tmp_path):
    main = load_script("predict_test_image.py").main

    def run(*arguments):
        output = tmp_path / "out"
        status = main(["--checkpoint", str(checkpoint), "--output", str(output), *arguments])
        return status, output

    return run


@pytest.mark.parametrize("method", ["tsne", "pca", "kmeans"])
def test_predict_one_image(predict, photographs, method, capsys):
    status, output = predict("--input", str(photographs / "p0.png"), "--method", method)
    assert status == 0
    page, figure = capsys.readouterr().out.splitlines()
    assert page.startswith(f"{output / 'index.html'}: mean error of its cosines, student's 0.0")
    page = output / "index.html"
    assert figure == f"{output / 'p0_islands.png'}; to explore, open {page}" and page.is_file()
    run = page_of(output)
    assert run["facts"].items() >= {"method": method, "grid": "4", "fit": "stretch"}.items()
    [item] = run["items"]
    assert item["name"] == "p0" and item["caption"] == "80 x 60 px"
    assert Image.open(output / "p0_islands.png").width > 1000
    assert results(output)["arguments"]["method"] == method
    assert no_leftovers(output)


def test_same_seed_same_figure(predict, photographs):
    pictures = []
    for _ in range(2):
        _, output = predict("--input", str(photographs / "p0.png"), "--seed", "5")
        pictures.append((output / "p0_islands.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_predict_saves_features(predict, photographs):
    _, output = predict(
        "--input", str(photographs / "p0.png"), "--save-features", "--method", "pca"
    )
    arrays = np.load(output / "p0_islands.npz")
    assert arrays["features"].shape == (4, 4, 16)
    assert arrays["rgb"].shape == arrays["islands"].shape == (4, 4, 3)


@pytest.mark.parametrize("method", ["tsne", "kmeans"])
def test_a_folder_of_frames_in_one_palette_becomes_an_animation(predict, tmp_path, method, capsys):
    """Of three equal frames, whose colours stay; the percepts come into being in any order."""
    (tmp_path / "frames").mkdir()
    for name in "abc":
        photograph(80, 60).save(tmp_path / "frames" / f"{name}.png")
    flags = ["--input", str(tmp_path / "frames"), "--method", method, "--grid", "8", "--joint"]
    status, output = predict(*flags, "--gif", "--order", "spiral")
    assert status == 0
    assert Image.open(output / "islands.gif").size == (256, 192)
    assert Image.open(output / "a_spiral.gif").n_frames == 24
    said = results(output)
    assert said["colour_changes"] == [0, 0]
    assert "colours change by 0.000 from picture to picture" in capsys.readouterr().out
    assert all(row["difference_to_all_at_once"] < 1e-5 for row in said["images"])
    (output / "islands.gif").unlink()
    photograph(60, 80).save(tmp_path / "frames" / "d.png")  # no such frame
    status, output = predict(*flags, "--gif", "--grid", "2", "--limit", "4")
    assert status == 0 and not (output / "islands.gif").exists()
    assert Image.open(output / "d_random.gif").n_frames == 4


@pytest.mark.parametrize("flag", [("--grid", "0"), ("--grid", "449"), ("--consensus", "-1")])
def test_impossible_grids_and_steps_are_refused(predict, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        predict(*flag)
    assert stopped.value.code == 2 and flag[0] in capsys.readouterr().err


def test_chunks_and_bfloat16_change_little(predict, photographs):
    answers = []
    for extra in ([], ["--chunk-size", "3"], ["--dtype", "bfloat16"]):
        arguments = ["--input", str(photographs / "p0.png"), "--save-features", "--method", "pca"]
        _, output = predict(*arguments, *extra)
        answers.append(np.load(output / "p0_islands.npz")["features"])
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    np.testing.assert_allclose(answers[0], answers[2], atol=5e-2)
    assert not np.array_equal(answers[0], answers[2])


def test_predict_a_folder_skips_what_is_no_image(predict, photographs, capsys):
    (photographs / "bad.jpg").write_text("no image")
    status, output = predict("--input", str(photographs), "--method", "pca")
    assert status == 0
    printed = capsys.readouterr()
    assert "3 images, 1 skipped" in printed.out
    assert "bad.jpg: cannot be read as an image" in printed.err
    assert len(list(output.glob("*.png"))) == 3
    assert list(results(output)["skipped"]) == [str(photographs / "bad.jpg")]


@pytest.mark.parametrize(
    ("size", "lost"),
    [((320, 80), {"width": 0.75}), ((80, 100), {"height": 0.2}), ((80, 80), {}), ((81, 80), {})],
)
def test_a_centre_crop_is_named(predict, tmp_path, labels, capsys, size, lost):
    photograph(*size).save(tmp_path / "photo.png")
    _, output = predict("--input", str(tmp_path / "photo.png"), "--method", "pca", "--fit", "crop")
    printed = capsys.readouterr().out.splitlines()
    assert labels[0][0][0] == ("input (centre crop)" if lost else "input")
    assert results(output)["images"][0]["left_out"] == pytest.approx(lost)
    assert printed[-1].startswith(f"{output / 'photo_islands.png'};")
    assert len(printed) == 2 + len(lost)
    for side, share in lost.items():
        line = f"photo.png: centre crop, {100 * share:.0f} % of the {side} left out"
        assert printed[0].endswith(line)


def test_a_folder_of_crops_is_said_on_one_line(predict, tmp_path, labels, capsys):
    (tmp_path / "images").mkdir()
    for name, size in {"a": (320, 80), "b": (80, 80), "c": (80, 100)}.items():
        photograph(*size).save(tmp_path / "images" / f"{name}.png")
    flags = ["--input", str(tmp_path / "images"), "--method", "pca"]
    assert predict(*flags, "--fit", "crop")[0] == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4
    assert "centre crop of 2 of 3 images, up to 75 % of a side left out" in printed
    assert [rows[0][0] for rows in labels] == [
        "input (centre crop)",
        "input",
        "input (centre crop)",
    ]


def test_two_images_of_one_stem_both_get_a_figure(predict, photographs):
    photograph(seed=9).save(photographs / "p0.jpg")
    _, output = predict("--input", str(photographs), "--method", "pca")
    assert len(list(output.glob("*.png"))) == 4


def test_odd_images_just_work(predict, tmp_path):
    for name, image in {
        "one_pixel.png": Image.new("RGB", (1, 1), "red"),
        "constant.png": Image.new("RGB", (60, 60), "grey"),
        "thin.png": Image.new("RGB", (1, 3000), "blue"),
    }.items():
        image.save(tmp_path / name)
        for method in ("tsne", "pca", "kmeans"):
            assert predict("--input", str(tmp_path / name), "--method", method)[0] == 0, name


def bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "text.pth").write_text("no checkpoint")
    photograph(448, 448).save(tmp_path / "good.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:3000])
    good = ["--input", str(tmp_path / "good.jpg")]
    yield ["--input", str(tmp_path / "missing.jpg")], "missing.jpg: no such file"
    yield ["--input", str(tmp_path / "empty")], "empty: no image in this folder"
    yield ["--input", str(tmp_path / "text.jpg")], "text.jpg: cannot be read as an image"
    yield ["--input", str(tmp_path / "half.jpg")], "half.jpg: cannot be read as an image"
    yield [*good, "--checkpoint", str(tmp_path / "text.pth")], "text.pth: not a checkpoint"
    yield [*good, "--checkpoint", str(tmp_path / "no.pth")], "no.pth: no such checkpoint"
    yield [*good, "--chunk-size", "0"], "0 must be at least 1"
    yield [*good, "--limit", "none"], "none"
    yield [*good, "--output", str(tmp_path / "good.jpg" / "out")], "cannot write output there"
    if not torch.cuda.is_available():
        yield [*good, "--device", "cuda"], "--device cuda: not available"


def test_bad_input_is_one_line_and_status_2(predict, tmp_path, capsys):
    for arguments, message in bad_input(tmp_path):
        try:
            status, output = predict(*arguments)
        except SystemExit as exit:  # argparse's own refusals
            status, output = exit.code, tmp_path / "out"
        printed = capsys.readouterr().err
        assert status == 2, arguments
        assert message in printed
        assert printed.count("\n") == 1, printed
        assert not output.exists(), arguments


def test_a_folder_of_bad_files_only_is_an_error(predict, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    assert predict("--input", str(tmp_path / "bad"))[0] == 2
    assert "a.jpg: cannot be read" in capsys.readouterr().err


def test_scripts_run_from_any_folder(tmp_path, photographs, checkpoint):
    copy = tmp_path / "näme with spaces"
    copy.mkdir()
    shutil.copy(photographs / "p0.png", copy / "bïld.png")
    done = subprocess.run(
        [sys.executable, ROOT / "predict_test_image.py", "--input", "bïld.png"]
        + ["--checkpoint", checkpoint, "--output", "aus", "--method", "pca"],
        cwd=copy,
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert (copy / "aus" / "bïld_islands.png").exists()


def test_visualize_with_teacher_and_scores_with_random_weights(
    photographs, checkpoint, tmp_path, teacher_weights, capsys
):
    main = load_script("visualize_coco.py").main
    save_model(checkpoint, make_model(feature_dim=192))
    # Class 1 is the left half, class 2 the right.
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in photographs.glob("*.png"):
        labels = np.ones((60, 80), np.uint8)
        labels[:, 40:] = 2
        Image.fromarray(labels).save(masks / path.name)
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--input", str(photographs)]
    arguments += ["--output", str(output), "--method", "pca"]
    arguments += ["--teacher", "vit_tiny_patch16_224", "--teacher-weights", str(teacher_weights)]
    assert main([*arguments, "--limit", "2"]) == 0
    run = page_of(output)
    assert [item["name"] for item in run["items"]] == ["p0", "p1"] and (output / "p0.png").exists()
    panels = ["photograph", "islands", "reconstruction", "teacher", "error"]
    assert list(run["items"][0]["panels"]) == panels and not run["joint"]
    assert all(0 < item["scores"]["error"] < 2 for item in run["items"])
    assert set(results(output)["page_cosine_error"]) == {"student", "teacher"}
    assert results(output)["images"] == 2
    assert results(output)["left_out"] == {}
    assert main([*arguments, "--limit", "2", "--fit", "crop", "--joint", "--grid", "8"]) == 0
    assert results(output)["left_out"] == {name: {"width": 0.25} for name in ("p0", "p1")}
    assert page_of(output)["joint"] and page_of(output)["facts"]["grid"] == "8"
    assert "25 % of the width left out" in page_of(output)["items"][0]["caption"]
    assert "centre crop of 2 of 2 images" in capsys.readouterr().out

    scoring = [*arguments, "--masks", str(masks), "--score", "--grid", "8", "--consensus", "1"]
    assert main(scoring) == 0
    scores = results(output)["scores"]
    ways = ("", ", nearest", ", bilinear", ", joint bilateral", ", consensus 1")
    kinds = [f"{name}{way}" for name in ("student", "teacher") for way in ways]
    assert set(scores) == {*kinds, "colour", "position"}  # this student has no local patches
    assert scores["position"]["ari"] == 1 and scores["student"]["gain"] == 0
    printed = capsys.readouterr().out
    assert (
        f"position                 ARI 1.000 +- 0.000 ({scores['position']['gain']:+.3f}" in printed
    )
    assert results(output)["teacher"]["block"] == 11 and results(output)["unscored"] == []
    Image.new("L", (80, 60), 1).save(masks / "p0.png")
    Image.new("L", (60, 80), 1).save(masks / "p1.png")
    assert main(scoring) == 0
    assert results(output)["unscored"] == ["p0"] and results(output)["images"] == 1
    printed = capsys.readouterr()
    assert "1 images, 1 more whose masks have one class" in printed.out
    assert "+-" not in printed.out and "p1.png: another shape" in printed.err
    for path in masks.iterdir():
        Image.new("L", (80, 60), 1).save(path)
    assert main(scoring) == 2
    assert "no mask has two classes" in capsys.readouterr().err
    for alone in (["--score"], ["--masks", str(masks)]):
        assert main([*arguments, *alone]) == 2
        assert "--score needs --masks" in capsys.readouterr().err


def test_scores_of_the_bundled_checkpoint(tmp_path):
    main = load_script("visualize_coco.py").main
    photographs, masks = tmp_path / "images", tmp_path / "masks"
    photographs.mkdir()
    masks.mkdir()
    # A disc on a plain ground: colour separates it perfectly, position cannot.
    pixels = np.full((200, 200, 3), (40, 90, 160), np.uint8)
    y, x = np.mgrid[:200, :200]
    disc = (y - 100) ** 2 + (x - 100) ** 2 < 60**2
    pixels[disc] = (230, 180, 40)
    Image.fromarray(pixels).save(photographs / "disc.png")
    Image.fromarray(disc.astype(np.uint8) + 1).save(masks / "disc.png")
    arguments = ["--input", str(photographs), "--masks", str(masks), "--score"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    scores = results(tmp_path / "out")["scores"]
    assert scores["colour"]["ari"] > 0.9
    assert scores["position"]["ari"] < 0.3
    assert scores["student"]["images"] == 1
    assert {"ari", "nmi", "gain", "images"} <= set(scores["student"])


def test_coco_that_was_not_fetched_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    script = load_script("visualize_coco.py")
    monkeypatch.setattr(script, "COCO", tmp_path / "val2017")
    assert script.main(["--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "--input FOLDER" in printed and "./download.sh coco-val" in printed
    assert not (tmp_path / "out").exists()


def test_a_mask_that_cannot_be_read_is_skipped(photographs, checkpoint, tmp_path, capsys):
    model = make_model(image_size=112)  # 8 x 8 locations
    model.preprocessing = Preprocessing(image_size=112)
    save_model(checkpoint, model)
    masks = tmp_path / "masks"
    masks.mkdir()
    halves = Image.fromarray(np.repeat(np.uint8([[1] * 40 + [2] * 40]), 60, axis=0))
    for name in ("p0", "p1"):
        halves.save(masks / f"{name}.png")
    (masks / "p1.png").write_text("no mask")
    arguments = ["--checkpoint", str(checkpoint), "--input", str(photographs)]
    arguments += ["--masks", str(masks), "--score", "--output", str(tmp_path / "out")]
    assert load_script("visualize_coco.py").main(arguments) == 0
    printed = capsys.readouterr()
    assert "1 images, 1 skipped" in printed.out
    assert "p1.png: cannot be read as a mask" in printed.err
    assert results(tmp_path / "out")["scores"]["student"]["images"] == 1


def test_a_teacher_of_another_width_is_refused_with_random_weights(
    photographs, checkpoint, teacher_weights, tmp_path, capsys
):
    main = load_script("visualize_coco.py").main
    arguments = ["--checkpoint", str(checkpoint), "--input", str(photographs)]
    arguments += ["--teacher", "vit_tiny_patch16_224", "--teacher-weights", str(teacher_weights)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "width 192, the checkpoint answers 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_only_shorter_than_its_teacher_has_its_colours():
    teacher = np.random.default_rng(0).normal(size=(4, 4, 8))
    student, same = directions(0.1 * teacher + 3), directions(teacher)
    np.testing.assert_allclose(student, same, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(same, axis=-1), 1)


@pytest.fixture
def interpolate(checkpoint, photographs, tmp_path):
    script = load_script("interpolate.py")

    def run(*arguments):
        output = tmp_path / "between"
        inputs = [str(photographs / "p0.png"), str(photographs / "p1.png")]
        standard = ["--checkpoint", str(checkpoint), "--output", str(output), "--input", *inputs]
        return script.main([*standard, *arguments]), output

    run.script = script
    return run


def test_interpolate_writes_frames_strip_and_animation(interpolate):
    status, output = interpolate("--steps", "4")
    assert status == 0
    assert len(list(output.glob("frame_*.png"))) == 4
    assert Image.open(output / "interpolation.gif").n_frames == 6  # there and back
    assert (output / "strip.png").exists() and no_leftovers(output)
    run = page_of(output)
    assert run["steps"]["values"] == [0, 0.3333, 0.6667, 1] and len(run["items"]) == 4
    panels = ["reconstruction", "islands", "A (centre crop)", "B (centre crop)"]
    assert list(run["items"][2]["panels"]) == panels


def test_interpolation_reaches_both_ends_from_the_columns_alone(model, photographs):
    script = load_script("interpolate.py")
    ends = torch.stack(
        [model.preprocessing(Image.open(photographs / name)) for name in ("p0.png", "p1.png")]
    )
    features, rgb = script.percepts(model, ends, 3, None, "float32")
    with torch.inference_mode():
        columns = model.encode(ends)
        middle = columns.mean(dim=0, keepdim=True)
        expected = model.query(torch.stack([columns[0], middle[0], columns[1]]))
    np.testing.assert_allclose(features.reshape(3, 16, 16), expected[0], atol=1e-5)
    np.testing.assert_allclose(rgb.reshape(3, 16, 3), expected[1].clamp(0, 1), atol=1e-5)


def test_the_strip_says_that_it_is_of_the_columns_alone(interpolate, monkeypatch, capsys):
    titles = []

    def noting(rows, shape, title):
        titles.append((title, list(rows[0])))
        return drawing.panels(rows, shape, title)

    monkeypatch.setattr(interpolate.script, "panels", noting)
    _, output = interpolate("--steps", "2")
    [(title, labels)] = titles
    assert "from the column alone" in title
    assert labels == ["A (centre crop)", "0.00", "1.00", "B (centre crop)"]
    assert results(output)["left_out"] == [{"width": 0.25}] * 2
    assert "centre crop of 2 of 2 images" in capsys.readouterr().out


def test_interpolate_refuses_one_step(interpolate, capsys):
    assert interpolate("--steps", "1")[0] == 2
    assert "--steps 1" in capsys.readouterr().err
