"""How long a call takes, and how long the machine's matrix product would take for the same."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from apm.runtime.device import multiply_adds


class Work(NamedTuple):
    """What is timed: ``run``, for ``images`` images."""

    name: str
    run: Callable[[], object]
    dtype: str = "float32"
    images: int = 1
    once: bool = False  # it takes too long to be repeated
    macs: int | None = None  # multiply-adds, 0 for no floor; None: to be counted by a call


def measure(work: Work, device: torch.device, repeats: int) -> dict[str, Any]:
    """A row: median seconds, the floor in seconds, how far above it, and images a second.

    Work whose multiply-adds are counted has been done once before it is timed.
    """
    macs = multiply_adds(work.run) if work.macs is None else work.macs
    floor = macs / matmul_rate(device, work.dtype, repeats)
    seconds = seconds_of(work.run, device, 1 if work.once else repeats)
    return {
        "name": f"{work.name}, {work.dtype}{', one call' if work.once else ''}",
        "seconds": seconds,
        "GMACs": macs / 1e9,
        "floor": floor,
        "x floor": seconds / floor if floor else None,
        "images/s": work.images / seconds,
    }


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after one to warm up; of a single call without."""
    times = [_seconds(work, device) for _ in range(repeats + (repeats > 1))]
    return statistics.median(times[-repeats:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - started


def matmul_rate(device: torch.device, dtype: str, repeats: int) -> float:
    """Multiply-adds a second of 1024 x 4096 by 4096 x 4096, the model's own largest product."""
    kind = getattr(torch, dtype)
    inputs = torch.randn(1024, 4096, device=device, dtype=kind)
    weight = torch.randn(4096, 4096, device=device, dtype=kind)
    work = partial(F.linear, inputs, weight)
    work()
    return 1024 * 4096**2 / seconds_of(work, device, repeats)
