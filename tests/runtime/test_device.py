"""What work costs, and where it runs."""

import torch
from torch import nn

from apm.runtime.device import multiply_adds


def test_attention_that_torch_fuses_is_counted():
    """Frozen attention takes another way through torch, with the same products."""
    places, width = 6, 8
    attention = nn.MultiheadAttention(width, 2, batch_first=True).eval().requires_grad_(False)
    inputs = 3 * [torch.randn(1, places, width)]
    with torch.no_grad():
        counted = multiply_adds(lambda: attention(*inputs, need_weights=False))
    assert counted == 4 * places * width**2 + 2 * places**2 * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_work_that_fails_leaves_torch_as_it_was():
    try:
        multiply_adds(lambda: 1 / 0)
    except ZeroDivisionError:
        assert torch.backends.mha.get_fastpath_enabled()
