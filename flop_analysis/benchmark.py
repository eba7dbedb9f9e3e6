"""Time this project's arithmetic against the released one and against the machine's own floor.

The floor of a row is its multiply-adds over the rate of a large matrix product, measured just
before it in the same precision. The released arithmetic concatenates a query per location; released
inference asks for one location at a time.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apm import APM, APMConfig
from apm.cli import OUTPUTS, Results, command, make_parser, positive_int, precision, select_device
from apm.files import prepare_output
from apm.model import QueryLinear
from apm.positional_encoding import sincos_2d

LOCATIONS = 1024


class Row(NamedTuple):
    """A measurement: seconds are medians, ``floor`` the least that its multiply-adds could take."""

    name: str
    seconds: float
    gmacs: float
    floor: float


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall-clock seconds of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matmul_rate(device: torch.device, dtype: str, repeats: int) -> float:
    """Multiply-adds a second of 1024 x 4096 by 4096 x 4096, the model's own largest product."""
    kind = getattr(torch, dtype)
    inputs = torch.randn(LOCATIONS, 4096, device=device, dtype=kind)
    weight = torch.randn(4096, 4096, device=device, dtype=kind)
    seconds = seconds_of(lambda: F.linear(inputs, weight), device, 2 * repeats)
    return LOCATIONS * 4096**2 / seconds


def concatenated(layer: QueryLinear, *parts: Tensor) -> Tensor:
    """The released first layer: one matrix on the concatenated query."""
    blocks = [layer.column.weight, layer.position.weight]
    if layer.feature is not None:
        blocks.insert(0, layer.feature.weight)
    return F.linear(torch.cat(parts, dim=-1), torch.cat(blocks, dim=1), layer.column.bias)


def released_dense(model: APM, images: Tensor, chunk_size: int) -> list[tuple[Tensor, Tensor]]:
    """The released inference: every query whole, ``chunk_size`` of them at a time."""
    column = model.encode(images)
    encoding = sincos_2d(model.grid_positions(), model.config.position_dim)
    answers = []
    for positions in encoding.split(chunk_size):
        query = column[:, None].expand(-1, len(positions), -1), positions[None]
        x = concatenated(model.trunk_first, *query).relu()
        for layer in model.trunk:
            x = layer(x).relu()
        features = model.feature_head(x)
        rgb = concatenated(model.rgb_first, features, *query).relu()
        for layer in model.rgb_head:
            rgb = layer(rgb).relu()
        answers.append((features, rgb))
    return answers


def dense_macs(config: APMConfig, *, split: bool) -> int:
    """Multiply-adds of trunk and feature head on every location of one image.

    With ``split`` the first layer's share, computed once an image, is left out: it is 5 M of 46 G.
    """
    widths = (*config.trunk_widths, config.feature_dim)
    each = sum(a * b for a, b in pairwise(widths))
    if not split:
        each += (config.column_dim + config.position_dim) * widths[0]
    return LOCATIONS * each


def dense_rows(device: torch.device, repeats: int) -> list[Row]:
    """Dense inference with the COCO model, random weights, one image."""
    torch.manual_seed(0)
    model = APM(APMConfig.coco()).eval().to(device)
    images = torch.rand(1, 3, 448, 448, device=device)
    rows = []

    def measure(
        name: str, dtype: str, split: bool, work: Callable[[], object], repeats: int = repeats
    ) -> None:
        rate = matmul_rate(device, dtype, repeats)
        with torch.inference_mode(), precision(device, dtype):
            seconds = seconds_of(work, device, repeats)
        macs = dense_macs(model.config, split=split)
        rows.append(Row(f"dense, {name}, {dtype}", seconds, macs / 1e9, macs / rate))

    one, all_ = (partial(released_dense, model, images, size) for size in (1, LOCATIONS))
    measure("released, one location at a time", "float32", False, one, repeats=1)
    measure("released, all locations at once", "float32", False, all_)
    for dtype in ("float32", "bfloat16"):
        measure("ours", dtype, True, lambda: model(images))
    return rows


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--output", "--device", output=OUTPUTS / "benchmark")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs of each row")
    args = parser.parse_args(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results = Results(args, device)
    rows = dense_rows(device, args.repeats)
    print(f"{'':52} seconds    GMACs   floor  x floor")
    for row in rows:
        print(
            f"{row.name:52} {row.seconds:7.3f}  {row.gmacs:7.2f}  {row.floor:6.3f}  "
            f"{row.seconds / row.floor:7.2f}"
        )
    results.save(output, rows=[row._asdict() for row in rows])


if __name__ == "__main__":
    sys.exit(main())
