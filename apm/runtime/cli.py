"""What the scripts share: exit status and one-line errors, stops, results.json."""

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
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from apm.runtime.files import release_outputs, write_json

if TYPE_CHECKING:
    from argparse import Namespace

    import torch

Item = TypeVar("Item")


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


def command(main: Callable[[list[str] | None], object]) -> Callable[..., int]:
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


def answer_flags(name: str, parse: Callable[[list[str] | None], object]) -> None:
    """In a script that is run, not imported: answer --help and wrong flags, and end.

    torch and its kin take seconds to import. So every script is in this order: what its flags need,
    ``parse``, this call, all other imports, the rest. ``main`` parses again.
    """
    if name == "__main__" and (status := command(parse)()):
        sys.exit(status)


def _reason(error: Exception) -> str | None:
    """One line about an error that is no fault of the program; else None."""
    line = " ".join(str(error).split())
    if not isinstance(error, (MemoryError, RuntimeError)):
        return line
    from apm.runtime.device import is_out_of_memory  # torch, which bad flags do not wait for

    if is_out_of_memory(error):
        return "out of memory; try smaller --batch-size, --chunk-size, --parallel or --workers"
    return f"{line}; try --workers 0" if line.startswith("DataLoader worker") else None


def _say(line: str, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


class Results:
    """What a script reports: printed by the script, kept in ``results.json``."""

    def __init__(self, args: "Namespace", device: "torch.device") -> None:
        import torch  # its numbers: it is there already

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
