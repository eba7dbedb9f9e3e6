"""kill -9 at random moments: nothing corrupt, nothing lost that was done, nothing done twice.

Slow: ``pytest -m slow -s tests/test_robustness_kills.py`` prints the counts.
"""

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_model, photograph, save_tiny_clip
from PIL import Image
from zygote import Zygote

from apm import load_model, save_model

pytestmark = pytest.mark.slow
KILLS = 30


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.close()


def kill_until_done(
    zygote: Zygote,
    script: str,
    argv: Sequence,
    longest: float,
    after_each: Callable[[], None],
    restart: Callable[[], None] = lambda: None,
) -> int:
    """Run a script again and again, killed at random moments, ``KILLS`` times at least.

    A run that ends by itself is good too; ``restart`` then sets the stage anew. The last run is
    left alone.

    Args:
        zygote: where runs come from.
        script: its path in the repository.
        argv: its arguments.
        longest: seconds after which a run is killed at the latest.
        after_each: checks what lies on the disk.
        restart: see above.
    """
    chance, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        process = zygote.start(script, argv)
        time.sleep(chance.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        status = zygote.status()
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        ends += status == 0
        after_each()
        if status == 0:
            restart()
    assert zygote.run(script, argv) == 0
    after_each()
    print(f"\n{script}: {kills} kills survived, {ends} runs ended before theirs")
    return kills


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".part" in path.name]


def move_away(folder: Path) -> Callable[[], None]:
    """A function that gives the folder another name each time."""

    def restart() -> None:
        folder.rename(folder.with_name(f"{folder.name}_{time.monotonic_ns()}"))

    return restart


def fill(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        photograph(60, 56, seed=index).save(folder / f"p{index:03}.jpg")
    return folder


def vit_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


def test_extraction_with_random_weights(zygote, tmp_path):
    images, weights = fill(tmp_path / "images", 48), vit_weights(tmp_path)
    script = "misc_scripts/1_extract_coco_features.py"
    arguments = ["--input", images, "--teacher", "test_vit", "--teacher-weights", weights]
    arguments += ["--teacher-block", "0", "--batch-size", "8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert zygote.run(script, [*arguments, "--output", whole]) == 0
    longest = (time.monotonic() - started) / 3
    expected = {path.name: path.read_bytes() for path in whole.glob("*.safetensors")}
    assert len(expected) == 12
    seen: dict[Path, int] = {}

    def check() -> None:
        now = {path: path.stat().st_mtime_ns for path in killed.glob("[0-9]*.safetensors")}
        for path, written in seen.items():
            assert now[path] == written  # nothing lost, nothing done twice
        for path in now.keys() - seen.keys():
            assert path.read_bytes() == expected[path.name]  # nothing corrupt
        seen.update(now)

    def restart() -> None:
        move_away(killed)()
        seen.clear()

    kill_until_done(zygote, script, [*arguments, "--output", killed], longest, check, restart)
    assert {path.name for path in seen} == set(expected) and not leftovers(killed)


def test_training_with_random_weights(zygote, tmp_path):
    images, weights = fill(tmp_path / "images", 24), vit_weights(tmp_path)
    save_model(tmp_path / "tiny", make_model(feature_dim=64, local_width=8))
    script = "misc_scripts/train.py"
    arguments = ["--input", images, "--teacher", "test_vit", "--teacher-weights", weights]
    arguments += [
        "--teacher-block",
        "0",
        "--init",
        tmp_path / "tiny",
        "--batch-size",
        "4",
    ]
    arguments += ["--validation-images", "4", "--epochs", "12", "--augment", "--resume"]
    arguments += ["--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert zygote.run(script, [*arguments, "--output", whole]) == 0
    longest = (time.monotonic() - started) / 2
    expected = load_model(whole / "apm.safetensors").state_dict()
    reached = 0

    def check() -> None:
        nonlocal reached
        state = killed / "last.pth"
        step = torch.load(state, weights_only=True)["steps_done"] if state.exists() else 0
        assert step >= reached  # nothing lost
        reached = step
        if (killed / "apm.safetensors").exists():
            model = load_model(killed / "apm.safetensors")
            for name, tensor in model.state_dict().items():  # nothing corrupt or done twice
                last = model.provenance["validation"]["epoch"] == 12
                assert torch.equal(tensor, expected[name]) or not last, name

    def restart() -> None:
        nonlocal reached
        move_away(killed)()
        reached = 0

    kill_until_done(zygote, script, [*arguments, "--output", killed], longest, check, restart)
    assert (killed / "apm.safetensors").exists() and not leftovers(killed)
    steps = [row["step"] for row in csv.DictReader((killed / "steps.csv").open())]
    assert steps == [row["step"] for row in csv.DictReader((whole / "steps.csv").open())]


def test_test_time_training_of_a_data_set_with_random_weights(zygote, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set").mkdir(exist_ok=True)
        fill(tmp_path / "set" / name, 40)
    teacher = save_tiny_clip(tmp_path / "tiny.pt")
    script = "single_token_segmentation/evaluate_tta.py"
    arguments = ["--dataset", "imagefolder", "--data-root", tmp_path / "set", "--teacher", teacher]
    arguments += ["--iterations", "1", "--report-at", "1", "--locations", "all"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert zygote.run(script, [*arguments, "--output", whole]) == 0
    longest = (time.monotonic() - started) / 3
    rows, seen = killed / "rows.csv", [b""]

    def check() -> None:
        content = rows.read_bytes() if rows.exists() else b""
        done = content[: content.rfind(b"\n") + 1]
        assert done.startswith(seen[0])  # nothing lost, nothing changed
        seen[0] = done

    def restart() -> None:
        move_away(killed)()
        seen[0] = b""

    kill_until_done(zygote, script, [*arguments, "--output", killed], longest, check, restart)
    with rows.open() as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == list(range(80))
    one, other = (json.loads((f / "results.json").read_text()) for f in (whole, killed))
    assert one["iterations"] == other["iterations"] and not leftovers(killed)


def test_figures_of_a_folder(zygote, tmp_path):
    images, output = fill(tmp_path / "images", 12), tmp_path / "out"
    save_model(tmp_path / "tiny", make_model())
    script = "predict_test_image.py"
    arguments = [
        "--checkpoint",
        tmp_path / "tiny",
        "--input",
        images,
        "--output",
        output,
    ]
    arguments += ["--method", "pca", "--save-features"]
    started = time.monotonic()
    assert zygote.run(script, arguments) == 0
    longest = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in output.glob("*.png")}
    assert len(expected) == 12

    def check() -> None:
        for path in output.glob("[!.]*.png"):
            with Image.open(path) as image:
                image.load()
            assert path.read_bytes() == expected[path.name]  # the former or the new, and whole
        json.loads((output / "results.json").read_text())

    kill_until_done(zygote, script, arguments, longest, check)
    assert len(list(output.glob("*.png"))) == 12 and not leftovers(output)
