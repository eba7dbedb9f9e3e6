"""A frozen video transformer: torchvision's MViTv2-S on a picture that is repeated to a clip."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.video import MViT, MViT_V2_S_Weights, mvit_v2_s

from apm.checkpoint import fit_weights, load_tensors
from apm.teachers import WAY_OUT, block_index, refusing

KINETICS = MViT_V2_S_Weights.KINETICS400_V1


class VideoTeacher(nn.Module):
    """Tokens of a still image after one of the 16 blocks (0..15) of torchvision's MViTv2-S.

    Attributes:
        block: the number of that block.
        transforms: the model's own preprocessing: resized to ``transforms.resize_size``, of which
            the central ``transforms.crop_size`` is seen.
    """

    def __init__(self, mvit: MViT, block: int = 0) -> None:
        super().__init__()
        self.block, self.transforms = block, KINETICS.transforms()
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
        frames = KINETICS.meta["min_temporal_size"]
        clips = self.transforms(images[:, None]).expand(-1, -1, frames, -1, -1)
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
    """
    with torch.device("cpu" if random_weights else "meta"):  # meta: nothing is drawn in vain
        mvit = mvit_v2_s()
    block = block_index(block, mvit.blocks)  # before a download
    if not random_weights:
        with refusing(
            f"weights of mvit_v2_s could not be downloaded; {WAY_OUT}, or see --random-weights"
        ):
            state = load_tensors(weights) if weights else KINETICS.get_state_dict(check_hash=True)
        with refusing(f"{weights or KINETICS.url}: not weights of torchvision's mvit_v2_s"):
            fit_weights(mvit, state)
    return VideoTeacher(mvit, block)
