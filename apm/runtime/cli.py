"""What the scripts share: flags, exit status and one-line errors, stops, results.json."""

import argparse
import dataclasses
import functools
import io
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from apm.runtime.device import is_out_of_memory
from apm.runtime.files import ROOT, release_outputs, write_json

OUTPUTS = ROOT / "outputs"
CHECKPOINT = ROOT / "checkpoints" / "apm_small.safetensors"
Item = TypeVar("Item")


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def whole_number(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def worker_count(text: str) -> int:
    """An argparse type: a whole number of at least 0, cut to the number of cores."""
    return min(whole_number(text), os.cpu_count() or 1)


def grid_size(text: str) -> int:
    """An argparse type: how many places a picture has along its longer side."""
    value = int(text)
    if not 1 <= value <= 448:
        raise argparse.ArgumentTypeError(f"{text} must be in 1..448, at most one place a pixel")
    return value


FITS = ("crop", "stretch")
DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("float32", "bfloat16")
FLAGS: dict[str, dict[str, Any]] = {
    "--checkpoint": {"type": Path, "default": CHECKPOINT, "help": "ours or a released one"},
    "--input": {"type": Path, "help": "image file, or folder searched for images"},
    "--output": {"type": Path, "help": "folder for the results"},
    "--teacher": {"help": "dense teacher: a ViT by timm's name"},
    "--teacher-weights": {"type": Path, "help": "teacher's weights file instead of a download"},
    "--teacher-block": {"type": int, "help": "teacher's block to take tokens from, -1 the last"},
    "--teacher-margin": {"type": int, "help": "patches by which images are mirrored outwards"},
    "--device": {"choices": DEVICES, "default": "auto", "help": "where to run"},
    "--dtype": {"choices": DTYPES, "default": "float32", "help": "precision of matrix products"},
    "--seed": {"type": int, "default": 0, "help": "seed of all randomness"},
    "--grid": {"type": grid_size, "help": "places along a side, 1..448 (default: the model's own)"},
    "--fit": {"choices": FITS, "help": "how a photograph becomes square: all of it, or its centre"},
    "--consensus": {
        "type": whole_number,
        "default": 0,
        "help": "steps in which like neighbours agree",
    },
    "--chunk-size": {"type": positive_int, "help": "places answered at a time (default: 16384)"},
    "--batch-size": {"type": positive_int, "default": 8, "help": "images at a time"},
    "--limit": {"type": positive_int, "help": "at most this many images (default: all)"},
    "--workers": {
        "type": worker_count,
        "default": 0,
        "help": "processes or threads that read images, at most one a core",
    },
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; shows defaults, paths from the repository's root on."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        if isinstance(default, (list, tuple)):
            default = (" " if action.nargs else ",").join(map(str, default))
        text = str(default).replace(f"{ROOT}{os.sep}", "").replace("%", "%%")
        return f"{action.help} (default: {text})"


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
        kind = {"action": "store_true"} if field.default is False else {"type": field.type}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, **kind, **field.metadata)


def take_fields(fields: type, args: argparse.Namespace) -> Any:
    """The dataclass that ``add_fields``'s flags fill, or the ``ValueError`` of its constructor."""
    return fields(**{field.name: getattr(args, field.name) for field in dataclasses.fields(fields)})


class Terminated(KeyboardInterrupt):
    """SIGTERM: from ``kill``, or from a cluster whose time is up."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class Stop:
    """In its block Ctrl-C and SIGTERM are only noted, for a loop to look at between its steps.

    A second signal ends the program at once.
    """

    requested: type[KeyboardInterrupt] | None = None  # what came

    def __enter__(self) -> "Stop":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._former = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

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


def command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Make ``main`` return an exit status and say on one line of stderr why it failed.

    Bad input, or a machine that cannot do the work: 2. Ctrl-C: 130. SIGTERM: 143. When nobody reads
    stdout any more (``| head``): 141, in silence.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            former = signal.signal(signal.SIGTERM, _terminate)
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
            try:
                main(argv)
            finally:
                release_outputs()
                signal.signal(signal.SIGTERM, former)
                print(end="", flush=True)  # while an error can still be reported
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
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


class Results:
    """What a script reports: printed by the script, kept in ``results.json``."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.started = time.perf_counter()
        self.content: dict[str, Any] = {
            "command": Path(sys.argv[0]).name,
            "arguments": vars(args),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def save(self, output: Path, **numbers: Any) -> None:
        """Write everything said so far, plus ``numbers``, to ``output / "results.json"``."""
        self.content |= numbers | {"seconds": round(time.perf_counter() - self.started, 3)}
        write_json(output / "results.json", self.content)
