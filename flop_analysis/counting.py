"""Count multiply-adds twice: by fvcore with a handle for attention, and by torch's own counter."""

import warnings
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from apm.runtime.counting import torch_macs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one of fvcore's losses uses the deprecated torch.jit.script
    from fvcore.nn import FlopCountAnalysis

# What fvcore charges though it is no product of two matrices.
NORMALISATION = ("layer_norm", "adaptive_avg_pool2d")
# Operators that fvcore does not count and need not: elementwise, reductions, look-ups.
HARMLESS = frozenset(
    f"aten::{name}"
    for name in (
        *("add", "add_", "sub", "rsub", "neg", "mul", "div", "pow", "exp", "sin", "cos", "ne"),
        *("sigmoid", "gelu", "softmax", "linalg_vector_norm", "argmax", "_unique2", "embedding"),
        *("cartesian_prod", "fill_", "numpy_T", "pad", "unflatten"),
    )
)


class Count(NamedTuple):
    """Multiply-adds of a forward pass.

    Attributes:
        fvcore: all that fvcore counts, with the handle for attention.
        attention: the handle's part, which fvcore alone leaves out.
        normalisation: what fvcore charges for normalisation.
        products: matrix products and convolutions, by torch's counter.
    """

    fvcore: int
    attention: int
    normalisation: int
    products: int


class Call(nn.Module):
    """Any computation on a model as a forward pass, which is what fvcore traces."""

    def __init__(self, model: nn.Module, work: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.work = model, work

    def forward(self, *inputs: Tensor) -> Tensor:
        """The computation."""
        return self.work(self.model, *inputs)


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore's handle: ``2 n m d`` for each head, the scores and the weighted sum."""
    query, key = (value.type().sizes() for value in inputs[:2])  # (..., n, d), (..., m, d)
    return 2 * prod(query) * key[-2]


def count_forward(model: nn.Module, *inputs: Tensor) -> Count:
    """Count a forward pass twice.

    Raises:
        ValueError: if an operator is not known to be harmless or the counters disagree.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    operators = analysis.by_operator()
    products = torch_macs(lambda: model(*inputs))
    count = Count(
        fvcore=round(operators.total()),
        attention=operators["scaled_dot_product_attention"],
        normalisation=sum(operators[name] for name in NORMALISATION),
        products=products,
    )
    if unknown := set(analysis.unsupported_ops()) - HARMLESS:
        raise ValueError(f"fvcore cannot count {sorted(unknown)}: give them a handle")
    # fvcore rounds an einsum to four digits.
    if abs(count.fvcore - count.normalisation - products) > 1e-6 * products:
        raise ValueError(f"an operator is left out: fvcore and torch disagree on {count}")
    return count


def count_step(model: nn.Module, work: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Multiply-adds of a forward and a backward pass."""
    return torch_macs(lambda: work(model, *inputs).sum().backward())
