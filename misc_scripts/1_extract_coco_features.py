"""Extract a frozen teacher's dense features for a folder of square images.

One float16 .npy of (locations, width) an image, in the layout of the image folder. Run it again
after an interruption: images that have their features are skipped.
"""

import sys

from torch.utils.data import DataLoader
from tqdm import tqdm

from apm.cli import OUTPUTS, command, make_parser, precision, select_device
from apm.data import FeatureStore, PictureDataset, image_names
from apm.files import file_sha256, prepare_output
from apm.preprocessing import Preprocessing
from apm.teachers import DEFAULT_TEACHER, load_dense_teacher


@command
def main(argv: list[str] | None = None) -> None:
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
    args = parser.parse_args(argv)
    device = select_device(args.device)
    images = image_names(args.input, args.limit)
    output = prepare_output(args.output)
    preprocessing = Preprocessing()
    teacher = load_dense_teacher(
        args.teacher, args.teacher_weights, block=args.teacher_block, margin=args.teacher_margin
    ).to(device)
    store = FeatureStore.create(
        output,
        {
            "teacher": args.teacher,
            "weights_sha256": args.teacher_weights and file_sha256(args.teacher_weights),
            "block": teacher.block,
            "margin": teacher.margin,
            "grid_size": teacher.grid_size,
            "feature_dim": teacher.feature_dim,
            "dtype": args.dtype,
        },
    )
    todo = [name for name in images if not store.path(name).exists()]
    loader = DataLoader(
        PictureDataset([images[name] for name in todo], preprocessing),
        batch_size=args.batch_size,
        num_workers=args.workers,
    )
    remaining = iter(todo)
    with tqdm(total=len(images), initial=len(images) - len(todo), unit="image") as progress:
        for batch in loader:
            with precision(device, args.dtype):
                features = teacher(batch.to(device) / 255)
            for feature in features:
                store.write(next(remaining), feature)
            progress.update(len(batch))
    print(f"features of {len(images)} images in {output}")


if __name__ == "__main__":
    sys.exit(main())
