"""Training runs from end to end: stopped, gone on with, shared out, refused."""

import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script, make_model, photograph
from reference import coco
from training_run import load_inputs

from apm import load_model, save_model
from apm.checkpoint import from_released
from apm.config import TrainConfig
from apm.data.features import StoreWriter
from apm.data.images import file_sizes, image_names
from apm.distill import Distiller, NonFiniteError
from apm.preprocessing import Preprocessing

script = load_script("misc_scripts/train.py")
main, STATE = script.main, script.STATE
IMAGES = 14


def features_of(path: Path) -> torch.Tensor:
    """Features that can be learnt from the image: random projections of patch means."""
    pixels = torch.from_numpy(np.array(photograph(56, 56, seed=int(path.stem[1:])))).float()
    cells = pixels.permute(2, 0, 1).unfold(1, 14, 14).unfold(2, 14, 14).mean((3, 4)).flatten(1)
    projection = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return (cells.T / 64 - 2) @ projection


def make_store(images: Path, folder: Path, dtype: str, teacher: str = "none") -> None:
    paths = image_names(images)
    meta = {"teacher": teacher, "grid_size": 4, "feature_dim": 16, "store_dtype": dtype}
    folder.mkdir()
    writer = StoreWriter(folder, meta, file_sizes(paths))
    writer.write(0, {name: features_of(paths[name]) for name in writer.shards[0]}, {})


@pytest.fixture
def data(tmp_path):
    """Images on a 4 x 4 grid, their features, and a model with random weights to start from."""
    (tmp_path / "images").mkdir()
    for index in range(IMAGES):
        photograph(56, 56, seed=index).save(tmp_path / "images" / f"p{index:02}.png")
    make_store(tmp_path / "images", tmp_path / "float16", "float16")
    save_model(tmp_path / "tiny.safetensors", make_model(local_width=8))
    return tmp_path


def flags(data, output, *more, features="float16", source=()):
    source = source or ("--features", str(data / features))
    return [
        *("--input", str(data / "images"), "--output", str(data / output), *source),
        *(
            "--init",
            str(data / "tiny.safetensors"),
            "--validation-images",
            "2",
            "--batch-size",
            "4",
        ),
        *("--epochs", "2", "--locations", "5", "--learning-rate", "1e-2", "--augment"),
        *("--schedule", "cosine", "--feature-loss", "standardised", *more),
    ]


def assert_same_result(one: Path, other: Path, atol=0.0):
    expected = load_model(other / "apm.safetensors").state_dict()
    for name, tensor in load_model(one / "apm.safetensors").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=atol, rtol=0, msg=name)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("save_every", [[], ["--save-every", "2"]])
def test_an_interrupted_run_goes_on_to_the_same_weights(data, monkeypatch, save_every, capsys):
    assert main(flags(data, "whole")) == 0
    step, calls = Distiller.step, []

    def interrupted(*args):  # in the first epoch, at its end, in the second
        calls.append(len(calls))
        if len(calls) in (2, 3, 5):
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Distiller, "step", interrupted)
    arguments = flags(data, "parts", "--resume", *save_every)
    for _ in range(3):
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert_same_result(data / "parts", data / "whole")
    assert len(calls) == 6  # no step was taken twice
    assert rows(data / "parts" / "steps.csv") == rows(data / "whole" / "steps.csv")
    one, other = (rows(data / name / "history.csv") for name in ("parts", "whole"))
    timings = {"images_per_second", "data_wait"}
    assert [{k: r[k] for k in r.keys() - timings} for r in one] == [
        {k: r[k] for k in r.keys() - timings} for r in other
    ]
    assert (data / "parts" / "loss.png").exists()


def raise_in(monkeypatch, owner, name, call):
    """Let the n-th call of a method end with SIGTERM."""
    method, calls = getattr(owner, name), []

    def terminated(*args):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return method(*args)

    monkeypatch.setattr(owner, name, terminated)


