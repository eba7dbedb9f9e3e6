import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apm.runtime.files import (
    LOCK,
    atomic_path,
    cache_home,
    dated_sha256,
    file_sha256,
    keep_settings,
    listing_sha256,
    prepare_output,
    read_array,
    read_json,
    release_outputs,
    use_writable_caches,
    write_json,
)


@pytest.fixture(autouse=True)
def give_up_outputs():
    yield
    release_outputs()


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Whole or absent


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "deep" / ("long " * 50 + ".txt")
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists() and temporary.suffix == ".txt"
        assert temporary.name.startswith(".") and temporary.parent == target.parent
        temporary.write_text("whole")
    assert target.read_text() == "whole" and len(names(tmp_path)) == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError(), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("former")
    with pytest.raises(type(error)) as raised, atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == {"a.txt"} and target.read_text() == "former"
    if isinstance(error, OSError):
        assert str(raised.value) == f"{target}: cannot be written (No space left)"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.booleans()), max_size=8))
def test_any_order_of_writes_and_failures_leaves_the_last_success(tmp_path_factory, writes):
    folder, expected = tmp_path_factory.mktemp("writes"), {}
    for name, content, fails in writes:
        try:
            with atomic_path(folder / name) as temporary:
                temporary.write_text(str(content))
                if fails:
                    raise RuntimeError
            expected[name] = str(content)
        except RuntimeError:
            pass
    assert {path.name: path.read_text() for path in folder.iterdir()} == expected


# Output folders


def test_leftovers_are_swept_away_but_not_where_another_run_is_at_work(tmp_path):
    with atomic_path(tmp_path / "sub" / "a.png") as temporary:
        stale = temporary.name
        temporary.touch()
    (tmp_path / "other").mkdir()
    for name in (f"sub/{stale}", "sub/.hidden", "sub/b.part", f"other/{LOCK}", f"other/{stale}"):
        (tmp_path / name).touch()
    assert prepare_output(tmp_path) == tmp_path
    kept = {"sub/a.png", "sub/.hidden", "sub/b.part", f"other/{LOCK}", f"other/{stale}"}
    assert names(tmp_path) == kept | {LOCK}


def other_process(folder):
    code = "import sys; from apm.runtime.files import *; prepare_output(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)


def test_another_process_is_refused_until_the_folder_is_given_up(tmp_path):
    prepare_output(tmp_path / "out")
    prepare_output(tmp_path / "out")  # the same one may ask again
    message = f"ValueError: {tmp_path / 'out'}: another run writes there now"
    assert message in other_process(tmp_path / "out").stderr
    release_outputs()
    assert other_process(tmp_path / "out").returncode == 0
    prepare_output(tmp_path / "out")  # which ended


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").touch()
    for output in ("file", "file/below"):
        with pytest.raises(ValueError, match="cannot write output there"):
            prepare_output(tmp_path / output)


# Settings, JSON, arrays


def test_work_goes_on_with_its_settings_and_no_others(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"seed": 0, "steps": (1, 5), "name": None}
    keep_settings(path, settings)
    written = path.read_bytes()
    keep_settings(path, dict(reversed(settings.items())))
    for other, message in (
        (settings | {"seed": 1}, r"made with seed 0, not 1; choose another --output"),
        (settings | {"steps": (1,)}, r"made with steps \[1, 5\], not \[1\]"),
        (settings | {"more": 3}, "made with more None, not 3"),
        ({"seed": 0, "name": None}, r"made with steps \[1, 5\], not None"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_settings(path, other)
    assert path.read_bytes() == written
    path.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: not JSON"):
        keep_settings(path, settings)


def test_results_hold_numbers_of_arrays_and_paths(tmp_path):
    content = {"score": np.float32(0.5), "count": np.int64(3), "path": Path("a/b"), "all": [np.pi]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content | {"path": "a/b"}


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "\xff", "[" * 10**5])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: (not JSON|holds a)"):
        read_json(tmp_path / "a.json")


def test_arrays_are_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    assert read_array(tmp_path / "a.npy", mmap_mode="r").tolist() == [0, 1, 2]
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(b"no array")
    for name in "bcd":
        with pytest.raises(ValueError, match=rf"{name}\.npy: cannot be read as an array"):
            read_array(tmp_path / f"{name}.npy")


# Fingerprints


def test_fingerprints_of_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_sha256(path).startswith("ba7816bf")
    assert listing_sha256({"a": 1, "b": 2}) == listing_sha256({"b": 2, "a": 1})
    assert len({listing_sha256(files) for files in ({"a": 1}, {"a": 2}, {"b": 1}, {})}) == 4
    found = [dated_sha256({"a": path})]
    os.utime(path, ns=(0, 0))  # rewritten
    found.append(dated_sha256({"a": path}))
    (tmp_path / "dead").symlink_to("nothing")
    found.append(dated_sha256({"a": path, "dead": tmp_path / "dead"}))
    assert len(set(found)) == 3 and found[1] == dated_sha256({"a": path})
    assert len(listing_sha256({os.fsdecode(b"\xff"): 1})) == 64  # names need not be text


# Caches


def test_downloads_go_to_the_temporary_folder_where_there_is_no_home(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("MPLCONFIGDIR", "kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_writable_caches()
    assert cache_home() == tmp_path / "cache" and not names(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    use_writable_caches()
    assert cache_home().parent == tmp_path / "tmp"
    assert os.environ["MPLCONFIGDIR"] == "kept"
    monkeypatch.setenv("XDG_CACHE_HOME", json.dumps(None))  # undone at the end
