"""A frozen video transformer. To it a photograph is a rather boring video: nothing moves."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.video import MViT, MViT_V2_S_Weights, mvit_v2_s

from apm.checkpoint import load_tensors

WEIGHTS = MViT_V2_S_Weights.KINETICS400_V1
FRAMES = WEIGHTS.meta["min_temporal_size"]


class VideoTeacher(nn.Module):
    """Tokens of a still image after one of the 16 blocks (0..15) of torchvision's MViTv2-S.

    Attributes:
        transforms: the model's own preprocessing: resized to ``transforms.resize_size``, of which
            the central ``transforms.crop_size`` is seen.
    """

    def __init__(self, mvit: MViT, block: int = 0) -> None:
        super().__init__()
        self.transforms = WEIGHTS.transforms()
        self.mvit = mvit.float().eval().requires_grad_(False)
        # What follows the block is not computed.
        self.mvit.blocks = mvit.blocks[: block + 1]
        self.mvit.norm, self.mvit.head = nn.Identity(), nn.Identity()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens of the first frame of a clip in which the image is repeated.

        Args:
            images: ``(B, 3, H, H)`` RGB, uint8 or float in [0, 1].

        Returns:
            ``(B, h, w, F)`` float32, without the class token: 56x56x96 after block 0, 28x28x192
            after block 1, 14x14x384 after block 3, 7x7x768 after the last.
        """
        clips = self.transforms(images[:, None]).expand(-1, -1, FRAMES, -1, -1)
        outputs: list[tuple[Tensor, tuple[int, int, int]]] = []
        with self.mvit.blocks[-1].register_forward_hook(
            lambda block, inputs, output: outputs.append(output)
        ):
            self.mvit(clips)  # (B, 3, 16, 224, 224)
        tokens, grid = outputs[0]  # (B, 1 + t*h*w, F), (t, h, w)
        return tokens[:, 1:].unflatten(1, grid)[:, 0].float()


def load_video_teacher(
    weights: str | Path | None = None, *, random_weights: bool = False, block: int = 0
) -> VideoTeacher:
    """MViTv2-S with its Kinetics-400 weights.

    Args:
        weights: a state dict in torchvision's format; default torchvision's own download.
        random_weights: leave the weights as they are drawn.
        block: the block whose tokens are taken, negative from the end.

    Raises:
        FileNotFoundError: if ``weights`` does not exist.
        ValueError: if there is no such block, or the weights do not fit or cannot be had.
    """
    with torch.device("cpu" if random_weights else "meta"):  # meta: nothing is drawn in vain
        mvit = mvit_v2_s()
    blocks = len(mvit.blocks)
    if not -blocks <= block < blocks:  # before a download
        raise ValueError(f"block {block} must be in {-blocks}..{blocks - 1}")
    if not random_weights:
        _load_weights(mvit, weights)
    return VideoTeacher(mvit, block % blocks)


def _load_weights(mvit: MViT, path: str | Path | None) -> None:
    if path is None:
        try:
            state = WEIGHTS.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # connections, interrupted downloads, damaged caches
            raise ValueError(
                f"weights of mvit_v2_s could not be downloaded ({type(error).__name__}); name a "
                "local file with --teacher-weights, or see --random-weights"
            ) from error
    else:
        state = load_tensors(path)
    try:
        mvit.load_state_dict(state, assign=True)
        if not all(parameter.isfinite().all() for parameter in mvit.parameters()):
            raise ValueError("it holds numbers that are not finite")
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path or WEIGHTS.url}: not weights of torchvision's mvit_v2_s ({reason})"
        ) from error