MOMENTS = [
    (script, "save_model", 1),
    (script, "save_model", 2),
    (script.Progress, "save", 1),
    (TrainConfig, "rate", 4),
    (Distiller, "validate", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS)
def test_a_signal_at_a_bad_moment_loses_nothing(data, monkeypatch, owner, name, call):
    assert main(flags(data, "whole")) == 0
    with monkeypatch.context() as patch:
        raise_in(patch, owner, name, call)
        # In the last epoch nothing is left to stop.
        assert main(flags(data, "parts", "--resume")) == (0 if call == 2 else 143)
    assert main(flags(data, "parts", "--resume")) == 0
    assert_same_result(data / "parts", data / "whole")
    assert rows(data / "parts" / "steps.csv") == rows(data / "whole" / "steps.csv")
    assert len(rows(data / "parts" / "history.csv")) == 2
    assert (data / "parts" / "loss.png").exists()


def test_a_run_that_lost_steps_takes_them_again(data, monkeypatch):
    """As after kill -9: what follows the last saved state is gone."""
    assert main(flags(data, "whole")) == 0
    arguments = flags(data, "parts", "--save-every", "2", "--resume")
    with monkeypatch.context() as patch:
        step = Distiller.step

        def killed(distiller, *args):
            if distiller.steps_done == 5:
                raise SystemExit("killed")
            return step(distiller, *args)

        patch.setattr(Distiller, "step", killed)
        with pytest.raises(SystemExit):
            main(arguments)
    assert torch.load(data / "parts" / STATE)["steps_done"] == 4
    assert len(rows(data / "parts" / "steps.csv")) == 5
    assert main(arguments) == 0
    assert_same_result(data / "parts", data / "whole")
    assert rows(data / "parts" / "steps.csv") == rows(data / "whole" / "steps.csv")


def test_a_run_is_not_written_over_nor_continued_with_other_settings(data, capsys):
    assert main(flags(data, "run")) == 0
    state = (data / "run" / STATE).read_bytes()
    for more, message in (
        ([], "holds a run; add --resume"),
        (["--resume", "--batch-size", "5"], "batch_size 4, not 5"),
        (["--resume", "--epochs", "3"], "epochs 2, not 3"),  # of a cosine schedule
        (["--resume", "--limit", "10"], "limit None, not 10"),
        (["--resume", "--accumulate", "9"], "expected at least 9"),
    ):
        assert main(flags(data, "run", *more)) == 2
        assert message in capsys.readouterr().err
    make_store(data / "images", data / "other", "float16", teacher="other")
    assert main(flags(data, "run", "--resume", features="other")) == 2
    assert "made with features: teacher" in capsys.readouterr().err
    arguments = flags(data, "run", "--resume")
    index = arguments.index("--init")
    other = [*arguments[: index + 1], str(data / "other.safetensors"), *arguments[index + 2 :]]
    with torch.no_grad():
        changed = load_model(data / "tiny.safetensors")
        changed.feature_head.bias += 1
    save_model(data / "other.safetensors", changed)
    assert main(other) == 2
    assert "made with --init" in capsys.readouterr().err
    assert (data / "run" / STATE).read_bytes() == state
    (data / "run" / STATE).write_bytes(state[:100])
    assert main(flags(data, "run", "--resume")) == 2
    assert "last.pth" in capsys.readouterr().err
    (data / "images" / "p03.png").unlink()
    assert main(flags(data, "run", "--resume")) == 2
    assert "made with held-out images" in capsys.readouterr().err


def test_another_picture_under_the_same_name_is_refused(data, capsys):
    photograph(60, 56, seed=99).save(data / "images" / "p03.png")
    assert main(flags(data, "run")) == 2
    assert "p03.png" in capsys.readouterr().err and not (data / "run").exists()


def test_a_run_does_not_go_on_with_other_pictures_with_random_weights(data, tiny_teacher, capsys):
    assert main(flags(data, "run", source=tiny_teacher)) == 0
    for index in range(IMAGES):
        photograph(56, 56, seed=99 + index).save(data / "images" / f"p{index:02}.png")
    assert main(flags(data, "run", "--resume", source=tiny_teacher)) == 2
    assert "made with held-out images" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_picture(data, tiny_teacher, capsys):
    """Of which the statistics of the features are."""
    assert main(flags(data, "run", source=tiny_teacher)) == 0
    names = sorted(image_names(data / "images"))
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).tolist()
    for which, index in (("training", order[-1]), ("held-out", order[0])):
        path = data / "images" / f"{names[index]}.png"
        before = path.read_bytes()
        photograph(56, 56, seed=99).save(path)
        assert main(flags(data, "run", "--resume", source=tiny_teacher)) == 2
        assert f"made with {which} images" in capsys.readouterr().err
        path.write_bytes(before)


