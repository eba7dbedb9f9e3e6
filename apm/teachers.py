"""Frozen dense teachers: the one place where images are normalised for them and tokens sliced."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from apm.checkpoint import fit_weights
from apm.consensus import agree
from apm.layers import move
from apm.runtime.files import file_sha256

WAY_OUT = "name a local file with --teacher-weights"
HEADS = ("head", "head_dist", "fc_norm", "attn_pool")  # what follows a ViT's patch tokens


@contextmanager
def refusing(refusal: str) -> Iterator[None]:
    """Turn whatever damaged files and download clients raise into one line that starts so."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split()).split(". ")[0]  # advice may follow
        raise ValueError(f"{refusal} ({kind}{reason:.200})") from error


def timm_name(name: str) -> str:
    """timm's own name of a model: on the Hub a prefix comes before it."""
    return name.removeprefix("hf-hub:").removeprefix("timm/")


def architecture_of(name: str) -> str:
    """timm's own name of a model, without the tag of its weights."""
    return timm_name(name).partition(".")[0]


def sketch(name: str, **settings: Any) -> Any:
    """A model of timm on the meta device: shapes without numbers."""
    own_name = timm_name(name)
    architecture, _, tag = own_name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"--teacher {name!r} is not a model of timm {timm.__version__}")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and own_name not in tagged:
        raise ValueError(f"--teacher {name!r}: timm has no such weights, but {', '.join(tagged)}")
    with torch.device("meta"):
        return timm.create_model(own_name, **settings)


def load_timm(
    name: str, weights: Path | None, unused: tuple[str, ...] = (), **settings: Any
) -> Any:
    """A model of timm with its weights, of which a file need not hold the ``unused`` parts."""
    if not weights:
        with refusing(f"--teacher {name!r}: its weights could not be downloaded; {WAY_OUT}"):
            return timm.create_model(timm_name(name), pretrained=True, **settings)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such teacher weights file")
    model = sketch(name, **settings)
    with refusing(f"{weights}: not weights of teacher {name!r}"):
        state = timm.models.load_state_dict(str(weights), weights_only=True)
        if isinstance(model, VisionTransformer):  # its positions are resized to another grid
            state = checkpoint_filter_fn(state, model)
        else:  # has buffers that no file holds
            model = timm.create_model(timm_name(name), **settings)
        fit_weights(model, state, unused)
    return model


def identify(name: str, weights: Path | None) -> dict[str, str | None]:
    """A teacher's name and the SHA-256 of its weights, if they are a local file."""
    return {"teacher": name, "weights_sha256": file_sha256(weights) if weights else None}


class DenseTeacher(nn.Module):
    """Patch tokens of a frozen ViT's block, normed, on the student's grid (the paper's: DINOv2).

    The image is scaled so that one token stands for one location. With a ``margin`` it is first
    continued by that many patches on each side, mirrored, and the tokens of the margin are
    dropped: tokens at a ViT's border, above all in the corners, are often outliers. With a
    ``density`` the ViT looks at ``density**2`` copies, moved by fractions of a patch (whole pixels,
    mirrored), whose tokens are stitched to a grid so many times as fine. Last come steps of
    ``consensus`` (``apm.consensus``).

    Attributes:
        grid_size: tokens along a side of one copy.
        block: its number from the front; negative numbers count from the end.
        feature_dim: width of the tokens.
        identity: as of ``identify``, if the ViT was loaded by its name.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        grid_size: int = 32,
        block: int = -1,
        margin: int = 0,
        density: int = 1,
        consensus: int = 0,
    ) -> None:
        super().__init__()
        for part in HEADS:
            setattr(vit, part, nn.Identity())
        self.vit: Any = vit.float().eval().requires_grad_(False)
        self.grid_size, self.block, self.margin = grid_size, block_index(block, vit.blocks), margin
        self.density, self.consensus = density, consensus
        self.feature_dim = vit.num_features
        self.identity: dict[str, str | None] = {}
        config = timm.data.resolve_model_data_config(vit)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1), persistent=False)

    def description(self) -> dict[str, Any]:
        """What decides the features, as plain values: kept with stores and checkpoints."""
        names = ("block", "margin", "density", "consensus", "feature_dim")
        description = self.identity | {name: getattr(self, name) for name in names}
        return description | {"grid_size": self.grid_size * self.density}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, H)`` float RGB in [0, 1] -> ``(B, N, F)`` float32, row by row.

        ``N = (grid_size * density)**2``. Each token stands for the middle of its cell, to less than
        a pixel.
        """
        patch = self.vit.patch_embed.patch_size[0]
        side, border = self.grid_size * patch, self.margin * patch
        if images.shape[-1] != side:
            images = F.interpolate(
                images, (side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        pictures, images = images, (images - self.mean) / self.std
        # How far the copies are moved: -4 and 3 of 14 pixels at a density of 2.
        moves = [int(patch * ((i + 0.5) / self.density - 0.5) // 1) for i in range(self.density)]
        copies = (move(images, row, column, border) for row in moves for column in moves)
        tokens = [self._tokens(copy) for copy in copies]
        stitched = F.pixel_shuffle(torch.stack(tokens, dim=2).flatten(1, 2), self.density)
        if self.consensus:
            colours = F.adaptive_avg_pool2d(pictures, stitched.shape[-1])
            pairs = zip(stitched.permute(0, 2, 3, 1), colours.permute(0, 2, 3, 1), strict=True)
            stitched = torch.stack([agree(*pair, self.consensus) for pair in pairs])
            return stitched.flatten(1, 2)
        return stitched.flatten(2).transpose(1, 2)

    def _tokens(self, images: Tensor) -> Tensor:
        """Normalised images with their margins -> ``(B, F, grid_size, grid_size)`` float32."""
        tokens = self.vit.forward_intermediates(
            images, indices=[self.block], norm=True, intermediates_only=True, stop_early=True
        )[0]  # (B, F, grid + 2 margin, grid + 2 margin), without CLS and register tokens
        inner = slice(self.margin, self.margin + self.grid_size)
        return tokens[:, :, inner, inner].float()


def load_dense_teacher(
    name: str,
    weights: Path | None = None,
    *,
    grid_size: int = 32,
    block: int = -1,
    margin: int = 0,
    density: int = 1,
    consensus: int = 0,
) -> DenseTeacher:
    """Any plain ViT, by timm's name for it, as a dense teacher.

    ``weights`` is a state dict, timm's or the original authors'; default timm's own download.
    """
    vit = sketch(name)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"--teacher {name!r} is a {type(vit).__name__}, expected a plain ViT")
    if not 0 <= margin < grid_size:
        raise ValueError(f"--teacher-margin {margin}: must be in 0..{grid_size - 1} patches")
    block_index(block, vit.blocks)  # before a download
    size = (grid_size + 2 * margin) * vit.patch_embed.patch_size[0]
    vit = load_timm(name, weights, HEADS, img_size=size)
    teacher = DenseTeacher(
        vit, grid_size=grid_size, block=block, margin=margin, density=density, consensus=consensus
    )
    teacher.identity = identify(name, weights)
    return teacher


def block_index(block: int, blocks: nn.Module) -> int:
    """The number of a block from the front, given from the front or negative from the end."""
    count = len(list(blocks.children()))
    if not -count <= block < count:
        raise ValueError(f"block {block} must be in {-count}..{count - 1}")
    return block % count
