"""The paper's T_vit: a column that comes from a ViT's CLS token instead of the patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm import APM
from apm.teachers import DenseTeacher


class TokenFold(nn.Module):
    """A fold of a model: a linear map of a frozen ViT's CLS token.

    A checkpoint with such a fold lacks the ViT, and ``load_model`` refuses it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: DenseTeacher, model: APM) -> None:
        super().__init__()
        self.teacher = [teacher]  # in a list: neither trained nor saved
        self.linear = nn.Linear(teacher.feature_dim, model.config.column_dim)
        mean, std = model.preprocessing.statistics()
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, H)``, RGB preprocessed for the model -> ``(B, column_dim)``."""
        teacher = self.teacher[0]
        side = teacher.grid_size * teacher.vit.patch_embed.patch_size[0]
        with torch.no_grad():
            images = images * self.std + self.mean
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            tokens = teacher.vit.forward_features((images - teacher.mean) / teacher.std)
        return self.linear(tokens[:, 0])
