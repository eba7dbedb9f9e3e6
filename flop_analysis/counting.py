"""Count multiply-adds twice: by fvcore with a handle for attention, and by torch's own counter."""

import warnings
from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor, nn

from apm.runtime.device import multiply_adds

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


def count_forward(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Count a forward pass twice, in GMACs.

    Returns:
        ``ours``: all that fvcore counts, with the handle for attention; ``fvcore alone`` and
        ``attention``, its two parts; ``norms``: what fvcore charges for normalisation; ``torch``:
        matrix products and convolutions, by torch's counter.

    Raises:
        ValueError: if an operator is not known to be harmless or the counters disagree.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    operators = analysis.by_operator()
    if unknown := set(analysis.unsupported_ops()) - HARMLESS:
        raise ValueError(f"fvcore cannot count {sorted(unknown)}: give them a handle")
    total, attention = operators.total(), operators["scaled_dot_product_attention"]
    norms = sum(operators[name] for name in NORMALISATION)
    products = multiply_adds(lambda: model(*inputs))
    # fvcore rounds an einsum to four digits.
    if abs(total - norms - products) > 1e-6 * products:
        raise ValueError(f"fvcore and torch disagree: {total - norms:.0f} and {products} products")
    macs = {"ours": total, "fvcore alone": total - attention, "attention": attention}
    macs |= {"norms": norms, "torch": products}
    return {name: number / 1e9 for name, number in macs.items()}


def count_step(model: nn.Module, work: Callable[..., Tensor], *inputs: Tensor) -> float:
    """GMACs of a forward and a backward pass."""
    return multiply_adds(lambda: work(model, *inputs).sum().backward()) / 1e9
