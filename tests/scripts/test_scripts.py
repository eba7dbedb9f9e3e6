"""The scripts together: from photographs to islands, and what all of them have in common."""

import ast
import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser

import pytest
import timm
import torch
from conftest import ROOT, load_script, photograph
from PIL import Image

from apm import APMConfig, load_model
from apm.data.features import FeatureStore


@pytest.fixture
def teacher_weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


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
    assert "image_size 448, not 224" in capsys.readouterr().err

    extract = load_script("misc_scripts/1_extract_coco_features.py").main
    arguments = ["--input", resized, "--output", features, "--teacher", "vit_tiny_patch16_224"]
    arguments += ["--teacher-weights", str(teacher_weights), "--teacher-block", "2"]
    assert extract(arguments) == 0
    assert FeatureStore(features).read("sub/p7").shape == (1024, 192)

    train = load_script("misc_scripts/train.py").main
    arguments = ["--input", resized, "--features", features, "--validation-images", "1"]
    arguments += ["--locations", "32", "--batch-size", "2"]
    arguments += ["--augment", "--learning-rate", "1e-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*arguments, "--output", str(whole), "--epochs", "2"]) == 0
    assert train([*arguments, "--output", str(parts), "--epochs", "1"]) == 0
    assert train([*arguments, "--output", str(parts), "--epochs", "2", "--resume"]) == 0
    one, other = (load_model(folder / "apm.safetensors") for folder in (whole, parts))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert one.provenance["teacher"]["block"] == 2
    assert str(tmp_path) not in json.dumps(one.provenance)
    assert len((whole / "history.csv").read_text().splitlines()) == 3
    assert (whole / "loss.png").exists()

    arguments += ["--output", str(tmp_path / "further"), "--init", str(whole / "apm.safetensors")]
    assert train([*arguments, "--epochs", "1", "--learning-rate", "0"]) == 0
    start = load_model(tmp_path / "further" / "apm.safetensors")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], tensor, atol=1e-6, rtol=0)

    predict = load_script("predict_test_image.py").main
    arguments = ["--checkpoint", str(whole / "apm.safetensors"), "--method", "pca"]
    assert predict([*arguments, "--output", str(tmp_path / "out")]) == 0


def test_training_without_features_is_refused(tmp_path, photographs, capsys):
    train = load_script("misc_scripts/train.py").main
    assert train(["--input", str(photographs), "--features", str(tmp_path / "none")]) == 2
    assert "none: no features" in capsys.readouterr().err


SCRIPTS = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", ".venv", ".venv-oldest"} & set(path.relative_to(ROOT).parts)
    and "def main(" in path.read_text(encoding="utf-8")
]


SLOW = {"torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "PIL"}  # to import


def run(script, *arguments):
    """A script run as a program: the process, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", script, *arguments]
    # No columns: a wrapped line would hide what is looked for.
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "9999"}, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_says_all_and_waits_for_nothing(script):
    done, imported = run(script, "--help")
    assert done.returncode == 0 and "argparse" in imported
    assert not imported & SLOW
    doc = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    assert doc.splitlines()[0] in done.stdout
    assert str(ROOT) not in done.stdout and "PosixPath" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--steps", "x"], "argument --steps: invalid number value: 'x'"),  # argparse's own
        (["--steps", "1"], "--steps 1: expected at least 2"),  # the script's own
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_flag_is_refused_at_once(arguments, reason):
    done, imported = run("interpolate.py", *arguments)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1
    assert said[0].startswith("interpolate.py: error: ") and reason in said[0]
    assert not imported & SLOW


ALONE = {"unpack_archive"}  # of download.sh, runs without this project


@pytest.mark.parametrize("script", [one for one in SCRIPTS if one.stem not in ALONE], ids=str)
def test_flags_are_grouped_and_explained_and_the_example_is_right(script, monkeypatch):
    module, parsers, parse_args = load_script(str(script)), [], ArgumentParser.parse_args

    def keep(parser, argv):
        parsers.append(parser)
        return parse_args(parser, argv)

    monkeypatch.setattr(ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    [parser] = parsers
    [line] = parser.epilog.removeprefix("example:\n").splitlines()
    python, name, *arguments = shlex.split(line)
    assert (python, name) == ("python", str(script))
    module.parse(arguments)
    grouped = [flag for group in parser.groups.values() for flag in group._group_actions]
    assert {flag.dest for flag in grouped} == {flag.dest for flag in parser._actions} - {"help"}
    assert all(flag.help and "_" not in flag.option_strings[0] for flag in grouped)


def test_the_bundled_checkpoint_is_small_and_has_the_local_patch():
    path = ROOT / "checkpoints" / "apm_small.safetensors"
    assert path.stat().st_size <= 12_000_000
    model = load_model(path)
    assert model.config == APMConfig.small(feature_dim=384)
    assert model.provenance["teacher"]["teacher"] == "vit_small_patch14_dinov2"
