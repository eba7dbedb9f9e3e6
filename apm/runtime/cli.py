"""What the scripts share: flags, exit status and one-line errors, stops, results.json."""

import argparse
import dataclasses
import functools
import io
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from apm.runtime.device import device_name, is_out_of_memory
from apm.runtime.files import ROOT, release_outputs, write_json

OUTPUTS = ROOT / "outputs"
Item = TypeVar("Item")


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    return tuple(positive_int(number) for number in text.split(","))


def worker_count(text: str) -> int:
    """An argparse type: a number of processes, no more than there are cores."""
    value, cores = int(text), os.cpu_count() or 1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return min(value, cores)


FLAGS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "type": Path,
        "default": ROOT / "checkpoints" / "apm_small.safetensors",
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


def add_fields(parser: argparse.ArgumentParser, fields: type) -> None:
    """A flag for each field of a dataclass: its default, and what argparse wants as metadata."""
    for field in dataclasses.fields(fields):
        default: Any = field.default
        flag, kind = "--" + field.name.replace("_", "-"), {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, default=default, **kind, **field.metadata)


def take_fields(fields: type, args: argparse.Namespace) -> Any:
    """The dataclass that ``add_fields``'s flags fill.

    Raises:
        ValueError: as its constructor does.
    """
    return fields(**{field.name: getattr(args, field.name) for field in dataclasses.fields(fields)})


class Terminated(KeyboardInterrupt):
    """SIGTERM: from ``kill``, or from a cluster whose time is up."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class Stop:
    """In its block Ctrl-C and SIGTERM are only noted, for a loop to look at between its steps.

    A second signal ends the program at once. Without a main thread there are no signals to note.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested: type[KeyboardInterrupt] | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.__exit__()

    def between(self, items: Iterable[Item], save: Callable[[], None]) -> Iterator[Item]:
        """The items; once a signal came, ``save`` and end as the signal would have ended."""
        for item in items:
            if self.requested:
                save()
                raise self.requested
            yield item


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
        except Terminated:
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


def _say(line: str, status: int) -> int:
    if sys.stderr is not None:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


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

    def save(self, output: Path, **numbers: Any) -> None:
        """Write everything said so far, plus ``numbers``, to ``output / "results.json"``."""
        self.content |= {name: _plain(value) for name, value in numbers.items()}
        self.content |= {"seconds": round(time.perf_counter() - self.started, 3)}
        write_json(output / "results.json", self.content)


def _plain(value: Any) -> Any:
    """What JSON can hold: arrays' numbers as Python's, paths and the like as text."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
