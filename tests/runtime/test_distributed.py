import pytest
import torch

from apm.runtime.distributed import claim_gpu


def test_a_process_claims_a_gpu_only_to_work_on_one(monkeypatch):
    claimed = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", claimed.append)
    claim_gpu(torch.device("cpu"))
    with pytest.raises(ValueError, match="--nproc-per-node 1, or --device cpu"):
        claim_gpu(torch.device("cuda"))
    assert not claimed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    claim_gpu(torch.device("cuda"))
    assert claimed == [1]
