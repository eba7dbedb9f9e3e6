import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from apm import page as page_module
from apm.page import Page, compress, unit_directions
from apm.predictor import Percept

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
ISLANDS = np.random.default_rng(1).random((8, 8, 3), np.float32)
HOSTILE = "</script><img src=x onerror=alert(1)>"


def features(seed: int, rank: int = 24, side: int = 8) -> np.ndarray:
    random = np.random.default_rng(seed)
    axes = np.random.default_rng(99).normal(size=(rank, 48))  # the same for all pictures
    return (random.normal(size=(side, side, rank)) @ axes).astype(np.float32)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of all places with all, ``(N, M)``."""
    one, other = (grid.reshape(-1, grid.shape[-1]).astype(float) for grid in (one, other))
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    return one @ other.T / lengths


def read(folder):
    """The run that a page shows, and for each picture its features by model."""
    text = (folder / "index.html").read_text()
    [run] = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text)
    run = json.loads(run)
    found = []
    for index in range(len(run["items"])):
        script = (folder / "index_files" / f"{index:05}.js").read_text()
        assert script.isascii() and "<" not in script
        found.append(json.loads(script.removeprefix(f"received({index},").rstrip().rstrip(")")))
    return run, found


def decoded(content) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(content["values"]), np.int8).astype(float)
    return numbers.reshape(*content["shape"], -1) * content["scale"]


def test_features_of_two_pictures_can_be_compared(tmp_path):
    page = Page(tmp_path, "title", {})
    grids = [features(seed) for seed in range(3)]
    for n, grid in enumerate(grids):
        page.add(f"p{n}", {"photograph": PHOTOGRAPH}, {"student": grid, "teacher": grid[::-1]}, "")
    errors = page.save()
    _, found = read(tmp_path)
    for one in (0, 1, 2):
        for other in (0, 1, 2):
            pair = [decoded(found[n]["student"]).reshape(64, -1) for n in (one, other)]
            true = cosines(grids[one], grids[other])
            np.testing.assert_allclose(pair[0] @ pair[1].T, true, atol=1e-2)
    assert 0 < errors["student"]["mean"] < errors["student"]["99%"] < 1e-2
    assert f"{tmp_path / 'index.html'}: mean error" in str(page) and "teacher's 0.00" in str(page)


def test_the_error_that_is_told_is_that_of_the_cosines():
    grid = unit_directions(np.random.default_rng(0).normal(size=(8, 8, 300)))
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(300, 32)))[0]
    content, error = compress(grid, axes)
    known = decoded(content).reshape(64, 32)
    expected = np.abs(cosines(grid, grid) - known @ known.T)
    places = [np.abs(expected - row).max(axis=1).argmin() for row in error]
    np.testing.assert_allclose(error, expected[places], atol=1e-6)
    assert len(set(places)) == 16 and len({place % 8 for place in places}) > 4  # all over the grid
    assert error.mean() > 0.02  # of 300 dimensions, 32 tell little


def test_what_is_finer_than_the_page_is_averaged():
    grid = np.random.default_rng(0).normal(size=(64, 64, 5))
    mean = grid.reshape(32, 2, 32, 2, 5).mean(axis=(1, 3))
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit_directions(grid), expected, atol=1e-5)
    assert unit_directions(grid[:7, :50]).shape == (7, 32, 5)
    assert np.array_equal(unit_directions(np.zeros((4, 4, 3))), np.zeros((4, 4, 3)))


def test_a_picture_takes_32_kilobytes(tmp_path):
    page = Page(tmp_path, "title", {})
    page.add("p", {"photograph": PHOTOGRAPH}, {"student": features(0, 48, side=128)}, "")
    page.save()
    _, [found] = read(tmp_path)
    assert decoded(found["student"]).shape == (32, 32, 32)
    assert (tmp_path / "index_files" / "00000.js").stat().st_size < 45_000  # base64 of 32,768


def test_panels_are_exact_and_the_same_one_is_written_once(tmp_path):
    page = Page(tmp_path, "title", {})
    for n in range(2):
        panels = {"islands": ISLANDS * (n + 1) / 2, "A": PHOTOGRAPH}
        page.add(f"p{n}", panels, {"student": features(n)}, "", {"error": n / 2})
    page.save([0, 1], "share", [0.5, float("nan")])
    run, _ = read(tmp_path)
    first, second = run["items"]
    assert first["aspect"] == 1 and second["scores"] == {"error": 0.5}
    assert first["panels"]["A"] == second["panels"]["A"] and first["panels"]["A"].endswith(".jpg")
    with Image.open(tmp_path / "index_files" / second["panels"]["islands"]) as image:
        np.testing.assert_array_equal(np.asarray(image), (ISLANDS * 255).round())
    assert run["steps"] == {"name": "share", "values": [0, 1], "losses": [0.5, None]}
    assert len(list((tmp_path / "index_files").iterdir())) == 5


def test_thumbnails_are_small(tmp_path):
    page = Page(tmp_path, "title", {})
    large = np.asarray(Image.fromarray(PHOTOGRAPH).resize((448, 336)))
    for n, picture in enumerate((large, PHOTOGRAPH)):
        page.add(f"p{n}", {"photograph": picture}, {"student": features(0)}, "")
    page.save()
    items = read(tmp_path)[0]["items"]
    sizes = [Image.open(tmp_path / "index_files" / item["thumbnail"]).size for item in items]
    assert sizes == [(256, 192), (40, 30)]
    assert items[1]["thumbnail"] == items[1]["panels"]["photograph"]


def test_captions_say_what_was_seen_and_how(tmp_path):
    checkpoint = tmp_path / "apm.safetensors"
    checkpoint.touch()
    said = {"checkpoint": checkpoint, "seed": 0, "teacher": None, "limit": 3, "method": "pca"}
    page = Page(tmp_path, "title", said)
    percept = Percept(PHOTOGRAPH, features(0), {"width": 0.25}, ISLANDS)
    page.add_percept("p", (400, 300), percept, ISLANDS)
    page.save()
    run, _ = read(tmp_path)
    [item] = run["items"]
    assert item["caption"] == "400 x 300 px: centre crop, 25 % of the width left out"
    assert list(item["panels"]) == ["photograph", "islands", "reconstruction"]
    told = {"checkpoint": "apm.safetensors", "method": "pca", "seed": "0"}
    assert told.items() <= run["facts"].items() and "limit" not in run["facts"]


def test_no_name_is_markup(tmp_path):
    page = Page(tmp_path, HOSTILE, {"method": HOSTILE})
    names = [HOSTILE, "<!--<script>", "\udcff", "\u2028 &amp; ä"]
    for name in names:
        page.add(name, {HOSTILE: PHOTOGRAPH}, {HOSTILE: features(0)}, HOSTILE, {HOSTILE: 1})
    page.save(step_name=HOSTILE, steps=range(4))
    text = (tmp_path / "index.html").read_text()
    assert "onerror" in text and "<img src=x" not in text and "<!--<script>" not in text
    assert text.count("<script") == text.count("</script>") == 2
    run, found = read(tmp_path)
    assert [item["name"] for item in run["items"]] == names and list(found[0]) == [HOSTILE]
    files = {path.name for path in (tmp_path / "index_files").iterdir()}
    assert all(re.fullmatch(r"\d{5}(_0)?\.(js|jpg)", name) for name in files)


def test_the_page_of_a_former_run_goes_with_its_files_and_no_others(tmp_path):
    files = tmp_path / "index_files"
    for pictures in (2, 1):
        page = Page(tmp_path, "title", {})
        assert not (tmp_path / "index.html").exists()
        for index in range(pictures):
            page.add("p", {"photograph": PHOTOGRAPH + index}, {"student": features(0)}, "")
        assert {path.name for path in tmp_path.iterdir()} == {"index_files"}
        page.save()
        assert (tmp_path / "index.html").exists()
        assert len([*files.glob("*.js")]) == pictures
        (files / "mine.jpg").touch()
    assert {path.name[:5] for path in files.iterdir()} == {"00000", "mine."}


def test_the_same_run_makes_the_same_page(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        page = Page(tmp_path / name, "title", {"seed": 1})
        page.add("p", {"photograph": PHOTOGRAPH}, {"student": features(0)}, "")
        page.save()
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_the_template_loads_nothing_from_a_network():
    text = page_module.TEMPLATE.read_text()
    assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}
    for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert sink not in text


@pytest.mark.parametrize("grid", [np.zeros((4, 4, 8)), np.full((1, 1, 3), 2.0)])
def test_odd_features_are_no_reason_to_fail(tmp_path, grid):
    page = Page(tmp_path, "title", {})
    page.add("p", {"photograph": PHOTOGRAPH}, {"student": grid}, "")
    assert page.save()["student"]["mean"] < 1e-2
