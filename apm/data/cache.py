"""Tensors computed once and kept, each beside the description of what it is."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apm.runtime.files import atomic_path, file_sha256, read_array, read_json

logger = logging.getLogger(__name__)


def cached(folder: Path, key: Mapping[str, Any], build: Callable[[], Tensor]) -> Tensor:
    """The tensor that ``key`` describes, from ``folder`` if it is there whole, else built.

    A cache entry is an ``.npy`` file and a ``.json`` with its key and SHA-256. A missing, damaged
    or differing entry is built again. What is not finite failed, and is not kept.

    Args:
        key: plain values; everything that the tensor depends on.
        build: returns a float32 tensor on any device.

    Returns:
        The tensor on the CPU.
    """
    text = json.dumps(key, sort_keys=True)
    data = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    record = data.with_suffix(".json")
    if data.exists() and record.exists():
        try:
            kept = read_json(record)
            if kept["key"] == json.loads(text) and kept["sha256"] == file_sha256(data):
                return torch.from_numpy(read_array(data))
            logger.warning("%s: damaged, built again", data)
        except (ValueError, KeyError, TypeError, OSError):
            logger.warning("%s: unreadable, built again", record)
    tensor = build().float().cpu()
    if not tensor.isfinite().all():
        return tensor
    with atomic_path(data) as temporary:
        np.save(temporary, tensor.numpy())
    with atomic_path(record) as temporary:
        content = {"key": key, "sha256": file_sha256(data)}
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    return tensor
