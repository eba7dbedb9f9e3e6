import errno
import io
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import damaged, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import apm.data.features
from apm.data.features import FeatureStore, StoreWriter, open_store, pack, unpack

META = {"teacher": "a", "grid_size": 4, "feature_dim": 8, "store_dtype": "float16"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(apm.data.features, "SHARD_IMAGES", 2)


def sizes(count=5):
    return {f"sub/{index}": 100 + index for index in range(count)}


def features_of(name, places=16, width=8):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(places, width, generator=generator)


def fill(writer, shards=None, skipped=()):
    for index in range(len(writer.shards)) if shards is None else shards:
        names = [name for name in writer.shards[index] if name not in skipped]
        bad = {name: "no image" for name in writer.shards[index] if name in skipped}
        writer.write(index, {name: features_of(name) for name in names}, bad)


def rounded(name):
    return features_of(name).half().float()


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one, other, dim=-1)


def heavy_tailed(*shape):
    """Random features with some channels far larger than others, as transformers have them."""
    torch.manual_seed(0)
    return torch.randn(shape) * torch.exp(0.5 * torch.randn(shape[-1]))


def test_int8_takes_a_quarter_of_float32_and_keeps_the_direction(tmp_path):
    meta = META | {"grid_size": 32, "feature_dim": 1024, "store_dtype": "int8"}
    features = heavy_tailed(2, 1024, 1024)
    writer = StoreWriter(tmp_path, meta, {"a": 1, "b": 2})
    writer.write(0, dict(zip("ab", features, strict=True)), {})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / 2 <= 1.06e6
    store = FeatureStore(tmp_path)
    for name, expected in zip("ab", features, strict=True):
        assert cosine(store.read(name), expected).min() >= 0.999


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_features_come_back_from_any_shard(tmp_path, dtype):
    fill(StoreWriter(tmp_path, META | {"store_dtype": dtype}, sizes()))
    store = open_store(tmp_path)
    assert store.sizes == sizes()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for name in sizes():
        steps = features_of(name).abs().amax(dim=1, keepdim=True) / (
            254 if dtype == "int8" else 2e3
        )
        assert ((store.read(name) - features_of(name)).abs() <= steps * 1.001).all()


def test_features_are_mapped_not_copied_and_the_store_goes_to_other_processes(tmp_path):
    writer = StoreWriter(tmp_path, META, sizes())
    fill(writer)
    store = FeatureStore(tmp_path)
    sent = pickle.dumps(store)
    assert len(sent) < 500 and torch.equal(pickle.loads(sent).read("sub/3"), store.read("sub/3"))
    store = FeatureStore(tmp_path)
    with writer.paths[1].open("r+b") as file:  # what is mapped changes with the file
        file.seek(-2 * 16 * 8, 2)
        file.write(bytes(2 * 16 * 8))
    assert store.read("sub/3").eq(0).all() and torch.equal(store.read("sub/2"), rounded("sub/2"))


def test_what_cannot_be_stored_faithfully_is_refused(tmp_path):
    assert unpack(pack(torch.zeros(4, 8), "int8")).eq(0).all()

    def write(features, dtype):
        meta = META | {"grid_size": 2, "feature_dim": 1000, "store_dtype": dtype}
        StoreWriter(tmp_path / dtype, meta, {"a": 1}).write(0, {"a": features}, {})

    features = torch.ones(4, 1000)
    features[2, 5] = 300
    with pytest.raises(ValueError, match=r"^a: .* --store-dtype float16"):
        write(features, "int8")
    write(features, "float16")
    with pytest.raises(ValueError, match="not finite"):
        write(features * 1000, "float16")
    features[0, 0] = torch.nan
    for dtype in ("int8", "float16"):
        with pytest.raises(ValueError, match="not finite"):
            write(features, dtype)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_images_that_cannot_be_read_are_left_out_and_remembered(tmp_path, dtype):
    writer = StoreWriter(tmp_path, META | {"store_dtype": dtype}, sizes())
    fill(writer, skipped={"sub/1", "sub/4"})  # sub/4 is alone in its shard
    assert all(writer.is_done(index, verify=True) for index in range(3))
    store = FeatureStore(tmp_path)
    assert list(store.sizes) == ["sub/0", "sub/2", "sub/3"]
    assert store.skipped == {"sub/1": "no image", "sub/4": "no image"}
    torch.testing.assert_close(store.read("sub/3"), features_of("sub/3"), atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    "change",
    [{"teacher": "b"}, {"grid_size": 5}, {"feature_dim": 9}, {"store_dtype": "int8"}, {"block": 3}],
)
def test_a_store_made_in_another_way_is_refused(tmp_path, change):
    StoreWriter(tmp_path, META, sizes())
    StoreWriter(tmp_path, META, sizes())
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{key} .*, not {value!r}; choose another --output"):
        StoreWriter(tmp_path, META | change, sizes())


def test_a_store_of_other_images_is_refused(tmp_path):
    StoreWriter(tmp_path, META, sizes())
    StoreWriter(tmp_path, META, dict(reversed(sizes().items())))  # order does not matter
    with pytest.raises(ValueError, match="images 5, not 4"):
        StoreWriter(tmp_path, META, sizes(4))
    with pytest.raises(ValueError, match="images_sha256"):
        StoreWriter(tmp_path, META, sizes() | {"sub/2": 7})