def test_every_epoch_has_its_own_crops_and_every_step_its_own_places(data, monkeypatch):
    seen, losses = [], Distiller.losses

    def noted(self, pixels, features, places, sees_local, moved=(0, 0)):
        if len(places) == 5:  # a step, no validation
            seen.append((pixels, places.tolist(), tuple(moved)))
        return losses(self, pixels, features, places, sees_local, moved)

    monkeypatch.setattr(Distiller, "losses", noted)
    assert main(flags(data, "run")) == 0
    pixels = torch.cat([step[0] for step in seen])
    assert len(seen) == 6 and len(pixels) == 24
    assert len(torch.unique(pixels.flatten(1), dim=0)) > 18  # of 12 images, twice
    assert len({tuple(places) for _, places, _ in seen}) == 6
    moves = {moved for _, _, moved in seen}
    assert len(moves) > 3 and all(-7 <= offset < 7 for moved in moves for offset in moved)


def test_a_new_student_answers_the_mean_feature_at_first(data):
    args = script.parse([*flags(data, "run"), "--model", "small"])
    args.init, config = None, dataclasses.replace(TrainConfig(), batch_size=4)
    small = make_model(local_width=8)
    inputs = load_inputs(args, config, torch.device("cpu"), lambda *_: small)
    assert torch.equal(small.feature_head.bias, inputs.mean) and inputs.mean.abs().max() > 0


def test_flags_of_a_teacher_without_a_teacher_are_refused(data, capsys):
    for more in (
        ["--teacher-weights", "w.pth"],
        ["--teacher-block", "4"],
        ["--teacher-margin", "2"],
    ):
        assert main(flags(data, "run", *more)) == 2
        assert "go with --teacher" in capsys.readouterr().err


def test_a_store_twice_as_fine_is_read_where_its_tokens_lie(data):
    """Features that are the same all over an image teach the same on either grid."""
    for name, side in (("coarse", 4), ("fine", 8)):
        paths = image_names(data / "images")
        meta = {"grid_size": side, "feature_dim": 16, "store_dtype": "float16"}
        writer = StoreWriter(data / name, meta, file_sizes(paths))
        means = {key: features_of(path).mean(0).expand(side**2, 16) for key, path in paths.items()}
        writer.write(0, means, {})
        run = flags(data, f"run_{name}", "--feature-loss", "mse", features=name)
        assert main(run) == 0
    coarse, fine = (rows(data / f"run_{name}" / "steps.csv") for name in ("coarse", "fine"))
    for one, other in zip(coarse, fine, strict=True):
        assert float(one["feature_loss"]) == pytest.approx(float(other["feature_loss"]), rel=1e-3)


def test_a_store_of_another_grid_is_refused(data, capsys):
    arguments = flags(data, "run")
    index = arguments.index("--init")
    assert main(arguments[:index] + arguments[index + 2 :]) == 2  # the small model has 32 x 32
    assert "grid_size 4, expected the model's 32 or a multiple" in capsys.readouterr().err


def test_a_model_of_another_width_is_refused(data, capsys):
    save_model(data / "tiny.safetensors", make_model(feature_dim=8))
    assert main(flags(data, "run")) == 2
    assert "features of width 16, the model's have 8" in capsys.readouterr().err
    assert not (data / "run").exists()


