"""The counting scripts against arithmetic done here by hand."""

import importlib
import json
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, make_model
from torch import nn

from apm import APMConfig
from apm.config import TrainConfig
from apm.distill import Distiller
from apm.losses import rgb_targets
from apm.runtime.device import multiply_adds
from apm.tta import TestTimeTrainer

FOLDER = ROOT / "flop_analysis"
SIDE, TOKENS, VOCABULARY = 224, 77, 49408
CLIP_SHAPES = {  # patch, image width, image layers, text width, embedding
    "ViT-B/32": (32, 768, 12, 512, 512),
    "ViT-B/16": (16, 768, 12, 512, 512),
    "ViT-L/14": (14, 1024, 24, 768, 768),
}
SWIN_STAGES = ((2, 128, 4), (2, 256, 8), (18, 512, 16), (2, 1024, 32))  # blocks, width, heads
TRUNK = (2048, 4096, 2048, 1024)  # of the student, the concatenated query first


@pytest.fixture(scope="module", autouse=True)
def folder_on_path():
    """A script's own folder is where its neighbours are imported from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


@pytest.fixture(scope="module")
def flops():
    return importlib.import_module("count_flops")


@pytest.fixture(scope="module")
def counting():
    return importlib.import_module("counting")


@pytest.fixture(scope="module")
def memory():
    return importlib.import_module("count_memory")


@pytest.fixture(scope="module")
def counted(flops, tmp_path_factory):
    """The results of count_flops with fewer rows, by table and name, and their folder."""
    output = tmp_path_factory.mktemp("flops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "CHUNKS", (64, 512))
        patch.setattr(importlib.import_module("figure_2"), "PATCHES", (7, 224))
        assert flops.main(["--output", str(output), "--device", "cpu", "--repeats", "1"]) == 0
    results = json.loads((output / "results.json").read_text())
    tables = {
        table: {row["name"]: row for row in results[table]}
        for table in ("forward", "student", "totals", "figure_2")
    }
    return tables, output


def layer_parameters(width):
    return 12 * width**2 + 13 * width  # attention 4w^2 + 4w, MLP 8w^2 + 5w, two norms 4w


def layer_macs(tokens, width, keys=None):
    return tokens * 12 * width**2 + 2 * tokens * (keys or tokens) * width


def clip_parameters(patch, width, layers, text_width, embedding):
    image = 3 * patch**2 * width + ((SIDE // patch) ** 2 + 2) * width + 4 * width
    image += layers * layer_parameters(width) + width * embedding
    text = (VOCABULARY + TOKENS + 2) * text_width
    text += 12 * layer_parameters(text_width) + text_width * embedding
    return image + text + 1  # the logit scale


def image_tower_macs(patch=16, width=768, embedding=512):
    patches = (SIDE // patch) ** 2
    return patches * 3 * patch**2 * width + 12 * layer_macs(patches + 1, width) + width * embedding


def text_tower_macs(width=512, embedding=512):
    return 12 * layer_macs(TOKENS, width) + width * embedding


def swin_parameters():
    count = 3 * 4**2 * 128 + 3 * 128  # patches, their bias and norm
    for blocks, width, heads in SWIN_STAGES:
        count += blocks * (layer_parameters(width) + 13**2 * heads)
    for _, width, _ in SWIN_STAGES[:-1]:
        count += 4 * width * 2 * width + 2 * 4 * width  # merging and its norm
    return count + 2 * 1024 + (1024 + 1) * 1000


def swin_macs():
    """Products, and what fvcore charges for norms and the average at the end."""
    tokens = (SIDE // 4) ** 2
    products, norms = tokens * 3 * 4**2 * 128 + 1024 * 1000, 5 * tokens * 128
    for index, (blocks, width, _) in enumerate(SWIN_STAGES):
        if index:
            tokens //= 4
            products += tokens * (2 * width) * width  # merging four tokens of half the width
            norms += 5 * tokens * 2 * width
        products += blocks * layer_macs(tokens, width, keys=7 * 7)
        norms += 5 * blocks * 2 * tokens * width
    return products, norms + (5 + 1) * tokens * 1024


def mlp(widths):
    return sum(a * b for a, b in pairwise(widths))


def student_parameters(trunk, features, attention=0):
    """Trunk, heads and fold; every layer but the fold counts its bias with its outputs."""
    rgb = (features + trunk[0], 256, 256, 3)
    linear = mlp((*trunk, features)) + sum(trunk[1:]) + features
    colour = mlp(rgb) + sum(rgb[1:])
    return linear + colour + 3 * 14**2 + 1 + attention


CONV = 1024 * 3 * 14**2
RELEASED_GRID = 1024 * mlp((*TRUNK, 768))
# One vector for the column, one for each row and column of the grid.
OUR_FIRST = 1024 * 4096 + 2 * 32 * 512 * 4096


@pytest.mark.parametrize(("name", "shape"), CLIP_SHAPES.items())
def test_clip_parameters(name, shape):
    baselines = importlib.import_module("baselines")
    with torch.device("meta"):
        model = baselines.clip_model(name)
    assert sum(p.numel() for p in model.parameters()) == clip_parameters(*shape)


def test_count_parameters(tmp_path, capsys):
    script = importlib.import_module("count_parameters")
    assert script.main(["--output", str(tmp_path)]) == 0
    counts = json.loads((tmp_path / "results.json").read_text())["counts"]
    attention = 4 * 768**2 + 4 * 768 + 768 + 2 * 1024  # with its query and the unused norm
    tta = student_parameters(TRUNK, 768, attention)
    coco = student_parameters((2048, 4096, 4096, 4096, 2048, 1024), 1024)
    assert counts["Swin-B"] == swin_parameters()
    assert counts["CLIP ViT-B/16"] == clip_parameters(*CLIP_SHAPES["ViT-B/16"]) == 149_620_737
    assert counts["CLIP ViT-B/32"] == clip_parameters(*CLIP_SHAPES["ViT-B/32"]) == 151_277_313
    assert counts["TPT (CLIP ViT-B/16)"] == counts["CLIP ViT-B/16"] + 4 * 512
    assert counts["APM, TTT model"] == tta == 22_822_224
    assert counts["APM, COCO model"] == coco == 54_347_600
    printed = capsys.readouterr().out
    assert f"{(counts['CLIP ViT-B/16'] + tta) / 1e6:.2f}" in printed
    assert "-1.76" in printed  # less than the paper's 174.2


def test_runs_inside_its_folder(tmp_path):
    command = [sys.executable, "count_parameters.py", "--output", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    assert (tmp_path / "results.json").exists()


def test_clip_forward(counted):
    row = counted[0]["forward"]["CLIP ViT-B/16, image + prompt"]
    attention = 12 * (2 * 197**2 * 768 + 2 * 77**2 * 512)
    norms = 5 * (197 * 768 * 25 + 768 + 77 * 512 * 25)
    products = image_tower_macs() + text_tower_macs() + 512  # one cosine
    assert row["torch"] == pytest.approx(products / 1e9, rel=1e-9)
    assert row["ours"] == pytest.approx((products + norms) / 1e9, rel=1e-9)
    assert row["fvcore alone"] == pytest.approx((products + norms - attention) / 1e9, rel=1e-9)
    assert f"{row['ours']:.2f}" == "20.57"
    assert f"{row['fvcore alone']:.2f}" == "19.78"
    assert row["difference"] == pytest.approx(row["ours"] - 20.5)


def test_swin_forward(counted):
    row = counted[0]["forward"]["Swin-B, image"]
    products, norms = swin_macs()
    assert row["torch"] == pytest.approx(products / 1e9, rel=1e-9)
    assert row["ours"] == pytest.approx((products + norms) / 1e9, rel=1e-9)
    total = counted[0]["totals"]["Swin-B, 20 x forward"]
    assert total["ours"] == pytest.approx(20 * row["ours"])
    assert total["paper"] == 308


@pytest.mark.parametrize("chunk_size", [64, 512])
def test_the_papers_protocol(counted, chunk_size):
    row = counted[0]["forward"][f"APM, 512 locations in chunks of {chunk_size}"]
    assert row["ours"] == pytest.approx(512 * mlp((2048, 4096, 2048, 1024, 768)) / 1e9)


def test_student_forward(counted):
    rows = counted[0]["student"]
    dense = rows["conv, feature grid: forward"]
    assert dense["released"] == pytest.approx((CONV + RELEASED_GRID) / 1e9)
    ours = CONV + OUR_FIRST + 1024 * mlp((*TRUNK[1:], 768))
    assert dense["ours"] == pytest.approx(ours / 1e9)
    assert dense["saved (%)"] == pytest.approx(100 * (1 - ours / (CONV + RELEASED_GRID)))

    coloured = rows["conv, feature grid, RGB head: forward"]
    assert coloured["released"] == pytest.approx(
        (CONV + RELEASED_GRID + 1024 * mlp((2816, 256, 256, 3))) / 1e9
    )
    our_colours = 1024 * 256 + 2 * 32 * 512 * 256 + 1024 * mlp((768, 256, 256, 3))
    assert coloured["ours"] == pytest.approx((ours + our_colours) / 1e9)


def test_student_pooled(counted):
    row = counted[0]["student"]["conv, pooled vector: forward"]
    attention = 2 * 768**2 * (1 + 1024) + 2 * 1024 * 768  # q, out; k, v; scores, weighted sum
    assert row["released"] == pytest.approx((CONV + RELEASED_GRID + attention) / 1e9)
    vectors = 3 * 768**2 + 768**2  # query, its probe, values, output
    probes = 8 * 768 * 1024 + 8 * 1024 * 768  # the head on probes and on mixed states
    grids = 2 * 8 * 1024 * 1024 + 2 * 8 * 1024 * 768  # scores and sums: states, encoding
    ours = CONV + OUR_FIRST + 1024 * mlp(TRUNK[1:]) + vectors + probes + grids
    assert row["ours"] == pytest.approx(ours / 1e9)


def test_a_released_step_costs_three_forward_passes(counted):
    rows = counted[0]["student"]
    for output in ("feature grid", "pooled vector"):
        forward = rows[f"conv, {output}: forward"]["released"]
        step = rows[f"conv, {output}: forward + backward"]["released"]
        assert step == pytest.approx(3 * forward - CONV / 1e9)  # the image needs no gradient


def test_totals(counted):
    tables, _ = counted
    clip = tables["forward"]["CLIP ViT-B/16, image + prompt"]["ours"]
    half = 512 * mlp((*TRUNK, 768)) / 1e9
    total = tables["totals"]["APM, CLIP + 19 x forward at 512 locations, released"]
    assert total["ours"] == pytest.approx(clip + 19 * half)
    assert total["difference"] == pytest.approx(clip + 19 * half - 210.5)
    step = tables["student"]["conv, pooled vector: forward + backward"]["ours"]
    ours = tables["totals"]["APM, CLIP + 19 x forward + backward, ours"]
    assert ours["ours"] == pytest.approx(clip + 19 * step)


@pytest.mark.parametrize(("views", "prompts"), [(1, 1), (64, 1), (64, 1000)])
def test_tpt_step(flops, views, prompts):
    attention = 12 * 2 * TOKENS**2 * 512
    # Frozen weights need no gradient: one product backward for a layer, two for attention.
    text = prompts * (2 * text_tower_macs() + attention)
    logits = 2 * views * prompts * 512
    expected = views * image_tower_macs() + text + logits
    assert flops.count_tpt(views, prompts) == pytest.approx(expected / 1e9, rel=1e-9)


def test_figure_2(counted):
    tables, output = counted
    for patches, halves in (
        (7, 2 * 7),  # of encodings: one by one
        (224, 32 + 7),  # columns and rows of the grid, row by row
    ):
        row = tables["figure_2"][f"APM, {patches} patches"]
        assert row["released"] == pytest.approx(patches * mlp((*TRUNK, 768)) / 1e9)
        ours = CONV + 1024 * 4096 + halves * 512 * 4096 + patches * mlp((*TRUNK[1:], 768))
        assert row["ours"] == pytest.approx(ours / 1e9)
        assert row["time (ms)"] > 0
    assert (output / "figure_2.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.part*"))


def test_both_arithmetics_answer_the_same(flops):
    model, images = make_model(pooling="attention"), torch.rand(1, 3, 56, 56)
    for released, ours in flops.STUDENT_OUTPUTS.values():
        with torch.no_grad():
            torch.testing.assert_close(released(model, images), ours(model, images))


def test_attention_is_counted(counting):
    class Attention(nn.Module):
        def forward(self, query, keys):
            return nn.functional.scaled_dot_product_attention(query, keys, keys)

    count = counting.count_forward(Attention(), torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8))
    gmacs = 2 * 3 * 2 * 5 * 7 * 8 / 1e9
    assert count["ours"] == count["attention"] == count["torch"] == gmacs
    assert count["fvcore alone"] == 0


def test_an_unknown_operator_is_refused(counting):
    class Distances(nn.Module):
        def forward(self, points):
            return torch.cdist(points, points)

    with pytest.raises(ValueError, match="aten::cdist"):
        counting.count_forward(Distances(), torch.rand(4, 2))


def test_counters_that_disagree_are_refused(counting, monkeypatch):
    monkeypatch.setattr(counting, "attention_macs", lambda inputs, outputs: 0)
    with pytest.raises(ValueError, match="disagree"):
        test_attention_is_counted(counting)


def test_peak_is_that_of_the_work(memory):
    def build():
        model, inputs = nn.Linear(1000, 500, bias=False), torch.zeros(250, 1000)
        model(torch.zeros(1000, 1000))  # more than the work holds, but before it
        return memory.workloads.forward(model, inputs)

    row = memory.measure(build, torch.device("cpu"))
    assert row["peak"] == pytest.approx(4 * (500 * 1000 + 250 * 1000 + 250 * 500) / 1e9)
    assert row["process"] > row["peak"]


def test_chunks_bound_inference(memory):
    device = torch.device("cpu")
    one, few = (
        memory.measure(memory.CASES[f"APM, forward, chunks of {size}"][0], device)
        for size in (1024, 128)
    )
    assert one["weights"] == few["weights"] == 4 * 22_822_224 / 1e9
    assert few["rest"] < one["rest"]


def test_count_memory(memory, tmp_path, capsys, monkeypatch):
    name = "APM, TTT step"
    monkeypatch.setattr(memory, "CASES", {name: memory.CASES[name]})
    assert memory.main(["--output", str(tmp_path), "--device", "cpu"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["CPU"] == pytest.approx(row["weights"] + row["optimiser"] + row["rest"])
    # Adam's two moments of what a step uses: no RGB head, no norm, but a count of steps a tensor.
    unused = mlp((2816, 256, 256, 3)) + 256 + 256 + 3 + 2 * 1024
    assert row["optimiser"] == pytest.approx(8 * (22_822_224 - unused) / 1e9, rel=1e-5)
    assert row["CUDA"] == "not measured"
    assert "not measured" in capsys.readouterr().out


def test_a_failing_process_is_one_line(memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "CASES", {"no such row": memory.CASES["Swin-B, forward"]})
    assert memory.main(["--output", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].count("no such row")


def test_the_released_training_step_is_ours():
    """Equal arithmetic, so that their times may be compared."""
    released = importlib.import_module("released")
    one, other = make_model(), make_model()
    statistics = torch.zeros(16), torch.ones(16)
    trainer = Distiller(one, TrainConfig(), *statistics, steps=1, batch_size=2)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-4)
    for _ in range(3):
        pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
        targets = torch.randn(2, 16, 16)
        images = other.preprocessing.normalise(pixels)
        colours = rgb_targets(pixels / 255, 14)
        loss = released.training_step(other, images, targets, colours, optimizer)
        assert trainer.step([(pixels, targets)]).sum().item() == pytest.approx(loss, rel=1e-5)
    for name, weights in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weights, atol=1e-5, rtol=0, msg=name)


def test_the_released_step_of_test_time_training_is_ours(monkeypatch):
    released = importlib.import_module("released")
    changes = {"pooling": "attention", "pool_heads": 2}
    trainer, other = TestTimeTrainer(make_model(**changes)), make_model(**changes)
    with torch.no_grad():  # weights that matter, the same in both
        for one, parameter in zip(trainer.model.parameters(), other.parameters(), strict=True):
            one.copy_(parameter.normal_(0, 0.1))
    sizes = []
    paint = released.rgb_head(other, released.joined(other.rgb_first))
    monkeypatch.setattr(
        released,
        "rgb_head",
        lambda *_: lambda *parts: sizes.append(len(parts[0])) or paint(*parts),
    )
    image, target = torch.rand(1, 3, 56, 56), torch.randn(1, 16)
    before = other.feature_head.weight.clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    trainer.optimizer = torch.optim.SGD([{"params": trainer.model.parameters(), "steps_done": 0}])
    trainer.learning_rate = 0.1
    for _ in range(2):
        released.tta_step(other, image, target, optimizer)
        trainer.step(image, target)
    assert sizes == [16] * (2 * 8 * 16 // 16)  # of 8 copies of a grid of 16, twice
    assert (other.feature_head.weight - before).abs().max() > 1e-3
    for name, weights in trainer.model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weights, atol=1e-5, rtol=0, msg=name)


def test_what_the_released_step_multiplies(monkeypatch):
    released = importlib.import_module("released")
    monkeypatch.setattr(released, "TTA_CHUNK", 5)  # copies and locations are one list
    model = make_model(pooling="attention", pool_heads=2)
    image, target = torch.rand(1, 3, 56, 56), torch.randn(1, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trunk, rgb = mlp((16 + 32, 32, 24, 16)), mlp((16 + 16 + 32, 16, 3))
    conv, pool = 16 * 3 * 14**2, 2 * 16**2 * (1 + 16) + 2 * 16 * 16
    forward = 8 * (conv + 16 * trunk + pool)
    expected = 3 * forward - 8 * conv + 8 * 16 * rgb  # no gradient for the image, none of colours
    step = partial(released.tta_step, model, image, target, optimizer)
    assert multiply_adds(step) == expected


def test_how_many_times_faster():
    adaptation = importlib.import_module("adaptation")
    own, peer = f"{adaptation.ONE_IMAGE}, 16 locations", f"{adaptation.AGAINST}, 10 classes"
    rows = [{"name": own, "seconds": 2.0}, {"name": peer, "seconds": 24.0}]
    rows.append({"name": "training step, ours", "seconds": 1.0})
    assert adaptation.times_faster(rows) == {f"{own}: times faster than one {peer}": 12}


@pytest.fixture
def small_benchmark(monkeypatch):
    """The benchmark with a small COCO model and no matrix product to compare with."""
    benchmark = importlib.import_module("benchmark")
    small = APMConfig(trunk_widths=(32, 16), feature_dim=24, position_dim=32)
    monkeypatch.setattr(APMConfig, "coco", lambda: small)
    monkeypatch.setattr(importlib.import_module("timing"), "matmul_rate", lambda *_: 1e9)
    return benchmark


def test_training_is_timed_with_its_data(small_benchmark, monkeypatch, tmp_path, capsys):
    benchmark = small_benchmark
    for part in ("inference", "test_time_training", "one_image", "islands", "peers"):
        monkeypatch.setattr(benchmark, part, lambda device: ())
    assert benchmark.main(["--output", str(tmp_path), "--device", "cpu", "--repeats", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    images = [row["images/s"] * row["seconds"] for row in rows.values()]
    assert images == pytest.approx([4, 4, 4, 16, 16])
    assert all(row["seconds"] > 0 for row in rows.values()) and 0 < results["data_wait"] < 1
    step, config = rows["training step, released, float32"], APMConfig.coco()
    macs = mlp((1024 + 32, 32, 16, 24)) + mlp((24 + 1024 + 32, *config.rgb_widths, 3))
    macs = 4 * 1024 * (3 * macs + 2 * 3 * 14**2)  # the patches' own gradient is not asked for
    assert step["floor"] == pytest.approx(macs / 1e9) == step["GMACs"]
    many = rows["training, its data read by one worker, bfloat16, one call"]
    assert many["GMACs"] == pytest.approx(4 * rows["training step, ours, bfloat16"]["GMACs"])
    assert step["x floor"] == pytest.approx(step["seconds"] / step["floor"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and "training waits for data" in printed


def test_inference_is_timed_in_both_arithmetics(small_benchmark):
    benchmark, cpu = small_benchmark, torch.device("cpu")
    rows = [benchmark.measure(work, cpu, 1) for work in benchmark.inference(cpu)]
    assert [row["name"] for row in rows] == [
        "dense, released: locations one by one, float32, one call",
        "dense, released: all locations at once, float32",
        "dense, ours, float32",
        "dense, ours, bfloat16",
    ]
    assert rows[0]["seconds"] > rows[1]["seconds"]
    assert rows[2]["GMACs"] < rows[1]["GMACs"]
