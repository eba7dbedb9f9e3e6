"""Time this project's arithmetic against the released one and against the machine's own floor.

The floor of a row is its multiply-adds over the rate of a large matrix product, measured just
before it in the same precision. The released arithmetic concatenates a query per location; released
inference asks for one location at a time.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from apm.choices import DTYPES
from apm.flags import CHECKPOINT, OUTPUTS, ROOT, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--device", "--repeats"),
        example="flop_analysis/benchmark.py --repeats 1",
        output=OUTPUTS / "benchmark",
        repeats=3,
    )
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import released
import torch
from adaptation import one_image, peers, test_time_training, times_faster
from released import LOCATIONS
from table import print_table
from timing import Work, measure
from torch.optim import Adam
from tqdm import tqdm

from apm import APM, APMConfig, load_model
from apm.config import TrainConfig
from apm.data.features import StoreWriter, open_store
from apm.data.images import file_sizes, load_batches, load_image
from apm.data.training_set import TrainingSet
from apm.distill import Distiller
from apm.islands import island_colours
from apm.losses import rgb_targets
from apm.predictor import perceive
from apm.preprocessing import Preprocessing
from apm.runtime.device import multiply_adds, precision, select_device
from apm.runtime.files import prepare_output

PHOTOGRAPH = ROOT / "assets" / "cat.jpg"
BATCH = 4  # images a step of training


def inference(device: torch.device) -> Iterator[Work]:
    """Features and colours of one image by the COCO model, random weights."""
    torch.manual_seed(0)
    model = APM(APMConfig.coco()).eval().to(device)
    images = torch.rand(1, 3, 448, 448, device=device)
    layers = released.first_layers(model)  # which the released code holds joined
    theirs = torch.no_grad()(partial(released.dense, model, images, layers=layers))

    @torch.no_grad()
    def ours(dtype: str) -> None:
        with precision(device, dtype):
            model(images)

    one_by_one = partial(theirs, chunk_size=1)
    yield Work("dense, released: locations one by one", one_by_one, once=True)
    yield Work("dense, released: all locations at once", theirs)
    macs = multiply_adds(partial(ours, "float32"))
    for dtype in DTYPES:
        yield Work("dense, ours", partial(ours, dtype), dtype, macs=macs)


def islands(device: torch.device) -> Iterator[Work]:
    """From a photograph to colours with the bundled checkpoint."""
    model = load_model(CHECKPOINT, device)
    see = partial(perceive, model, load_image(PHOTOGRAPH))
    for method in ("pca", "tsne"):
        run = partial(lambda method: island_colours(see().features, method), method)
        yield Work(f"islands of a photograph, {method}", run, macs=0)


def distiller(device: torch.device, dtype: str = "float32") -> Distiller:
    """Trains the COCO model from random weights, with the paper's settings."""
    torch.manual_seed(0)
    model = APM(APMConfig.coco()).to(device)
    mean, std = torch.zeros(model.config.feature_dim), torch.ones(model.config.feature_dim)
    return Distiller(model, TrainConfig(dtype=dtype), mean, std, steps=1, batch_size=BATCH)


def training(device: torch.device) -> Iterator[Work]:
    """A step of training on COCO: four images, all locations, forward, backward, Adam."""
    model = distiller(device).model
    pixels = torch.randint(0, 256, (BATCH, 3, 448, 448), dtype=torch.uint8)
    targets = torch.randn(BATCH, LOCATIONS, model.config.feature_dim)
    images = model.preprocessing.normalise(pixels.to(device))
    colours = rgb_targets(model.preprocessing.colours(pixels.to(device)), model.config.patch_size)
    inputs = (images, targets.to(device), colours, Adam(model.parameters(), lr=1e-4))
    step: Callable[[], object] = partial(released.training_step, model, *inputs)
    yield Work("training step, released", step, images=BATCH)
    macs = multiply_adds(partial(distiller(device).step, [(pixels, targets)]))
    for dtype in DTYPES:
        step = partial(distiller(device, dtype).step, [(pixels, targets)])
        yield Work("training step, ours", step, dtype, images=BATCH, macs=macs)


def training_data(device: torch.device, waits: list[float]) -> Iterator[Work]:
    """Reading images and int8 features, alone and while training; adds each batch's wait."""
    count, trainer = 4 * BATCH, distiller(device, "bfloat16")
    with TemporaryDirectory() as folder:
        data = random_data(Path(folder), count)
        batches = [range(start, start + BATCH) for start in range(0, count, BATCH)]
        read = partial(load_batches, data, batches)
        yield Work("training data, one process", lambda: [*read(0)], images=count, macs=0)

        def train() -> None:
            loader = read(1)
            for _ in batches:
                started = time.perf_counter()
                _, items = next(loader)
                waits.append(time.perf_counter() - started)
                trainer.step([items])

        name = "training, its data read by one worker"
        _, batch = next(read(0))
        macs = len(batches) * multiply_adds(partial(distiller(device).step, [batch]))
        yield Work(name, train, "bfloat16", images=count, once=True, macs=macs)


def random_data(folder: Path, count: int) -> TrainingSet:
    """Photographs of 448 px, random features of the COCO model's size, random crops and flips."""
    preprocessing, config = Preprocessing(), APMConfig.coco()
    picture = preprocessing.picture(load_image(PHOTOGRAPH))
    paths = {f"{index:03}": folder / f"{index:03}.jpg" for index in range(count)}
    for path in paths.values():
        picture.save(path, quality=95)
    meta = {"grid_size": config.grid_size, "feature_dim": config.feature_dim}
    features = {name: torch.randn(LOCATIONS, config.feature_dim) for name in paths}
    StoreWriter(folder, meta | {"store_dtype": "int8"}, file_sizes(paths)).write(0, features, {})
    return TrainingSet(paths, preprocessing, open_store(folder), augment=True)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results, waits = Results(args, device), list[float]()
    parts: list[Callable[[torch.device], Iterator[Work]]]
    parts = [inference, test_time_training, one_image, peers, islands, training]
    parts.append(partial(training_data, waits=waits))
    rows = [
        measure(work, device, args.repeats)
        for part in tqdm(parts, unit="part")
        for work in part(device)
    ]
    data_wait = sum(waits) / rows[-1]["seconds"]
    print_table("Seconds, median", rows, digits=3)
    faster = times_faster(rows)
    for name, times in faster.items():
        print(f"{name}: {times:.1f}")
    print(f"training waits for data {100 * data_wait:.1f} % of the time")
    results.save(output, rows=rows, times_faster=faster, data_wait=data_wait)
    print(f"{output / 'results.json'} has these numbers and the machine's")


if __name__ == "__main__":
    sys.exit(main())
