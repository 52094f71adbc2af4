"""The page in a real browser: headless Chromium, with a real generator behind the server."""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from flux_lora.inputs import EXTENDED
from tests.service.local import LocalReplica, local_front, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key-of-sixteen-letters"

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(CHROMIUM is None and os.environ.get("CI") != "true", reason="chromium is not installed"),
]


expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox, which containers do not allow; it loads nothing but this server's page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """The page, of which nothing was asked yet; what went wrong in it, fails the test."""
    wrong: list[str] = []
    page = opened(context, address)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda asked: None if asked.url.startswith((address, "blob:", "data:")) else wrong.append(asked.url)
    )
    yield page
    assert wrong == []


def opened(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    page.locator("html[data-ready]").wait_for()
    return page


def fill(page: Page, prompt: str, *, number: int = 1, steps: int = 2, seed: str = "") -> None:
    """Fill the form, as by hand."""
    page.get_by_label("Prompt").fill(prompt)
    page.locator("#numbers").get_by_label(str(number)).check(force=True)
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Seed", exact=True).fill(seed)


def pictures(page: Page) -> list[str]:
    """All pictures that are shown, pixel by pixel, the newest draw first."""
    pixels = """async (images) => Promise.all(images.map(async (image) => {
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
        canvas.drawImage(image, 0, 0);
        const { data } = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight);
        const digest = await crypto.subtle.digest("SHA-256", data);
        return new Uint8Array(digest).join();
    }))"""
    found: list[str] = page.locator("#history img").evaluate_all(pixels)
    return found


def test_it_draws_and_shows_what_drew_it(page: Page, replica: LocalReplica) -> None:
    fill(page, "a tomato", number=2, steps=6, seed="7")
    page.get_by_label("3:2").check(force=True)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#state")).to_contain_text("of 2, step")
    expect(page.locator("#easel img").first).to_have_attribute("src", re.compile("^data:image/webp;base64,"))
    expect(page.locator("#history figure")).to_have_count(2)
    assert page.locator("#history .seed").all_inner_texts() == ["seed 7", "seed 8"]
    expect(page.locator("#history .facts")).to_contain_text("dev · 6 steps · 3:2")
    expect(page.locator("#current")).to_be_hidden()
    request = replica.drawn[-1].request
    assert (request.prompt, request.aspect_ratio, request.seeds, request.num_inference_steps) == (
        "a tomato", "3:2", (7, 8), 6
    )  # fmt: skip
    assert page.locator("#history img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
        1216,
        832,
    ]


def test_again_with_this_seed_is_the_same_picture(page: Page) -> None:
    fill(page, "a tomato", number=2, seed="7")
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator("#history figure")).to_have_count(2)
    second = page.locator("#history figure").nth(1)
    second.get_by_role("button", name="Again").click()
    expect(page.locator("#history li")).to_have_count(2)
    again, first, other = pictures(page)
    assert again == other != first
    assert page.locator("#seed").input_value() == "8"
    page.locator("#history figure").first.get_by_role("button", name="Vary").click()
    expect(page.locator("#history li")).to_have_count(3)
    assert pictures(page)[0] not in (first, other)


def test_it_cancels_by_escape_and_by_the_button(page: Page, address: str) -> None:
    for by_key in (True, False):
        fill(page, "a long one", number=4, steps=50)
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#state")).to_contain_text("step")
        if by_key:
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#current")).to_be_hidden()
        expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()
        newest = httpx.get(f"{address}/v1/predictions").json()["results"][0]
        assert newest["status"] == "canceled"
    expect(page.locator("#history li")).to_have_count(0)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_errors_are_in_plain_words(page: Page) -> None:
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(alert).to_contain_text("Say in the prompt what to draw.")
    expect(page.get_by_label("Prompt")).to_have_attribute("aria-invalid", "true")
    fill(page, "a tomato", seed="-3")
    page.get_by_label("Prompt").press("Enter")
    expect(alert).to_contain_text("The seed must be a whole number")
    fill(page, "a tomato", seed="7")
    page.get_by_label("LoRA", exact=True).fill("no-such.safetensors")
    page.get_by_label("Prompt").press("Enter")
    expect(alert).to_contain_text("no-such.safetensors")
    page.get_by_role("button", name="Close this message").click()
    expect(alert).to_be_hidden()


def test_the_queue_and_a_server_that_is_gone_are_told(context: BrowserContext, replica: LocalReplica) -> None:
    with serving(local_front([replica], limit=1)) as address:
        page = opened(context, address)
        body = {"input": {"prompt": "a long one", "num_inference_steps": 50, "num_outputs": 4}}
        first, second = (
            httpx.post(f"{address}/predictions", json=body, headers={"Prefer": "respond-async"}).json()["id"]
            for _ in range(2)
        )
        fill(page, "a tomato")
        page.get_by_label("Prompt").press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("Many are waiting already. Try again in")
        httpx.post(f"{address}/predictions/{second}/cancel")
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#state")).to_contain_text("Next in the queue")
        httpx.post(f"{address}/predictions/{first}/cancel")
        expect(page.locator("#history li")).to_have_count(1)
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")


