"""Damaged files: a clear error that names the file, or a sound result; no code is run."""

import io
import pickle

import pytest
import torch
from conftest import make_model, photograph
from fuzzing import damaged, examples
from hypothesis import given
from hypothesis import strategies as st

from apm import load_model, save_model
from apm.data.class_names import load_templates
from apm.data.images import load_image
from apm.runtime.files import read_json
from apm.runtime.logs import RowLog

ERRORS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that each example writes anew."""
    return tmp_path_factory.mktemp("fuzz") / "file"


class Bang:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return open, ("bang", "w")


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_model(path, make_model(local_width=8))
    return [path.read_bytes(), saved({"fc1.weight": torch.zeros(4, 4)})]


@examples(200)
@given(data=st.data())
def test_damaged_checkpoints(path, checkpoints, data):
    path.write_bytes(data.draw(damaged(checkpoints)))
    try:
        model = load_model(path)
    except ERRORS as error:
        assert str(path) in str(error) and len(str(error)) < 1000 + len(str(path))
    else:  # a byte that does not matter, or one of a weight
        assert all(weight.isfinite().all() for weight in model.state_dict().values())


@examples(60)
@given(
    content=damaged(
        [
            pickle.dumps(Bang(), 2),
            saved({"fc1.weight": Bang()}),
            saved(Bang(), _use_new_zipfile_serialization=False),
        ]
    )
)
def test_code_in_a_checkpoint_is_never_run(path, content):
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        with pytest.raises(ERRORS):
            load_model(path)
    assert not (path.parent / "bang").exists()


def image_files() -> list[bytes]:
    contents = []
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO"):
        buffer = io.BytesIO()
        photograph(40, 30).save(buffer, kind)
        contents.append(buffer.getvalue())
    return contents


@examples(300)
@given(content=damaged(image_files()))
def test_damaged_images(path, content):
    path.write_bytes(content)
    try:
        image = load_image(path)
    except ERRORS as error:
        assert str(path) in str(error)
    else:
        assert image.mode == "RGB"


COLUMNS = ["index", "label", "loss"]
TABLE = b"index,label,loss\n" + b"".join(b"%d,%d,0.25\n" % (i, i % 10) for i in range(12))


@examples(300)
@given(content=damaged([TABLE]) | st.binary(max_size=200).map(lambda tail: TABLE + tail))
def test_damaged_tables(path, content):
    path.write_bytes(content)
    try:
        log = RowLog(path, COLUMNS)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert len(log.done) == len(log.rows)  # no image twice
    log.append([{"index": 10**6, "label": 0, "loss": 0.5}])
    assert len(RowLog(path, COLUMNS).rows) == len(log.rows)


@examples(300)
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(st.sampled_from(("a photo of a {}", "{}", "{0}", "{{}}", "%s", "\x00", "")))
    .map("\n".join)
    .map(str.encode)
)
def test_prompt_files(path, content):
    path.write_bytes(content)
    try:
        templates = load_templates(str(path))
    except ERRORS as error:
        assert str(path) in str(error)
        return
    assert templates and all(template.count("{}") == 1 for template in templates)
    assert all("cat" in template.replace("{}", "cat") for template in templates)


@examples(200)
@given(content=st.binary(max_size=100) | st.integers(1, 10**5).map(lambda depth: b"[" * depth))
def test_json_files(path, content):
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except ValueError as error:
        assert str(path) in str(error)
