"""The page as a user sees it, in headless Chromium: ``pytest -m browser -n 0``."""

import base64
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from apm.page import Page

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "</script><script>hacked = 1</script>",
    '"><img src=x onerror="hacked = 1">',
    "<b>bold</b> &lt; ${hacked = 1} \udcff",
)
SIDE, STUDENT, TEACHER = 8, 12, 20


def random_features(seed: int, dim: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SIDE, SIDE, dim)).astype(np.float32)


def blobs() -> np.ndarray:
    """Features of three islands: left, right and, on the right, a square in the corner."""
    places = np.zeros((SIDE, SIDE), int)
    places[:, 5:], places[:3, 5:] = 1, 2
    centres = np.random.default_rng(5).normal(size=(3, STUDENT))
    return (centres[places] + 0.05 * random_features(6, STUDENT)).astype(np.float32)


# Features by picture: in the folder.
FEATURES = [
    {"student": random_features(seed, STUDENT), "teacher": random_features(10 + seed, TEACHER)}
    for seed in range(5)
]
FEATURES[4]["student"] = blobs()


def cosines(one: np.ndarray, place: int, other: np.ndarray) -> np.ndarray:
    """Of one place with all places of another grid, ``(N,)``."""
    query, points = one.reshape(-1, one.shape[-1])[place], other.reshape(-1, other.shape[-1])
    return points @ query / np.linalg.norm(points, axis=1) / np.linalg.norm(query)


