import logging

import pytest
import torch

from apm.data.cache import cached


@pytest.fixture
def counted():
    calls = []

    def build():
        calls.append(1)
        return torch.arange(6.0).view(2, 3) + len(calls)

    return build, calls


def test_built_once_and_read_back(tmp_path, counted):
    build, calls = counted
    first = cached(tmp_path, {"teacher": "a", "classes": ("x", "y")}, build)
    second = cached(tmp_path, {"classes": ["x", "y"], "teacher": "a"}, build)
    assert torch.equal(first, second) and len(calls) == 1


def test_another_key_is_another_entry(tmp_path, counted):
    build, calls = counted
    cached(tmp_path, {"teacher": "a"}, build)
    cached(tmp_path, {"teacher": "b"}, build)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda npy, record: npy.write_bytes(npy.read_bytes()[:-4]),
        lambda npy, record: npy.write_bytes(b"x" + npy.read_bytes()[1:]),
        lambda npy, record: npy.write_bytes(npy.read_bytes()[:-1] + b"\x01"),
        lambda npy, record: npy.unlink(),
        lambda npy, record: record.unlink(),
        lambda npy, record: record.write_text("{"),
        lambda npy, record: record.write_text("[]"),
        lambda npy, record: record.write_text(record.read_text().replace('"a"', '"b"')),
    ],
)
def test_a_damaged_or_stale_entry_is_built_again(tmp_path, counted, damage, caplog):
    build, calls = counted
    with caplog.at_level(logging.WARNING):
        cached(tmp_path, {"teacher": "a"}, build)
        damage(*tmp_path.glob("*.npy"), *tmp_path.glob("*.json"))
        again = cached(tmp_path, {"teacher": "a"}, build)
        assert len(calls) == 2
        assert torch.equal(again, torch.arange(6.0).view(2, 3) + 2)
        assert torch.equal(cached(tmp_path, {"teacher": "a"}, build), again)
        assert len(calls) == 2
