"""Teacher features on disk: sharded and memory-mapped, or the released one ``.npy`` an image.

A store is a folder with ``store.json``, which says how its features were made, and shards: shard i
holds the features of images ``64 i .. 64 i + 63`` of the sorted image list, in one safetensors file
whose header names the images. A shard is whole or absent. Nothing read here can run code.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from apm.runtime.files import atomic_path, file_sha256, listing_sha256, read_array, read_json

if TYPE_CHECKING:
    from apm.teachers import DenseTeacher

META = "store.json"
FORMAT = "apm-features"
SHARD_IMAGES = 64
STORE_DTYPES = ("int8", "float16")
_HEADER_DTYPES = {"int8": "I8", "float16": "F16"}
# An image's features are stored with a relative error of at most this, so that their cosine to the
# teacher's is at least 0.999.
MAX_ERROR = (1 - 0.999**2) ** 0.5


class Packed(NamedTuple):
    """Features as they are stored: ``(..., N, F)`` float16, or int8 with scales ``(..., N)``."""

    features: Tensor
    scales: Tensor | None = None

    def unpack(self) -> Tensor:
        """``(..., N, F)`` float32."""
        features = self.features.float()
        return features if self.scales is None else features.mul_(self.scales[..., None])

    def cpu(self) -> "Packed":
        """The same on the CPU."""
        return Packed(self.features.cpu(), None if self.scales is None else self.scales.cpu())


def pack(features: Tensor, dtype: str) -> Packed:
    """Round ``(..., N, F)`` float32 features to ``dtype``; int8 has one scale a token.

    Raises:
        ValueError: if an image's features are not finite, or their cosine would fall below 0.999.
    """
    if dtype == "int8":
        scales = features.abs().amax(dim=-1) / 127
        steps = features / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        packed = Packed(steps.round_().to(torch.int8), scales)
    else:
        packed = Packed(features.half())
    error = (packed.unpack() - features).flatten(-2).norm(dim=-1)
    if not (error <= MAX_ERROR * features.flatten(-2).norm(dim=-1)).all():  # false for NaN too
        way_out = "use --store-dtype float16" if dtype == "int8" else "use --dtype float32"
        raise ValueError(f"features not finite, or too unlike in size for {dtype}: {way_out}")
    return packed


def join(packed: Sequence[Packed]) -> Packed:
    """Features of one image after the other."""
    features, scales = zip(*packed, strict=True)
    return Packed(torch.cat(features), None if scales[0] is None else torch.cat(scales))


def describe_teacher(
    name: str, weights: Path | None, teacher: "DenseTeacher", dtype: str
) -> dict[str, Any]:
    """What decides a teacher's features, as plain values: part of stores and of checkpoints."""
    return {
        "teacher": name,
        "weights_sha256": weights and file_sha256(weights),
        "block": teacher.block,
        "margin": teacher.margin,
        "grid_size": teacher.grid_size,
        "feature_dim": teacher.feature_dim,
        "dtype": dtype,
    }


def file_sizes(images: Mapping[str, Path]) -> dict[str, int]:
    """Each image's size in bytes, by which a store knows its images again; 0 for a dead link."""
    return {name: path.stat().st_size if path.exists() else 0 for name, path in images.items()}


