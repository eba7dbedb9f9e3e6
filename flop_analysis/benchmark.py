"""Time this project's arithmetic against the released one and against the machine's own floor.

The floor of a row is its multiply-adds over the rate of a large matrix product, measured just
before it in the same precision. The released arithmetic concatenates a query per location; released
inference asks for one location at a time.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines import TPT, clip_inputs, clip_model
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

from apm import APM, APMConfig, load_model
from apm.data.features import StoreWriter, file_sizes, open_store, pack
from apm.data.images import DistillationDataset, load_image
from apm.distill import DistillationTrainer
from apm.evaluation import adapt_each
from apm.figures import save_figure
from apm.islands import island_colours
from apm.losses import rgb_targets
from apm.model import QueryLinear
from apm.positional_encoding import sincos_2d
from apm.predictor import perceive
from apm.preprocessing import Preprocessing
from apm.run import Waiting
from apm.runtime.cli import (
    BUNDLED_CHECKPOINT,
    OUTPUTS,
    ROOT,
    Results,
    command,
    make_parser,
    positive_int,
    precision,
    select_device,
)
from apm.runtime.counting import torch_macs
from apm.runtime.files import prepare_output
from apm.tta import TestTimeTrainer

LOCATIONS = 1024
TPT_CLASSES = 10
TRAINING_IMAGES = 4


class Row(NamedTuple):
    """A measurement: seconds are medians, ``floor`` the least that its multiply-adds could take."""

    name: str
    seconds: float
    gmacs: float
    floor: float
    images: int


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after one to warm up; of a single call without."""
    timed = cuda_seconds if device.type == "cuda" else cpu_seconds
    times = [timed(work) for _ in range(repeats + (repeats > 1))]
    return statistics.median(times[-repeats:])


def cpu_seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cuda_seconds(work: Callable[[], object]) -> float:
    """Seconds of one call between two events of the current CUDA stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def matmul_rate(device: torch.device, dtype: str, repeats: int) -> float:
    """Multiply-adds a second of 1024 x 4096 by 4096 x 4096, the model's own largest product."""
    kind = getattr(torch, dtype)
    inputs = torch.randn(LOCATIONS, 4096, device=device, dtype=kind)
    weight = torch.randn(4096, 4096, device=device, dtype=kind)
    seconds = seconds_of(lambda: F.linear(inputs, weight), device, repeats)
    return LOCATIONS * 4096**2 / seconds


def joined(layer: QueryLinear) -> Callable[..., Tensor]:
    """The released first layer: one matrix, joined once, on the concatenated query."""
    blocks = [layer.column.weight, layer.position.weight]
    if layer.feature is not None:
        blocks.insert(0, layer.feature.weight)
    weight = torch.cat(blocks, dim=1)
    return lambda *parts: F.linear(torch.cat(parts, dim=-1), weight, layer.column.bias)


