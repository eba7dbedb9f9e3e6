import dataclasses
import json
import pickle

import pytest
import torch
from conftest import make_model
from reference import coco, tta
from safetensors import safe_open
from safetensors.torch import save

from apm import load_model, save_model
from apm.checkpoint import from_released


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=0, rtol=0)


def test_round_trip(tmp_path, model):
    model.provenance = {"teacher": {"name": "a teacher"}, "epochs": 3}
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors")
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    assert loaded.provenance == model.provenance
    assert not loaded.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model = make_model(trunk_widths=(256, 256))
    save_model(tmp_path / "single.safetensors", model)
    save_model(tmp_path / "half.safetensors", model, dtype=torch.float16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "single")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = load_model(tmp_path / "half.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build", [coco, tta])
def test_a_released_state_dict_loads_by_its_path(tmp_path, build):
    torch.manual_seed(0)
    reference = build().eval()
    torch.save(reference.state_dict(), tmp_path / "released.pth")
    model = load_model(tmp_path / "released.pth")
    images = torch.rand(1, 3, 448, 448)
    with torch.inference_mode():
        for answer, expected in zip(model(images), reference(images), strict=True):
            torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    if build is coco:
        assert model.preprocessing.channels == "BGR"
        assert model.preprocessing.scaling == "min-max"
        assert model.preprocessing.fit == "stretch"
    else:
        assert model.config.pooling == "attention"
        assert model.preprocessing.scaling == "imagenet"


class Bomb:
    """Its pickle writes a file when it is loaded by an unsafe reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def changed(path, header=(), weights=(), without=()):
    """The bytes of a checkpoint with other parts in its header, other weights, or without some."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["apm"]) | dict(header)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors |= dict(weights)
    content = {name: value for name, value in content.items() if name not in without}
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    return save(kept, {"apm": json.dumps(content)})


def wrong_files(tmp_path, model):
    """What the reason must name, and a file's content."""
    good = tmp_path / "good.safetensors"
    save_model(good, model)
    config = dataclasses.asdict(model.config)
    yield "", b"not a checkpoint at all"
    yield "", b""
    yield "", good.read_bytes()[:-2000]
    yield "", (2**40).to_bytes(8, "little") + b"{" + bytes(100)
    yield "apm", save({"fold.bias": torch.zeros(1)})
    yield "", pickle.dumps(Bomb(str(tmp_path / "bang")))
    yield "", {"fc1.weight": Bomb(str(tmp_path / "bang"))}
    yield "fc1.weight", {"weights": {}}
    yield "", [1, 2, 3]
    yield "config", changed(good, without=("config",))
    yield "fold.bias", changed(good, without=("fold.bias",))
    yield "fold.bias", changed(good, weights={"fold.bias": torch.zeros(7)})
    yield "fold.bias", changed(good, weights={"fold.bias": torch.full((1,), torch.nan)})
    yield "fold.bias", changed(good, weights={"fold.bias": torch.zeros(1, dtype=torch.int32)})
    yield "surplus", changed(good, weights={"surplus": torch.zeros(1)})
    yield "-5", changed(good, {"config": config | {"trunk_widths": [-5]}})
    yield "colour", changed(good, {"config": config | {"colour": 1}})
    yield "1000000000", changed(good, {"config": config | {"trunk_widths": [10**9, 10**9]}})
    yield "wild", changed(good, {"preprocessing": {"scaling": "wild", "image_size": 56}})
    yield "448 px", changed(good, {"preprocessing": {}})
    released = coco().state_dict()
    yield "fc3", {key: value for key, value in released.items() if key != "fc3.weight"}
    yield "fc9", released | {"fc9.weight": torch.zeros(1)}
    yield "trunk_first", released | {"fc1.weight": torch.zeros(4096, 2050)}
    for state, name in ((released, "fc1.weight"), (released, "rgb_head_1.weight")):
        yield "", state | {name: torch.zeros(())}
        yield "", state | {name: torch.zeros(4)}
        yield "", state | {name: 3}
    yield "feature_dim", tta().state_dict() | {"feat_proj_head.weight": torch.zeros(4)}


def test_wrong_files_are_refused_in_one_line_and_nothing_runs(tmp_path, model):
    for named, content in wrong_files(tmp_path, model):
        path = tmp_path / "wrong.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=r"wrong\.pth: not a checkpoint") as error:
            load_model(path)
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
        assert named in str(error.value)
        assert not (tmp_path / "bang").exists(), named


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_model(tmp_path / "nothing.pth")


def test_from_released_keeps_every_number():
    for build in (coco, tta):
        state = build().state_dict()
        translated = from_released(state)
        assert sum(t.numel() for t in translated.values()) == sum(t.numel() for t in state.values())


def test_a_failed_save_leaves_nothing(tmp_path, model):
    model.provenance = {"no JSON": lambda: 0}
    with pytest.raises(Exception, match=r".+"):
        save_model(tmp_path / "model.safetensors", model)
    assert list(tmp_path.iterdir()) == []
