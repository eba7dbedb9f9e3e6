"""Save and load models. Nothing in a checkpoint file is ever run.

Two formats: this project's (config, preprocessing, provenance, weights) and the paper authors' bare
state dicts, of which the positional encoding, the config and the preprocessing are not part.
"""

import dataclasses
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from apm.model import APM, APMConfig
from apm.preprocessing import Preprocessing
from apm.runtime.files import atomic_path

FORMAT = "apm-checkpoint"
ZIP_MAGIC = b"PK\x03\x04"
# Two large terms whose sum is small: half precision would lose it.
CANCELLING = ("rgb_first.position.weight", "rgb_first.column.bias")

# What tensors and plain values are pickled with. torch's own list is longer and has functions whose
# result can be larger than any file (bytearray, encode).
_NEEDED_GLOBALS = re.compile(
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch \w+Storage|torch\.storage (Typed|Untyped)Storage|torch b?float\d*"
)

# The released COCO model saw BGR images stretched to a square and scaled to their own range, and
# learnt from tokens cut five places too early (CLS and four registers first).
RELEASED_COCO = Preprocessing(fit="stretch", channels="BGR", scaling="min-max", token_offset=5)
RELEASED_TTA = Preprocessing(fit="stretch", scaling="imagenet")


def save_model(
    path: str | os.PathLike[str],
    model: APM,
    provenance: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint atomically.

    Args:
        model: its config, preprocessing and weights are saved.
        provenance: how the model was made, as plain values; default the model's own.
        dtype: precision of the saved weights, but for a few that stay in float32; float16 halves
            the file.
    """
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "provenance": model.provenance if provenance is None else provenance,
        "weights": {
            name: tensor.to("cpu", torch.float32 if name in CANCELLING else dtype)
            for name, tensor in model.state_dict().items()
        },
    }
    save_tensors(path, content)


def save_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """Write tensors and plain values, for ``load_tensors``, atomically.

    Raises:
        OSError: if they cannot be written, for example onto a full disk.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # a file object: torch's own writer hides what went wrong


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> APM:
    """Load this project's checkpoints and both released formats, in float32 and eval mode.

    ``model.preprocessing`` turns pictures into what the checkpoint was trained on.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, or its weights do not fit its model.
    """
    content = load_tensors(path)
    try:
        model = _build(content, Path(path).stat().st_size)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error)[:1000].split())[:300]
        raise ValueError(f"{path}: not a checkpoint of this model ({reason})") from error
    return model.to(device).eval()


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Read a file of tensors and plain values without running anything in it, onto the CPU.

    The memory it takes is bounded by the size of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        for pickled in _pickles(path):
            _refuse_functions(pickled)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: not a checkpoint that can be read safely ({reason[0][:200]})"
        ) from error


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """What torch.load would unpickle: members of a zip archive, or five in a row.

    Raises:
        ValueError: if the archive is larger unpacked than packed; torch does not compress.
    """
    with path.open("rb") as file:
        # As torch tells them apart; Python would also find an archive behind something else.
        is_archive = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        if not is_archive:
            yield from [file] * 5
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("it would unpack to more than its size")
            for member in members:
                if member.filename.endswith(".pkl"):
                    yield io.BytesIO(archive.read(member))


def _refuse_functions(pickled: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        names_one = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        if names_one and not _NEEDED_GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it asks for {str(argument)[:80]!r}, not for tensors alone")


def _build(content: Any, size: int) -> APM:
    """The model of a checkpoint whose file has ``size`` bytes."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dictionary")
    provenance: dict[str, Any] = {}
    if content.get("format") == FORMAT:
        config = APMConfig(**content["config"])
        preprocessing = Preprocessing(**content["preprocessing"])
        weights, provenance = content["weights"], content["provenance"]
    elif "fc1.weight" in content:
        pooled = "little_query" in content
        width = content["feat_proj_head.weight"].shape[0]
        config = APMConfig.tta(width) if pooled else APMConfig.coco()
        preprocessing = RELEASED_TTA if pooled else RELEASED_COCO
        weights = from_released(content)
    else:
        raise ValueError("neither this project's format nor the released keys (fc1.weight, ...)")
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance is a {type(provenance).__name__}, expected a dictionary")
    if preprocessing.image_size != config.image_size:
        raise ValueError(
            f"preprocessing for {preprocessing.image_size} px, model for {config.image_size} px"
        )
    if preprocessing.token_offset > config.column_dim - config.grid_size:
        raise ValueError(f"token_offset {preprocessing.token_offset} is more than the grid holds")
    _check_weights(weights, size)
    layers = len(config.trunk_widths) + len(config.rgb_widths)
    layers += sum(config.local_blocks) if config.local_width else 0
    if layers > len(weights):
        raise ValueError(f"a model of {layers} layers, but {len(weights)} weights")
    with torch.device("meta"):
        model = APM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"weight {name} is missing")
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}")
    if unknown := set(weights) - set(expected):
        raise ValueError(f"unknown weights {', '.join(sorted(unknown)[:5])}")
    model.load_state_dict(
        {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}, assign=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.preprocessing, model.provenance = preprocessing, provenance
    return model


def _check_weights(weights: dict[str, Tensor], size: int) -> None:
    """Refuse what is no weight, and views that are larger than the file they came from."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is no tensor of floating-point numbers")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}")
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > size:
        raise ValueError("its weights are larger than the file")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict under the released keys, of the COCO or the TTT model.

    Raises:
        ValueError: if a key is missing or unknown.
    """
    state = dict(state)
    layers = sorted(key[2:-7] for key in state if key.startswith("fc") and key.endswith(".weight"))
    names = {"conv1": "fold", "feat_proj_head": "feature_head"}
    names |= {f"fc{layer}": f"trunk.{index}" for index, layer in enumerate(layers[1:])}
    names |= {f"rgb_head_{layer}": f"rgb_head.{layer - 2}" for layer in (2, 3)}
    if "little_query" in state:
        names |= {
            "little_self_attention": "attention_pool.attention",
            "little_self_attention.out_proj": "attention_pool.attention.out_proj",
            "norm": "attention_pool.unused_norm",
        }
    try:
        column_dim = state["fc1.weight"].shape[1] // 2
        ours = {
            "trunk_first.column.weight": state["fc1.weight"][:, :column_dim],
            "trunk_first.column.bias": state.pop("fc1.bias"),
            "trunk_first.position.weight": state.pop("fc1.weight")[:, column_dim:],
            "rgb_first.feature.weight": state["rgb_head_1.weight"][:, : -2 * column_dim],
            "rgb_first.column.weight": state["rgb_head_1.weight"][:, -2 * column_dim : -column_dim],
            "rgb_first.column.bias": state.pop("rgb_head_1.bias"),
            "rgb_first.position.weight": state.pop("rgb_head_1.weight")[:, -column_dim:],
        }
        if "little_query" in state:
            ours["attention_pool.query"] = state.pop("little_query").flatten()
        for key, tensor in state.items():
            stem, _, kind = key.rpartition(".")
            ours[f"{names[stem]}.{kind}"] = tensor
    except KeyError as error:
        raise ValueError(f"released checkpoint: key {error} is missing or unknown") from error
    return ours