def colours(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((SIDE, SIDE, 3), np.float32)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder of pictures with a teacher, one picture, an interpolation, a training."""
    folder = tmp_path_factory.mktemp("pages") / "a folder, 50 % #1"
    for name in ("folder", "one", "interpolation", "training"):
        (folder / name).mkdir(parents=True)
    page = Page(folder / "folder", HOSTILE[0], {"method": HOSTILE[1], "seed": 3})
    for n, (name, features) in enumerate(zip((*HOSTILE, "d", "e"), FEATURES, strict=True)):
        panels = {"photograph": np.asarray(photograph(80, 60, seed=n))} | {
            panel: colours(10 * n + k)
            for k, panel in enumerate(("islands", "reconstruction", "teacher", "error"))
        }
        page.add(name, panels, features, HOSTILE[1], {"error": (0.3, 0.5, 0.1, 0.4, 0.2)[n]})
    page.save()
    page = Page(folder / "one", "One", {}, joint=True)
    panels = {"photograph": np.asarray(photograph(60, 80)), "islands": colours(0)}
    page.add("only", panels, {"student": blobs()}, "60 x 80 px")
    page.save()
    for name, steps, losses in (
        ("interpolation", [0, 0.25, 1], ()),
        ("training", [2, 4, 6], [1, 1e-1, 1e-2, float("nan"), 1e-4, 1e-5, 1e-6]),
    ):
        page = Page(folder / name, name, {})
        for n, _ in enumerate(steps):
            page.add(f"step {n}", {"islands": colours(n)}, {"student": blobs()}, "")
        page.save(steps, "share" if name == "interpolation" else "iterations", losses)
    return folder


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    with api.sync_playwright() as playwright:
        # In a container root cannot have Chromium's sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, pages):
    """Open a page; in the end there must have been no error."""
    errors: list[str] = []
    contexts = []

    def opened(name: str, **options):
        context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)  # milliseconds, for a machine with other work
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.goto((pages / name).as_uri() + "/index.html")
        opened.errors = errors
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def picture(page, number: int):
    """Show a picture of the folder, and wait for its features."""
    page.locator("#thumbs button").nth(number).click()
    page.wait_for_function(
        f"shown === {number} && stages.length && $('reading').textContent === ''"
    )
    return page.locator("#stages .frame")


def point(frame, place: int) -> dict[str, float]:
    """Where a place lies in a frame, in pixels."""
    box, (row, column) = frame.bounding_box(), divmod(place, SIDE)
    return {
        "x": (column + 0.5) / SIDE * box["width"],
        "y": (row + 0.5) / SIDE * box["height"],
    }


def values(page) -> list[np.ndarray]:
    """The cosines of the heat maps on show."""
    return [np.array(shown) for shown in page.evaluate("stages.map((s) => [...s.values])")]


def pixels(page, stage: int) -> np.ndarray:
    """The colours of a stage's canvas, ``(N, 3)``."""
    url = page.evaluate(f"stages[{stage}].canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("RGB"), int).reshape(-1, 3)


def test_pointing_at_a_place_shows_what_is_like_it(visit):
    page = visit("folder")
    frames = picture(page, 1)
    assert frames.count() == 2 and page.locator("#stages canvas:visible").count() == 0
    for place in (0, 27, 63):
        frames.nth(0).hover(position=point(frames.nth(0), place))
        for stage, model in enumerate(("student", "teacher")):
            features = FEATURES[1][model]
            expected = cosines(features, place, features)
            np.testing.assert_allclose(values(page)[stage], expected, atol=1e-2)
            others = np.arange(SIDE**2) != place
            brightness = pixels(page, stage).sum(axis=1)[others]
            order = np.argsort(expected[others])
            assert brightness[order[-1]] > 650 and brightness[order[0]] < 20
            assert np.corrcoef(brightness, expected[others])[0, 1] > 0.95
            assert page.locator(".mark:visible").count() == 2
    page.mouse.move(1, 1)
    assert page.locator("#stages canvas:visible").count() == 0


def test_a_pinned_place_stays_and_finds_its_like_in_the_other_pictures(visit):
    page = visit("folder")
    frames = picture(page, 0)
    frames.nth(1).click(position=point(frames.nth(1), 20))  # on the teacher's side
    frames.nth(1).hover(position=point(frames.nth(1), 50))
    query = FEATURES[0]["teacher"]
    np.testing.assert_allclose(values(page)[1], cosines(query, 20, query), atol=1e-2)
    assert "Pinned row 3, column 5. To row 7, column 3: student" in page.inner_text("#reading")
    assert f"teacher {cosines(query, 20, query)[50]:.1f}" in page.inner_text("#reading")

    page.wait_for_function("document.querySelectorAll('#found button').length === 4")
    assert "by the teacher (4 of 4 looked at)" in page.inner_text("#nearest-title")
    best = {n: cosines(query, 20, FEATURES[n]["teacher"]) for n in range(1, 5)}
    nearest = sorted(best, key=lambda n: -best[n].max())
    found = page.locator("#found .name").all_inner_texts()
    told = [float(text.split()[0]) for text in found]
    np.testing.assert_allclose(told, [best[n].max() for n in nearest], atol=1e-2)
    page.locator("#found button").first.click()
    page.wait_for_function(f"shown === {nearest[0]} && pinned !== null && stages[0].values")
    assert page.evaluate("pinned.place") == best[nearest[0]].argmax()

    page.keyboard.press("Escape")
    assert page.evaluate("pinned") is None and page.locator("#nearest").is_hidden()
    page.keyboard.press("Escape")
    assert page.locator("#folder").is_visible()


def test_panels_lie_over_the_photograph_as_the_slider_says(visit):
    page = visit("folder")
    frames = picture(page, 0)
    over = frames.nth(0).locator("img.over")
    for key, panel in enumerate(("islands", "reconstruction", "teacher", "error"), 2):
        page.locator("#panels label", has_text=panel).click()
        assert over.get_attribute("alt").endswith(f": {panel}")
        assert over.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == SIDE
        page.keyboard.press("1")
        assert over.count() == 0
        page.keyboard.press(str(key))
        assert over.get_attribute("src").endswith(f"_{key - 1}.png")
    for share in ("30", "100", "0"):
        page.locator("#opacity").fill(share)
        opacity = over.evaluate("(image) => getComputedStyle(image).opacity")
        assert float(opacity) == int(share) / 100
    page.keyboard.press("2")
    alts = [frame.locator("img.over").get_attribute("alt") for frame in frames.all()]
    assert [alt.split(": ")[-1] for alt in alts] == ["islands", "teacher"]


def test_islands_by_k_means_are_those_that_were_planted(visit):
    page = visit("one")
    page.wait_for_function("stages.length === 1")
    page.locator("#clusters").fill("3")
    assert page.locator("#panels :checked").get_attribute("value") == "k-means"
    planted = np.ones((SIDE, SIDE), int)
    planted[:, :5], planted[:3, 5:] = 0, 2
    _, labels = np.unique(pixels(page, 0), axis=0, return_inverse=True)
    pairs = set(zip(planted.ravel().tolist(), labels.ravel().tolist(), strict=True))
    assert len(pairs) == 3
    assert page.evaluate("[...kmeans(features.student, 3)]") == planted.ravel().tolist()
    assert "k = 3" in page.inner_text("figcaption")


def test_no_place_is_nearer_to_another_island_by_k_means(visit):
    page = visit("folder")
    picture(page, 1)
    page.locator("#clusters").fill("7")
    for stage, model in enumerate(("student", "teacher")):
        found, labels = np.unique(pixels(page, stage), axis=0, return_inverse=True)
        assert len(found) == 7
        features = FEATURES[1][model].reshape(SIDE**2, -1)
        points = features / np.linalg.norm(features, axis=1, keepdims=True)
        means = np.stack([points[labels.ravel() == label].mean(axis=0) for label in range(7)])
        distances = np.linalg.norm(points[:, None] - means, axis=-1)
        own = distances[np.arange(SIDE**2), labels.ravel()]
        assert (own <= distances.min(axis=1) + 5e-3).all()


def test_everything_can_be_done_with_keys(visit):
    page = visit("folder")
    press = page.keyboard.press
    focused = "Number(document.activeElement.dataset.index)"
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 1), ("ArrowLeft", 0)):
        press(key)
        assert page.evaluate(focused) == index
    press("ArrowRight")
    press("Enter")
    page.wait_for_function("shown === 1 && stages.length")
    for key, index in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1)):
        press(key)
        assert page.evaluate("shown") == index  # at once: the next key may already be down
    press("5")
    assert page.evaluate("panel") == "error"
    press("Enter")
    press("ArrowUp")
    press("ArrowRight")
    assert page.evaluate("hovered.place") == 3 * SIDE + 5
    press("Enter")
    assert page.evaluate("pinned.place") == 3 * SIDE + 5
    for _ in range(2):
        press("Escape")
    assert page.evaluate("[pinned, hovered, shown]") == [None, None, 1]
    press("Escape")
    assert page.evaluate("shown") is None and page.evaluate(focused) == 1
    press("2")
    page.go_back()
    page.wait_for_function("shown === 1")