def test_the_history_stays_until_it_is_cleared(page: Page, context: BrowserContext, address: str) -> None:
    fill(page, "a tomato", seed="7")
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator("#history li")).to_have_count(1)
    before = pictures(page)
    page.close()
    page = opened(context, address)
    assert pictures(page) == before
    assert page.locator("#prompt").input_value() == "a tomato"
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download").click()
    assert downloading.value.suggested_filename == "a-tomato-seed7.webp"
    page.get_by_role("button", name="Enlarge").click()
    expect(page.get_by_role("dialog")).to_contain_text("seed 7")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Clear the history").click()
    page.get_by_role("button", name="Clear", exact=True).click()
    expect(page.locator("#history li")).to_have_count(0)
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


def test_what_is_drawn_is_followed_when_the_page_is_loaded_again(page: Page) -> None:
    fill(page, "a tomato", number=2, steps=5, seed="7")
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator("#state")).to_contain_text("step")
    page.reload()
    expect(page.locator("#history figure")).to_have_count(2)


def test_it_asks_for_the_key_and_keeps_it(context: BrowserContext, replica: LocalReplica) -> None:
    with serving(local_front([replica]), keys=(KEY,)) as address:
        page = opened(context, address)
        asks = page.get_by_role("dialog")
        expect(asks).to_contain_text("This server asks for a key")
        page.locator("#key").fill("a wrong key")
        page.keyboard.press("Enter")
        expect(asks).to_contain_text("It does not know the key")
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        expect(asks).to_be_hidden()
        fill(page, "a tomato", seed="7")
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#history li")).to_have_count(1)
        page.reload()
        page.locator("html[data-ready]").wait_for()
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#history li")).to_have_count(2)
        expect(asks).to_be_hidden()


def test_it_fits_a_phone_in_light_and_dark(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    fill(page, "a " + "very" * 40 + " long word", number=2, seed="7")
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator("#history figure")).to_have_count(2)
    page.locator("#custom").evaluate("box => box.hidden = false")
    paper = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        paper.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper[0] != paper[1]


def test_it_works_by_keyboard_alone(page: Page) -> None:
    page.keyboard.type("a tomato")  # the prompt has the focus from the beginning
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.name")
        reached.append(name)
        if name == "num_inference_steps":
            page.keyboard.press("Home")
        elif name == "aspect_ratio":
            page.keyboard.press("ArrowRight")
        elif name == "draw":
            break
    assert {"aspect_ratio", "model", "num_outputs", "num_inference_steps", "seed", "dice", "draw"} <= set(reached)
    page.keyboard.press("Enter")
    expect(page.locator("#history .facts")).to_contain_text("dev · 1 step · 4:5")


def test_only_its_own_files_may_do_anything(address: str) -> None:
    for path in ("/", "/static/page.css", "/static/page.js"):
        answer = httpx.get(address + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "//" not in policy
    assert httpx.get(f"{address}/static/__init__.py").status_code == 404
    assert httpx.get(f"{address}/static/../__init__.py").status_code == 404


def test_a_picture_to_start_from_and_a_mask_are_drawn_within(
    context: BrowserContext, replica: LocalReplica, tmp_path: Path
) -> None:
    file = tmp_path / "start.png"
    Image.new("RGB", (320, 256), "white").save(file)
    with serving(local_front([replica], interface=EXTENDED)) as address:
        page = opened(context, address)
        fill(page, "a tomato", seed="7", steps=4)
        page.set_input_files("#image", file)
        page.get_by_role("button", name="Draw a mask").click()
        box = page.locator("#canvas").bounding_box()
        assert box
        page.mouse.move(box["x"] + 40, box["y"] + 128)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + 128, steps=4)
        page.mouse.up()
        page.get_by_role("button", name="Done").click()
        expect(page.get_by_role("button", name="Done")).to_be_hidden()  # and then gives the focus back
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#history .facts")).to_contain_text("from a picture, within a mask, 80 % change")
        request = replica.drawn[-1].request
        assert request.image == f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        mask = Image.open(io.BytesIO(base64.b64decode(str(request.mask).partition(",")[2]))).convert("L")
        assert mask.size == (320, 256)
        assert (mask.getpixel((80, 128)), mask.getpixel((250, 128))) == (255, 0)
        page.get_by_role("button", name="Without picture").click()
        page.get_by_role("button", name="Vary").click()
        expect(page.locator("#history li")).to_have_count(2)
        assert replica.drawn[-1].request.mask is None
        assert str(replica.drawn[-1].request.image).startswith("data:image/webp;base64,")