def test_damaged_shards_are_found(tmp_path):
    writer = StoreWriter(tmp_path, META, sizes())
    assert not writer.is_done(0)
    fill(writer)
    assert writer.is_done(0, verify=True)
    data = bytearray(writer.paths[0].read_bytes())
    for content in (data[:-5], data + b"more", data[:4], b"", b"text" * 100):
        writer.paths[0].write_bytes(content)
        with pytest.raises(ValueError, match=r"000000\.safetensors: damaged"):
            writer.is_done(0)
    data[-3] ^= 64  # a bit has changed: only the checksum tells
    writer.paths[0].write_bytes(data)
    assert writer.is_done(0)
    with pytest.raises(ValueError, match="checksum differs"):
        writer.is_done(0, verify=True)
    writer.paths[0].write_bytes(writer.paths[1].read_bytes())
    with pytest.raises(ValueError, match="holds other images"):
        writer.is_done(0)
    other = StoreWriter(tmp_path / "other", META | {"feature_dim": 4}, sizes())
    writer.paths[2].rename(tmp_path / "other" / "000002.safetensors")
    with pytest.raises(ValueError, match="expected"):
        other.is_done(2)


def test_a_full_disk_leaves_nothing_half_written_and_the_rest_follows(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path, META, sizes())
    fill(writer, [0])
    write_bytes = Path.write_bytes

    def full(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device.*1 of 3 shards done: run"):
            fill(writer, [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.safetensors", "store.json"]
    fill(writer, [1, 2])
    assert FeatureStore(tmp_path).sizes == sizes()


def test_what_is_half_written_is_no_part_of_a_store(tmp_path):
    fill(StoreWriter(tmp_path / "shards", META, sizes()))
    (tmp_path / "shards" / ".1-0123456789abcdef.part.safetensors").write_bytes(b"half")
    assert open_store(tmp_path / "shards").sizes == sizes()
    np.save(tmp_path / "a.npy", features_of("a").numpy())
    (tmp_path / ".1-0123456789abcdef.part.npy").write_bytes(b"half")
    assert list(open_store(tmp_path).sizes) == ["a"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_released_layout_is_read(tmp_path, dtype):
    for name in ("b", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", features_of(name).numpy().astype(dtype))
    store = open_store(tmp_path)
    assert store.sizes == {"b": None, "sub/a.jpg": None}
    assert store.meta == {"grid_size": 4, "feature_dim": 8}
    torch.testing.assert_close(store.read("b"), features_of("b"), atol=2e-3, rtol=1e-3)
    assert store.read("b").dtype == torch.float32


def test_an_image_unlike_the_others_is_named(tmp_path):
    np.save(tmp_path / "a.npy", features_of("a").numpy())
    np.save(tmp_path / "b.npy", features_of("b", places=17).numpy())
    with pytest.raises(ValueError, match=r"b\.npy: .* without CLS and register tokens"):
        open_store(tmp_path).read("b")


def test_a_store_that_is_not_finished_is_refused(tmp_path):
    fill(StoreWriter(tmp_path, META, sizes()), shards=(0, 1), skipped=("sub/0",))
    with pytest.raises(ValueError, match="holds 4 of 5 images; extract the rest first"):
        open_store(tmp_path)


def test_files_that_hold_no_features_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1_extract_coco_features\.py"):
        open_store(tmp_path / "nowhere")
    np.save(tmp_path / "a.npy", np.array([{"code": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        open_store(tmp_path)
    for wrong in (np.arange(8), np.zeros((17, 8), np.float32), np.zeros((16, 8), int), np.ones(())):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ValueError, match=r"a\.npy: .* expected floats"):
            open_store(tmp_path)
    for content in ("", "[]", "{}", "null", '{"grid_size": "4", "feature_dim": 8}', "[" * 9999):
        (tmp_path / "store.json").write_text(content)
        with pytest.raises(ValueError, match=r"store\.json"):
            open_store(tmp_path)


GOOD_META = json.dumps(META | {"format": "apm-features", "grid_size": 2, "images": 2})
TENSORS = {"features": torch.ones(2, 4, 8, dtype=torch.float16)}
HEADER = {"images": {"a": 1, "b": 2}, "skipped": {}, "sha256": "0"}


def shard_of(header) -> bytes:
    return save(TENSORS, {"shard": header if isinstance(header, str) else json.dumps(header)})


def array_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 8), np.float16))
    return buffer.getvalue()


def read_or_refuse(files) -> bool:
    """Read all of a store; whether that was possible."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            store = open_store(folder)
            for name in store.sizes:
                assert store.read(name).dtype == torch.float32
        except ValueError as error:
            assert folder in str(error) and len(str(error)) < 1500 and "\n" not in str(error)
            return False
    return True


def store_files(meta=GOOD_META, shard=None):
    shard = shard_of(HEADER) if shard is None else shard
    meta = meta if isinstance(meta, bytes) else meta.encode()
    return {"store.json": meta, "000000.safetensors": shard}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)


@examples(150)
@given(damaged([GOOD_META.encode()]), damaged([shard_of(HEADER)]), damaged([array_file()]))
def test_damaged_feature_stores(meta, shard, array):
    read_or_refuse(store_files(meta=meta))
    read_or_refuse(store_files(shard=shard))
    read_or_refuse({"a.npy": array})


@examples(150)
@given(
    st.sampled_from(("images", "skipped", "sha256")),
    json_values | st.sampled_from((["a", "b"], [[], []], [["a", 1], ["b", 2]], "ab")),
    st.sampled_from(("grid_size", "feature_dim", "store_dtype", "format", "images")),
    json_values | st.just(10**9),
)
def test_feature_stores_that_say_anything(part, value, key, meta_value):
    read_or_refuse(store_files(shard=shard_of(HEADER | {part: value})))
    read_or_refuse(store_files(meta=json.dumps(json.loads(GOOD_META) | {key: meta_value})))


def test_the_store_that_is_damaged_above_is_whole_and_deep_nests_are_refused():
    assert read_or_refuse(store_files())
    assert read_or_refuse({"a.npy": array_file()})
    assert not read_or_refuse(store_files(shard=shard_of("[" * 10**5)))
