"""Write a checkpoint that answers features of another width, for train.py to go on from.

The feature head is new, and the colours do not depend on features at first. All else is kept.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--seed"),
        required=["--feature-dim"],
        example="misc_scripts/bundled/new_feature_head.py --feature-dim 384",
    )
    output, help = OUTPUTS / "start.safetensors", "checkpoint to write"
    parser.add("input and output", "--output", type=Path, default=output, help=help)
    return parser.parse_args(argv)


answer_flags(__name__, parse)

from torch import nn

from apm import APM, load_model, save_model
from apm.runtime.device import seed_everything


def with_features(model: APM, width: int) -> APM:
    """The same model with a random head for features of another width."""
    wider = APM(replace(model.config, feature_dim=width))
    shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.shape == shapes[name] and not name.startswith("feature_head.")
    }
    wider.load_state_dict(kept, strict=False)
    assert wider.rgb_first.feature is not None
    nn.init.zeros_(wider.rgb_first.feature.weight)
    wider.preprocessing, wider.provenance = model.preprocessing, model.provenance
    return wider


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    seed_everything(args.seed)
    save_model(args.output, with_features(load_model(args.checkpoint), args.feature_dim))
    print(
        f"{args.output}; train it with misc_scripts/train.py --fold-rate 0.1 --init {args.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
