"""What the scripts share: flags, device and precision, seed, errors in one line, results.json."""

import argparse
import functools
import io
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from apm.islands import METHODS
from apm.runtime.files import atomic_path, release_outputs

ROOT = Path(__file__).resolve().parents[2]
BUNDLED_CHECKPOINT = ROOT / "checkpoints" / "apm_small.pth"
OUTPUTS = ROOT / "outputs"


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def worker_count(text: str) -> int:
    """An argparse type: a number of processes, no more than there are cores."""
    value, cores = int(text), os.cpu_count() or 1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return min(value, cores)


def share(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return value


FLAGS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "type": Path,
        "default": BUNDLED_CHECKPOINT,
        "help": "this project's or a released checkpoint",
    },
    "--input": {"type": Path, "help": "image file, or folder searched for images"},
    "--output": {"type": Path, "help": "folder for the results"},
    "--teacher": {"help": "dense teacher: a ViT by timm's name"},
    "--teacher-weights": {"type": Path, "help": "teacher's weights file instead of a download"},
    "--teacher-block": {"type": int, "help": "teacher's block to take tokens from, -1 the last"},
    "--teacher-margin": {"type": int, "help": "patches by which images are mirrored outwards"},
    "--device": {
        "choices": ("auto", "cpu", "cuda", "mps"),
        "default": "auto",
        "help": "where to run",
    },
    "--dtype": {
        "choices": ("float32", "bfloat16"),
        "default": "float32",
        "help": "precision of matrix products",
    },
    "--seed": {"type": int, "default": 0, "help": "seed of all randomness"},
    "--method": {"choices": METHODS, "default": "tsne", "help": "how islands are coloured"},
    "--chunk-size": {"type": positive_int, "help": "locations answered at a time (default: all)"},
    "--batch-size": {"type": positive_int, "default": 8, "help": "images at a time"},
    "--limit": {"type": positive_int, "help": "at most this many images (default: all)"},
    "--workers": {
        "type": worker_count,
        "default": 0,
        "help": "processes that read images, at most one a core",
    },
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str, *flags: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with some of the shared ``FLAGS``, and defaults by their destination names."""
    parser = _Parser(description=description, formatter_class=_HelpFormatter)
    for flag in flags:
        parser.add_argument(flag, **FLAGS[flag])
    parser.set_defaults(**defaults)
    return parser


class _Terminated(KeyboardInterrupt):
    """SIGTERM: from ``kill``, or from a cluster whose time is up."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


@contextmanager
def _orderly() -> Iterator[None]:
    """SIGTERM becomes an exception; on the way out stdout is emptied and outputs are given up."""
    main_thread = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        yield
    finally:
        release_outputs()
        if main_thread:
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
        if sys.stdout is not None:
            sys.stdout.flush()


def command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Make ``main`` return an exit status and say on one line of stderr why it failed.

    Bad input, or a machine that cannot do the work: 2. Ctrl-C: 130. SIGTERM: 143. When nobody reads
    stdout any more (``| head``): 141, in silence.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            with _orderly():
                main(argv)
        except BrokenPipeError:
            # What is left in the buffer has no reader: Python shall not try again at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        except _Terminated:
            return _say("terminated", 143)
        except KeyboardInterrupt:
            return _say("interrupted", 130)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if os.environ.get("APM_TRACEBACK") or not (reason := _reason(error)):
                raise
            return _say(f"error: {reason}", 2)
        return 0

    return wrapped


def _reason(error: Exception) -> str | None:
    """One line about an error that is no fault of the program; else None."""
    line = " ".join(str(error).split())
    if is_out_of_memory(error):
        return "out of memory; try smaller --batch-size, --chunk-size, --parallel or --workers"
    if isinstance(error, RuntimeError):
        return f"{line}; try --workers 0" if line.startswith("DataLoader worker") else None
    return line


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a device ran out; torch's CPU allocator has no exception of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _say(line: str, status: int) -> int:
    if sys.stderr is not None:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


def select_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU; float32 is float32 everywhere.

    Raises:
        ValueError: if the named device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, there in available.items() if there), "cpu")
    if not available.get(name, True):
        raise ValueError(f"--device {name}: not available on this machine, use cpu or auto")
    torch.backends.cudnn.allow_tf32 = False  # convolutions would have 10 bits of mantissa
    return torch.device(name)


def precision(device: torch.device, dtype: str) -> AbstractContextManager:
    """The context in which matrix products run in ``dtype``."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Results:
    """What a script reports: printed by the script, kept in ``results.json``."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.started = time.perf_counter()
        self.content: dict[str, Any] = {
            "command": Path(sys.argv[0]).name,
            "arguments": {name: _plain(value) for name, value in vars(args).items()},
            "device": device_name(device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }

    def save(self, output: Path, **numbers: Any) -> Path:
        """Write everything said so far, plus ``numbers``, to ``output / "results.json"``."""
        self.content |= numbers | {"seconds": round(time.perf_counter() - self.started, 3)}
        path = output / "results.json"
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=2, default=_plain) + "\n")
        return path


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or the CPU and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return (
        value if isinstance(value, (int, float, str, bool, type(None), list, tuple)) else str(value)
    )
