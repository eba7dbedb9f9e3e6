"""Extract a frozen teacher's dense features for a folder of images, into a feature store.

A store takes about 1.05 MB an image of 1024 tokens of width 1024 as int8, with one scale a token,
or 2.1 MB as float16. With --density 2 the teacher looks at four moved copies of each image: four
times the time and size. Run it again after an interruption: what is whole is kept, what is damaged
is made anew. Under torchrun the work is shared out:

    torchrun --nproc-per-node 8 misc_scripts/1_extract_coco_features.py
"""

import sys
from argparse import Namespace
from pathlib import Path

from apm.choices import DEFAULT_TEACHER, STORE_DTYPES
from apm.flags import OUTPUTS, make_parser, positive_int
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--teacher-block"),
        *("--teacher-margin", "--device", "--dtype", "--batch-size", "--limit", "--workers"),
        "--consensus",
        example="misc_scripts/1_extract_coco_features.py --input outputs/resized --workers 8",
        input=OUTPUTS / "resized",
        output=OUTPUTS / "features",
        teacher=DEFAULT_TEACHER,
        teacher_block=-1,
        teacher_margin=0,
    )
    help = "tokens along a side of a patch: 2 takes four times the time and size of 1"
    parser.add("model", "--density", type=positive_int, default=1, help=help)
    help = "how features are stored: int8 takes 1 byte a number, float16 2"
    parser.add("input and output", "--store-dtype", choices=STORE_DTYPES, default="int8", help=help)
    help = "also compare the checksums of what is there"
    parser.add("input and output", "--verify", action="store_true", help=help)
    return parser.parse_args(argv)


answer_flags(__name__, parse)

from torch import Tensor
from tqdm import tqdm

from apm.data.features import FeatureStore, StoreWriter
from apm.data.images import Skipped, file_sizes, image_names, load_batches
from apm.data.training_set import TrainingSet
from apm.preprocessing import Preprocessing
from apm.runtime.device import precision, select_device
from apm.runtime.distributed import claim_gpu, process_group, rank, wait_for_all, world_size
from apm.runtime.files import prepare_output
from apm.teachers import DenseTeacher, load_dense_teacher


def shards_to_do(writer: StoreWriter, verify: bool) -> list[int]:
    """This process's shards that are missing or damaged."""
    todo = []
    mine = range(rank(), len(writer.shards), world_size())
    for index in tqdm(mine, "shards that are there", delay=3, leave=False, disable=rank() > 0):
        try:
            if not writer.is_done(index, verify):
                todo.append(index)
        except ValueError as error:
            tqdm.write(f"made anew: {error}", file=sys.stderr)
            todo.append(index)
    return todo


def chunks(names: list[str], size: int) -> list[list[str]]:
    """Names, ``size`` at a time."""
    return [names[i : i + size] for i in range(0, len(names), size)]


def extract(
    writer: StoreWriter, images: dict[str, Path], teacher: DenseTeacher, args: Namespace
) -> None:
    """Make this process's share of the store; no batch lies in two shards."""
    todo = shards_to_do(writer, args.verify)
    parts = [chunks(writer.shards[index], args.batch_size) for index in todo]
    dataset = TrainingSet(images, Preprocessing())  # without features, which are made here
    rows = {name: row for row, name in enumerate(dataset.names)}
    batches = [[rows[name] for name in names] for part in parts for names in part]
    device, skipped = teacher.mean.device, Skipped()
    loaded = load_batches(dataset, batches, args.workers, skipped)
    with tqdm(total=sum(map(len, batches)), unit="image", disable=rank() > 0) as progress:
        for index, part in zip(todo, parts, strict=True):
            features: dict[str, Tensor] = {}
            for names in part:
                found, items = next(loaded)
                if found:
                    pixels, _ = items
                    with precision(device, args.dtype):
                        tokens = teacher(pixels.to(device) / 255)
                    features |= zip((dataset.names[row] for row in found), tokens, strict=True)
                progress.update(len(names))
            lost = [name for name in writer.shards[index] if name not in features]
            writer.write(index, features, {name: skipped[str(images[name])] for name in lost})


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    claim_gpu(device)
    images = image_names(args.input, args.limit)
    if rank() == 0:
        prepare_output(args.output)
    results = Results(args, device)
    with process_group(device):
        teacher = load_dense_teacher(
            args.teacher,
            args.teacher_weights,
            block=args.teacher_block,
            margin=args.teacher_margin,
            density=args.density,
            consensus=args.consensus,
        ).to(device)
        meta = teacher.description() | {"dtype": args.dtype, "store_dtype": args.store_dtype}
        if rank() > 0:
            wait_for_all()  # until the first process has written down how the store is made
        writer = StoreWriter(args.output, meta, file_sizes(images))
        if rank() == 0:
            wait_for_all()
        extract(writer, images, teacher, args)
        wait_for_all()
    if rank() == 0:
        store = FeatureStore(args.output)
        Skipped(store.skipped).refuse_all(len(images))
        results.save(args.output, images=len(store.sizes), skipped=store.skipped)
        made, lost = len(store.sizes), len(store.skipped)
        hint = f"train on them with misc_scripts/train.py --features {args.output}"
        print(f"features of {made} images in {args.output}, {lost} skipped; {hint}")


if __name__ == "__main__":
    sys.exit(main())
