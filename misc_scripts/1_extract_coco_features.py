"""Extract a frozen teacher's dense features for a folder of images, into a feature store.

A store takes about 1.05 MB an image of 1024 tokens of width 1024 as int8, with one scale a token,
or 2.1 MB as float16. Run it again after an interruption: what is whole is kept, what is damaged is
made anew. Under torchrun the work is shared out:

    torchrun --nproc-per-node 8 misc_scripts/1_extract_coco_features.py
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from apm.data.features import (
    STORE_DTYPES,
    FeatureStore,
    Packed,
    StoreWriter,
    describe_teacher,
    file_sizes,
    join,
    pack,
)
from apm.data.images import PictureDataset, image_names
from apm.preprocessing import Preprocessing
from apm.runtime.cli import OUTPUTS, Results, command, make_parser, precision, select_device
from apm.runtime.distributed import claim_gpu, process_group, rank, wait_for_all, world_size
from apm.runtime.files import prepare_output
from apm.teachers import DEFAULT_TEACHER, DenseTeacher, load_dense_teacher


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--teacher-block"),
        *("--teacher-margin", "--device", "--dtype", "--batch-size", "--limit", "--workers"),
        input=OUTPUTS / "resized",
        output=OUTPUTS / "features",
        teacher=DEFAULT_TEACHER,
        teacher_block=-1,
        teacher_margin=0,
    )
    add = parser.add_argument
    add("--store-dtype", choices=STORE_DTYPES, default="int8", help="how features are stored")
    add("--verify", action="store_true", help="also compare the checksums of what is there")
    return parser.parse_args(argv)


def shards_to_do(writer: StoreWriter, verify: bool) -> list[int]:
    """This process's shards that are missing or damaged."""
    todo = []
    for index in range(rank(), len(writer.shards), world_size()):
        try:
            done = writer.is_done(index, verify)
        except ValueError as error:
            tqdm.write(f"made anew: {error}", file=sys.stderr)
            done = False
        if not done:
            todo.append(index)
    return todo


def chunks(names: list[str], size: int) -> list[list[str]]:
    """Names, ``size`` at a time."""
    return [names[i : i + size] for i in range(0, len(names), size)]


def load(
    images: dict[str, Path], batches: list[list[str]], workers: int
) -> Generator[tuple[list[str], Tensor, list[str]]]:
    """Batches of names, their images ``(B, 3, H, W)`` uint8, and why one could not be read."""
    names = [name for batch in batches for name in batch]
    places = iter(range(len(names)))
    loader = DataLoader(
        PictureDataset([images[name] for name in names], Preprocessing()),
        batch_sampler=[list(islice(places, len(batch))) for batch in batches],
        num_workers=workers,
    )
    with tqdm(total=len(names), unit="image", disable=rank() > 0) as progress:
        for batch, (pixels, reasons) in zip(batches, loader, strict=True):
            yield batch, pixels, reasons
            progress.update(len(batch))


def make_shard(
    batches: Iterable[tuple[list[str], Tensor, list[str]]], teacher: DenseTeacher, args: Namespace
) -> tuple[list[str], Packed, dict[str, str]]:
    """Names and features of the images that can be read; why others cannot."""
    names, packed = [], []
    skipped: dict[str, str] = {}
    device = teacher.mean.device
    for batch, pixels, reasons in batches:
        with precision(device, args.dtype):
            features = teacher(pixels.to(device) / 255)
        skipped |= {name: why for name, why in zip(batch, reasons, strict=True) if why}
        good = [i for i, name in enumerate(batch) if name not in skipped]
        names += [batch[i] for i in good]
        packed.append(pack(features[good], args.store_dtype).cpu())
    for reason in skipped.values():
        tqdm.write(f"skipped {reason}", file=sys.stderr)
    return names, join(packed), skipped


def extract(
    writer: StoreWriter,
    todo: list[int],
    images: dict[str, Path],
    teacher: DenseTeacher,
    args: Namespace,
) -> None:
    """Write the shards ``todo``; no batch lies in two of them."""
    parts = [chunks(writer.shards[index], args.batch_size) for index in todo]
    batches = [batch for part in parts for batch in part]
    with closing(load(images, batches, args.workers)) as loaded:
        for index, part in zip(todo, parts, strict=True):
            writer.write(index, *make_shard(islice(loaded, len(part)), teacher, args))


def make_store(args: Namespace, images: dict[str, Path], device: torch.device) -> None:
    """This process's share of the store."""
    teacher = load_dense_teacher(
        args.teacher, args.teacher_weights, block=args.teacher_block, margin=args.teacher_margin
    ).to(device)
    meta = describe_teacher(args.teacher, args.teacher_weights, teacher, args.dtype)
    writer = StoreWriter(args.output, meta | {"store_dtype": args.store_dtype}, file_sizes(images))
    todo = shards_to_do(writer, args.verify)
    if rank() == 0:
        print(
            f"{len(images)} images in {len(writer.shards)} shards, "
            f"{len(images) * writer.image_bytes / 1e9:.1f} GB in all; {len(todo)} shards to make "
            f"here, {shutil.disk_usage(args.output).free / 1e9:.1f} GB free",
            file=sys.stderr,
        )
    extract(writer, todo, images, teacher, args)


def report(output: Path, images: int, results: Results) -> None:
    """Say what the whole store holds.

    Raises:
        ValueError: if none of the images could be read.
    """
    store = FeatureStore(output)
    if len(store.skipped) == images:
        reason = next(iter(store.skipped.values()))
        raise ValueError(f"none of {images} images could be read: {reason}")
    results.save(output, images=len(store.sizes), skipped=store.skipped)
    print(f"features of {len(store.sizes)} images in {output}, {len(store.skipped)} skipped")


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
        wait_for_all()  # nobody writes before the folder is claimed
        make_store(args, images, device)
        wait_for_all()
    if rank() == 0:
        report(args.output, len(images), results)


if __name__ == "__main__":
    sys.exit(main())
