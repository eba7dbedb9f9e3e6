"""Files from strangers: whatever the bytes, a clear error, no code run, memory in proportion.

Bounded and the same in every run; ``APM_FUZZ=20 pytest tests/test_fuzz.py`` tries 20 times as much.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, make_model, photograph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from apm import APM, load_model, save_model
from apm.data.features import open_store
from apm.data.images import load_image
from apm.data.prompts import load_templates
from apm.evaluation import RowLog
from apm.runtime.files import read_json

SCALE = int(os.environ.get("APM_FUZZ", 1))


def examples(count: int):
    """Settings: ``count`` inputs, the same ones every time."""
    return settings(
        max_examples=count * SCALE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, contents):
    """One of the ``contents`` with some bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("change", "cut", "double", "insert", "end", "number")))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "double":
            data[place:place] = data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=64))
        elif kind == "end":
            del data[place:]
        else:  # a length or an offset, as in headers
            value = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1)))
            data[place : place + 8] = value.to_bytes(8, "little")
    return bytes(data)


def written(content: bytes, suffix: str) -> Path:
    """A new file; hypothesis calls a test many times with one ``tmp_path``."""
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    path = folder / f"file{suffix}"
    path.write_bytes(content)
    return path


FOLDER = tempfile.TemporaryDirectory()


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def checkpoint_content() -> dict:
    path = written(b"", ".pth")
    save_model(path, make_model(local_width=8))
    return torch.load(path, weights_only=True)


CONTENT = checkpoint_content()
CHECKPOINTS = [saved(CONTENT), saved(CONTENT, _use_new_zipfile_serialization=False)]
ERRORS = (ValueError, FileNotFoundError)


def load_or_refuse(path: Path) -> APM | None:
    try:
        return load_model(path)
    except ERRORS as error:
        assert str(path) in str(error) and len(str(error)) < 1000 + len(str(path))
        return None


@examples(150)
@given(damaged(CHECKPOINTS))
def test_damaged_checkpoints(content):
    model = load_or_refuse(written(content, ".pth"))
    if model is not None:  # a byte that does not matter, or one of a weight
        assert all(weight.isfinite().all() for weight in model.state_dict().values())


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
tensors = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1).expand(10**9),
        torch.full((4,), torch.nan),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(4, dtype=torch.complex64),
        torch.nn.Parameter(torch.zeros(2)),
    ]
)


@examples(150)
@given(
    st.sampled_from(("config", "preprocessing", "weights", "provenance", "format")),
    st.sampled_from(sorted(CONTENT["config"]) + sorted(CONTENT["preprocessing"])),
    plain | tensors | st.just(10**9) | st.just([10**9, 10**9]) | st.just([1] * 1000),
    st.booleans(),
)
def test_checkpoints_that_say_anything(part, key, value, whole):
    parts = {name: dict(CONTENT[name]) for name in ("config", "preprocessing", "weights")}
    content = CONTENT | parts
    if whole or part not in parts:
        content[part] = value
    elif part == "weights":
        content[part][next(iter(content[part]))] = value
    else:
        content[part][key] = value
    model = load_or_refuse(written(saved(content), ".pth"))
    if model is not None:
        assert isinstance(model.provenance, dict)


class Bang:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return open, (str(Path(FOLDER.name) / "bang"), "w")


@examples(60)
@given(
    damaged(
        [
            pickle.dumps(Bang(), 2),
            saved({"format": "apm-checkpoint", "weights": Bang()}),
            saved(Bang(), _use_new_zipfile_serialization=False),
        ]
    )
)
def test_code_in_a_checkpoint_is_never_run(content):
    assert load_or_refuse(written(content, ".pth")) is None
    assert not (Path(FOLDER.name) / "bang").exists()


def image_files() -> list[bytes]:
    contents = []
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO"):
        buffer = io.BytesIO()
        photograph(40, 30).save(buffer, kind)
        contents.append(buffer.getvalue())
    return contents


@examples(300)
@given(damaged(image_files()), st.sampled_from((".png", ".jpg", ".tif", "")))
def test_damaged_images(content, suffix):
    path = written(content, suffix)
    try:
        image = load_image(path)
    except ERRORS as error:
        assert str(path) in str(error)
    else:
        assert image.mode == "RGB"


COLUMNS = ["index", "label", "loss"]
TABLE = b"index,label,loss\n" + b"".join(b"%d,%d,0.25\n" % (i, i % 10) for i in range(12))