def test_more_parts_than_images_are_refused(data, capsys):
    assert main(flags(data, "run", "--limit", "5", "--accumulate", "4")) == 2  # 3 to learn from
    assert "3 images are the whole batch, expected at least 4" in capsys.readouterr().err


def test_a_run_into_a_folder_in_use_is_refused_before_the_work(data, monkeypatch, capsys):
    lock = data / "run" / ".lock"
    lock.parent.mkdir()
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as holder:
        assert holder.stdout.readline()
        monkeypatch.setattr(script.Progress, "load", lambda run: pytest.fail("a state was read"))
        assert main(flags(data, "run", "--resume")) == 2
        holder.stdin.close()
    assert "another run writes there now" in capsys.readouterr().err


def test_training_on_crops_makes_a_model_for_crops(data):
    shifted = Preprocessing(image_size=56, fit="stretch", channels="BGR", token_offset=5)
    model = make_model(local_width=8)
    model.preprocessing = shifted
    save_model(data / "tiny.safetensors", model)
    assert main(flags(data, "run")) == 0
    expected = dataclasses.replace(shifted, fit="crop", token_offset=0)
    assert load_model(data / "run" / "apm.safetensors").preprocessing == expected


def test_parts_of_a_batch_change_nothing(data):
    assert main(flags(data, "whole")) == 0
    assert main(flags(data, "parts", "--accumulate", "3")) == 0
    assert_same_result(data / "parts", data / "whole", atol=2e-3)  # saved in half precision


