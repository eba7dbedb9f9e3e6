"""Test-time training over a data set, with a CLIP with random weights."""

import csv
import json
import logging
import os
import subprocess
import sys
import time

import methods
import pytest
import timm
import torch
from clip.model import CLIP
from conftest import ROOT, TINY, help_of, load_script, photograph, refused, save_tiny_clip
from evaluate_tta import doubtful_names
from methods import adapt_each
from safetensors.torch import load_file

from apm import APM, APMConfig
from apm.token_teachers import ClipTeacher
from apm.tta import TestTimeTrainer

SCRIPT = "single_token_segmentation/evaluate_tta.py"


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny.pt")


@pytest.fixture(scope="module")
def main():
    return load_script(SCRIPT).main


@pytest.fixture
def small_student(monkeypatch):
    """56 px and a few thousand parameters instead of the paper's."""

    def tta(feature_dim, pooling):
        return APMConfig(**TINY | {"feature_dim": feature_dim, "pooling": pooling})

    monkeypatch.setattr(APMConfig, "tta", tta)


@pytest.fixture
def test_set(tmp_path):
    root = tmp_path / "set"
    for index in range(5):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(seed=index).save(folder / f"{index}.png")
    return root


@pytest.fixture
def arguments(test_set, tmp_path, tiny_clip):
    return [
        *("--dataset", "imagefolder", "--data-root", str(test_set)),
        *("--output", str(tmp_path / "out"), "--teacher", str(tiny_clip)),
        *("--iterations", "2", "--report-at", "1,2"),
    ]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    with (folder / "rows.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


PEERS = ["--method", "apm", "tpt", "zero"]


def table(folder, name):
    with (folder / name).open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_peers_on_the_same_images(main, small_student, arguments, tmp_path, capsys):
    """All beside each other; the answers of each are those of its own run, added later or not."""
    output, alone = tmp_path / "out", tmp_path / "alone"
    assert main([*arguments, *PEERS]) == 0
    printed = capsys.readouterr().out
    methods = {row["name"]: row for row in results(output)["methods"]}
    assert [*methods] == [
        *("teacher, single", "teacher, clip80", "TPT", "ZERO"),
        *("APM, 1 iterations", "APM, 2 iterations"),
    ]
    assert all(name in printed for name in methods)
    assert all(row["GMACs"] > 0 and row["peak_GB"] > 0 for row in methods.values())
    views = methods["ZERO"]["GMACs"] / methods["teacher, single"]["GMACs"]
    assert views == pytest.approx(64, rel=0.01)
    assert methods["TPT"]["GMACs"] > methods["ZERO"]["GMACs"]
    assert [row["label"] for row in table(output, "tpt.csv")] == [0, 0, 0, 1, 1]

    assert main([*arguments, "--output", str(alone)]) == 0
    assert results(alone)["methods"][0]["name"] == "teacher, single"
    assert len(results(alone)["methods"]) == 3
    assert main([*arguments, *PEERS, "--output", str(alone), "--workers", "1"]) == 0
    for name in ("rows.csv", "tpt.csv", "zero.csv"):
        one, other = (
            [row | {"seconds": 0} for row in table(folder, name)] for folder in (output, alone)
        )
        assert one == other


def test_peers_that_were_stopped_go_on(main, small_student, arguments, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert main([*arguments, *PEERS, "--output", str(tmp_path / "whole")]) == 0
    vote, seen = methods.zero_vote, []

    def stopping(logits):
        seen.append(1)
        if len(seen) == 4:  # the first was to count its cost
            raise KeyboardInterrupt
        return vote(logits)

    monkeypatch.setattr(methods, "zero_vote", stopping)
    assert main([*arguments, *PEERS]) == 130
    assert len(table(output, "tpt.csv")) == 5 and len(table(output, "zero.csv")) == 2
    assert not (output / "results.json").exists()
    assert main([*arguments, *PEERS]) == 0
    assert len(seen) == 4 + 1 + 3
    for name in ("teacher_top1", "iterations", "images"):
        assert results(output)[name] == results(tmp_path / "whole")[name]
    for one, other in zip(
        results(output)["methods"], results(tmp_path / "whole")["methods"], strict=True
    ):
        assert one["top1"] == other["top1"] and one["agreement"] == other["agreement"]


def test_peers_without_students(main, small_student, arguments, tmp_path, capsys):
    assert main([*arguments, "--method", "zero"]) == 0
    assert "APM" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "rows.csv").exists()
    assert "iterations" not in results(tmp_path / "out")


def test_tpt_needs_prompts(main, small_student, arguments, tmp_path, capsys, monkeypatch):
    """A classifier has none, but views to vote with."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **more: create(*args, **more | {"pretrained": False})
    )
    (tmp_path / "set" / "cat").rename(tmp_path / "set" / "tabby")
    (tmp_path / "set" / "dog").rename(tmp_path / "set" / "goldfish")
    weights = tmp_path / "weights.pth"
    torch.save(create("test_vit", num_classes=1000).state_dict(), weights)
    arguments = [*arguments, "--teacher", "test_vit", "--teacher-weights", str(weights)]
    assert main([*arguments, "--method", "apm", "tpt"]) == 2
    said = capsys.readouterr().err
    assert "--method tpt: 'test_vit' has no prompts to tune; give a CLIP" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main([*arguments, "--method", "zero"]) == 0
    assert [row["name"] for row in results(tmp_path / "out")["methods"]] == [
        "teacher, single",
        "ZERO",
    ]


IN_ITS_OWN_PROCESS = f"""
import sys
import torch
from apm import APM, APMConfig
from evaluate_tta import main
torch.set_num_threads(2)
small = {TINY!r}
APMConfig.tta = lambda width, pooling: APMConfig(**small | dict(feature_dim=width, pooling=pooling))
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_ends_with_the_undisturbed_table(
    main, small_student, arguments, tmp_path, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "out"
    arguments = [*arguments, "--iterations", "30", "--report-at", "1,30"]
    assert main([*arguments, "--output", str(whole)]) == 0
    assert "5 images, 0 skipped; teacher top-1" in capsys.readouterr().out

    process = subprocess.Popen(
        [sys.executable, "-c", IN_ITS_OWN_PROCESS, *arguments],
        env=os.environ | {"PYTHONPATH": str((ROOT / SCRIPT).parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = killed / "rows.csv"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = path.read_text().count("\n") - 1
    assert 2 <= kept < 5
    assert main(arguments) == 0

    one, other = (results(folder) for folder in (whole, killed))
    for key in ("images", "teacher_top1", "iterations"):
        assert one[key] == other[key]
    assert [row["index"] for row in rows(killed)] == list(range(5))


def test_rows_of_other_settings_are_refused(
    main, small_student, arguments, test_set, tmp_path, capsys
):
    assert main([*arguments, "--limit", "1"]) == 0
    other_clip = tmp_path / "other.pt"
    other_clip.write_bytes(save_tiny_clip(tmp_path / "same.pt").read_bytes())
    state = torch.load(other_clip)
    state["logit_scale"] += 1
    torch.save(state, other_clip)
    for flag, value, name in (
        ("--seed", "1", "seed"),
        ("--report-at", "1", "report_at"),
        ("--iterations", "3", "iterations"),
        ("--pooling", "mean", "pooling"),
        ("--templates", "clip80", "templates"),
        ("--dtype", "bfloat16", "dtype"),
        ("--learning-rate", "1e-3", "learning_rate"),
        ("--locations", "3", "locations"),
        ("--teacher", str(other_clip), "teacher"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--limit", "1", flag, value]) == 2, flag
        assert f"made with {name} " in capsys.readouterr().err
    photograph(seed=9).save(test_set / "cat" / "0.png")
    assert main([*arguments, "--limit", "1"]) == 2
    assert "made with files_sha256" in capsys.readouterr().err
    assert len(rows(tmp_path / "out")) == 1


def test_labels_are_indices_into_the_recorded_class_names(
    main, small_student, arguments, test_set, tmp_path, capsys
):
    assert main(arguments) == 0

    def names_of_rows(folder):
        classes = json.loads((folder / "settings.json").read_text())["classes"]
        return [classes[int(row["label"])] for row in rows(folder)]

    assert names_of_rows(tmp_path / "out") == ["cat"] * 3 + ["dog"] * 2
    (test_set / "dog").rename(test_set / "ant")  # the two classes change places
    capsys.readouterr()
    assert main(arguments) == 2
    assert "made with classes ['cat', 'dog'], not ['ant', 'cat']" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "other")]) == 0
    assert names_of_rows(tmp_path / "other") == ["ant"] * 2 + ["cat"] * 3


def test_hidden_folders_change_nothing(main, small_student, arguments, test_set, tmp_path):
    hidden = test_set / ".ipynb_checkpoints"
    hidden.mkdir()
    photograph().save(hidden / "a.png")
    assert main(arguments) == 0
    found = results(tmp_path / "out")
    assert found["classes"] == 2 and found["first_classes"] == ["cat", "dog"]
    assert [row["label"] for row in rows(tmp_path / "out")] == [0, 0, 0, 1, 1]


def test_embeddings_are_kept_and_only_the_missing_ones_are_made(
    main, small_student, arguments, test_set, tmp_path, monkeypatch, capsys
):
    seen = []
    forward = ClipTeacher.forward
    monkeypatch.setattr(
        ClipTeacher,
        "forward",
        lambda self, images: seen.append(len(images)) or forward(self, images),
    )

    def embedded():
        """Images that the teacher has seen, but for those that tell its width and its cost."""
        count = sum(seen) - 1 - (methods.REPEATS + 1)
        seen.clear()
        return count

    assert main([*arguments, "--limit", "2"]) == 0
    assert embedded() == 2
    first = rows(tmp_path / "out")
    assert [row["index"] for row in first] == [0, 2]
    (test_set / "cat" / "a.txt").touch()  # no image: the same set
    assert main([*arguments, "--limit", "3"]) == 0  # 0, 1 and 3
    assert embedded() == 2
    kept = load_file(tmp_path / "out" / "embeddings.safetensors")
    assert kept["indices"].tolist() == [0, 2, 1, 3]
    assert kept["embeddings"].shape == (4, 64)
    assert results(tmp_path / "out")["images"] == 3  # 2 has its row, but was not asked for
    assert main([*arguments, "--limit", "2"]) == 0
    assert embedded() == 0
    assert rows(tmp_path / "out")[:2] == first and len(rows(tmp_path / "out")) == 4
    path = tmp_path / "out" / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(arguments) == 2
    assert "embeddings.safetensors: damaged" in capsys.readouterr().err


def test_images_that_cannot_be_read(main, small_student, arguments, test_set, tmp_path, capsys):
    bad = test_set / "cat" / "bad.png"
    bad.write_text("no image")
    assert main(arguments) == 0
    assert "bad.png: cannot be read" in capsys.readouterr().err
    assert main(arguments) == 0  # tried again, in vain
    printed = capsys.readouterr()
    assert "5 images, 1 skipped" in printed.out and printed.err.count("skipped") == 1
    assert results(tmp_path / "out")["skipped"] == 1
    assert [row["index"] for row in rows(tmp_path / "out")] == [0, 1, 2, 4, 5]
    for path in test_set.rglob("*.png"):
        path.write_text("no image")
    assert main([*arguments, "--output", str(tmp_path / "none")]) == 2
    assert "none of 6 images could be read" in capsys.readouterr().err
    assert not (tmp_path / "none" / "results.json").exists()


def test_workers_give_the_same_rows(main, small_student, arguments, test_set, tmp_path, caplog):
    """So does --parallel, which a CPU does not follow, and says so."""
    (test_set / "cat" / "bad.png").write_text("no image")
    tables = []
    for number, more in enumerate(([], ["--parallel", "4"], ["--workers", "2"])):
        assert (
            main([*arguments, *more, "--device", "cpu", "--output", str(tmp_path / str(number))])
            == 0
        )
        tables.append([row | {"seconds": 0} for row in rows(tmp_path / str(number))])
        said = "--parallel 4: on a CPU students are faster one by one" in caplog.text
        assert said == (number > 0)
    assert tables[0] == tables[1] == tables[2]


def test_students_trained_at_once_are_those_trained_one_by_one():
    trainer = TestTimeTrainer(
        APM(APMConfig(**TINY | {"pooling": "mean"})), iterations=3, learning_rate=1e-2, locations=5
    )
    images, targets = torch.rand(3, 3, 56, 56), torch.randn(3, 16)
    together = adapt_each(trainer, images, targets, [4, 5, 6], (1, 3))
    for k, many in enumerate(together):
        [one] = adapt_each(trainer, images[k : k + 1], targets[k : k + 1], [4 + k], (1, 3))
        assert one.pooled_at.keys() == many.pooled_at.keys() == {1, 3}
        torch.testing.assert_close(many.pooled_at, one.pooled_at, atol=1e-5, rtol=0)


def test_the_set_is_described_and_useless_names_are_pointed_out(
    main, small_student, arguments, test_set, tmp_path, capsys, caplog
):
    with caplog.at_level(logging.WARNING):
        assert main(arguments) == 0
        assert not caplog.text
        printed = capsys.readouterr().out
        assert "imagefolder: 5 images of 2 classes (cat, dog)" in printed
        for folder in ("0", "1", "n99999999", "sea_lake", "tree", "under"):
            (test_set / folder).mkdir()
            photograph().save(test_set / folder / "a.png")
        other = tmp_path / "other"
        assert main([*arguments, "--output", str(other), "--limit", "2"]) == 0
    assert "names that say nothing to a teacher: 0, 1, n99999999 (3 of 8)" in caplog.text
    assert "11 images of 8 classes (0, 1, cat, dog, n99999999, ...)" in capsys.readouterr().out
    found = results(other)
    assert found["dataset_images"] == 11 and found["classes"] == 8 and found["images"] == 2
    assert found["first_classes"] == ["0", "1", "cat", "dog", "n99999999"]
    assert found["gmacs_per_iteration"] > 0


def test_flags(main, arguments, capsys):
    printed = help_of(main, capsys)
    assert "iterations in the table, with commas between (default: 1,5,10,20,50)" in printed
    assert "steps for each image (default: 50)" in printed
    for more in (["--input", "a.png"], ["--classes", "cat"], ["--every", "1"]):
        assert refused(main, [*arguments, *more])
    for more in (
        ["--report-at", "0"],
        ["--report-at", "a"],
        ["--parallel", "0"],
        ["--locations", "0"],
        ["--severity", "6"],
        ["--corruption", "drizzle"],
    ):
        assert refused(main, [*arguments, *more])
        assert f"argument {more[0]}" in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_2(main, arguments, test_set, tmp_path, capsys):
    (tmp_path / "alike" / "sea_lake").mkdir(parents=True)
    (tmp_path / "alike" / "sea lake").mkdir()
    for path in ("sea_lake", "sea lake"):
        photograph().save(tmp_path / "alike" / path / "a.png")
    for extra, message in (
        (["--dataset", "cifar10", "--data-root", str(tmp_path)], "no cifar10 there"),
        (["--data-root", str(tmp_path / "none")], "none: no such folder"),
        (["--data-root", str(tmp_path / "alike")], "sea lake"),
        (["--report-at", "500"], "--report-at"),
        (["--templates", str(tmp_path / "none.txt")], "none.txt: no such file of templates"),
        (["--teacher", "ViT-Z/99"], "ViT-Z/99"),
    ):
        assert main([*arguments, *extra]) == 2, extra
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("locations", ["all", "5"])
def test_both_scripts_tell_the_same_loss(main, small_student, arguments, tmp_path, locations):
    """After as many steps; with a few places a step the last loss is still that of all places."""
    more = ["--locations", locations, "--learning-rate", "1e-2"]
    assert main([*arguments, *more, "--limit", "1"]) == 0
    train, image = load_script("single_token_segmentation/train_tta.py").main, "set/cat/0.png"
    alone = ["--output", str(tmp_path / "one"), "--input", str(tmp_path / image)]
    shared = arguments[arguments.index("--teacher") : arguments.index("--report-at")]
    assert train([*shared, *more, *alone, "--classes", "cat,dog"]) == 0
    losses, [row] = results(tmp_path / "one")["losses"], rows(tmp_path / "out")
    assert len(losses) == 3 and losses[2] == pytest.approx(row["loss_2"], rel=1e-5)
    assert (losses[1] == pytest.approx(row["loss_1"], rel=1e-5)) == (locations == "all")


@pytest.mark.slow
def test_clip_vit_b16_goes_through_both_scripts(main, tmp_path, capsys):
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    path = tmp_path / "ViT-B-16.pt"
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    folder = tmp_path / "set" / "cat"
    folder.mkdir(parents=True)
    photograph().save(folder / "a.png")
    one, many = tmp_path / "one", tmp_path / "many"
    command = ["--teacher", str(path), "--iterations", "2"]
    image = ["--input", str(folder / "a.png"), "--classes", "cat,dog", "--templates", "clip80"]
    train = load_script("single_token_segmentation/train_tta.py").main
    assert train([*command, *image, "--output", str(one)]) == 0
    assert len(results(one)["losses"]) == 3
    data = ["--dataset", "imagefolder", "--data-root", str(folder.parent), "--report-at", "1,2"]
    assert main([*command, *data, "--output", str(many)]) == 0
    assert len(rows(many)) == 1
    assert "1 images, 0 skipped; teacher top-1 100.00 %" in capsys.readouterr().out


def test_names_that_say_nothing():
    nothing = ["7", "1234", "a", "n12345678"]
    assert doubtful_names(["cat", "a330", *nothing, "ox", "boeing 707"]) == nothing


def test_a_corrupted_set_of_some_severities_is_refused(main, arguments, tmp_path, capsys):
    """Its rows would be taken for those of other severities."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "settings.json").write_text('{"severities": [5]}')
    more = ["--dataset", "cifar10c", "--data-root", str(tmp_path / "some")]
    assert main([*arguments, *more]) == 2
    assert "some: made with severities [5]" in capsys.readouterr().err