@examples(300)
@given(damaged([TABLE]) | st.binary(max_size=200).map(lambda tail: TABLE + tail))
def test_damaged_tables(content):
    path = written(b"", ".csv")
    path.unlink()
    RowLog(path, COLUMNS, {})
    path.write_bytes(content)
    try:
        log = RowLog(path, COLUMNS, {})
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert len(log.done) == len(log.rows)  # no image twice
    log.append([{"index": 10**6, "label": 0, "loss": 0.5}])
    assert len(RowLog(path, COLUMNS, {}).rows) == len(log.rows)


@examples(300)
@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(st.sampled_from(("a photo of a {}", "{}", "{0}", "{{}}", "%s", "\x00", "")))
    .map("\n".join)
    .map(str.encode)
)
def test_prompt_files(content):
    path = written(content, ".txt")
    try:
        templates = load_templates(str(path))
    except ERRORS as error:
        assert str(path) in str(error)
        return
    assert templates and all(template.count("{}") == 1 for template in templates)
    assert all("cat" in template.replace("{}", "cat") for template in templates)


@examples(200)
@given(
    st.binary(max_size=100)
    | plain.map(lambda value: repr(value).encode("utf-8", "replace"))
    | st.integers(1, 10**5).map(lambda depth: b"[" * depth)
    | st.just(b"1" * 10_000)
)
def test_json_files(content):
    path = written(content, ".json")
    try:
        assert isinstance(read_json(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


META = {
    "format": "apm-features",
    "grid_size": 2,
    "feature_dim": 3,
    "store_dtype": "int8",
    "images": 2,
}
PACKED = {"features": torch.ones(2, 4, 3, dtype=torch.int8), "scales": torch.ones(2, 4)}
SHARD = {"images": {"a": 1, "b": 2}, "skipped": {}, "sha256": "0"}
HEADER = {"shard": json.dumps(SHARD)}
GOOD_STORE = json.dumps(META).encode(), save_safetensors(PACKED, HEADER)


def read_or_refuse(files: dict[str, bytes]) -> bool:
    """Read all of a store; whether that was possible."""
    folder = written(b"", ".txt").parent
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        store = open_store(folder)
        for name in store.sizes:
            assert store.read(name).dtype == torch.float32
    except ERRORS as error:
        assert str(folder) in str(error) and len(str(error)) < 1500 + len(str(folder))
        return False
    return True


def store_files(meta: bytes, shard: bytes) -> dict[str, bytes]:
    return {"store.json": meta, "000000.safetensors": shard}


def array_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 3), np.float16))
    return buffer.getvalue()


@examples(150)
@given(
    damaged([json.dumps(META).encode()])
    | plain.map(lambda value: repr(value).encode("utf-8", "replace")),
    damaged([save_safetensors(PACKED, HEADER)]),
    damaged([array_file()]),
    st.sampled_from(("meta", "shard", "array")),
)
def test_damaged_feature_stores(meta, shard, array, which):
    if which == "array":
        read_or_refuse({"a.npy": array})
    else:
        good_meta, good_shard = GOOD_STORE
        chosen = (meta, good_shard) if which == "meta" else (good_meta, shard)
        read_or_refuse(store_files(*chosen))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)


@examples(200)
@given(
    st.sampled_from(("images", "skipped", "sha256")),
    json_values | st.sampled_from((["a", "b"], [[], []], [["a", 1], ["b", 2]], "ab")),
    st.sampled_from(("grid_size", "feature_dim", "store_dtype", "format", "images")),
    json_values | st.just(10**9),
)
def test_feature_stores_that_say_anything(part, value, key, meta_value):
    good_meta, good_shard = GOOD_STORE
    shard = save_safetensors(PACKED, {"shard": json.dumps(SHARD | {part: value})})
    read_or_refuse(store_files(good_meta, shard))
    read_or_refuse(store_files(json.dumps(META | {key: meta_value}).encode(), good_shard))


def test_the_store_that_is_damaged_above_is_whole_and_deep_nests_are_refused():
    good_meta, good_shard = GOOD_STORE
    assert read_or_refuse(store_files(good_meta, good_shard))
    assert read_or_refuse({"a.npy": array_file()})
    deep = {"shard": "[" * 10**5}
    assert not read_or_refuse(store_files(good_meta, save_safetensors(PACKED, deep)))


# Memory


