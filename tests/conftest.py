import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apm import APM, APMConfig, layers, save_model
from apm.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tests", "misc_scripts", "misc_scripts/bundled", "single_token_segmentation")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
torch.set_num_threads(1)  # two workers share two cores
layers.FEW = 8  # the whole grid of a tiny model is many, as that of a real one is

# What scripts keep in the user's cache is no business of the tests, nor theirs of the user.
CACHE = tempfile.mkdtemp(prefix="apm-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

TINY = {
    "image_size": 56,
    "trunk_widths": (32, 24),
    "feature_dim": 16,
    "rgb_widths": (16,),
    "position_dim": 32,
}


def make_model(**changes) -> APM:
    """A model with random weights on a 4 x 4 grid."""
    torch.manual_seed(0)
    model = APM(APMConfig(**TINY | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("local_null", "widen.weight")):  # which start at zero
            torch.nn.init.normal_(parameter)
    model.preprocessing = Preprocessing(image_size=56)
    return model


@pytest.fixture
def model() -> APM:
    return make_model(local_width=8, local_blocks=(1, 1))


@pytest.fixture
def checkpoint(tmp_path, model) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_model(path, model)
    return path


def photograph(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth random colours with a bright square in the middle."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 240, 20), (width // 3, height // 3, width // 2, height // 2))
    return image


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder of three pictures."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        photograph(seed=index).save(folder / f"p{index}.png")
    return folder


def load_script(relative: str):
    """Import a script of the repository by its path, whatever its name."""
    path = ROOT / relative
    spec = importlib.util.spec_from_file_location(path.stem.replace("1_", ""), path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as when the script is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def save_tiny_clip(path: Path) -> Path:
    """A CLIP with random weights in the format that clip.load reads."""
    from clip.model import CLIP

    torch.manual_seed(0)
    clip = CLIP(
        embed_dim=64,
        image_resolution=32,
        vision_layers=2,
        vision_width=64,
        vision_patch_size=8,
        context_length=77,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    torch.save(clip.state_dict(), path)
    return path


def refused(main, arguments) -> bool:
    """Whether argparse refuses the arguments."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code == 2


def help_of(main, capsys) -> str:
    """What ``--help`` prints, in one line."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    return " ".join(capsys.readouterr().out.split())
