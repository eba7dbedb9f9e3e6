"""download.sh against a local server that misbehaves, and unpacking hostile archives."""

import http.server
import io
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from conftest import ROOT, load_script
from reference import coco

BUNDLED = "checkpoints/apm_small.safetensors"
pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl"
)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``, name -> bytes, and misbehaves as ``faults`` say: name -> list of faults.

    A fault is used up by one GET: ``truncate`` closes half-way, ``stall`` sends half and nothing
    more, ``long`` announces twice the length. ``deaf`` (for good) ignores ranges, ``lie`` (for
    good) announces a wrong size to HEAD, ``dumb`` (for good) no size at all, ``moved`` (for good)
    has the file in a folder ``new`` and announces the length of saying so.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        name, start = self.path.strip("/"), 0
        faults = self.server.faults.setdefault(name, [])
        self.server.requests.append((self.command, name, self.headers.get("Range")))
        if "moved" in faults:
            self.send_response(302)
            self.send_header("Location", f"/new/{name}")
            self.send_header("Content-Length", "5")
            self.end_headers()
            return None if head else self.wfile.write(b"moved")
        if name not in self.server.files:
            return self.send_error(404)
        body = self.server.files[name]
        if "Range" in self.headers and "deaf" not in faults:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                return self.send_error(416)
        rest = body[start:]
        for_good = not faults or faults[0] in ("deaf", "lie", "dumb")
        fault = "" if head or for_good else faults.pop(0)
        length = len(rest) * 2 if fault == "long" or (head and "lie" in faults) else len(rest)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "dumb" not in faults:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if not head:
            self.wfile.write(rest[: len(rest) // 2] if fault in ("truncate", "stall") else rest)
            self.wfile.flush()
            if fault == "stall":
                time.sleep(4)
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(tmp_path, server):
    """Runs a copy of the script in a repository of its own."""
    copy = tmp_path / "with späces"
    (copy / "misc_scripts").mkdir(parents=True)
    (copy / "checkpoints").mkdir()
    shutil.copy(ROOT / "download.sh", copy)
    shutil.copy(ROOT / "misc_scripts" / "unpack_archive.py", copy / "misc_scripts")

    def run(*arguments, base=server.url, **environment):
        settings = {"APM_DOWNLOAD_BASE": base, "APM_DOWNLOAD_STALL": "1"}
        environment = settings | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
        done = subprocess.run(
            [copy / "download.sh", *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.stderr.count("\n") == (0 if done.returncode == 0 else 1), done.stderr
        return done

    run.root = copy
    return run


def archive(members):
    """A zip of name -> content; a name may be a ZipInfo."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def coco_zip():
    """As val2017.zip is: 5000 files, none of them an image yet."""
    return archive({f"val2017/{index:012}.jpg": b"x" * 40 for index in range(5000)})


def left_in(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.endswith((".sh", ".py", ".download.lock"))}


def test_the_default_is_coco_val_and_the_checkpoint_and_a_second_run_asks_for_nothing(
    download, server, coco_zip
):
    buffer = io.BytesIO()
    torch.save(coco().state_dict(), buffer)
    server.files = {
        "model_15.pth": buffer.getvalue(),
        "val2017.zip": coco_zip,
        "data.zip": archive({"notes/readme.txt": b"hello"}),
    }
    done = download()
    assert done.returncode == 0, done.stderr
    assert (download.root / "checkpoints/model_15.pth").read_bytes() == buffer.getvalue()
    assert (download.root / "data/paper/notes/readme.txt").read_bytes() == b"hello"
    assert len(list((download.root / "data/coco/val2017").iterdir())) == 5000
    assert not [name for name in left_in(download.root) if ".part" in name]
    server.requests.clear()
    again = download()
    assert again.returncode == 0 and again.stdout.count("there already") == 3
    assert server.requests == []


@pytest.mark.parametrize(
    "faults", [["truncate", "truncate"], ["stall"], ["long"], ["truncate", "deaf"]], ids="+".join
)
def test_a_broken_transfer_is_taken_up_again(download, server, coco_zip, faults):
    server.files, server.faults = {"val2017.zip": coco_zip}, {"val2017.zip": list(faults)}
    assert download("coco-val").returncode == 0
    assert len(list((download.root / "data/coco/val2017").iterdir())) == 5000
    ranges = [range for method, _, range in server.requests if method == "GET"]
    if faults == ["truncate", "truncate"]:
        half = len(coco_zip) // 2
        assert ranges == [
            None,
            f"bytes={half}-",
            f"bytes={half + (len(coco_zip) - half) // 2}-",
        ]


def test_a_stopped_download_goes_on_in_the_next_run(download, server, coco_zip):
    (download.root / "data").mkdir()
    (download.root / "data/val2017.zip.part").write_bytes(coco_zip[:1000])
    server.files = {"val2017.zip": coco_zip}
    assert download("coco-val").returncode == 0
    assert ("GET", "val2017.zip", "bytes=1000-") in server.requests


def test_a_redirects_length_is_not_the_files(download, server, coco_zip):
    server.files = {"new/val2017.zip": coco_zip}
    server.faults = {"val2017.zip": ["moved"], "new/val2017.zip": ["dumb"]}
    assert download("coco-val").returncode == 0
    assert len([method for method, *_ in server.requests if method == "GET"]) == 2


def test_a_whole_download_of_unknown_size_is_made_anew(download, server, coco_zip):
    (download.root / "data").mkdir()
    (download.root / "data/val2017.zip.part").write_bytes(coco_zip)
    server.files, server.faults = {"val2017.zip": coco_zip}, {"val2017.zip": ["dumb"]}
    assert download("coco-val").returncode == 0
    assert len(list((download.root / "data/coco/val2017").iterdir())) == 5000


def hopeless(coco_zip):
    """Files served, faults, and what the one line says."""
    link = zipfile.ZipInfo("val2017/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    damaged = bytearray(coco_zip)
    damaged[60] ^= 255
    yield {}, [], "refused by the server"
    yield {"val2017.zip": coco_zip}, ["truncate"] * 9, "could not be downloaded whole"
    yield {"val2017.zip": coco_zip}, ["lie"], "could not be downloaded whole"
    yield {"val2017.zip": coco_zip[:-9]}, [], "could not be verified"
    yield {"val2017.zip": bytes(damaged)}, [], "could not be verified"
    yield {"val2017.zip": archive({"val2017/1.jpg": b"one"})}, [], "could not be verified"
    yield {"val2017.zip": archive({link: "/etc/passwd"})}, [], "could not be verified"
    yield {"val2017.zip": archive({"../../evil.jpg": b""})}, [], "could not be verified"


@pytest.mark.parametrize("case", range(8))
def test_what_is_not_whole_and_sound_never_gets_its_name(download, server, coco_zip, case):
    server.files, faults, message = list(hopeless(coco_zip))[case]
    server.faults["val2017.zip"] = faults
    done = download("coco-val")
    assert done.returncode == 1 and message in done.stderr
    # Kept is at most what a later run can go on from.
    kept = {"data/val2017.zip.part"} if faults and faults[0] == "truncate" else set()
    assert left_in(download.root.parent) == {f"{download.root.name}/{name}" for name in kept}


def test_a_checkpoint_that_is_none_is_removed(download, server):
    server.files = {"model_15.pth": b"<html>not here</html>"}
    done = download("checkpoint")
    assert done.returncode == 1 and "not the paper's checkpoint" in done.stderr
    assert left_in(download.root) == set()


def test_what_says_nothing_about_the_file_leaves_it_for_the_next_run(
    download, server, coco_zip, tmp_path
):
    server.files = {"val2017.zip": coco_zip, "model_15.pth": b"some", "data.zip": b"other"}
    python = tmp_path / "python"
    for target, part, fault in (
        ("coco-val", "data/val2017.zip.part", "echo several; echo lines; exit 1"),
        ("checkpoint", "checkpoints/model_15.pth.part", "exec kill -9 $$"),
    ):
        # Fails in all that it is asked to do, but says that it can do it.
        python.write_text(f'#!/bin/sh\n[ "$*" = "-c import apm" ] && exit\n{fault}\n')
        python.chmod(0o755)
        done = download(target, PYTHON=str(python))
        assert done.returncode == 1 and f"{part}: kept" in done.stderr
        assert part in left_in(download.root)
    server.requests.clear()
    assert download("coco-val").returncode == 0
    assert [method for method, *_ in server.requests] == ["HEAD"]


def test_a_python_that_cannot_verify_is_known_before(download, server):
    done = download("checkpoint", PYTHON="/nowhere/python")
    assert done.returncode == 1 and "/nowhere/python cannot verify" in done.stderr
    assert server.requests == []


def test_no_network_names_the_bundled_checkpoint(download):
    done = download(base="http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no network" in done.stderr and BUNDLED in done.stderr
    assert left_in(download.root) == set()


@pytest.mark.parametrize("status", [6, 22, 28])
def test_the_papers_and_cocos_servers_are_asked_and_may_be_gone(download, tmp_path, status):
    """A curl that logs what it is asked for, and fails as at a host without name, a 404, ..."""
    log, curl = tmp_path / "asked", tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text(f'#!/bin/sh\nfor url; do :; done\necho "$url" >>{log}\nexit {status}\n')
    curl.chmod(0o755)
    path = f"{curl.parent}:{os.environ['PATH']}"
    paper, coco = "https://www.cs.ucf.edu/~rmodi/apm", "http://images.cocodataset.org/zips"
    for target, url in (
        ("checkpoint", f"{paper}/model_15.pth"),
        ("checkpoint", f"{paper}/data.zip"),
        ("coco-val", f"{coco}/val2017.zip"),
        ("coco-train", f"{coco}/train2017.zip"),
    ):
        log.unlink(missing_ok=True)
        done = download(target, base="", PATH=path, PYTHON="true")
        assert done.returncode == 1 and url in done.stderr and BUNDLED in done.stderr
        assert set(log.read_text().split()) == {url}
        (download.root / "checkpoints/model_15.pth").touch()  # then data.zip is next


def test_a_full_disk_is_known_before(download, server, coco_zip, tmp_path):
    server.files = {"val2017.zip": coco_zip}
    (tmp_path / "bin").mkdir()
    df = tmp_path / "bin" / "df"
    df.write_text("#!/bin/sh\necho head; echo /dev/disk 100 99 1 99% /\n")
    df.chmod(0o755)
    done = download("coco-val", PATH=f"{df.parent}:{os.environ['PATH']}")
    assert done.returncode == 1 and "MB free" in done.stderr
    assert [method for method, *_ in server.requests] == ["HEAD"]


def test_an_unknown_word_is_refused(download):
    for words in (["everything"], ["all", "everything"]):
        done = download(*words)
        assert done.returncode == 2 and "everything: expected checkpoint" in done.stderr
    assert download("--help").stdout.startswith("Download what")


def special(name, kind):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


HOSTILE = [
    {"/etc/evil": b""},
    {"../evil": b""},
    {"a/../../evil": b""},
    {"..\\evil": b""},
    {"C:\\evil": b""},
    {"\\evil": b""},
    {special("link", stat.S_IFLNK): "/etc/passwd"},
    {"ok": b"", special("link", stat.S_IFLNK): ".."},
    {special("pipe", stat.S_IFIFO): ""},
    {special("device", stat.S_IFCHR): ""},
]


@pytest.mark.parametrize("members", HOSTILE, ids=lambda members: str(list(members)[-1])[:30])
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path, members, capsys):
    main = load_script("misc_scripts/unpack_archive.py").main
    (tmp_path / "a.zip").write_bytes(archive(members))
    assert main(["--input", str(tmp_path / "a.zip"), "--output", str(tmp_path / "out")]) == 2
    assert "a.zip: holds" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_failure_of_the_machine_is_not_called_a_bad_archive(tmp_path, capsys):
    main = load_script("misc_scripts/unpack_archive.py").main
    (tmp_path / "a.zip").write_bytes(archive({"a/b.txt": b"hello"}))
    (tmp_path / "file").write_bytes(b"")
    for name, output in (("none.zip", "out"), ("a.zip", "file"), ("a.zip", "file/out")):
        assert main(["--input", str(tmp_path / name), "--output", str(tmp_path / output)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "file"}


def test_a_zip_bomb_and_other_damage_are_refused(tmp_path, capsys):
    main = load_script("misc_scripts/unpack_archive.py").main
    path, output = tmp_path / "a.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(10_000_000))
    bomb = path.read_bytes()
    # The same, lying about what it unpacks to.
    size = (10_000_000).to_bytes(4, "little")
    liar = bomb.replace(size, (1000).to_bytes(4, "little"))
    assert liar != bomb
    for content, message in (
        (bomb, "more than 20 times"),
        (liar, "damaged"),
        (b"no archive", "damaged"),
        (b"", "damaged"),
    ):
        path.write_bytes(content)
        assert main(["--input", str(path), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
