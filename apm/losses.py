"""What a student learns from: the teacher's features and the image's colours (paper, section 3).

A feature loss takes answers and targets ``(B, N, F)``, and the ``(F,)`` mean and standard deviation
of the teacher's features.
"""

import torch.nn.functional as F
from torch import Tensor

from apm.choices import FEATURE_LOSSES

RELATION_WEIGHT = 30.0


def mse_loss(answers: Tensor, targets: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The paper's: mean squared error of answers and teacher features."""
    return F.mse_loss(answers, targets)


def standardised_loss(answers: Tensor, targets: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared error plus cosine distance of features whose channels have equal weight."""
    answers, targets = (answers - mean) / std, (targets - mean) / std
    cosine = F.cosine_similarity(answers, targets, dim=-1).mean()
    return F.mse_loss(answers, targets) + 1 - cosine


def relational_loss(answers: Tensor, targets: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``standardised_loss`` plus the error of how alike the places of an image are.

    An unsure student answers a mean: its features are shorter than the teacher's, and places differ
    less. The third term, weighted by ``RELATION_WEIGHT``, is the squared error of the cosines
    between all pairs of places, of features centred on each image's mean.
    """
    one, other = (_cosines((features - mean) / std) for features in (answers, targets))
    return standardised_loss(answers, targets, mean, std) + RELATION_WEIGHT * F.mse_loss(one, other)


def _cosines(features: Tensor) -> Tensor:
    """Between all places of an image, centred: ``(B, N, F)`` -> ``(B, N, N)``."""
    features = F.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)
    return features @ features.mT


_FEATURE_LOSSES = (mse_loss, standardised_loss, relational_loss)
FEATURE_LOSS_FUNCTIONS = dict(zip(FEATURE_LOSSES, _FEATURE_LOSSES, strict=True))


def rgb_targets(images: Tensor, patch_size: int) -> Tensor:
    """The colour of each location, the mean of its patch: ``(B, 3, H, W)`` -> ``(B, N, 3)``."""
    return F.avg_pool2d(images, patch_size).flatten(2).transpose(1, 2)
