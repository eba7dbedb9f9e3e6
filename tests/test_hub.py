import sys

import pytest
import torch
from conftest import ROOT, load_script
from reference import coco, tta
from test_architecture import LIBRARY, imports

from apm import APM, load_model

CHECKPOINT = ROOT / "checkpoints" / "apm_small.safetensors"


def load(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


def assert_same(model, other):
    assert type(model) is APM and not model.training
    assert model.config == other.config and model.preprocessing == other.preprocessing
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=0, rtol=0)


def test_the_bundled_model():
    assert_same(load("apm_small"), load_model(CHECKPOINT))


@pytest.mark.parametrize("build", [coco, tta])
def test_a_released_model(tmp_path, build):
    torch.manual_seed(0)
    path = tmp_path / "model_15.pth"
    torch.save(build().state_dict(), path)
    assert_same(load("apm_released", checkpoint=str(path)), load_model(path))


def test_only_models_are_entry_points():
    hub = load_script("hubconf.py")  # torch.hub.list, which asks GitHub, takes what can be called
    found = {name for name in dir(hub) if callable(getattr(hub, name)) and name[0] != "_"}
    assert found == {"apm_small", "apm_released"}


def test_dependencies_are_what_loading_a_model_imports():
    seen, left, outside = set(), {"apm"}, set()
    while left:
        seen |= (now := left)
        found = set().union(*(imports(LIBRARY[name]) for name in now))
        left = (found & LIBRARY.keys()) - seen
        outside |= {name.partition(".")[0] for name in found - LIBRARY.keys()}
    dependencies = load_script("hubconf.py").dependencies
    assert outside - sys.stdlib_module_names - {"apm"} == set(dependencies)
