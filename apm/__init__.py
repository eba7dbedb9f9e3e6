"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024)."""

from apm.runtime.files import use_writable_caches

use_writable_caches()  # before libraries look for theirs

from apm.checkpoint import load_model, save_model  # noqa: E402
from apm.config import APMConfig  # noqa: E402
from apm.model import APM  # noqa: E402

__all__ = ["APM", "APMConfig", "load_model", "save_model"]
