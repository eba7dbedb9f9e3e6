"""What a student learns from: the teacher's features and the image's colours (paper, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def feature_loss(answers: Tensor, targets: Tensor) -> Tensor:
    """The paper's loss: mean squared error of ``(..., F)`` answers and teacher features."""
    return F.mse_loss(answers, targets)


def standardised_feature_loss(
    answers: Tensor, targets: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """Squared error plus cosine distance of features whose channels weigh alike.

    Args:
        answers, targets: ``(..., F)``.
        mean, std: ``(F,)``, of the teacher's features.
    """
    answers, targets = (answers - mean) / std, (targets - mean) / std
    cosine = F.cosine_similarity(answers, targets, dim=-1).mean()
    return F.mse_loss(answers, targets) + 1 - cosine


def rgb_targets(images: Tensor, patch_size: int) -> Tensor:
    """The colour of each location, the mean of its patch: ``(B, 3, H, W)`` -> ``(B, N, 3)``."""
    return F.avg_pool2d(images, patch_size).flatten(2).transpose(1, 2)
