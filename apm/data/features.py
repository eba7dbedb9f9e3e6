"""Teacher features on disk: sharded and memory-mapped, or the released one ``.npy`` an image.

A store is a folder with ``store.json``, which says how its features were made, and shards: shard i
holds the features of images ``64 i .. 64 i + 63`` of the sorted image list, in one safetensors file
whose header names the images. A shard is whole or absent. Nothing read here can run code.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from apm.runtime.files import atomic_path, keep_settings, listing_sha256, read_array, read_json

META = "store.json"
FORMAT = "apm-features"
SHARD_IMAGES = 64
MAX_ERROR = (1 - 0.999**2) ** 0.5  # relative: an image's cosine to the teacher is at least 0.999


def pack(features: Tensor, dtype: str) -> dict[str, Tensor]:
    """``(N, F)`` float32 as it is stored: float16, or int8 with ``scales`` ``(N,)``."""
    if dtype == "float16":
        return {"features": features.half()}
    scales = features.abs().amax(dim=1) / 127
    steps = features / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return {"features": steps.round().to(torch.int8), "scales": scales}


def unpack(packed: Mapping[str, Tensor]) -> Tensor:
    """What ``pack`` was given, rounded: ``(N, F)`` float32."""
    features = packed["features"].float()
    return features * packed["scales"][:, None] if "scales" in packed else features


class StoreWriter:
    """Makes a store, or goes on with one, shard by shard; one of other settings is refused.

    ``meta`` says how features are made, ``grid_size``, ``feature_dim`` and ``store_dtype`` among
    it; ``sizes`` are the names of all images and their sizes in bytes.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        self.sizes, names = sizes, sorted(sizes)
        images = {"images": len(sizes), "images_sha256": listing_sha256(sizes)}
        self.meta = {"format": FORMAT, **meta, **images}
        keep_settings(folder / META, self.meta)
        self.shards = [names[i : i + SHARD_IMAGES] for i in range(0, len(names), SHARD_IMAGES)]
        self.paths = [folder / f"{index:06d}.safetensors" for index in range(len(self.shards))]

    def is_done(self, index: int, verify: bool = False) -> bool:
        """Whether a shard is there; a ``ValueError`` if it is damaged, or its checksum differs."""
        path = self.paths[index]
        if not path.is_file():
            return False
        header, tensors = _open_shard(path, self.meta)
        if sorted([*header["images"], *header["skipped"]]) != self.shards[index]:
            raise ValueError(f"{path}: holds other images; extract again")
        if verify and header.get("sha256") != _sha256(tensors):
            raise ValueError(f"{path}: damaged (its checksum differs); extract again")
        return True

    def write(self, index: int, features: Mapping[str, Tensor], skipped: Mapping[str, str]) -> None:
        """Write a shard; features that are not finite, or of a cosine below 0.999, are refused.

        ``features`` are ``(N, F)`` float32 by image name, on any device; ``skipped`` says why the
        shard's other images could not be read.
        """
        dtype, layout = self.meta["store_dtype"], _layout(self.meta, len(features))
        tensors = {part: torch.empty(shape, dtype=kind) for part, (kind, shape) in layout.items()}
        for row, (name, image) in enumerate(features.items()):
            packed = pack(image, dtype)
            if not (unpack(packed) - image).norm() <= MAX_ERROR * image.norm():  # false for NaN too
                hint = "use --store-dtype float16" if dtype == "int8" else "use --dtype float32"
                raise ValueError(f"{name}: features not finite or too uneven for {dtype}; {hint}")
            for part, tensor in tensors.items():
                tensor[row] = packed[part]
        images = {name: self.sizes[name] for name in features}
        header = {"images": images, "skipped": dict(skipped), "sha256": _sha256(tensors)}
        content = save(tensors, {"shard": json.dumps(header)})
        try:
            with atomic_path(self.paths[index]) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            done = f"{sum(map(Path.is_file, self.paths))} of {len(self.paths)} shards"
            raise OSError(f"{error}; {done} done: run the same command again") from error


class FeatureStore:
    """Teacher features in shards. Other processes are sent its folder, and map the files anew."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = read_json(self.folder / META)
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"{self.folder / META}: expected the settings of a feature store")
        self.sizes: dict[str, int] = {}  # of the images' files, in bytes
        self.skipped: dict[str, str] = {}  # images that could not be read, and why
        self._rows: dict[str, tuple[dict[str, Tensor], int]] = {}
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):  # not those half-written
            header, tensors = _open_shard(path, self.meta)
            self.sizes |= header["images"]
            self.skipped |= header["skipped"]
            self._rows |= {name: (tensors, row) for row, name in enumerate(header["images"])}
        found, wanted = len(self.sizes) + len(self.skipped), self.meta.get("images")
        if found != wanted:
            raise ValueError(
                f"{folder}: holds {found} of {wanted!s:.300} images; extract the rest first"
            )

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return FeatureStore, (self.folder,)

    def read(self, name: str) -> Tensor:
        """``(N, F)`` float32."""
        tensors, row = self._rows[name]
        return unpack({part: tensor[row] for part, tensor in tensors.items()})


class NpyStore:
    """The released layout, read only: a ``.npy`` of ``(N, F)`` floats an image, sizes unknown."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        paths = self.folder.rglob("[!.]*.npy")  # not those half-written
        names = sorted(path.relative_to(folder).as_posix().removesuffix(".npy") for path in paths)
        if not names:
            raise FileNotFoundError(f"{folder}: no features; run 1_extract_coco_features.py")
        self.sizes: dict[str, int | None] = dict.fromkeys(names)
        shape = read_array(self.folder / f"{names[0]}.npy", mmap_mode="r").shape or (0,)
        self.meta = {"grid_size": math.isqrt(shape[0]), "feature_dim": shape[-1]}
        self.read(names[0])

    def read(self, name: str) -> Tensor:
        """``(N, F)`` float32; an image unlike the first is refused."""
        path = self.folder / f"{name}.npy"
        features = read_array(path)
        expected = (self.meta["grid_size"] ** 2, self.meta["feature_dim"])
        if features.dtype.kind != "f" or features.shape != expected or not features.size:
            raise ValueError(
                f"{path}: holds {features.dtype} of shape {features.shape}, expected floats of "
                f"{expected}: one row a patch of a square, without CLS and register tokens"
            )
        return torch.from_numpy(features.astype(np.float32))


def open_store(folder: str | Path) -> FeatureStore | NpyStore:
    """A store of either layout."""
    return FeatureStore(folder) if Path(folder, META).is_file() else NpyStore(folder)


def _layout(meta: Mapping[str, Any], images: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors in a shard."""
    dtype = getattr(torch, meta["store_dtype"])
    shape = (images, meta["grid_size"] ** 2, meta["feature_dim"])
    scales = {"scales": (torch.float32, shape[:2])} if dtype == torch.int8 else {}
    return {"features": (dtype, shape), **scales}


def _open_shard(path: Path, meta: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A shard's header, and its tensors, which are mapped and not read."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["shard"])
            tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        header |= {"images": dict(header["images"]), "skipped": dict(header["skipped"])}
        expected = _layout(meta, len(header["images"]))
    except Exception as error:  # whatever a damaged header provokes
        raise ValueError(f"{path}: damaged ({error!r:.300}); extract again") from error
    layout = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
    if layout != expected:
        raise ValueError(
            f"{path}: holds {layout!s:.300}, expected {expected!s:.300}; extract again"
        )
    return header, tensors


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    content = b"".join(tensors[part].numpy().tobytes() for part in sorted(tensors))
    return hashlib.sha256(content).hexdigest()
