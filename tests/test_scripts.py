"""Every script from end to end on tiny inputs, as a user calls it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script, make_model, photograph
from PIL import Image

from apm import APMConfig, load_model, save_model
from apm.data.features import FeatureStore
from apm.runtime.cli import FLAGS


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        photograph(seed=index).save(folder / f"p{index}.png")
    return folder


@pytest.fixture
def teacher_weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def no_leftovers(folder):
    return not [path for path in folder.rglob("*") if ".part" in path.name]


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
    assert capsys.readouterr().out.strip() == str(output / "p0_islands.png")
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
    page = (output / "index.html").read_text()
    assert page.count('loading="lazy"') == 2
    assert 'src="p0.png"' in page and (output / "p0.png").exists()
    assert results(output)["images"] == 2

    # On a 4 x 4 grid no class has the 10 locations that a score needs: see the message.
    assert main([*arguments, "--masks", str(masks), "--score"]) == 2
    assert "no mask has two classes" in capsys.readouterr().err
    assert main([*arguments, "--score"]) == 2
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
    assert set(scores["student"]) == {"ari", "nmi", "images"}


@pytest.fixture
def interpolate(checkpoint, photographs, tmp_path):
    main = load_script("interpolate.py").main

    def run(*arguments):
        output = tmp_path / "between"
        inputs = [str(photographs / "p0.png"), str(photographs / "p1.png")]
        status = main(
            [
                "--checkpoint",
                str(checkpoint),
                "--output",
                str(output),
                "--input",
                *inputs,
                *arguments,
            ]
        )
        return status, output

    return run


def test_interpolate_writes_frames_strip_and_animation(interpolate):
    status, output = interpolate("--steps", "4")
    assert status == 0
    assert len(list(output.glob("frame_*.png"))) == 4
    assert Image.open(output / "interpolation.gif").n_frames == 6  # there and back
    assert (output / "strip.png").exists() and no_leftovers(output)


def test_interpolation_reaches_both_ends_from_the_columns_alone(model, photographs):
    script = load_script("interpolate.py")
    ends = torch.stack(
        [model.preprocessing(Image.open(photographs / name)) for name in ("p0.png", "p1.png")]
    )
    rgb, features = script.percepts(model, ends, 3, None, "float32")
    with torch.inference_mode():
        columns = model.encode(ends)
        middle = columns.mean(dim=0, keepdim=True)
        expected = model.query(torch.stack([columns[0], middle[0], columns[1]]))
    np.testing.assert_allclose(features.reshape(3, 16, 16), expected[0], atol=1e-5)
    np.testing.assert_allclose(rgb.reshape(3, 16, 3), expected[1].clamp(0, 1), atol=1e-5)


def test_interpolate_refuses_one_step(interpolate, capsys):
    assert interpolate("--steps", "1")[0] == 2
    assert "--steps 1" in capsys.readouterr().err


def test_training_from_photographs_to_islands_with_random_teacher(
    photographs, tmp_path, teacher_weights, capsys
):
    """Resize, extract, train, stop, resume, predict: the whole path."""
    (photographs / "sub").mkdir()
    photograph(300, 200, seed=7).save(photographs / "sub" / "p7.jpg")
    (photographs / "bad.jpg").write_text("no image")
    resized, features = str(tmp_path / "resized"), str(tmp_path / "features")
    resize = load_script("misc_scripts/resize_coco_images.py").main
    assert resize(["--input", str(photographs), "--output", resized]) == 0
    assert "4 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "resized" / "sub" / "p7.jpg").size == (448, 448)
    assert resize(["--input", str(photographs), "--output", resized, "--image-size", "224"]) == 2
    assert "448 x 448 pixels, not 224 x 224" in capsys.readouterr().err

    extract = load_script("misc_scripts/1_extract_coco_features.py").main
    arguments = ["--input", resized, "--output", features, "--teacher", "vit_tiny_patch16_224"]
    arguments += ["--teacher-weights", str(teacher_weights), "--teacher-block", "2"]
    assert extract(arguments) == 0
    assert FeatureStore(features).read("sub/p7").shape == (1024, 192)

    train = load_script("misc_scripts/train.py").main
    arguments = ["--input", resized, "--features", features, "--validation-images", "1"]
    arguments += ["--trunk-widths", "24,16", "--locations", "32", "--batch-size", "2"]
    arguments += ["--augment", "--learning-rate", "1e-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*arguments, "--output", str(whole), "--epochs", "2"]) == 0
    assert train([*arguments, "--output", str(parts), "--epochs", "1"]) == 0
    assert train([*arguments, "--output", str(parts), "--epochs", "2", "--resume"]) == 0
    one, other = (load_model(folder / "apm.pth") for folder in (whole, parts))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert one.provenance["teacher"]["block"] == 2
    assert str(tmp_path) not in json.dumps(one.provenance)
    assert len((whole / "history.csv").read_text().splitlines()) == 3
    assert (whole / "loss.png").exists()

    arguments += ["--output", str(tmp_path / "further"), "--init", str(whole / "apm.pth")]
    assert train(arguments) == 2
    assert "--init brings its own shape" in capsys.readouterr().err
    arguments = [word for word in arguments if word not in ("--trunk-widths", "24,16")]
    assert train([*arguments, "--epochs", "1", "--learning-rate", "0"]) == 0
    start = load_model(tmp_path / "further" / "apm.pth")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], tensor, atol=1e-6, rtol=0)

    predict = load_script("predict_test_image.py").main
    arguments = ["--checkpoint", str(whole / "apm.pth"), "--method", "pca"]
    assert predict([*arguments, "--output", str(tmp_path / "out")]) == 0


def test_training_without_features_is_refused(tmp_path, photographs, capsys):
    train = load_script("misc_scripts/train.py").main
    assert train(["--input", str(photographs), "--features", str(tmp_path / "none")]) == 2
    assert "none: no features" in capsys.readouterr().err


SCRIPTS = [
    path.relative_to(ROOT)
    for folder in (
        ".",
        "misc_scripts",
        "misc_scripts/bundled",
        "flop_analysis",
        "single_token_segmentation",
    )
    for path in sorted((ROOT / folder).glob("*.py"))
    if "def main(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_says_what_the_script_does(script, capsys):
    module = load_script(str(script))
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0
    assert module.__doc__.strip().splitlines()[0] in capsys.readouterr().out


def test_shared_flags_are_kebab_case():
    assert all(flag == flag.lower() and "_" not in flag for flag in FLAGS)


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


def test_the_bundled_checkpoint_is_small_and_has_the_local_patch():
    path = ROOT / "checkpoints" / "apm_small.pth"
    assert path.stat().st_size <= 12_000_000
    model = load_model(path)
    assert model.config == APMConfig.small()
    assert model.provenance["teacher"]["teacher"] == "vit_tiny_patch16_224"


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
    directions = load_script("visualize_coco.py").directions
    teacher = np.random.default_rng(0).normal(size=(4, 4, 8))
    student, same = directions(np.stack([0.1 * teacher + 3, teacher]))
    np.testing.assert_allclose(student, same, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(same, axis=-1), 1)
