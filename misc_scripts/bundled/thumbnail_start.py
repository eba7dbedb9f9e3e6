"""Write a checkpoint whose colours start as a grey thumbnail, for train.py to go on from.

Each entry of its column is the brightness of a patch, and its RGB head starts as a lookup of the
column. Fold and lookup are then trained at a lower rate: Adam's first steps change every weight by
the whole rate, which would blur the thumbnail.

    python misc_scripts/bundled/thumbnail_start.py --output start.safetensors
    python misc_scripts/train.py --init start.safetensors --fold-rate 0.1
"""

import sys
from pathlib import Path

from thumbnail import start_as_thumbnail

from apm import APM, APMConfig, load_model, save_model
from apm.runtime.cli import OUTPUTS, command, make_parser, positive_int
from apm.runtime.device import seed_everything


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--seed")
    add = parser.add_argument
    add("--output", type=Path, default=OUTPUTS / "start.safetensors", help="checkpoint to write")
    add("--checkpoint", type=Path, help="checkpoint that gets a new fold and RGB head")
    add("--feature-dim", type=positive_int, default=192, help="of a new model: the teacher's width")
    args = parser.parse_args(argv)
    seed_everything(args.seed)
    if args.checkpoint:
        model = load_model(args.checkpoint)
    else:
        model = APM(APMConfig.small(feature_dim=args.feature_dim))
    start_as_thumbnail(model)
    save_model(args.output, model)
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
