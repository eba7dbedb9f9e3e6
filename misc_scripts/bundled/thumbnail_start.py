"""Write a checkpoint whose colours start as a grey thumbnail, for train.py to go on from.

Each entry of its column is the brightness of a patch, and its RGB head starts as a lookup of the
column. Fold and lookup are then trained at a lower rate: Adam's first steps change every weight by
the whole rate, which would blur the thumbnail.
"""

import sys
from argparse import Namespace
from pathlib import Path

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--feature-dim", "--seed"),
        example="misc_scripts/bundled/thumbnail_start.py --feature-dim 384",
    )
    output, help = OUTPUTS / "start.safetensors", "checkpoint to write"
    parser.add("input and output", "--output", type=Path, default=output, help=help)
    help = "checkpoint that gets a new fold and RGB head, instead of a new model"
    parser.add("model", "--checkpoint", type=Path, help=help)
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.feature_dim is None):
        raise ValueError("give --checkpoint, or --feature-dim for a new model")
    return args


answer_flags(__name__, parse)

from thumbnail import start_as_thumbnail

from apm import APM, APMConfig, load_model, save_model
from apm.runtime.device import seed_everything


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    seed_everything(args.seed)
    if args.checkpoint:
        model = load_model(args.checkpoint)
    else:
        model = APM(APMConfig.small(feature_dim=args.feature_dim))
    start_as_thumbnail(model)
    save_model(args.output, model)
    print(
        f"{args.output}; train it with misc_scripts/train.py --fold-rate 0.1 --init {args.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
