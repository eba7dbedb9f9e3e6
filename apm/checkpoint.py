"""Save and load models. Nothing in a checkpoint file is ever run.

This project's format is a safetensors file, whose header holds config, preprocessing and provenance
as JSON. The paper authors' are bare state dicts: their config and preprocessing are known by their
keys.
"""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from apm.config import APMConfig
from apm.model import APM
from apm.preprocessing import Preprocessing
from apm.runtime.files import atomic_path

HEADER = "apm"  # under which the JSON lies in the safetensors header
# Two large terms whose sum is small: half precision would lose it.
CANCELLING = ("rgb_first.position.weight", "rgb_first.column.bias")

# The released COCO model saw BGR images stretched to a square and scaled to their own range, and
# learnt from tokens cut five places too early (CLS and four registers first).
RELEASED_COCO = Preprocessing(fit="stretch", channels="BGR", scaling="min-max", token_offset=5)
RELEASED_TTA = Preprocessing(fit="stretch", scaling="imagenet")

# Released layer -> ours; the first layers of trunk and RGB head are split, see ``from_released``.
_LAYERS = {"conv1": "fold", "feat_proj_head": "feature_head"}
_LAYERS |= {"rgb_head_2": "rgb_head.0", "rgb_head_3": "rgb_head.1"}
_COCO_LAYERS = _LAYERS | {"fc2": "trunk.0", "fc3": "trunk.1", "fc4": "trunk.2", "fc5": "trunk.3"}
_TTA_LAYERS = _LAYERS | {"fc4": "trunk.0", "fc5": "trunk.1", "norm": "pooling.unused_norm"}
_TTA_LAYERS |= {"little_self_attention.out_proj": "pooling.attention.out_proj"}
_TTA_TENSORS = {
    "little_query": "pooling.query",
    "little_self_attention.in_proj_weight": "pooling.attention.in_proj_weight",
    "little_self_attention.in_proj_bias": "pooling.attention.in_proj_bias",
}


def save_model(
    path: str | os.PathLike[str],
    model: APM,
    provenance: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model's config, preprocessing and weights atomically.

    ``provenance`` says how it was made, in plain values. A few weights stay float32 in any dtype.
    """
    header = {
        "config": asdict(model.config),
        "preprocessing": asdict(model.preprocessing),
        "provenance": model.provenance if provenance is None else provenance,
    }
    weights = {
        name: tensor.to("cpu", torch.float32 if name in CANCELLING else dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, {HEADER: json.dumps(header)}))


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> APM:
    """Load this project's checkpoints and both released formats, in float32 and eval mode.

    ``model.preprocessing`` makes pictures what it was trained on. ``ValueError``: no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with path.open("rb") as file:
            ours = file.read(9)[8:] == b"{"  # safetensors: JSON after the eight bytes of its length
        config, preprocessing, provenance, weights = _ours(path) if ours else _released(path)
        if preprocessing.image_size != config.image_size:
            raise ValueError(
                f"preprocessing for {preprocessing.image_size} px, model for {config.image_size} px"
            )
        if preprocessing.token_offset > config.column_dim - config.grid_size:
            raise ValueError(f"token_offset {preprocessing.token_offset} is beyond the grid")
        with torch.device("meta"):  # nothing is drawn in vain
            model = APM(config)
        # Copies: a view of the file's memory would keep all of it.
        fit_weights(model, {name: weight.clone() for name, weight in weights.items()})
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a checkpoint of this model ({reason:.300})") from error
    model.preprocessing, model.provenance = preprocessing, provenance
    return model.to(device, torch.float32).eval()


_Parts = tuple[APMConfig, Preprocessing, dict[str, Any], dict[str, Tensor]]


def _ours(path: Path) -> _Parts:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an exception of its own
        raise ValueError(error) from error
    config, preprocessing = APMConfig(**header["config"]), Preprocessing(**header["preprocessing"])
    return config, preprocessing, dict(header["provenance"]), weights


def _released(path: Path) -> _Parts:
    state = load_tensors(path)
    if "fc1.weight" not in state:
        raise ValueError("neither this project's format nor the released keys (fc1.weight, ...)")
    weights = from_released(state)
    if "little_query" in state:
        return APMConfig.tta(len(weights["feature_head.weight"])), RELEASED_TTA, {}, weights
    return APMConfig.coco(), RELEASED_COCO, {}, weights


def fit_weights(model: nn.Module, state: Any, unused: tuple[str, ...] = ()) -> None:
    """Give a model the tensors of a state dict as its weights.

    Children named in ``unused`` are left as they are, whatever the state says of them. A
    ``ValueError`` names the first weight that is missing, unknown, misshapen or not finite.
    """
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__}, expected a state dict")
    present, expected = (
        {key: value for key, value in weights.items() if key.split(".")[0] not in unused}
        for weights in (state, model.state_dict())
    )
    for key in sorted(present.keys() | expected.keys()):
        found = tuple(present[key].shape) if key in present else "missing"
        wanted = tuple(expected[key].shape) if key in expected else "no such weight"
        if found != wanted:
            raise ValueError(f'"{key}" is {found}, expected {wanted}')
        if not present[key].isfinite().all():
            raise ValueError(f'"{key}" holds numbers that are not finite')
    model.load_state_dict(present, strict=False, assign=True)


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict under the released keys, of the COCO or the TTT model.

    A ``ValueError`` names a key that is missing or unknown.
    """
    layers, names = _COCO_LAYERS, dict[str, str]()
    if "little_query" in state:
        layers, names = _TTA_LAYERS, dict(_TTA_TENSORS)
    first = {"fc1": "trunk_first", "rgb_head_1": "rgb_first"}
    for kind in ("weight", "bias"):
        names |= {f"{released}.{kind}": f"{ours}.{kind}" for released, ours in layers.items()}
    known = names.keys() | {f"{layer}.{kind}" for layer in first for kind in ("weight", "bias")}
    if wrong := known ^ state.keys():
        raise ValueError(f"released checkpoint: key {min(wrong)} is missing or unknown")
    weights = {ours: state[released] for released, ours in names.items()}
    if "pooling.query" in weights:
        weights["pooling.query"] = weights["pooling.query"].flatten()
    # The first layers take T and p, each 1024 wide; the RGB head takes a feature before them.
    for released, ours in first.items():
        weight = state[f"{released}.weight"]
        parts = weight.tensor_split((weight.shape[1] - 2048, weight.shape[1] - 1024), dim=1)
        for part, block in zip(("feature", "column", "position"), parts, strict=True):
            if block.shape[1]:
                weights[f"{ours}.{part}.weight"] = block
        weights[f"{ours}.column.bias"] = state[f"{released}.bias"]
    return weights


def save_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """Write tensors and plain values atomically, for ``load_tensors``."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # a file object: torch's own writer hides what went wrong


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Read torch's file of tensors and plain values onto the CPU, without running anything."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types on damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: not a file of tensors that can be read safely ({reason[0]:.200})"
        ) from error
