"""Odd images, exhausted resources, signals, homes that are none: what the README promises."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, make_model, photograph, save_tiny_clip
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from zygote import Zygote

from apm import save_model
from apm.data.images import find_images, load_image
from apm.drawing import save_picture
from apm.flags import make_parser
from apm.runtime.cli import command
from apm.runtime.files import (
    LOCK,
    atomic_path,
    cache_home,
    prepare_output,
    release_outputs,
    use_writable_caches,
    write_json,
)
from apm.runtime.logs import RowLog


@pytest.fixture(autouse=True)
def give_up_outputs():
    yield
    release_outputs()


@pytest.fixture
def unprivileged():
    """An empty folder of a user whom permissions bind; tests as root become that user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    folder = Path(tempfile.mkdtemp())
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)
    shutil.rmtree(folder)
    if root:
        os.seteuid(0)


# Images


def odd_images(folder: Path) -> set[str]:
    """Images that are odd and still images."""
    base = photograph()
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = np.asarray(base.convert("L")).astype(np.uint16) * 257
    clear = base.quantize(64)
    clear.info["transparency"] = 0
    Image.new("RGB", (1, 1), "red").save(folder / "one_pixel.png")
    Image.new("RGB", (1, 5000), "blue").save(folder / "thin.png")
    Image.new("RGB", (5000, 1), "blue").save(folder / "flat.bmp")
    Image.fromarray(grey16).save(folder / "sixteen.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    clear.save(folder / "palette.png", transparency=0)
    base.save(folder / "moving.gif", save_all=True, append_images=[photograph(seed=1)])
    base.save(folder / "turned.jpg", exif=exif)
    base.save(folder / "grüße 写真 #1?.png")
    base.save(folder / os.fsdecode(b"not-text-\xff.png"))
    base.save(folder / "a.png")
    (folder / "a.png").rename(folder / "really_a_png.jpg")
    (folder / "x.jpg").mkdir()
    base.save(folder / "x.jpg" / "inside.png")
    (folder / "up.png").symlink_to("one_pixel.png")
    (folder / "round").symlink_to(".")
    return {path.name for path in folder.rglob("*") if path.is_file()}


def png(width: int, height: int) -> bytes:
    """A well-formed PNG of zeros, however large."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    row = bytes(1 + (width + 7) // 8)
    body = zlib.compressobj()
    data = b"".join([*(body.compress(row) for _ in range(height)), body.flush()])
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_images(folder: Path) -> set[str]:
    """Files that look like images and are none."""
    photograph(300, 200).save(folder / "whole.jpg")
    photograph(300, 200).save(folder / "whole.png")
    jpeg, lossless = ((folder / f"whole.{kind}").read_bytes() for kind in ("jpg", "png"))
    (folder / "whole.jpg").unlink()
    (folder / "whole.png").unlink()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "truncated.png").write_bytes(lossless[: len(lossless) // 2])
    (folder / "header_only.png").write_bytes(lossless[:33])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "html.png").write_text("<html>404 not found</html>")
    (folder / "bomb.png").write_bytes(png(20000, 20000))
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "broken.jpg").symlink_to("nothing")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(os.path.relpath(folder / "socket.png"))
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def predict(checkpoint, tmp_path):
    main = load_script("predict_test_image.py").main

    def run(source, output=tmp_path / "out"):
        arguments = ["--checkpoint", checkpoint, "--input", source, "--output", output]
        return main([*map(str, arguments), "--method", "pca"]), output

    return run


def test_a_folder_of_odd_and_bad_images_gives_figures_of_the_odd_and_reasons_for_the_bad(
    predict, tmp_path, capsys
):
    folder = tmp_path / "images"
    (folder / "bad").mkdir(parents=True)
    odd, bad = odd_images(folder), bad_images(folder / "bad")
    (folder / ".thumbnail.png").write_bytes(b"hidden")
    status, output = predict(folder)
    assert status == 0
    printed = capsys.readouterr()
    assert f"{len(odd)} images, {len(bad)} skipped" in printed.out
    results = json.loads((output / "results.json").read_text())
    assert {Path(path).name for path in results["skipped"]} == bad
    assert {Path(row["image"]).name for row in results["images"]} == odd
    assert len(list(output.rglob("*_islands.png"))) == len(odd)
    for name in bad:
        assert f"{name}: cannot be read as an image" in printed.err


def test_a_bad_image_named_alone_is_one_line_and_status_2(predict, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    for name in sorted(bad_images(tmp_path / "bad")):
        status, output = predict(tmp_path / "bad" / name)
        printed = capsys.readouterr().err
        assert status == 2 and printed.count("\n") == 1 and name in printed, printed
        assert not output.exists()


def test_a_folder_of_bad_images_alone_is_status_2(predict, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    bad = bad_images(tmp_path / "bad")
    assert predict(tmp_path / "bad")[0] == 2
    assert f"none of {len(bad)} images could be read" in capsys.readouterr().err


def test_odd_images_are_seen_as_meant(tmp_path):
    odd_images(tmp_path)
    base = np.asarray(photograph(), int)
    grey = np.asarray(photograph().convert("L"), int)

    def seen(name):
        return np.asarray(load_image(tmp_path / name), int)

    assert np.abs(seen("sixteen.png")[..., 0] - grey).max() <= 1
    assert seen("turned.jpg").shape == (80, 60, 3)
    assert np.abs(seen("moving.gif") - base).mean() < 8  # the first frame, in 256 colours
    assert np.abs(seen("cmyk.jpg") - base).mean() < 8
    clear = np.asarray(Image.open(tmp_path / "palette.png")) == 0
    assert clear.any() and (seen("palette.png")[clear] == 255).all()


def test_an_image_without_permission_is_reported(unprivileged):
    photograph().save(unprivileged / "secret.png")
    (unprivileged / "secret.png").chmod(0)
    with pytest.raises(ValueError, match=r"secret\.png: cannot be read .*Permission denied"):
        load_image(unprivileged / "secret.png")
    photograph().save(unprivileged / "open.png")
    (unprivileged / "closed").mkdir(mode=0)
    assert [path.name for path in find_images(unprivileged)] == ["open.png", "secret.png"]


# Output folders


def test_an_output_path_that_is_a_file_or_read_only_is_refused(unprivileged):
    (unprivileged / "file").touch()
    (unprivileged / "closed").mkdir(mode=0o500)
    for output in ("file", "file/below", "closed", "closed/below"):
        with pytest.raises(ValueError, match="cannot write output there"):
            prepare_output(unprivileged / output)


def test_a_second_run_into_one_folder_is_refused_until_the_first_ends(predict, tmp_path, capsys):
    photograph().save(tmp_path / "a.png")
    output = tmp_path / "out"
    output.mkdir()
    program = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
    program += "print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", program, output / LOCK], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert predict(tmp_path / "a.png")[0] == 2
        assert f"{output}: another run writes there now" in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == [LOCK]
        other.kill()
    assert predict(tmp_path / "a.png")[0] == 0
    assert predict(tmp_path / "a.png")[0] == 0  # a run gives its folder up


def test_what_killed_runs_left_is_swept_away_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "sub" / "a.png") as temporary:
        stale = temporary.name
        temporary.touch()
    # Another run is at work in a folder below.
    (tmp_path / "other").mkdir()
    for name in ("sub/" + stale, "sub/.hidden", "sub/a.part", "sub/x.jpg"):
        (tmp_path / name).touch()
    for name in (LOCK, stale):
        (tmp_path / "other" / name).touch()
    prepare_output(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {"sub/a.png", "sub/.hidden", "sub/a.part", "sub/x.jpg"}
    kept |= {f"other/{LOCK}", f"other/{stale}"}
    assert left == kept | {LOCK}
    assert find_images(tmp_path) == [tmp_path / "sub" / name for name in ("a.png", "x.jpg")]


@contextmanager
def small_files():
    """A disk that takes 4 kB a file: the system refuses more, as a full disk does.

    No fixture: the limit would hold for pytest's own report too, which may be a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_everything(folder: Path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    yield lambda: save_picture(folder / "a.png", noise)
    yield lambda: save_model(folder / "a.safetensors", make_model())
    yield lambda: write_json(folder / "a.json", {"long": "long " * 2000})
    yield lambda: save_array(folder / "a.npz")


def save_array(path: Path):
    with atomic_path(path) as temporary:
        np.savez(temporary, np.zeros(10_000))


def test_a_full_disk_is_named_and_keeps_what_was_there(tmp_path):
    for name in ("a.png", "a.safetensors", "a.json", "a.npz"):
        (tmp_path / name).write_text("former")
    for write in write_everything(tmp_path):
        with small_files(), pytest.raises(OSError, match=r"a\.\w+: cannot be written") as error:
            write()
        assert error.value.errno in (errno.EFBIG, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.png",
        "a.safetensors",
        "a.json",
        "a.npz",
    }
    assert {path.read_text() for path in tmp_path.iterdir()} == {"former"}


def test_rows_survive_a_full_disk(tmp_path):
    log = RowLog(tmp_path / "rows.csv", ["index", "label"])
    with small_files(), pytest.raises(OSError, match="File too large"):
        for index in range(10_000):
            log.append([{"index": index, "label": 1}])
    written = len(log.rows)
    assert written > 300
    assert RowLog(tmp_path / "rows.csv", ["index", "label"]).done == set(range(written))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(checkpoint, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        photograph().save(tmp_path / "a.png")
        (disk / "filler").write_bytes(bytes(56_000))
        main = load_script("predict_test_image.py").main
        arguments = ["--checkpoint", str(checkpoint), "--input", str(tmp_path / "a.png")]
        assert main([*arguments, "--output", str(disk / "out"), "--method", "pca"]) == 2
        printed = capsys.readouterr().err
        assert "a_islands.png: cannot be written (No space left on device)" in printed
        assert printed.count("\n") == 1
        assert [path.name for path in (disk / "out").iterdir()] == [LOCK]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Memory and workers


class Deadly(Dataset):
    """Its workers are killed, as the system does when memory is short."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def exhausted(argv):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nand much more")


def worked_to_death(argv):
    list(DataLoader(Deadly(), num_workers=1))


def buggy(argv):
    raise RuntimeError("a bug")


def test_lack_of_memory_and_dead_workers_are_one_line_but_bugs_are_not_hidden(capsys):
    for main, reason in ((exhausted, "out of memory; try"), (worked_to_death, "--workers 0")):
        assert command(main)([]) == 2
        printed = capsys.readouterr().err
        assert reason in printed and printed.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        command(buggy)([])


def test_workers_are_no_more_than_cores(capsys):
    parser = make_parser("", "--workers")
    assert parser.parse_args(["--workers", "100000"]).workers == os.cpu_count()
    assert parser.parse_args(["--workers", "0"]).workers == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--workers", "-1"])
    assert "must be at least 0" in capsys.readouterr().err


# Signals and closed pipes


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.close()


TTA = "single_token_segmentation/evaluate_tta.py"


def test_signals_end_a_run_in_one_line_and_it_goes_on_with_random_weights(zygote, tmp_path):
    names = ["cat/a", "cat/z", *(f"dog/{letter}" for letter in "abcd")]  # enough for two stops
    for name in names:
        path = tmp_path / "set" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(seed=ord(name[-1])).save(path)
    (tmp_path / "set" / "cat" / "bad.png").write_text("no image")
    teacher = save_tiny_clip(tmp_path / "tiny.pt")
    arguments = ["--dataset", "imagefolder", "--data-root", tmp_path / "set"]
    arguments += ["--output", tmp_path / "out", "--teacher", teacher, "--iterations", "1"]
    arguments += ["--report-at", "1", "--locations", "all"]
    rows, messages = tmp_path / "out" / "rows.csv", tmp_path / "stderr"

    def row_count():
        return rows.read_text().count("\n") - 1 if rows.exists() else 0

    for kind, status, word in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
    ):
        before = row_count()
        ended = zygote.stop(lambda n=before: row_count() > n, kind, TTA, arguments, stderr=messages)
        assert ended == status
        assert messages.read_text().splitlines()[-1] == f"evaluate_tta.py: {word}"
        assert "Traceback" not in messages.read_text()
        assert row_count() >= before + 1
    table = tmp_path / "table"
    assert zygote.run(TTA, arguments, stdout=table) == 0
    assert "6 images, 1 skipped" in table.read_text()
    indices = [int(line.split(",")[0]) for line in rows.read_text().splitlines()[1:]]
    assert sorted(indices) == [0, 2, 3, 4, 5, 6]  # the bad one is number 1


def test_a_reader_that_leaves_and_a_full_stdout(zygote, checkpoint, tmp_path):
    photograph().save(tmp_path / "a.png")
    arguments = ["--checkpoint", checkpoint, "--input", tmp_path / "a.png", "--method", "pca"]
    script, messages = "predict_test_image.py", tmp_path / "stderr"
    arguments += ["--output", tmp_path / "out"]
    assert zygote.run(script, arguments, stdout="gone", stderr=messages) == 141
    assert messages.read_text() == ""
    assert load_image(tmp_path / "out" / "a_islands.png").width > 1000
    assert zygote.run(script, ["--help"], stdout="gone", stderr=messages) in (0, 141)
    assert messages.read_text() == ""
    assert zygote.run(script, arguments, stdout="/dev/full", stderr=messages) == 2
    assert messages.read_text().count("\n") == 1 and "No space left" in messages.read_text()


# Homes and locales


def test_caches_go_to_the_temporary_folder_where_home_is_none(monkeypatch, unprivileged):
    monkeypatch.setattr(tempfile, "tempdir", str(unprivileged / "tmp"))
    monkeypatch.setenv("MPLCONFIGDIR", "kept")
    monkeypatch.setenv("HOME", str(unprivileged))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    use_writable_caches()
    assert cache_home() == unprivileged / ".cache"
    closed, file = unprivileged / "closed", unprivileged / "file"
    closed.mkdir(mode=0o500)
    file.touch()
    for home in (closed, file, closed / "below"):
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        use_writable_caches()
        assert cache_home().parent == unprivileged / "tmp"


def test_no_home_no_display_c_locale_from_another_folder(checkpoint, tmp_path):
    folder = tmp_path / "näme with spaces"
    folder.mkdir()
    photograph().save(folder / "bïld.png")
    (tmp_path / "home").touch()
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "import apm, matplotlib, huggingface_hub.constants as hub, torch\n"
        "print(matplotlib.get_cachedir(), matplotlib.get_configdir(), hub.HF_HOME, "
        "torch.hub.get_dir(), sep='\\n')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-W", "error::UserWarning:matplotlib", "-c", program]
    command += [ROOT / "predict_test_image.py", "--input", ".", "--output", "aus"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(tmp_path / "home")}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--checkpoint", checkpoint, "--method", "pca"],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "aus" / "bïld_islands.png").exists()
    caches = done.stdout.splitlines()[:4]
    assert all(cache.startswith(f"{tmp_path}/apm-cache-") for cache in caches), caches
    assert "atplotlib" not in done.stderr
