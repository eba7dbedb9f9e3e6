"""Test-time training by its script, with the full student and a CLIP with random weights."""

import csv
import json
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from clip.model import CLIP
from conftest import ROOT, load_script, photograph, save_tiny_clip
from PIL import Image

from apm.teachers import ClipTeacher

BUNDLED_TEACHER = ROOT / "checkpoints" / "clip_tiny.pt"


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny.pt")


@pytest.fixture
def main():
    return load_script("single_token_segmentation/train_tta.py").main


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_one_image_from_whole_to_parts_with_random_weights(main, tiny_clip, tmp_path, capsys):
    photograph().save(tmp_path / "a.png")
    output = tmp_path / "out"
    arguments = ["--input", str(tmp_path / "a.png"), "--teacher", str(tiny_clip)]
    arguments += ["--classes", "cat,dog,cup of coffee", "--iterations", "4", "--every", "2"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "student:" in capsys.readouterr().out
    found = results(output)
    assert len(found["losses"]) == 4 and found["losses"][3] < found["losses"][0]
    assert set(found["probabilities"]["student"]) == {"cat", "dog", "cup of coffee"}
    assert Image.open(output / "islands.gif").n_frames == 2
    assert Image.open(output / "islands.png").width > 600
    assert (output / "loss.png").exists()


def test_the_bundled_teacher_needs_no_flags(main, tmp_path, capsys):
    assert main(["--iterations", "2", "--every", "2", "--output", str(tmp_path)]) == 0
    assert "teacher: cat" in capsys.readouterr().out
    assert BUNDLED_TEACHER.stat().st_size <= 14e6


def test_another_teacher_has_another_cache_key(tmp_path):
    teacher_key = load_script("single_token_segmentation/train_tta.py").teacher_key
    names = ["open_clip:ViT-B-16/openai", "open_clip:ViT-B-32/openai", "ViT-L/14"]
    for folder, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clip.pt").write_bytes(content)
        names.append(str(tmp_path / folder / "clip.pt"))
    keys = [teacher_key(Namespace(teacher=name, teacher_weights=None)) for name in names]
    weights = tmp_path / "a" / "clip.pt"
    keys += [teacher_key(Namespace(teacher="resnet50", teacher_weights=weights))]
    keys += [teacher_key(Namespace(teacher="resnet50", teacher_weights=None))]
    for index, key in enumerate(keys):
        # A file that was only moved is the same teacher.
        assert [other for other, found in enumerate(keys) if found == key] == (
            [3, 5] if index in (3, 5) else [index]
        )


@pytest.mark.slow
def test_clip_vit_b16_goes_through_the_whole_script_with_random_weights(main, tmp_path, capsys):
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    path = tmp_path / "ViT-B-16.pt"
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    folder = tmp_path / "set" / "cat"
    folder.mkdir(parents=True)
    photograph().save(folder / "a.png")
    one = ["--input", str(folder / "a.png"), "--classes", "cat,dog", "--templates", "clip80"]
    many = ["--dataset", "imagefolder", "--data-root", str(folder.parent), "--report-at", "1,2"]
    for name, more in (("one", one), ("many", many)):
        output = tmp_path / name
        command = ["--teacher", str(path), "--iterations", "2", "--output", str(output), *more]
        assert main(command) == 0
    assert len(results(tmp_path / "one")["losses"]) == 2
    with (tmp_path / "many" / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    assert "1 images, 0 skipped; teacher top-1 100.00 %" in capsys.readouterr().out


@pytest.fixture
def test_set(tmp_path):
    root = tmp_path / "set"
    for index in range(6):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(seed=index).save(folder / f"{index}.png")
    return root


def arguments(root, output, tiny_clip):
    return [
        *("--dataset", "imagefolder", "--data-root", str(root), "--output", str(output)),
        *("--teacher", str(tiny_clip), "--iterations", "2", "--report-at", "1,2"),
    ]


def test_a_killed_run_ends_with_the_undisturbed_table_with_random_weights(
    main, tiny_clip, test_set, tmp_path, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(test_set, whole, tiny_clip)) == 0
    table = capsys.readouterr().out
    assert "6 images, 0 skipped; teacher top-1" in table

    script = ROOT / "single_token_segmentation" / "train_tta.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments(test_set, killed, tiny_clip)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = killed / "rows.csv"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = rows.read_text().count("\n") - 1
    assert 2 <= kept < 6
    assert main(arguments(test_set, killed, tiny_clip)) == 0

    one, other = (results(folder) for folder in (whole, killed))
    for key in ("images", "teacher_top1", "iterations"):
        assert one[key] == other[key]
    with rows.open() as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == list(range(6))


def test_rows_of_other_pictures_are_refused_with_random_weights(
    main, tiny_clip, test_set, tmp_path, capsys
):
    command = arguments(test_set, tmp_path / "out", tiny_clip)
    assert main([*command, "--limit", "1"]) == 0
    photograph(seed=9).save(test_set / "cat" / "0.png")
    capsys.readouterr()
    assert main([*command, "--limit", "1"]) == 2
    assert "rows of another run, whose files_sha256 differed" in capsys.readouterr().err


def test_embeddings_are_kept_for_other_runs_with_random_weights(
    main, tiny_clip, test_set, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = arguments(test_set, tmp_path / "one", tiny_clip)
    assert main([*command, "--limit", "2"]) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert len(kept) == 4  # images and classes, each with its description
    monkeypatch.setattr(ClipTeacher, "embed_classes", lambda *_: pytest.fail("not kept"))
    other = [*command, "--limit", "2", "--output", str(tmp_path / "other"), "--seed", "1"]
    assert main(other) == 0
    bad = test_set / "cat" / "bad.png"
    bad.write_text("no image")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main([*command, "--output", str(tmp_path / "bad")]) == 0
    table = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert table["images"] == 6 and table["skipped"] == 1
    # What failed may be repaired: it is tried again.
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == len(kept) // 2 + 1


def test_parallel_students_give_the_same_rows_with_random_weights(
    main, tiny_clip, test_set, tmp_path
):
    tables = []
    for parallel in ("1", "4"):
        output = tmp_path / parallel
        assert main([*arguments(test_set, output, tiny_clip), "--parallel", parallel]) == 0
        tables.append(results(output)["iterations"])
    for one, other in zip(*tables, strict=True):
        assert one["student_top1"] == other["student_top1"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_bad_input_is_one_line_and_status_2(main, tiny_clip, tmp_path, capsys):
    for extra, message in (
        (["--input", str(tmp_path / "none.jpg")], "none.jpg: no such file"),
        (["--teacher", "ViT-Z/99"], "ViT-Z/99"),
        (["--teacher-weights", "w.pth"], "only of a classifier of timm"),
        (
            ["--teacher", "vit_small_patch14_dinov2", "--teacher-weights", "w.pth"],
            "no linear head of the 1000 classes",
        ),
        (["--templates", str(tmp_path / "none.txt")], "none.txt: no such file of templates"),
        (["--dataset", "cifar10", "--data-root", str(tmp_path)], "no cifar10 there"),
        (["--report-at", "500"], "--report-at"),
    ):
        command = ["--teacher", str(tiny_clip), "--output", str(tmp_path / "out"), *extra]
        assert main(command) == 2, extra
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
