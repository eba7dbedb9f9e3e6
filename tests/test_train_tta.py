"""Test-time training by its script, with the full student and a CLIP with random weights."""

import csv
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_script, photograph, save_tiny_clip
from PIL import Image


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
    assert "6 images; teacher top-1" in table

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
        (["--templates", str(tmp_path / "none.txt")], "none.txt: no such file of templates"),
        (["--dataset", "cifar10", "--data-root", str(tmp_path)], "no cifar10 there"),
        (["--report-at", "500"], "--report-at"),
    ):
        command = ["--teacher", str(tiny_clip), "--output", str(tmp_path / "out"), *extra]
        assert main(command) == 2, extra
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