def test_the_folder_is_sorted_by_error(visit):
    page = visit("folder")
    indices = "[...document.querySelectorAll('#thumbs button')].map((b) => Number(b.dataset.index))"
    assert page.evaluate(indices) == [0, 1, 2, 3, 4]
    page.select_option("#sort", label="error, largest first")
    assert page.evaluate(indices) == [1, 3, 0, 4, 2]
    assert page.locator("#thumbs img:not([loading=lazy])").count() == 0
    page.locator("#thumbs button").first.click()
    page.locator("#next").click()
    page.wait_for_function("shown === 3")


def test_a_slider_over_the_steps_of_an_interpolation(visit):
    page = visit("interpolation")
    for n, share in enumerate(("0", "0.25", "1")):
        page.locator("#step").fill(str(n))
        page.wait_for_function(f"stages.length && $('name').textContent === 'step {n}'")
        page.wait_for_function(f"document.querySelector('#stages img').src.endsWith('{n}_0.png')")
        assert page.inner_text("#step-value") == share
    assert page.locator("#curve").is_hidden() and page.locator("#next").is_hidden()


def test_a_slider_over_the_iterations_moves_a_point_along_the_loss(visit):
    page = visit("training")
    page.wait_for_function("stages.length")
    points = {}
    for iteration, shown in ((0, 0), (1, 0), (2, 0), (4, 1), (5, 1), (6, 2)):
        page.locator("#step").fill(str(iteration))
        page.wait_for_function(f"shown === {shown}")
        points[iteration] = page.evaluate("['cx', 'cy'].map((a) => +$('point').getAttribute(a))")
        assert page.inner_text("#step-value").startswith(
            f"{iteration}: loss 1.00e{'-' if iteration else '+'}{iteration};"
        )
    across, down = np.array(list(points.values())).T
    np.testing.assert_allclose(np.diff(across) / np.diff(list(points)), 530 / 6)
    np.testing.assert_allclose(
        np.diff(down) / np.diff(list(points)), 110 / 6
    )  # a power of ten each
    page.locator("#step").fill("3")
    assert "not finite" in page.inner_text("#step-value")


def test_no_name_does_anything(visit):
    page = visit("folder")
    for number, name in enumerate(HOSTILE):
        picture(page, number)
        assert page.inner_text("#name") == name
        assert HOSTILE[1] in page.inner_text("#caption")
        page.locator("#back").click()
        page.wait_for_function("shown === null")
    assert page.title() == page.inner_text("#title") == HOSTILE[0]
    assert HOSTILE[1] in page.inner_text("#facts")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("b:not(figcaption b), img[src=x]").count() == 0


