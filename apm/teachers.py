"""Frozen teachers. The only place that normalises for a teacher and slices its tokens."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

DEFAULT_TEACHER = "vit_large_patch14_reg4_dinov2.lvd142m"


class DenseTeacher(nn.Module):
    """Patch tokens of a frozen ViT on the student's grid (section 2 of the paper: DINOv2).

    The image is scaled so that one token stands for one location. With a ``margin`` it is first
    continued by that many patches on each side, mirrored, and the tokens of the margin are
    dropped: tokens at a ViT's border, above all in the corners, are often outliers.

    Attributes:
        feature_dim: width of the patch tokens.
    """

    def __init__(
        self, vit: VisionTransformer, *, grid_size: int = 32, block: int = -1, margin: int = 0
    ) -> None:
        super().__init__()
        blocks = len(vit.blocks)
        if not -blocks <= block < blocks:
            raise ValueError(f"teacher block {block} must be in {-blocks}..{blocks - 1}")
        self.vit = vit.eval().requires_grad_(False)
        self.grid_size, self.margin = grid_size, margin
        self.block = block % blocks
        self.feature_dim = vit.num_features
        self.register_buffer("mean", _as_image(vit.pretrained_cfg["mean"]), persistent=False)
        self.register_buffer("std", _as_image(vit.pretrained_cfg["std"]), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Dense features of the images.

        Args:
            images: ``(B, 3, H, H)`` float, RGB in [0, 1], any ``H``.

        Returns:
            ``(B, grid_size**2, feature_dim)`` float32, row by row, after the ViT's final norm.
        """
        patch = self.vit.patch_embed.patch_size[0]
        side, border = self.grid_size * patch, self.margin * patch
        if images.shape[-1] != side:
            images = F.interpolate(
                images, (side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        images = F.pad((images - self.mean) / self.std, (border,) * 4, mode="reflect")
        tokens = self.vit.forward_intermediates(
            images,
            indices=[self.block],
            norm=True,
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
        )[0]  # (B, F, grid + 2 margin, grid + 2 margin), without CLS and register tokens
        inner = slice(self.margin, self.margin + self.grid_size)
        return tokens[:, :, inner, inner].flatten(2).transpose(1, 2).float()


def load_dense_teacher(
    name: str,
    weights: str | Path | None = None,
    *,
    grid_size: int = 32,
    block: int = -1,
    margin: int = 0,
) -> DenseTeacher:
    """Any plain ViT of timm as a dense teacher.

    Args:
        name: timm's model name, e.g. ``vit_large_patch14_reg4_dinov2.lvd142m``.
        weights: a state dict in timm's or the original authors' format (``.pth``,
            ``.safetensors``); default timm's own download.
        block: the transformer block whose tokens are taken, negative from the end.
        margin: patches by which the image is continued on each side.

    Raises:
        FileNotFoundError: if ``weights`` does not exist.
        ValueError: if the name is no ViT of timm, the weights do not fit it or cannot be had.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"teacher {name!r} is not a model of timm {timm.__version__}")
    patch_size = _patch_size(name)
    try:
        vit = timm.create_model(
            name, pretrained=weights is None, img_size=(grid_size + 2 * margin) * patch_size
        )
    except Exception as error:  # timm's hub clients raise a dozen unrelated types
        raise ValueError(
            f"teacher {name!r}: its weights could not be downloaded ({type(error).__name__}); "
            "name a local file with --teacher-weights"
        ) from error
    if weights is not None:
        _load_weights(vit, name, Path(weights))
    return DenseTeacher(vit, grid_size=grid_size, block=block, margin=margin)


def _patch_size(name: str) -> int:
    with torch.device("meta"):
        vit = timm.create_model(name)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"teacher {name!r} is a {type(vit).__name__}, expected a plain ViT of timm"
        )
    return vit.patch_embed.patch_size[0]


def _load_weights(vit: VisionTransformer, name: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such teacher weights file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        vit.load_state_dict(checkpoint_filter_fn(state, vit))
    except Exception as error:  # whatever an untrusted file provokes in the readers
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not weights of teacher {name!r} ({reason})") from error


def _as_image(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
