"""Where and how precisely to compute, how much it costs, and where randomness comes from."""

import json
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

Built = TypeVar("Built")
MEASURED = "measured"  # marks the work in the profiler's trace

# Attention on a CPU, which torch's counter misses in older versions.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
flop_registry.setdefault(_ATTENTION, sdpa_flop)
flop_registry.setdefault(_BACKWARD, sdpa_backward_flop)


def select_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU; float32 is float32 everywhere."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, there in available.items() if there), "cpu")
    if not available.get(name, True):
        raise ValueError(f"--device {name}: not available on this machine, use cpu or auto")
    torch.backends.cudnn.allow_tf32 = False  # convolutions would have 10 bits of mantissa
    return torch.device(name)


def precision(device: torch.device, dtype: str) -> AbstractContextManager:
    """The context in which matrix products run in ``dtype``, ``"float32"`` or ``"bfloat16"``."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device ran out; torch's CPU allocator has no exception of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_at(seed: int, index: int) -> torch.Generator:
    """Randomness that is a function of the seed and of a step's or an epoch's index."""
    return torch.Generator().manual_seed(seed + 1_000_003 * index)


def multiply_adds(work: Callable[[], object]) -> int:
    """Multiply-adds of matrix products and convolutions, backward passes included.

    ``work`` may use ``no_grad``, not ``inference_mode``, in which older torch counts no linear
    layer.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose products torch does not count
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2  # torch counts each as two operations


def peak_bytes(
    build: Callable[[], Built], work: Callable[[Built], object], device: torch.device
) -> tuple[Built, int]:
    """Build something, work with it: what was built, and the most that tensors held meanwhile.

    Of tensors made since ``build`` began. On a GPU its allocator tells; on a CPU torch's profiler,
    which totals what it saw allocated and freed.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        built = build()
        torch.cuda.reset_peak_memory_stats()
        work(built)
        return built, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build()
        with record_function(MEASURED):
            work(built)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event["name"] == MEASURED)
    memory = [event for event in events if event["name"] == "[memory]"]
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    totals = [event["args"]["Total Allocated"] for event in memory if event["ts"] >= start]
    return built, max(totals) - before
