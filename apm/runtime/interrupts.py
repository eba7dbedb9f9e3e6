"""Ctrl-C and SIGTERM at moments when what is in memory is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block, which should be short.

    For blocks that change several things which belong together, such as weights and step count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread alone
        return
    came: list[int] = []
    former: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for known, handler in former.items():
            signal.signal(known, handler or signal.SIG_DFL)  # None: not set from Python
        if came:
            signal.raise_signal(came[0])