class Shard:
    """One file of features, memory-mapped.

    Attributes:
        images: names of its images, in its order, and their sizes in bytes.
        skipped: images that could not be read, and why.

    Raises:
        ValueError: if the file is damaged or holds features unlike those of ``meta``.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path, self.int8 = path, meta["store_dtype"] == "int8"
        try:
            self.file = safe_open(path, framework="pt")
            header = json.loads((self.file.metadata() or {})["shard"])
            self.images: dict[str, int] = dict(header["images"])
            self.skipped: dict[str, str] = dict(header["skipped"])
            self.sha256 = header["sha256"]
            shapes = {
                name: (part.get_dtype(), part.get_shape())
                for name in self.file.keys()  # noqa: SIM118  (no mapping)
                for part in [self.file.get_slice(name)]
            }
        except Exception as error:  # whatever a stranger's header provokes
            raise ValueError(f"{path}: damaged ({repr(error)[:300]}); extract again") from error
        places = [len(self.images), meta["grid_size"] ** 2]
        expected = {
            "features": (_HEADER_DTYPES[meta["store_dtype"]], [*places, meta["feature_dim"]])
        }
        if self.int8:
            expected["scales"] = ("F32", places)
        if shapes != expected:
            raise ValueError(
                f"{path}: holds {str(shapes)[:300]}, expected {expected}; extract again"
            )

    def view(self, row: int) -> Packed:
        """One image's features, not copied: ``(N, F)``, with scales ``(N,)`` if int8."""
        parts = ("features", "scales") if self.int8 else ("features",)
        return Packed(*(self.file.get_slice(part)[row] for part in parts))

    def verify(self) -> None:
        """Compare the content with its checksum.

        Raises:
            ValueError: if they differ.
        """
        parts = ("features", "scales") if self.int8 else ("features",)
        if _sha256(Packed(*map(self.file.get_tensor, parts))) != self.sha256:
            raise ValueError(f"{self.path}: damaged (its checksum differs); extract again")


class FeatureStore:
    """Teacher features in shards. Cheap to send to other processes, which map the files anew.

    Attributes:
        meta: the content of ``store.json``.
        sizes: names of the images with features, and the sizes in bytes of their files.
        skipped: images that could not be read, and why.

    Raises:
        ValueError: if it is damaged or not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        paths = sorted(self.folder.glob("[0-9]*.safetensors"))  # not those half-written
        shards = [Shard(path, self.meta) for path in paths]
        self._rows = {name: (s, row) for s in shards for row, name in enumerate(s.images)}
        self.sizes = {name: size for s in shards for name, size in s.images.items()}
        self.skipped = {name: reason for s in shards for name, reason in s.skipped.items()}
        found, wanted = len(self.sizes) + len(self.skipped), self.meta["images"]
        if found != wanted:
            raise ValueError(
                f"{self.folder}: holds {found} of {wanted} images; give the command again that "
                "extracts them"
            )

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return FeatureStore, (self.folder,)

    def view(self, name: str) -> Packed:
        """An image's features as they are stored, not copied."""
        shard, row = self._rows[name]
        return shard.view(row)

    def read(self, name: str) -> Tensor:
        """``(N, F)`` float32."""
        return self.view(name).unpack()


