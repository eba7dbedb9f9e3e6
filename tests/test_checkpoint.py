import pickle
import zipfile

import pytest
import torch
from conftest import make_model
from reference import coco, tta

from apm import load_model, save_model
from apm.checkpoint import from_released
from apm.distill import start_at_mean


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=0, rtol=0)


def test_round_trip(tmp_path, model):
    model.provenance = {"teacher": {"name": "a teacher"}, "epochs": 3}
    save_model(tmp_path / "model.pth", model)
    loaded = load_model(tmp_path / "model.pth")
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    assert loaded.provenance == model.provenance
    assert not loaded.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model = make_model(trunk_widths=(256, 256))
    save_model(tmp_path / "single.pth", model)
    save_model(tmp_path / "half.pth", model, dtype=torch.float16)
    sizes = [(tmp_path / f"{name}.pth").stat().st_size for name in ("half", "single")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = load_model(tmp_path / "half.pth")
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


def wrong_files(tmp_path, model):
    save_model(tmp_path / "good.pth", model)
    good = torch.load(tmp_path / "good.pth", weights_only=True)
    yield "text", b"not a checkpoint at all"
    yield "empty", b""
    yield "truncated", (tmp_path / "good.pth").read_bytes()[:-2000]
    yield "pickle", pickle.dumps(Bomb(str(tmp_path / "bang")))
    yield "torch pickle", {"format": "apm-checkpoint", "weights": Bomb(str(tmp_path / "bang"))}
    yield "another dictionary", {"weights": {}}
    yield "a list", [1, 2, 3]
    yield "no weights", {key: value for key, value in good.items() if key != "weights"}
    missing = {key: value for key, value in good["weights"].items() if key != "fold.bias"}
    yield "fold.bias", good | {"weights": missing}
    yield "fold.bias", good | {"weights": good["weights"] | {"fold.bias": torch.zeros(7)}}
    yield "surplus", good | {"weights": good["weights"] | {"surplus": torch.zeros(1)}}
    yield "not a tensor", good | {"weights": good["weights"] | {"fold.bias": 3}}
    yield "bad config", good | {"config": good["config"] | {"trunk_widths": [-5]}}
    yield "unknown config", good | {"config": good["config"] | {"colour": 1}}
    yield "huge config", good | {"config": good["config"] | {"trunk_widths": [10**9, 10**9]}}
    yield "bad preprocessing", good | {"preprocessing": {"scaling": "wild"}}
    released = coco().state_dict()
    yield "fc3", {key: value for key, value in released.items() if key != "fc3.weight"}
    yield "fc9", released | {"fc9.weight": torch.zeros(1)}
    yield "fc1", released | {"fc1.weight": torch.zeros(4096, 7)}
    yield "fc1", released | {"fc1.weight": 3}
    for state, name in (
        (released, "fc1.weight"),
        (released, "rgb_head_1.weight"),
        (tta().state_dict(), "feat_proj_head.weight"),
    ):
        for shape in ((), (4,)):
            yield name, state | {name: torch.zeros(shape)}


def test_wrong_files_are_refused_in_one_line_and_nothing_runs(tmp_path, model):
    for name, content in wrong_files(tmp_path, model):
        path = tmp_path / "wrong.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=r"wrong\.pth: not a checkpoint") as error:
            load_model(path)
        assert len(str(error.value)) < 1000, name
        assert not (tmp_path / "bang").exists(), name


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_model(tmp_path / "nothing.pth")


def test_from_released_keeps_every_number():
    for build in (coco, tta):
        state = build().state_dict()
        translated = from_released(state)
        assert sum(t.numel() for t in translated.values()) == sum(t.numel() for t in state.values())


def test_a_failed_save_leaves_nothing(tmp_path, model):
    model.provenance = {"unpicklable": lambda: 0}
    with pytest.raises(Exception, match=r".+"):
        save_model(tmp_path / "model.pth", model)
    assert list(tmp_path.iterdir()) == []


def test_torch_files_of_the_old_format_load_and_archives_behind_them_change_nothing(
    tmp_path, model
):
    save_model(tmp_path / "new.pth", model)
    content = torch.load(tmp_path / "new.pth")
    old = tmp_path / "old.pth"
    torch.save(content, old, _use_new_zipfile_serialization=False)
    for name, tensor in load_model(old).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    hidden = b"\x80\x04c__builtin__\nbytearray\nJ\x00\xe1\xf5\x05\x85R."  # 100 MB
    old.write_bytes(hidden + (tmp_path / "empty.zip").read_bytes())
    with pytest.raises(ValueError, match="bytearray"):
        load_model(old)


def test_terms_that_nearly_cancel_are_saved_in_full_precision(tmp_path):
    model = make_model(rgb_widths=(20, 8), position_dim=128)
    start_at_mean(model, torch.zeros(16))
    save_model(tmp_path / "half.pth", model, dtype=torch.float16)
    images = torch.rand(1, 3, 56, 56)
    answers = load_model(tmp_path / "half.pth").query(model.encode(images))[1]
    torch.testing.assert_close(answers, model.query(model.encode(images))[1], atol=3e-3, rtol=0)