def released_chunks(
    model: APM, column: Tensor, chunk_size: int
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """The released arithmetic, ``chunk_size`` whole queries at a time: queries and features."""
    encoding = sincos_2d(model.grid_positions(), model.config.position_dim)
    first = joined(model.trunk_first)
    for positions in encoding.split(chunk_size):
        query = (
            column[:, None].expand(-1, len(positions), -1),
            positions.expand(len(column), -1, -1),
        )
        x = first(*query).relu()
        for layer in model.trunk:
            x = layer(x).relu()
        yield query, model.feature_head(x)


def released_dense(model: APM, images: Tensor, chunk_size: int) -> list[tuple[Tensor, Tensor]]:
    """The released inference."""
    answers, rgb_first = [], joined(model.rgb_first)
    for query, features in released_chunks(model, model.encode(images), chunk_size):
        rgb = rgb_first(features, *query).relu()
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


def released_training_step(
    model: APM, images: Tensor, targets: Tensor, colours: Tensor, optimizer: Adam
) -> float:
    """The released step of training on COCO; the loss before it."""
    features, rgb = zip(*released_dense(model, images, LOCATIONS), strict=True)
    loss = F.mse_loss(torch.cat(features, dim=1), targets)
    loss = loss + F.mse_loss(torch.cat(rgb, dim=1), colours)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


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
        self.data_wait = 0.0  # share of the training time that is waiting for data

    def measure(
        self,
        name: str,
        dtype: str,
        macs: int,
        work: Callable[[], object],
        repeats: int = 0,
        images: int = 1,
    ) -> None:
        """Time ``work``, which takes ``macs`` multiply-adds for ``images`` images."""
        rate = matmul_rate(self.device, dtype, self.repeats)
        with precision(self.device, dtype):
            seconds = seconds_of(work, self.device, repeats or self.repeats)
        self.rows.append(Row(f"{name}, {dtype}", seconds, macs / 1e9, macs / rate, images))


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


def bench_images(bench: Bench) -> None:
    """Test-time training of whole images: one student, and eight at once."""
    for iterations, count in ((20, 1), (2, 1), (2, 8)):
        trainer = TestTimeTrainer(iterations=iterations, device=bench.device)
        config = trainer.model.config
        images, targets = torch.rand(count, 3, 448, 448), torch.randn(count, config.feature_dim)
        each = 3 * LOCATIONS * macs_per_location(config, first=False, head=False)
        bench.measure(
            f"TTT, {iterations} iterations, {count} image{'s at once' * (count > 1)}",
            "float32",
            count * iterations * each,
            partial(adapt_each, trainer, images, targets, range(count)),
            repeats=1,
            images=count,
        )


def bench_islands(bench: Bench) -> None:
    """From a photograph to colours with the bundled checkpoint."""
    model = load_model(BUNDLED_CHECKPOINT, bench.device)
    image = load_image(ROOT / "assets" / "cat.jpg")
    macs = torch_macs(lambda: perceive(model, image))

    def islands(method: str) -> None:
        island_colours(perceive(model, image).features, method)

    for method in ("pca", "tsne"):
        bench.measure(
            f"islands of a photograph, {method}", "float32", macs, partial(islands, method)
        )


def coco_trainer(device: torch.device, dtype: str) -> DistillationTrainer:
    """A trainer of the COCO model with random weights and the paper's settings."""
    torch.manual_seed(0)
    config = APMConfig.coco()
    mean, std = torch.zeros(config.feature_dim), torch.ones(config.feature_dim)
    return DistillationTrainer(APM(config).to(device), mean, std, steps=1, dtype=dtype)


def bench_training(bench: Bench) -> None:
    """A step of training on COCO: four images, all locations, forward, backward, Adam."""
    config, count = APMConfig.coco(), TRAINING_IMAGES
    pixels = torch.randint(0, 256, (count, 3, 448, 448), dtype=torch.uint8)
    targets = torch.randn(count, LOCATIONS, config.feature_dim)
    each = 3 * count * LOCATIONS
    released = each * macs_per_location(config, first=True, head=True)
    ours = each * macs_per_location(config, first=False, head=True)
    model = coco_trainer(bench.device, "float32").model
    images = model.preprocessing.normalise(pixels.to(bench.device))
    colours = rgb_targets(model.preprocessing.colours(pixels.to(bench.device)), config.patch_size)
    inputs = (images, targets.to(bench.device), colours)
    step: Callable[[], object] = partial(
        released_training_step, model, *inputs, Adam(model.parameters(), lr=1e-4)
    )
    bench.measure("training step, released", "float32", released, step, images=count)
    for dtype in ("float32", "bfloat16"):
        step = partial(coco_trainer(bench.device, dtype).step, [(pixels, targets)], count)
        bench.measure("training step, ours", dtype, ours, step, images=count)


def bench_loader(bench: Bench) -> None:
    """Images and int8 features as training reads them, alone and while it trains."""
    count = 4 * TRAINING_IMAGES
    with tempfile.TemporaryDirectory() as folder:
        data = random_data_set(Path(folder), count)
        load = partial(DataLoader, data, TRAINING_IMAGES)
        bench.measure("training data, one process", "float32", 0, lambda: [*load()], images=count)
        trainer = coco_trainer(bench.device, "bfloat16")
        batches = Waiting(load(num_workers=1))

        def train() -> None:
            for batch in batches:
                trainer.step([batch], TRAINING_IMAGES)

        ours = 3 * count * LOCATIONS * macs_per_location(APMConfig.coco(), first=False, head=True)
        name = "training, its data read by one worker"
        bench.measure(name, "bfloat16", ours, train, repeats=1, images=count)
        bench.data_wait = batches.seconds / bench.rows[-1].seconds


def random_data_set(folder: Path, count: int) -> DistillationDataset:
    """Photographs of 448 px, random features of the COCO model's size, random crops and flips."""
    preprocessing, config = Preprocessing(), APMConfig.coco()
    picture = preprocessing.picture(load_image(ROOT / "assets" / "cat.jpg"))
    paths = {f"{index:03}": folder / f"{index:03}.jpg" for index in range(count)}
    for path in paths.values():
        picture.save(path, quality=95)
    meta = {"grid_size": config.grid_size, "feature_dim": config.feature_dim}
    writer = StoreWriter(folder, meta | {"store_dtype": "int8"}, file_sizes(paths))
    for index, names in enumerate(writer.shards):
        features = torch.randn(len(names), LOCATIONS, config.feature_dim)
        writer.write(index, names, pack(features, "int8"), {})
    return DistillationDataset(paths, preprocessing, open_store(folder), augment=True)


def bench_teachers(bench: Bench) -> None:
    """What the paper compares with, random weights: CLIP ViT-B/16, and a step of TPT."""
    with bench.device:
        clip = clip_model("ViT-B/16")
        image, prompt = clip_inputs()
        views, prompts = clip_inputs(TPT.VIEWS, TPT_CLASSES)
    forward = torch.inference_mode()(partial(clip, image, prompt))
    bench.measure("CLIP ViT-B/16, image + prompt", "float32", torch_macs(forward), forward)
    with bench.device:
        tpt = TPT(clip)
    step = partial(tpt.step, Adam([tpt.context], lr=5e-3), views, prompts)
    name = f"TPT step, {TPT.VIEWS} views, {TPT_CLASSES} classes"
    bench.measure(name, "float32", torch_macs(step), step, repeats=1)


def print_rows(rows: list[Row]) -> None:
    """The table: seconds, the floor, and how far above it."""
    print(f"{'':48} seconds      GMACs    floor  x floor  images/s")
    for row in rows:
        above = f"{row.seconds / row.floor:7.2f}" if row.floor else f"{'':7}"
        print(
            f"{row.name:48} {row.seconds:7.3f}  {row.gmacs:9.2f}  {row.floor:7.3f}  "
            f"{above}  {row.images / row.seconds:8.3f}"
        )


def draw_rows(path: Path, rows: list[Row]) -> None:
    """Seconds of each row as bars, its floor as a mark."""
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in rows]
    axes.barh(names, [row.seconds for row in rows], color="tab:blue", label="measured")
    axes.plot([row.floor for row in rows], names, "k|", markersize=14, label="floor")
    axes.set(xscale="log", xlabel="seconds")
    axes.invert_yaxis()
    axes.legend()
    save_figure(path, figure)


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--output", "--device", output=OUTPUTS / "benchmark")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed runs of each row")
    args = parser.parse_args(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results = Results(args, device)
    bench = Bench(device, args.repeats)
    parts = (bench_dense, bench_tta, bench_images, bench_islands, bench_teachers)
    for part in (*parts, bench_training, bench_loader):
        part(bench)
    print_rows(bench.rows)
    print(f"training waits for data {100 * bench.data_wait:.1f} % of the time")
    draw_rows(output / "benchmark.png", bench.rows)
    results.save(output, rows=[row._asdict() for row in bench.rows], data_wait=bench.data_wait)


if __name__ == "__main__":
    sys.exit(main())