class NpyStore:
    """The released layout, read only: one ``.npy`` of ``(N, F)`` floats for each image.

    Attributes:
        meta: the content of ``store.json`` where there is one; else what the first file shows.
        sizes: names of the images with features; no sizes are known.
        skipped: empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        names = sorted(
            path.relative_to(self.folder).as_posix().removesuffix(".npy")
            for path in self.folder.rglob("[!.]*.npy")  # not those half-written
        )
        if not names:
            raise FileNotFoundError(
                f"{self.folder}: no features; make them with 1_extract_coco_features.py"
            )
        self.sizes: dict[str, int | None] = dict.fromkeys(names)
        self.skipped: dict[str, str] = {}
        if (self.folder / META).is_file():
            self.meta = _read_meta(self.folder)
        else:
            first = read_array(self._path(names[0]), mmap_mode="r")
            side = round(first.shape[0] ** 0.5) if first.ndim == 2 else 0
            self.meta = {"grid_size": side, "feature_dim": first.shape[-1] if side else 0}
            self.view(names[0])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def view(self, name: str) -> np.ndarray:
        """An image's features as they are stored, memory-mapped.

        Raises:
            ValueError: if the file holds no floats, or not a square grid of the store's size.
        """
        features = read_array(self._path(name), mmap_mode="r")
        side, width = self.meta["grid_size"], self.meta["feature_dim"]
        if features.dtype.kind != "f" or not side or features.shape != (side**2, width):
            raise ValueError(
                f"{self._path(name)}: holds {features.dtype} of shape {features.shape}, expected "
                f"floats, ({side}^2, {width}): one row a patch, without CLS and register tokens"
            )
        return features

    def read(self, name: str) -> Tensor:
        """``(N, F)`` float32."""
        return torch.from_numpy(self.view(name).astype(np.float32))


def open_store(folder: str | Path) -> FeatureStore | NpyStore:
    """A store of either layout.

    Raises:
        FileNotFoundError: if the folder holds no features.
        ValueError: if the store is damaged.
    """
    meta = Path(folder) / META
    is_ours = meta.is_file() and _read_meta(meta.parent).get("format") == FORMAT
    return FeatureStore(folder) if is_ours else NpyStore(folder)


class StoreWriter:
    """Makes a store, or goes on with one that was made in the same way, shard by shard.

    Args:
        folder: of the store.
        meta: how the features are made (``describe_teacher``) and ``store_dtype``.
        sizes: names of all images and their sizes in bytes.

    Raises:
        ValueError: if the folder holds features made in another way or of other images.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        self.folder, self.sizes = folder, dict(sorted(sizes.items()))
        self.meta = {
            "format": FORMAT,
            **meta,
            "images": len(sizes),
            "images_sha256": listing_sha256(self.sizes),
        }
        if (folder / META).is_file():
            self._compare(_read_meta(folder))
        else:
            with atomic_path(folder / META) as temporary:
                temporary.write_text(json.dumps(self.meta, indent=2) + "\n")

    def _compare(self, present: Mapping[str, Any]) -> None:
        for key, value in self.meta.items():
            if present.get(key) != value:
                raise ValueError(
                    f"{self.folder}: holds features with {key} {present.get(key)!r}, not "
                    f"{value!r}; choose another --output"
                )

    @functools.cached_property
    def shards(self) -> list[list[str]]:
        """The names of each shard's images."""
        names = list(self.sizes)
        return [names[i : i + SHARD_IMAGES] for i in range(0, len(names), SHARD_IMAGES)]

    @property
    def image_bytes(self) -> int:
        """What an image's features take on disk."""
        width = {"int8": self.meta["feature_dim"] + 4, "float16": 2 * self.meta["feature_dim"]}
        return self.meta["grid_size"] ** 2 * width[self.meta["store_dtype"]]

    def path(self, index: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{index:06d}.safetensors"

    def is_done(self, index: int, verify: bool = False) -> bool:
        """Whether a shard is there and holds its images.

        Args:
            index: of the shard.
            verify: read all of it and compare checksums.

        Raises:
            ValueError: if it is there, but damaged.
        """
        if not self.path(index).is_file():
            return False
        shard = Shard(self.path(index), self.meta)
        if sorted([*shard.images, *shard.skipped]) != self.shards[index]:
            raise ValueError(f"{shard.path}: holds other images; extract again")
        if verify:
            shard.verify()
        return True

    def write(
        self, index: int, names: Sequence[str], packed: Packed, skipped: Mapping[str, str]
    ) -> None:
        """Write a shard: features of the images ``names``, and what could not be read.

        Raises:
            OSError: if the disk is full, saying how to go on.
        """
        header = {
            "images": {name: self.sizes[name] for name in names},
            "skipped": dict(skipped),
            "sha256": _sha256(packed),
        }
        tensors = {"features": packed.features}
        if packed.scales is not None:
            tensors["scales"] = packed.scales
        try:
            with atomic_path(self.path(index)) as temporary:
                temporary.write_bytes(save(tensors, {"shard": json.dumps(header)}))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = sum(self.path(other).is_file() for other in range(len(self.shards)))
            size = SHARD_IMAGES * self.image_bytes / 1e6
            raise OSError(
                f"{self.folder}: disk full after {done} of {len(self.shards)} shards of "
                f"{size:.1f} MB; make space and run the same command again"
            ) from error


def _sha256(packed: Packed) -> str:
    digest = hashlib.sha256()
    for part in packed:
        if part is not None:
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    """The content of ``store.json``, checked.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = folder / META
    try:
        meta = read_json(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: not found; make features with 1_extract_coco_features.py"
        ) from error
    sides = [meta.get("grid_size"), meta.get("feature_dim")]
    sound = all(type(side) is int and side > 0 for side in sides)
    sound &= meta.get("format", FORMAT) == FORMAT
    sound &= meta.get("store_dtype", "int8") in STORE_DTYPES
    if "format" in meta:
        sound &= "store_dtype" in meta and type(meta.get("images")) is int
    if not sound:
        raise ValueError(f"{path}: says nothing that a feature store can be read by")
    return meta
