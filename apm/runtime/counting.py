"""Multiply-adds of any computation."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def torch_macs(work: Callable[[], object]) -> int:
    """Multiply-adds of matrix products and convolutions, backward passes included.

    torch's counter counts each as two operations.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2
