"""Files that are whole or absent, output folders of one run at a time, caches that can be written.

A file is written under a temporary name, then renamed; what a killed process left is swept away by
the next run into that folder.
"""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".lock"
_LEFTOVER = re.compile(r"\.(\d+)-[0-9a-f]{16}\.part(\..*)?", re.DOTALL)
_locks: dict[Path, IO] = {}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` with its suffix, renamed to ``path`` if the block succeeds.

    Missing folders are made.

    Raises:
        OSError: naming ``path``, if the block or the rename raised one (a full disk, ...).

    Example:
        ``with atomic_path("figure.png") as temporary: figure.savefig(temporary)``
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # never too long a name
    temporary = path.with_name(f".{os.getpid()}-{digest}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        named = OSError(f"{path}: cannot be written ({error.strerror or error})")
        named.errno = error.errno
        raise named from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare_output(folder: str | Path) -> Path:
    """Create an output folder and claim it, before any long work, for this process alone.

    The claim is a lock that the system drops with the process, however that ends, so there is none
    to clear away. Half-written files of killed processes are removed.

    Raises:
        ValueError: if the folder cannot be written to, or another process writes there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _claim(folder.resolve())
    except BlockingIOError as error:
        raise ValueError(
            f"{folder}: another run writes there now; wait for it or choose another --output"
        ) from error
    except OSError as error:
        raise ValueError(f"{folder}: cannot write output there ({error.strerror})") from error
    _sweep(folder)
    return folder


def release_outputs() -> None:
    """Give up the folders that ``prepare_output`` claimed."""
    while _locks:
        _locks.popitem()[1].close()


def _claim(folder: Path) -> None:
    if sys.platform == "win32" or folder in _locks:
        return
    file = (folder / LOCK).open("a")
    try:
        # Not flock: that lock would live on in worker processes of a killed parent.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        file.close()
        raise BlockingIOError(error.errno, error.strerror) from error
    except OSError as error:
        logger.warning("%s: no locks on this file system (%s)", folder, error.strerror)
    _locks[folder] = file


def _sweep(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if (match := _LEFTOVER.fullmatch(name)) and not _alive(int(match[1])):
                Path(parent, name).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_array(path: str | Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array in an ``.npy`` file; nothing in it is unpickled.

    Args:
        path: the file.
        mmap_mode: ``"r"`` maps the file instead of reading it.

    Raises:
        ValueError: if there is none.
    """
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # numpy's parser raises whatever a stranger's header provokes
        raise ValueError(f"{path}: cannot be read as an array ({str(error)[:200]})") from error


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def listing_sha256(files: Mapping[str, object]) -> str:
    """Hexadecimal SHA-256 of a set of files, given by name and what tells a changed file."""
    lines = (f"{name}\t{value}\n" for name, value in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()


def dated_sha256(files: Mapping[str, Path]) -> str:
    """``listing_sha256`` by size and date, which are zero for a dead link."""
    found: dict[str, tuple[int, int]] = {}
    for name, path in files.items():
        stat = path.stat() if path.exists() else None
        found[name] = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
    return listing_sha256(found)


def cache_home() -> Path:
    """``$XDG_CACHE_HOME`` or ``~/.cache``; where neither can be written, a folder of one's own.

    The folder of one's own lies under the system's temporary folder, readable to its owner alone.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    if home.is_absolute() and _writable(home):
        return home
    own = Path(tempfile.gettempdir(), f"apm-cache-{os.geteuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if status.st_uid != os.geteuid() or status.st_mode != 0o40700:  # a trap of somebody else's
        own = Path(tempfile.mkdtemp(prefix="apm-cache-"))
    return own


def use_writable_caches() -> None:
    """Point the caches of matplotlib, torch and the model hubs to ``cache_home``.

    Without effect where the usual places can be written to.
    """
    try:
        home = cache_home()
    except OSError:  # no temporary folder either: who needs a cache will say so
        return
    if home.name.startswith("apm-cache-"):
        os.environ["XDG_CACHE_HOME"] = str(home)
        os.environ.setdefault("MPLCONFIGDIR", str(home / "matplotlib"))


def _writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made where it is missing."""
    while not os.path.exists(folder):  # noqa: PTH110  (Path.exists may raise)
        folder = folder.parent
    effective = os.access in os.supports_effective_ids
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)