def bombs(folder: Path) -> None:
    """Small files that ask for a lot, each in its own way."""

    def packed(name: str, pickled: bytes, compression: int = zipfile.ZIP_STORED, **members):
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/byteorder", "little")
            archive.writestr("a/version", "3\n")
            for number, content in members.items():
                archive.writestr(f"a/data/{number.removeprefix('n')}", content)

    def call(function: str, argument: bytes) -> bytes:
        return b"\x80\x02c" + function.encode() + b"\n" + argument + b"\x85R."

    content, zeros = CONTENT, torch.zeros(1)
    wide = content["config"] | {"trunk_widths": [2**15, 2**15, 2**15]}
    with torch.device("meta"):
        shapes = APM(type(make_model().config)(**wide)).state_dict()
    expanded = {name: zeros.expand(tensor.shape) for name, tensor in shapes.items()}
    one = torch.zeros(10**6)
    shared = {name: one[: t.numel()].view(t.shape) for name, t in content["weights"].items()}
    sparse = torch.sparse_coo_tensor([[0]], zeros, (2**40,), check_invariants=True)
    laughs: list = []
    for _ in range(60):
        laughs = [laughs, laughs]
    files = {
        "expanded weights": content | {"config": wide, "weights": expanded},
        "huge widths": content | {"config": content["config"] | {"trunk_widths": [10**12] * 3}},
        "a million layers": content | {"config": content["config"] | {"rgb_widths": [1] * 10**6}},
        "a million blocks": content | {"config": content["config"] | {"local_blocks": [10**6, 0]}},
        "billion laughs": content | {"config": content["config"] | {"pooling": laughs}},
        "more laughs": content | {"config": content["config"] | {"trunk_widths": laughs}},
        "laughing colours": content | {"preprocessing": {"scaling": laughs}},
        "laughing weights": content | {"weights": content["weights"] | {"fold.bias": laughs}},
        "sparse": content | {"weights": OrderedDict(a=sparse)},
        "shared": content | {"weights": shared | {f"x{i}": one for i in range(10**4)}},
    }
    for name, value in files.items():
        torch.save(value, folder / f"{name}.pth")
    lying = saved({"a": torch.zeros(8)}, _use_new_zipfile_serialization=False)
    (folder / "legacy.pth").write_bytes(
        lying.replace(b"K\x08", b"\x8a\x05" + b"\xff" * 4 + b"\x00")
    )
    hexed = b"X\x01\x00\x00\x00a"
    for _ in range(36):  # each doubles the text
        hexed = b"c_codecs\nencode\n(" + hexed + b"X\x03\x00\x00\x00hextR"
    packed("bytearray.pth", call("__builtin__\nbytearray", b"J\x00\x00\x00\x7f"))
    packed("encode.pth", b"\x80\x02" + hexed + b".")
    packed("tensor.pth", call("torch\nTensor", b"J\x00\x00\x00\x7f"))
    packed("deflated.pth", b"\x80\x02N.", zipfile.ZIP_DEFLATED, n0=bytes(10**8))
    (folder / "plain.pth").write_bytes(call("__builtin__\nbytearray", b"J\x00\x00\x00\x7f"))


MEASURE = """
import resource, sys
from pathlib import Path
from apm import load_model

resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_model(path)
        print(path.name, "loaded")
    except ValueError as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(path.name, grown * 1024, path.stat().st_size, str(error)[-150:], sep="|")
"""


def test_no_checkpoint_takes_memory_beyond_its_size(tmp_path):
    bombs(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(list(tmp_path.iterdir())) == 16
    for line in lines:
        _, grown, size, _ = line.split("|")
        assert int(grown) < 20_000_000 + 20 * int(size), line


def test_a_table_takes_memory_in_proportion():
    import tracemalloc

    path = written(b"", ".csv")
    path.unlink()
    RowLog(path, COLUMNS, {})
    path.write_bytes(b"index,label,loss\n" + b"".join(b"%d,1,0.5\n" % i for i in range(20_000)))
    tracemalloc.start()
    RowLog(path, COLUMNS, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * path.stat().st_size


def test_numpy_is_never_asked_to_unpickle(tmp_path):
    """Feature files and cached tensors are read by numpy, which can run pickled code if let."""
    for path in [*ROOT.glob("apm/*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "tests":
            assert text.count("np.load(") == text.count("allow_pickle=False"), path
            assert "import pickle\n" not in text and "eval(" not in text.replace(".eval(", "")