def test_int8_features_teach_as_well_as_float16(data):
    make_store(data / "images", data / "int8", "int8")
    losses = []
    for dtype in ("float16", "int8"):
        more = ("--epochs", "10", "--learning-rate", "1e-3", "--feature-loss", "mse")
        assert main(flags(data, f"run_{dtype}", *more, features=dtype)) == 0
        losses.append(float(rows(data / f"run_{dtype}" / "history.csv")[-1]["feature_loss"]))
    assert losses[0] < 1.9  # something was learnt: 2 is knowing nothing
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_image(data, capsys):
    (data / "npy").mkdir()  # the released layout, in which nothing was checked
    for name, path in image_names(data / "images").items():
        features = features_of(path).numpy()
        features[3] = np.nan if name == "p07" else features[3]
        np.save(data / "npy" / f"{name}.npy", features)
    assert main(flags(data, "run", "--locations", "16", features="npy")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "feature loss nan" in message and message.endswith("images p07")
    assert not (data / "run" / "apm.safetensors").exists()


def test_images_that_do_no_harm_alone_are_not_blamed(data, monkeypatch, capsys):
    def step(*args):
        raise NonFiniteError("gradient inf")

    monkeypatch.setattr(Distiller, "step", step)
    assert main(flags(data, "run")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("gradient inf; none of this process's images alone is the cause")


def test_weights_that_explode_are_named_as_the_cause(data, capsys):
    assert main(flags(data, "run", "--learning-rate", "1e30")) == 2
    assert "all images of this process's batch" in capsys.readouterr().err


@pytest.fixture
def tiny_teacher(data):
    """A ViT with random weights and 64-dimensional tokens, and a student for it."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), data / "vit.pth")
    save_model(data / "tiny.safetensors", make_model(local_width=8, feature_dim=64))
    return ("--teacher", "test_vit", "--teacher-weights", str(data / "vit.pth"))


def test_a_teacher_on_the_fly_needs_no_store_with_random_weights(data, tiny_teacher, capsys):
    more = ("--teacher-block", "1", "--learning-rate", "1e-3")
    arguments = flags(data, "run", *more, source=tiny_teacher)
    assert main(arguments) == 0
    assert main([*arguments, "--output", str(data / "again")]) == 0
    assert_same_result(data / "run", data / "again")
    model = load_model(data / "run" / "apm.safetensors")
    assert model.provenance["teacher"]["block"] == 1
    history = rows(data / "run" / "history.csv")
    assert float(history[-1]["feature_loss"]) < float(history[0]["feature_loss"])


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_an_image_that_a_worker_cannot_read_is_named_in_one_line(
    data, tiny_teacher, monkeypatch, capsys, part, gone
):
    train = script.train

    def damaged(inputs, *args):
        path = getattr(inputs, part).paths[0]
        path.unlink() if gone else path.write_text("no image")
        return train(inputs, *args)

    monkeypatch.setattr(script, "train", damaged)
    assert main(flags(data, "run", "--workers", "1", source=tiny_teacher)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("no such file") if gone else "cannot be read as an image" in message
    assert ".png: " in message and "Traceback" not in message


def test_tensorboard_gets_every_step(data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(flags(data, "run", "--tensorboard")) == 0
    events = EventAccumulator(str(data / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("feature_loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_is_optional(data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(flags(data, "run", "--tensorboard")) == 2
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_released_checkpoint_is_trained_further_with_random_weights(tmp_path):
    torch.manual_seed(0)
    released = coco().state_dict()
    torch.save(released, tmp_path / "model_15.pth")
    for folder in ("images", "features"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        photograph(448, 448, seed=index).save(tmp_path / "images" / f"p{index}.png")
        np.save(tmp_path / "features" / f"p{index}.npy", np.ones((1024, 1024), np.float32))
    arguments = ["--input", str(tmp_path / "images"), "--features", str(tmp_path / "features")]
    arguments += ["--output", str(tmp_path / "run"), "--init", str(tmp_path / "model_15.pth")]
    arguments += ["--validation-images", "1", "--batch-size", "2", "--locations", "8"]
    assert main([*arguments, "--epochs", "1", "--learning-rate", "0"]) == 0
    model = load_model(tmp_path / "run" / "apm.safetensors")
    assert model.preprocessing.channels == "BGR" and model.preprocessing.scaling == "min-max"
    assert model.preprocessing.fit == "crop"  # as the images that it learnt from
    assert model.preprocessing.token_offset == 0  # the new features are where they belong
    for name, tensor in from_released(released).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_under_torchrun_train_as_one(data):
    assert main(flags(data, "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(random.randint(20000, 60000)), "misc_scripts/train.py"]
    subprocess.run([*command, *flags(data, "two")], cwd=ROOT, env=environment(), check=True)
    assert_same_result(data / "two", data / "one", atol=2e-3)  # saved in half precision
    one, two = (torch.load(data / name / STATE)["model"] for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow  # two processes import torch
def test_a_process_that_fails_ends_all_of_them_in_one_line_each_with_random_weights(
    data, tiny_teacher
):
    (data / "images" / "p00.png").write_text("no image")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(random.randint(20000, 60000)), "misc_scripts/train.py"]
    command += flags(data, "two", source=tiny_teacher)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and any("p00.png: cannot be read" in line for line in lines)
    assert done.stderr.count("Traceback (most recent call last)") == 1  # torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(data, number, status):
    # All in processes of their own: another number of threads rounds differently.
    script = [sys.executable, "misc_scripts/train.py"]
    whole = flags(data, "whole", "--epochs", "60")
    subprocess.run([*script, *whole], cwd=ROOT, env=environment(), check=True)
    command = script + flags(data, "parts", "--epochs", "60", "--save-every", "1", "--resume")
    kills = 0
    for delay in random.Random(0).choices(range(1, 20), k=6):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        log, before = data / "parts" / "steps.csv", time.monotonic()
        seen = log.read_bytes() if log.exists() else b""
        while process.poll() is None and (log.read_bytes() if log.exists() else b"") == seen:
            assert time.monotonic() - before < 300
            time.sleep(0.02)
        time.sleep(delay / 50)
        process.send_signal(number)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == status
        kills += 1
    assert kills >= 2
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    assert_same_result(data / "parts", data / "whole")
