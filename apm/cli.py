"""What the scripts share: flags, device and precision, seed, errors in one line, results.json."""

import argparse
import functools
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from apm.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_CHECKPOINT = ROOT / "checkpoints" / "apm_small.pth"
OUTPUTS = ROOT / "outputs"


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


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
    "--chunk-size": {"type": positive_int, "help": "locations answered at a time (default: all)"},
    "--batch-size": {"type": positive_int, "default": 8, "help": "images at a time"},
    "--limit": {"type": positive_int, "help": "at most this many images (default: all)"},
    "--workers": {"type": int, "default": 0, "help": "processes that read images"},
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


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """Make ``main`` return an exit status: bad input is one line and 2, Ctrl-C one line and 130."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("APM_TRACEBACK"):
                raise
            line = " ".join(str(error).split())
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            return 130
        return 0

    return wrapped


def select_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if the named device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, there in available.items() if there), "cpu")
    if not available.get(name, True):
        raise ValueError(f"--device {name}: not available on this machine, use cpu or auto")
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
