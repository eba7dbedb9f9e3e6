"""Several processes that work as one under ``torchrun``, or one process without it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def shares(batch: Sequence[int], accumulate: int = 1) -> list[list[int]]:
    """This process's parts of a batch: of n parts in all, part p takes every n-th from p on."""
    count = world_size() * accumulate
    return [list(batch[rank() * accumulate + part :: count]) for part in range(accumulate)]


def claim_gpu(device: torch.device) -> None:
    """If work is done on GPUs, let ``cuda`` mean this process's own."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f"process {index + 1} on a machine with {count} GPU(s): use --nproc-per-node {count}, "
            "or --device cpu"
        )
    torch.cuda.set_device(index)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connects the processes for the block; torchrun ends all of them if one ends with an error."""
    if world_size() == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(days=7),  # one may have hours more to do
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    yield
    # Not after an error: it would wait for the others, and they for this process.
    wait_for_all()  # torch 2.4 hangs in the next line if gloo's thread has yet to free a tensor
    dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at once; the loss of another one is no fault of this one's."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(f"another process ended ({reason})") from error


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place; every process gets the sums."""
    if dist.is_initialized():
        with _together():
            for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                handle.wait()


@torch.no_grad()
def broadcast_weights(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    if dist.is_initialized():
        with _together():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        with _together():
            dist.barrier()
