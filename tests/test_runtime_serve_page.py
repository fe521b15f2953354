"""The page for people, in a real browser without a window."""

from __future__ import annotations

import base64
import io
import re
import shutil

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, write_bundle
from PIL import Image
from serve_fixtures import hosted, png

from runtime.changes import CHANGES
from runtime.preprocess import pad_to
from runtime.serve.settings import ServeSettings

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
TOKEN = "a-token-of-the-tests"
WORDS = {"real": "Looks natural", "uncertain": "Uncertain", "fake": "Looks generated"}


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; at the end nothing may have come from elsewhere, nor a script have failed."""
    contexts, problems = [], []

    def opened(server, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 800}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda request: problems.append(request.url) if _foreign(request.url, server) else None)
        page.goto(f"http://127.0.0.1:{server.port}/")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def _foreign(url, server):
    return not url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:"))


@pytest.fixture
def files(tmp_path):
    """Two pictures and a file that is none; the second picture is larger than the model's input."""
    images = [random_images(1, seed=1)[0], np.kron(random_images(1, seed=2)[0], np.ones((3, 5, 1), np.uint8))]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def _choose(page, *paths):
    page.get_by_label("Choose pictures").set_input_files(list(paths))


def _card(page, name):
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=name, exact=True))


def _pixels(page, selector):
    """(height, width, 3) uint8 pixels of a canvas."""
    url = page.locator(selector).evaluate("(canvas) => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_chosen_pictures_show_verdict_and_both_scores(open_page, server, files):
    page = open_page(server)
    playwright.expect(page.get_by_text("Model tiny, fp32 on onnxruntime")).to_be_visible()
    _choose(page, files / "0.png", files / "1.png")
    outputs = numpy_outputs(random_images(1, seed=1))
    probability = CALIBRATION.fake_probability(outputs["logits"])[0]
    card = _card(page, "0.png")
    playwright.expect(card.get_by_text(WORDS[str(CALIBRATION.verdicts(outputs["logits"])[0])])).to_be_visible()
    playwright.expect(card.locator(".probability")).to_have_text(f"{100 * probability:.1f} %")
    real, fake = (CALIBRATION.fake_probability(t) for t in (CALIBRATION.real_threshold, CALIBRATION.fake_threshold))
    words = f"calls a picture natural up to {100 * real:.1f} % and generated above {100 * fake:.1f} %."
    playwright.expect(card.get_by_text(words)).to_be_visible()
    similarity = outputs["trace_similarity"][0]
    playwright.expect(card.locator(".similarity")).to_have_text(f"{similarity:+.3f}".replace("-", "−"))
    playwright.expect(_card(page, "1.png").locator(".verdict")).to_be_visible()
    # As chosen, from the top.
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["0.png", "1.png"]
    playwright.expect(page.locator("#announcement")).to_contain_text("1.png: ")


def test_evidence_is_drawn_over_the_part_that_was_looked_at(open_page, server, files):
    page = open_page(server)
    _choose(page, files / "0.png")
    evidence = CALIBRATION.calibrated(numpy_outputs(random_images(1, seed=1))["evidence"][0])
    fake = int((evidence > 0).sum())
    words = f"Evidence: {fake} of 16 cells point to generated, {16 - fake} to natural."
    playwright.expect(page.get_by_role("img", name=words)).to_be_visible()
    with_map = _pixels(page, ".crop")
    page.get_by_label("show").uncheck()
    without = _pixels(page, ".crop")
    side = without.shape[0] // 16
    shown = without[side // 2 :: side, side // 2 :: side]
    np.testing.assert_array_equal(shown, random_images(1, seed=1)[0])
    # Red and green tell the two colours of the map apart, in every cell by the sign of its logit.
    change = (with_map.astype(int) - without).reshape(4, 4 * side, 4, 4 * side, 3).mean((1, 3))
    strong = np.abs(evidence) > 0.5
    assert strong.any()
    redder = change[..., 0] > change[..., 2]
    np.testing.assert_array_equal(redder[strong], (evidence > 0)[strong])


def test_centre_of_a_larger_picture_is_what_is_shown(open_page, server, files):
    page = open_page(server)
    _choose(page, files / "1.png")
    playwright.expect(page.locator(".verdict")).to_be_visible()
    page.get_by_label("show").uncheck()
    rgb = np.asarray(Image.open(files / "1.png"))  # 48 x 80
    without = _pixels(page, ".crop")
    side = without.shape[0] // 16
    np.testing.assert_array_equal(without[side // 2 :: side, side // 2 :: side], rgb[16:32, 32:48])


def test_smaller_picture_is_shown_mirrored_outwards_as_the_model_sees_it(open_page, server, tmp_path):
    rgb = random_images(1, seed=5)[0][:5, :11]
    Image.fromarray(rgb).save(tmp_path / "small.png")
    page = open_page(server)
    _choose(page, tmp_path / "small.png")
    playwright.expect(page.get_by_text("mirrored outwards to fill it")).to_be_visible()
    page.get_by_label("show").uncheck()
    without = _pixels(page, ".crop")
    side = without.shape[0] // 16
    np.testing.assert_array_equal(without[side // 2 :: side, side // 2 :: side], pad_to(rgb, 16, 16))


def test_everything_can_be_done_from_the_keyboard(open_page, server, files):
    page = open_page(server)
    choosers = []
    # Before the key and not around it: the browser must know that its own window is not wanted.
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    playwright.expect(page.get_by_text("Model tiny")).to_be_visible()
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_label("Choose pictures")).to_be_focused()
    page.keyboard.press("Enter")
    while not choosers:
        page.wait_for_timeout(20)
    choosers[0].set_files(files / "0.png")
    playwright.expect(page.locator(".verdict")).to_be_visible()
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_label("Also check stability")).to_be_focused()
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_label("show")).to_be_focused()
    page.keyboard.press("Space")
    assert not page.get_by_label("show").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("listitem")).to_have_count(0)
    playwright.expect(page.get_by_label("Choose pictures")).to_be_focused()


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_picture_may_be_pasted_or_dropped(open_page, server, way):
    page = open_page(server)
    page.evaluate(
        """([way, bytes]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
            document.body.dispatchEvent(way === "paste"
                ? new ClipboardEvent("paste", { clipboardData: files, bubbles: true })
                : new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        [way, list(png(random_images(1)[0]))],
    )
    playwright.expect(_card(page, "given.png").locator(".verdict")).to_be_visible()


def test_stability_is_shown_where_it_was_asked_for(open_page, server, files):
    page = open_page(server)
    _choose(page, files / "0.png")
    playwright.expect(_card(page, "0.png").locator(".verdict")).to_be_visible()
    playwright.expect(_card(page, "0.png").get_by_role("table")).to_have_count(0)
    page.get_by_label("Also check stability").check()
    _choose(page, files / "1.png")
    names = [change.name for change in CHANGES]
    playwright.expect(_card(page, "1.png").get_by_role("rowheader")).to_have_text(names)
    playwright.expect(_card(page, "1.png").get_by_text(re.compile(r"table: .* within [\d.]+ points"))).to_be_visible()


def test_failure_is_told_in_words_and_the_next_picture_goes_on(open_page, server, files):
    page = open_page(server)
    _choose(page, files / "notes.txt", files / "0.png")
    playwright.expect(_card(page, "notes.txt").get_by_role("status")).to_have_text(
        re.compile("no picture of a kind that is known here")
    )
    playwright.expect(_card(page, "0.png").locator(".verdict")).to_be_visible()


def test_busy_server_is_asked_again(open_page, server, files):
    page = open_page(server)
    refusals = []

    def refuse_once(route):
        if refusals:
            route.continue_()
        else:
            refusals.append(route)
            route.fulfill(
                status=429, headers={"Retry-After": "1"}, json={"error": {"code": "too_busy", "message": "x"}}
            )

    page.route("**/v1/infer", refuse_once)
    _choose(page, files / "0.png")
    playwright.expect(page.get_by_text("The server is busy; trying again in 1 s")).to_be_visible()
    playwright.expect(page.locator(".verdict")).to_be_visible()


def test_answer_that_is_not_understood_costs_one_picture_alone(open_page, server, files):
    page = open_page(server)
    answers = [{"data": []}]
    page.route("**/v1/infer", lambda route: route.fulfill(json=answers.pop()) if answers else route.continue_())
    _choose(page, files / "0.png", files / "1.png")
    playwright.expect(_card(page, "0.png").get_by_role("status")).to_have_text(re.compile("is not understood"))
    playwright.expect(_card(page, "1.png").locator(".verdict")).to_be_visible()
    _choose(page, files / "0.png")
    playwright.expect(_card(page, "0.png").first.locator(".verdict")).to_be_visible()


# Notes every bitmap; one that is closed has no size any more.
_NOTE_BITMAPS = """() => {
    window.bitmaps = [];
    const real = window.createImageBitmap;
    window.createImageBitmap = async (...options) => {
        const bitmap = await real(...options);
        window.bitmaps.push(bitmap);
        return bitmap;
    };
}"""


def test_pictures_are_kept_as_thumbnails_alone_and_not_once_they_are_removed(open_page, server, tmp_path):
    page = open_page(server)
    page.evaluate(_NOTE_BITMAPS)
    Image.new("RGB", (2400, 1200), (90, 120, 30)).save(tmp_path / "large.png")
    _choose(page, tmp_path / "large.png")
    playwright.expect(page.get_by_role("img", name="large.png, 2400 by 1200 pixels")).to_be_visible()
    assert page.evaluate("bitmaps.map((b) => [b.width, b.height])") == [[0, 0], [960, 480], [16, 16]]
    page.get_by_role("button", name="Remove all").click()
    assert page.evaluate("bitmaps.map((b) => b.width)") == [0, 0, 0]


def test_model_without_natural_traces_shows_no_similarity(open_page, tmp_path, files):
    write_bundle(tmp_path / "tiny", mean_trace=(0.0,) * 128)
    with hosted(tmp_path / "tiny") as server:
        page = open_page(server)
        _choose(page, files / "0.png")
        playwright.expect(page.get_by_text("Fake probability", exact=True)).to_be_visible()
        assert "similarity" not in page.get_by_role("listitem").inner_text()


def test_server_that_is_gone_is_told_in_words(open_page, server, files):
    page = open_page(server)
    playwright.expect(page.get_by_text("Model tiny")).to_be_visible()
    page.route("**/v1/infer", lambda route: route.abort())
    _choose(page, files / "0.png")
    playwright.expect(_card(page, "0.png").get_by_role("status")).to_have_text(re.compile("does not answer"))


def test_token_is_asked_for_where_the_server_wants_one(open_page, bundle, files):
    with hosted(bundle, settings=ServeSettings(token=TOKEN)) as server:
        page = open_page(server)
        playwright.expect(page.get_by_label("This server asks for a token")).to_be_focused()
        page.keyboard.type("another-token-than-that")
        page.keyboard.press("Enter")
        playwright.expect(page.get_by_text("That is not the token of this server.")).to_be_visible()
        page.get_by_label("This server asks for a token").fill(TOKEN)
        page.keyboard.press("Enter")
        playwright.expect(page.get_by_text("Model tiny")).to_be_visible()
        _choose(page, files / "0.png")
        playwright.expect(page.locator(".verdict")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_its_text_stands_out(open_page, server, files, scheme):
    page = open_page(server, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    long_name = files / ("a-name-without-a-place-to-break-it" * 3 + ".png")
    shutil.copy(files / "0.png", long_name)
    _choose(page, long_name, files / "1.png", files / "notes.txt")
    playwright.expect(_card(page, "notes.txt").get_by_role("status")).to_have_text(re.compile("no picture"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("body", ".hint", ".verdict", ".failed .state", "dt", "figcaption", "footer a"):
        assert _contrast(page, selector) >= 4.5, selector


def _contrast(page, selector):
    """Contrast ratio of WCAG 2 between an element's text and what is behind it."""
    colours = page.locator(selector).first.evaluate(
        """(element) => {
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }"""
    )
    lights = sorted(_luminance([int(value) for value in re.findall(r"\d+", colour)[:3]]) for colour in colours)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(rgb):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_description_of_the_api_is_shown_without_any_other_server(open_page, server):
    page = open_page(server)
    page.get_by_role("link", name="API").click()
    playwright.expect(page.get_by_role("link", name="/v1/infer")).to_be_visible()
