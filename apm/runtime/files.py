"""Files that are whole or absent, output folders of one run at a time, settings kept with results.

A file is written under a temporary name, then renamed. What a killed process left is swept away by
the next run into that folder.
"""

import hashlib
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[2]  # of the repository
LOCK = ".lock"
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.part(\..*)?")  # of atomic_path
_locks: dict[Path, FileLock] = {}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` with its suffix, renamed to ``path`` if the block succeeds.

    Missing folders are made. An ``OSError`` of the block (a full disk, ...) names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # never too long a name
    temporary = path.with_name(f".{digest}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare_output(folder: str | Path) -> Path:
    """Create an output folder and lock it for this process alone, before any long work.

    Half-written files of killed processes are removed. A folder that cannot be written to, or that
    another process writes to, is refused with a ``ValueError``.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _locks.setdefault(folder.resolve(), FileLock(folder / LOCK)).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{folder}: another run writes there now; wait for it or choose another --output"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot write output there ({error.strerror}); choose another --output"
        ) from error
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(parent, name, LOCK).exists()]
        for name in names:
            if _LEFTOVER.fullmatch(name):
                Path(parent, name).unlink(missing_ok=True)
    return folder


def release_outputs() -> None:
    """Give up the folders that ``prepare_output`` locked."""
    while _locks:
        _locks.popitem()[1].release(force=True)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down, as JSON, what long work is made with; refuse to go on with anything else.

    The ``ValueError`` names the first setting that differs.
    """
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, wanted)
        return
    present = read_json(path)
    for name in sorted(present.keys() | wanted.keys()):
        former, now = present.get(name), wanted.get(name)
        if former != now:
            raise ValueError(
                f"{path.parent}: made with {name} {reprlib.repr(former)}, not "
                f"{reprlib.repr(now)}; choose another --output"
            )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values, numbers of arrays and paths as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is refused with a ``ValueError``."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_array(path: str | Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array in an ``.npy`` file, else a ``ValueError``; nothing in it is unpickled."""
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # numpy's parser raises many types on a damaged header
        raise ValueError(f"{path}: cannot be read as an array ({str(error)[:200]})") from error


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def listing_sha256(files: Mapping[str, object]) -> str:
    """Hexadecimal SHA-256 of a set of files, given by name and what tells a changed file."""
    lines = (f"{name}\t{value}\n" for name, value in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()


def dated_sha256(files: Mapping[str, Path]) -> str:
    """``listing_sha256`` by size and date, which a broken link has not."""
    stats = {name: path.stat() if path.exists() else None for name, path in files.items()}
    return listing_sha256(
        {name: stat and (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    )


def cache_home() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def use_writable_caches() -> None:
    """Where the user's cache cannot be written, keep downloads in the system's temporary folder."""
    try:
        cache_home().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_home()).close()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        own = Path(tempfile.gettempdir(), f"apm-cache-{os.geteuid()}")
        os.environ["XDG_CACHE_HOME"] = str(own)
        os.environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))
