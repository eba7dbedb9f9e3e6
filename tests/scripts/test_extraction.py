"""Extraction of features from end to end: stopped, gone on with, shared out, refused."""

import errno
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, load_script, photograph

import apm.data.features
from apm.data.features import FeatureStore, StoreWriter
from apm.preprocessing import Preprocessing

main = load_script("misc_scripts/1_extract_coco_features.py").main


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for index in range(5):
        photograph(120, 100, seed=index).save(folder / "sub" / f"p{index}.jpg")
    return folder


@pytest.fixture
def arguments(tmp_path, images, monkeypatch):
    """The flags for a tiny ViT with random weights; shards of two images."""
    monkeypatch.setattr(apm.data.features, "SHARD_IMAGES", 2)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    return [
        *("--input", str(images), "--teacher", "test_vit", "--teacher-block", "0"),
        *("--teacher-weights", str(tmp_path / "vit.pth"), "--output", str(tmp_path / "features")),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_store_is_made_and_kept_with_random_weights(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert "features of 5 images" in capsys.readouterr().out
    folder = tmp_path / "features"
    store = FeatureStore(folder)
    assert list(store.sizes) == [f"sub/p{index}" for index in range(5)]
    assert store.read("sub/p3").shape == (1024, 64)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert main([*arguments, "--verify"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for more, message in (
        (["--teacher-block", "1"], "block 0, not 1"),
        (["--teacher-margin", "1"], "margin 0, not 1"),
        (["--density", "2"], "density 1, not 2"),
        (["--consensus", "1"], "consensus 0, not 1"),
        (["--store-dtype", "float16"], "store_dtype 'int8', not 'float16'"),
        (["--limit", "4"], "images 5, not 4"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_dense_store_is_four_times_as_large_with_random_weights(arguments, tmp_path):
    assert main([*arguments, "--density", "2", "--consensus", "1", "--limit", "1"]) == 0
    store = FeatureStore(tmp_path / "features")
    assert store.read("sub/p0").shape == (4096, 64)
    assert store.meta["grid_size"] == 64


def test_what_is_missing_or_damaged_is_made_anew_with_random_weights(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    folder = tmp_path / "features"
    whole = contents(folder)
    (folder / "000000.safetensors").unlink()
    (folder / "000001.safetensors").write_bytes(whole["000001.safetensors"][:-1])
    flipped = bytearray(whole["000002.safetensors"])
    flipped[-1] ^= 1
    (folder / "000002.safetensors").write_bytes(flipped)
    assert main(arguments) == 0
    assert "000001.safetensors: damaged" in capsys.readouterr().err
    assert contents(folder).keys() == whole.keys() and contents(folder) != whole
    assert main([*arguments, "--verify"]) == 0
    assert "checksum differs" in capsys.readouterr().err
    assert contents(folder) == whole


def work_slowly(environment: dict[str, str], argv: list[str], seconds: float) -> None:
    """One of several processes, which takes so much longer for each shard."""
    os.environ |= environment
    torch.set_num_threads(1)
    write = StoreWriter.write

    def slow(*args):
        time.sleep(seconds)
        write(*args)

    StoreWriter.write = slow
    sys.exit(main(argv))


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_batches_and_processes_change_nothing_with_random_weights(arguments, tmp_path):
    assert main(arguments) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [*arguments, "--batch-size", "1", "--output", str(tmp_path / "shared")]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=work_slowly, args=({"RANK": str(rank)} | shared, argv, rank))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results = json.loads((tmp_path / "shared" / "results.json").read_text())
    assert results["images"] == 5  # those of the slower process too
    one, two = (FeatureStore(tmp_path / name) for name in ("features", "shared"))
    assert one.sizes == two.sizes
    for name in one.sizes:
        torch.testing.assert_close(one.read(name), two.read(name), atol=0.05, rtol=0)


def test_images_that_cannot_be_read_are_reported_and_left_out_with_random_weights(
    arguments, images, tmp_path, capsys
):
    (images / "sub" / "p1.jpg").write_text("no image")
    (images / "sub" / "p4.jpg").unlink()
    (images / "sub" / "p4.jpg").symlink_to(tmp_path / "nowhere")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "3 images" in printed.out and "2 skipped" in printed.out
    assert "p1.jpg: cannot be read" in printed.err and "p4.jpg: cannot be read" in printed.err
    results = json.loads((tmp_path / "features" / "results.json").read_text())
    assert results["images"] == 3 and list(results["skipped"]) == ["sub/p1", "sub/p4"]
    for path in images.rglob("*.jpg"):
        path.unlink()
        path.write_text("no image")
    assert main([*arguments, "--output", str(tmp_path / "none")]) == 2
    assert "none of 5 images could be read" in capsys.readouterr().err


def test_an_error_that_is_no_images_fault_ends_it_with_random_weights(
    arguments, monkeypatch, capsys
):
    def broken(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(Preprocessing, "picture", broken)
    assert main(arguments) == 2
    assert "a mistake" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_stops_it_and_space_lets_it_go_on_with_random_weights(
    arguments, tmp_path, monkeypatch, capsys
):
    write_bytes, space = Path.write_bytes, 200_000

    def write(path, data):
        nonlocal space
        write_bytes(path, data[:space])
        space -= len(data)
        if space < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        assert main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in message
    assert "1 of 3 shards done: run the same command again" in message
    left = {path.name for path in (tmp_path / "features").iterdir()}
    assert left == {".lock", "store.json", "000000.safetensors"}
    assert main(arguments) == 0
    assert len(FeatureStore(tmp_path / "features").sizes) == 5


@pytest.mark.slow
def test_kill_9_loses_and_doubles_nothing_with_random_weights(arguments, tmp_path):
    assert main(arguments) == 0
    whole = contents(tmp_path / "features")
    arguments = [*arguments, "--output", str(tmp_path / "killed")]
    script = ROOT / "misc_scripts" / "1_extract_coco_features.py"
    code = (
        "import runpy, sys, apm.data.features; apm.data.features.SHARD_IMAGES = 2; "
        f"sys.argv = [{str(script)!r}, *{arguments!r}]; "
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kills, chance = 0, random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while process.poll() is None and not (tmp_path / "killed" / "store.json").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -9
    assert kills >= 2
    assert main(arguments) == 0
    assert contents(tmp_path / "killed") == whole


def test_tokens_of_the_real_dinov2_land_at_their_places_with_random_weights(images, tmp_path):
    """Through --teacher-weights, with the patch embedding alone: one patch, one grid cell."""
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    vit = timm.create_model(name)
    for block in vit.blocks:  # tokens pass the blocks unchanged
        for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
            torch.nn.init.zeros_(parameter)
    torch.save(vit.state_dict(), tmp_path / "dinov2.pth")
    assert vit.num_prefix_tokens == 5 and vit.patch_embed.patch_size == (14, 14)
    picture = photograph(448, 448)
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture.save(folder / "plain.png")
    places = {"first": (0, 0), "inner": (5, 20), "last": (31, 31)}
    for label, (row, column) in places.items():
        marked = picture.copy()
        box = (14 * column, 14 * row, 14 * column + 14, 14 * row + 14)
        marked.paste((255, 0, 255), box)
        marked.save(folder / f"{label}.png")
    arguments = ["--input", str(folder), "--output", str(tmp_path / "features"), "--teacher", name]
    arguments += ["--teacher-weights", str(tmp_path / "dinov2.pth"), "--store-dtype", "float16"]
    assert main([*arguments, "--teacher-block", "0"]) == 0
    store = FeatureStore(tmp_path / "features")
    plain = store.read("plain")
    assert plain.shape == (1024, 384)
    for label, place in places.items():
        moved = (store.read(label) - plain).abs().amax(dim=1).view(32, 32) > 0
        assert moved.nonzero().tolist() == [list(place)]