def test_everything_has_a_name_that_can_be_read_aloud(visit):
    page = visit("folder")
    picture(page, 0)
    nameless = page.evaluate(
        """[...document.querySelectorAll("img, button, input, select, svg, [tabindex='0']")]
        .filter((e) => !e.closest("[hidden]"))
        .filter((e) => !(e.alt || e.innerText || e.ariaLabel || e.labels?.[0]?.innerText))
        .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    how = page.locator("details li").all_inner_texts()
    assert len(how) == 3 and "do not carry over between pictures" in how[1]
    page = visit("one")
    assert "carry over from picture to picture" in page.locator("details li").nth(1).inner_text()


def test_a_phone_needs_no_sideways_scrolling_and_a_tap_is_enough(visit):
    page = visit("folder", has_touch=True)
    page.set_viewport_size({"width": 360, "height": 740})
    fits = "document.documentElement.scrollWidth <= 360"
    assert page.evaluate(fits)
    page.locator("#thumbs button").nth(1).tap()
    page.wait_for_function("shown === 1 && stages.length === 2")
    page.locator("#stages .frame").first.tap()
    page.wait_for_function("document.querySelectorAll('#found button').length === 4")
    assert page.evaluate(fits)
    boxes = [frame.bounding_box() for frame in page.locator("#stages .frame").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] > 150  # side by side


def test_light_and_dark(visit):
    shades = {
        scheme: visit("one", color_scheme=scheme).evaluate(
            "['backgroundColor', 'color'].map((key) => getComputedStyle(document.body)[key])"
        )
        for scheme in ("light", "dark")
    }
    assert shades["light"][0] == "rgb(255, 255, 255)" and shades["dark"][1] == "rgb(231, 233, 236)"
    assert shades["dark"][0] == "rgb(20, 22, 26)"


def test_a_missing_file_is_named(visit, pages):
    page = visit("folder")
    data = pages / "folder" / "index_files" / "00003.js"
    content = data.read_bytes()
    data.unlink()
    page.locator("#thumbs button").nth(3).click()
    page.wait_for_function("$('reading').textContent.includes('index_files/00003.js is missing')")
    data.write_bytes(content)
    assert len(visit.errors) == 2  # the browser's own
    visit.errors.clear()


def renderer_memory(browser) -> int:
    """Memory in bytes of the browser's largest renderer, with its share of what is shared."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    renderers = [process["id"] for process in processes if process["type"] == "renderer"]
    sizes = [Path(f"/proc/{n}/smaps_rollup").read_text().split("\nPss:")[1] for n in renderers]
    return max(int(size.split()[0]) * 1024 for size in sizes)


def test_200_pictures_open_at_once(visit, browser, pages):
    folder = pages / "many"
    folder.mkdir()
    page = Page(folder, "many", {})
    noise = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    large = np.kron(noise, np.ones((16, 10, 1), np.uint8))  # 448 x 420
    for n in range(200):
        features = np.random.default_rng(n).normal(size=(32, 32, 40)).astype(np.float32)
        islands = np.random.default_rng(n).random((32, 32, 3), np.float32)
        panels = {"photograph": np.roll(large, n, axis=1), "islands": islands}
        page.add(f"p{n}", panels, {"student": features, "teacher": features}, "")
    page.save()
    seconds = []
    for _ in range(3):  # other work on the machine only adds to the time
        shown = visit("many")
        told = shown.wait_for_function(  # milliseconds after the page was asked for
            "[...document.querySelectorAll('#thumbs img')].slice(0, 50)"
            ".every((image) => image.naturalWidth) && performance.now()"
        )
        seconds.append(told.json_value() / 1000)
    opened = renderer_memory(browser)
    for item in shown.locator("#thumbs li").all()[::20]:
        item.scroll_into_view_if_needed()
    scrolled = renderer_memory(browser)
    frame = picture(shown, 7).first
    frame.click(position=point(frame, 9))
    shown.wait_for_function("$('nearest-title').textContent.includes('199 of 199')")
    searched = renderer_memory(browser)
    sizes = [opened, scrolled, searched]
    print(f"open in {min(seconds):.2f} s; opened, scrolled, searched in {np.divide(sizes, 1e6)} MB")
    assert min(seconds) < 2 and max(sizes) < 300e6
