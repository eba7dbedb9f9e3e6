"""Write a checkpoint that answers features of another width, for train.py to go on from.

The feature head is new, and the colours do not depend on features at first. All else is kept.

    python misc_scripts/bundled/new_feature_head.py --feature-dim 384 --output start.safetensors
    python misc_scripts/train.py --init start.safetensors --fold-rate 0.1
"""

import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from apm import APM, load_model, save_model
from apm.runtime.cli import OUTPUTS, command, make_parser, positive_int
from apm.runtime.device import seed_everything


def with_features(model: APM, width: int) -> APM:
    """The same model with a random head for features of another width."""
    wider = APM(replace(model.config, feature_dim=width))
    shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    kept = {k: v for k, v in model.state_dict().items() if v.shape == shapes[k]}
    wider.load_state_dict(kept, strict=False)
    assert wider.rgb_first.feature is not None
    nn.init.zeros_(wider.rgb_first.feature.weight)
    wider.preprocessing, wider.provenance = model.preprocessing, model.provenance
    return wider


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "--checkpoint", "--seed")
    add = parser.add_argument
    add("--output", type=Path, default=OUTPUTS / "start.safetensors", help="checkpoint to write")
    add("--feature-dim", type=positive_int, required=True, help="width of the features")
    args = parser.parse_args(argv)
    seed_everything(args.seed)
    save_model(args.output, with_features(load_model(args.checkpoint), args.feature_dim))
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
