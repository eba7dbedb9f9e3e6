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


def relational_feature_loss(
    answers: Tensor, targets: Tensor, mean: Tensor, std: Tensor, weight: float = 30.0
) -> Tensor:
    """``standardised_feature_loss`` plus how alike the places of an image are to one another.

    A student answers the mean of what a place may be, so what it can tell least shrinks most. The
    cosines between places, which islands are made of, are learnt as such: each image's features
    are centred, and the squared error of all pairs counts ``weight`` times.

    Args:
        answers, targets: ``(B, N, F)``.
        mean, std: ``(F,)``, of the teacher's features.
    """
    loss = standardised_feature_loss(answers, targets, mean, std)
    return loss + weight * F.mse_loss(_cosines(answers, mean, std), _cosines(targets, mean, std))


def _cosines(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Between all places of an image, standardised and centred: ``(B, N, F)`` -> ``(B, N, N)``."""
    features = (features - mean) / std
    features = F.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)
    return features @ features.mT


def rgb_targets(images: Tensor, patch_size: int) -> Tensor:
    """The colour of each location, the mean of its patch: ``(B, 3, H, W)`` -> ``(B, N, 3)``."""
    return F.avg_pool2d(images, patch_size).flatten(2).transpose(1, 2)
