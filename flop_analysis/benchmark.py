"""Time this project's arithmetic against the released one and against the machine's own floor.

The floor of a row is its multiply-adds over the rate of a large matrix product, measured just
before it in the same precision. The released arithmetic concatenates a query per location; released
inference asks for one location at a time.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from apm import APM, APMConfig
from apm.cli import OUTPUTS, Results, command, make_parser, positive_int, precision, select_device
from apm.files import prepare_output
from apm.model import QueryLinear
from apm.positional_encoding import sincos_2d
from apm.tta import TestTimeTrainer

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


def released_chunks(
    model: APM, column: Tensor, chunk_size: int
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """The released arithmetic, ``chunk_size`` whole queries at a time: queries and features."""
    encoding = sincos_2d(model.grid_positions(), model.config.position_dim)
    for positions in encoding.split(chunk_size):
        query = (
            column[:, None].expand(-1, len(positions), -1),
            positions.expand(len(column), -1, -1),
        )
        x = concatenated(model.trunk_first, *query).relu()
        for layer in model.trunk:
            x = layer(x).relu()
        yield query, model.feature_head(x)


def released_dense(model: APM, images: Tensor, chunk_size: int) -> list[tuple[Tensor, Tensor]]:
    """The released inference."""
    answers = []
    for query, features in released_chunks(model, model.encode(images), chunk_size):
        rgb = concatenated(model.rgb_first, features, *query).relu()
        for layer in model.rgb_head:
            rgb = layer(rgb).relu()
        answers.append((features, rgb))
    return answers


def released_step(model: APM, images: Tensor, target: Tensor, optimizer: Adam) -> None:
    """The released step of test-time training: eight copies of the image, chunks of 16."""
    column = model.encode(images.expand(8, -1, -1, -1))
    features = torch.cat([chunk for _, chunk in released_chunks(model, column, 16)], dim=1)
    pool, encoding = model.attention_pool, sincos_2d(model.grid_positions(), features.shape[-1])
    tokens = features + encoding
    pooled, _ = pool.attention(pool.query.expand(8, 1, -1), tokens, tokens)
    F.mse_loss(pooled[:, 0], target.expand(8, -1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def macs_per_location(config: APMConfig, *, first: bool, head: bool) -> int:
    """Multiply-adds of the shared MLP for one location, with or without first layer and head."""
    widths = [*config.trunk_widths, config.feature_dim]
    if first:
        widths.insert(0, config.column_dim + config.position_dim)
    if not head:
        widths.pop()
    return sum(a * b for a, b in pairwise(widths))


class Bench:
    """Collects rows, each with the matrix rate measured just before it."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.rows: list[Row] = []

    def measure(
        self, name: str, dtype: str, macs: int, work: Callable[[], object], repeats: int = 0
    ) -> None:
        """Time ``work``, which takes ``macs`` multiply-adds."""
        rate = matmul_rate(self.device, dtype, self.repeats)
        with precision(self.device, dtype):
            seconds = seconds_of(work, self.device, repeats or self.repeats)
        self.rows.append(Row(f"{name}, {dtype}", seconds, macs / 1e9, macs / rate))


def bench_dense(bench: Bench) -> None:
    """Dense inference with the COCO model, random weights, one image."""
    torch.manual_seed(0)
    model = APM(APMConfig.coco()).eval().to(bench.device)
    images = torch.rand(1, 3, 448, 448, device=bench.device)
    released = LOCATIONS * macs_per_location(model.config, first=True, head=True)
    ours = LOCATIONS * macs_per_location(model.config, first=False, head=True)
    with torch.inference_mode():
        one, all_ = (partial(released_dense, model, images, size) for size in (1, LOCATIONS))
        bench.measure("dense, released: locations one by one", "float32", released, one, repeats=1)
        bench.measure("dense, released: all locations at once", "float32", released, all_)
        for dtype in ("float32", "bfloat16"):
            bench.measure("dense, ours", dtype, ours, lambda: model(images))


def bench_tta(bench: Bench) -> None:
    """One step of test-time training with the full student: forward, backward, Adam."""
    model = TestTimeTrainer(device=bench.device).model
    image, target = torch.rand(3, 448, 448), torch.randn(model.config.feature_dim)
    released = 8 * 3 * LOCATIONS * macs_per_location(model.config, first=True, head=True)
    # The head is applied after pooling.
    ours = 3 * LOCATIONS * macs_per_location(model.config, first=False, head=False)
    images, targets = image[None].to(bench.device), target.to(bench.device)
    step = partial(released_step, model, images, targets, Adam(model.parameters(), lr=1e-4))
    bench.measure("TTT step, released", "float32", released, step, repeats=1)
    for dtype in ("float32", "bfloat16"):
        trainer = TestTimeTrainer(dtype=dtype, device=bench.device)
        bench.measure("TTT step, ours", dtype, ours, partial(trainer.step, images, targets[None]))


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--output", "--device", output=OUTPUTS / "benchmark")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs of each row")
    args = parser.parse_args(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results = Results(args, device)
    bench = Bench(device, args.repeats)
    bench_dense(bench)
    bench_tta(bench)
    print(f"{'':50} seconds     GMACs   floor  x floor")
    for row in bench.rows:
        print(
            f"{row.name:50} {row.seconds:7.3f}  {row.gmacs:8.2f}  {row.floor:6.3f}  "
            f"{row.seconds / row.floor:7.2f}"
        )
    results.save(output, rows=[row._asdict() for row in bench.rows])


if __name__ == "__main__":
    sys.exit(main())
