"""Pairs of an image and its teacher's features, and the order in which they are learnt."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from apm.data.features import FeatureStore, NpyStore
from apm.data.images import load_image
from apm.preprocessing import Preprocessing, to_pixels
from apm.runtime.device import generator_at


class TrainingSet(Dataset):
    """Images ``(3, H, W)`` uint8 RGB and their teacher features ``(N, F)`` float16, row by row.

    Without a store the features are empty, for the teacher to make from the image. With
    ``augment``, half of the pictures are cropped to a random square of at least half the side and
    resized to the full size, and half are flipped, features alike. The crop is a function of seed,
    ``epoch`` and index. An image that cannot be read raises ``UnreadableImage``.
    """

    def __init__(
        self,
        images: Mapping[str, Path],
        preprocessing: Preprocessing,
        store: FeatureStore | NpyStore | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.names, self.paths = list(images), list(images.values())
        self.preprocessing, self.store = preprocessing, store
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.preprocessing.picture(load_image(self.paths[index]))
        features = self.store.read(self.names[index]) if self.store else torch.empty(0)
        if not self.augment:
            return to_pixels(picture), features.half()
        random = np.random.default_rng((self.seed % 2**32, self.epoch, index))
        side = min(random.uniform(0.5, 1.5), 1)  # of the crop, as a share of the picture's
        left, top = random.uniform(0, 1 - side, size=2)
        flip = random.random() < 0.5
        box = picture.width * np.array([left, top, left + side, top + side])
        image = to_pixels(picture.resize(picture.size, Image.Resampling.BILINEAR, box=tuple(box)))
        if self.store:
            features = crop_features(features, left, top, side, flip)
        return image.flip(-1) if flip else image, features.half()


def crop_features(
    features: Tensor, left: float, top: float, side: float, flip: bool = False
) -> Tensor:
    """Features of a square crop, sampled from those of the whole picture: ``(N, F)``, row by row.

    ``left``, ``top`` and ``side`` are shares of the picture's side; ``flip`` mirrors left to right.
    """
    grid_size = round(len(features) ** 0.5)
    across = [-side if flip else side, 0, 2 * left + side - 1]
    theta = torch.tensor([across, [0, side, 2 * top + side - 1]], dtype=torch.float32)
    grid = F.affine_grid(theta[None], [1, 1, grid_size, grid_size], align_corners=False)
    maps = features.T.reshape(1, -1, grid_size, grid_size)
    cropped = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return cropped[0].flatten(1).T


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The whole batches of an epoch, in an order that seed and epoch decide."""
    order = torch.randperm(images, generator=generator_at(seed, epoch)).tolist()
    return [order[i : i + batch_size] for i in range(0, images - batch_size + 1, batch_size)]
